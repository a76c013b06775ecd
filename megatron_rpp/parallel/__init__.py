"""Process groups, the device, and the pipeline: with `model/` the only rooms that know Megatron.

Importing this package comes before any import of `megatron.core`: it makes "cuda" mean the CPU on
a machine that has no CUDA.
"""

from megatron_rpp.parallel import device as device  # noqa: F401  (first, for its effect)
