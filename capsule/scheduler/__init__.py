"""Where a sandbox goes: the pure choice, and the reservations that keep a burst from over-filling a host."""
