"""The HTTP API: parse, call a use-case, render. No SQL, no decisions."""
