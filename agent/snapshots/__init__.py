"""Snapshots on disk: what a paused sandbox, a template and a golden snapshot consist of."""
