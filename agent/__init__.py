"""Everything that runs on one host."""
