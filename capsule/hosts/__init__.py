"""Hosts of the fleet: their certificates and tokens, how they join, and the links to their agents."""
