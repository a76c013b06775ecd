"""How a process lives and ends: exit codes, mistakes, heartbeats, the watchdog, atomic files.

The ground floor: nothing here imports another room of the package.
"""
