"""Per-sandbox networks: slots (namespace, veth pair, tap, NAT), the pool that prepares them, the host's side."""
