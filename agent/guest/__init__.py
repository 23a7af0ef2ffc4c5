"""The guest: its daemon in C (`daemon/`), how it is built, and the host's side of talking to it."""
