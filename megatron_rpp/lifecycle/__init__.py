"""How a process lives and ends: exit codes, errors, heartbeat, watchdog, atomic files.

This is the ground floor: nothing here imports another room of the package.
"""
