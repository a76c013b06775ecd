"""Process lifecycle: exit codes, errors, heartbeat, watchdog, atomic files.

Nothing here imports another package of megatron_rpp.
"""
