"""The protocol between control plane and agent, and between agent and guest daemon: bytes in, events out."""
