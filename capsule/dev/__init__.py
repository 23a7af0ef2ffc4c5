"""`capsule dev`: everything on one machine."""
