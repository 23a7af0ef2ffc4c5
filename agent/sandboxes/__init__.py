"""The sandboxes of this host: one actor each, the manager that owns them, and the directory they are rebuilt from."""
