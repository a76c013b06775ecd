"""What the user sees of a run: console, metrics, FLOPs."""
