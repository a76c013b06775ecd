"""CUDA graphs of one token of generation: many kernels for the cost of one launch.

A graph repeats the same kernels on the same addresses, so there is one for each shape. It is recorded
when a shape comes for the second time. If recording fails, this process goes on without graphs, which
the log says.

On a CPU there are no graphs, and the same function is called.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch

from megatron_rpp.lifecycle.config_error import first_line
from megatron_rpp.model.attention_metadata import AttentionMetadata
from megatron_rpp.parallel import device as devices

Function = Callable[[torch.Tensor, AttentionMetadata], torch.Tensor]


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    given: torch.Tensor
    metadata: AttentionMetadata
    result: torch.Tensor


class Graphs:
    """The graphs of an engine. All take their memory from one pool."""

    def __init__(self) -> None:
        self._seen: set[Hashable] = set()
        self._recorded: dict[Hashable, _Recorded] = {}
        self._enabled = devices.has_cuda_graphs()
        self._pool = torch.cuda.graph_pool_handle() if self._enabled else None

    def clear(self) -> None:
        """Forgets all graphs, because the memory that they use is freed."""
        self._seen.clear()
        self._recorded.clear()

    def run(
        self, key: Hashable, function: Function, *, given: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        """Returns function(given, metadata); valid until the next call with the same key.

        Args:
            key: stands for the function and all shapes.
            metadata: of one token per sequence.
        """
        if self._enabled and key in self._seen and key not in self._recorded:
            self._record(key, function, given=given, metadata=metadata)
        self._seen.add(key)
        recorded = self._recorded.get(key)
        if recorded is None:
            return function(given, metadata)
        recorded.given.copy_(given)
        recorded.metadata.table.copy_(metadata.table)
        recorded.metadata.positions.copy_(metadata.positions)
        recorded.graph.replay()
        return recorded.result

    def _record(
        self, key: Hashable, function: Function, *, given: torch.Tensor, metadata: AttentionMetadata
    ) -> None:
        given = given.clone()
        table, positions = metadata.table.clone(), metadata.positions.clone()
        metadata = replace(metadata, table=table, positions=positions)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"):
                result = function(given, metadata)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # after an error, the context may not do so
            torch.cuda.synchronize()
            self._enabled = False
            self._recorded.clear()
            reason = first_line(error)
            logging.getLogger(__name__).warning("generation without CUDA graphs: %s", reason)
            return
        self._recorded[key] = _Recorded(graph, given, metadata, result)
