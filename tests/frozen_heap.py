"""Whoever imports this excludes all modules before it from garbage collection, as the programs do.

A full collection takes half a second otherwise, and every world that ends runs one.
"""

from megatron_rpp.runtime.session import freeze_heap

freeze_heap()
