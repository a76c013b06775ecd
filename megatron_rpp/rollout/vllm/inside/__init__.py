"""What vLLM's processes import: this folder is on their PYTHONPATH, the package is not."""
