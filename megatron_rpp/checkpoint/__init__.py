"""Checkpoints: what they hold, how they are written, and which one of a directory is current."""
