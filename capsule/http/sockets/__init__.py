"""WebSockets: consoles, terminals, processes and watches, each a handler over `stream_ports.StreamService`."""
