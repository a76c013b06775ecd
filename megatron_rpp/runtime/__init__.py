"""A run and everything around its steps: inputs, models, saving, resuming, stopping."""
