"""The parts of tools/reproduce.py: the comparisons of docs/reproduction.md."""
