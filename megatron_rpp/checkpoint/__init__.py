"""Checkpoints: what is in one, how it is written, which one of a directory is current."""
