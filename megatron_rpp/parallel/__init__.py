"""Process groups, the device, and the waits and exchanges between ranks.

Import this package before `megatron.core`: on a machine without CUDA it makes "cuda" mean the CPU.
Only this room, `model/` and `checkpoint/` know Megatron.
"""

from megatron_rpp.parallel import device as device  # first, for its effect
