"""What a run is and what surrounds its steps: inputs, models, resuming, saving, stopping."""
