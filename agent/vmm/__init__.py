"""Virtual machine monitors: one driver interface, QEMU behind it, and a fake for tests."""
