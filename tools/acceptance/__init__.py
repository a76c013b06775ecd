"""What tools/gpu_acceptance.py checks, one function per check (catalog.py lists them)."""
