"""`capsule-agent doctor`: what this machine has for running sandboxes, what is missing, and what fixes it."""
