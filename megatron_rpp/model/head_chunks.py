"""How many fp32 logits exist at once: one chunk of model/logprobs.py. Imports no torch, because the
memory estimate needs it before torch is loaded."""

ON_CPU = 2**21
"""8 MB, to fit the caches of a CPU."""
ON_GPU = 2**26
"""256 MB: a GPU needs many rows to be busy."""
