"""What a user sees of a run: console, metrics, FLOPs."""
