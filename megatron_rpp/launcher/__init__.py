"""The launcher behind `python -m megatron_rpp.torchrun`: torch's, for runs that end on purpose."""
