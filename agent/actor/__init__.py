"""What every daemon of ours is built from: actors, the peer that drives the wire, settings, logs, the loop watchdog."""
