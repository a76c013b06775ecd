"""megatron_rpp: REINFORCE++ (arXiv 2501.03262) on Megatron-Core, from a laptop to a cluster."""

__version__ = "0.2.0"
