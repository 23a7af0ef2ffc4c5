"""Disks of sandboxes: writable overlays over shared, read-only base images."""
