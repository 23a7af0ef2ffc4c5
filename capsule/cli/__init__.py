"""The command line for sandboxes: `capsule sandbox`, `exec`, `cp`, `logs`, `login`."""
