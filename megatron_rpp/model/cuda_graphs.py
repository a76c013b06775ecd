"""CUDA graphs of one token of generation: many kernels for the cost of one launch.

A graph repeats the same kernels on the same addresses, so there is one for each shape. The first
token of a shape runs as usual and is then recorded. If recording fails, all tokens run as usual,
which the log says once.

On a CPU there are no graphs, and the same function is called.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch

from megatron_rpp.model.kv_cache import Places
from megatron_rpp.parallel import device as devices

Function = Callable[[torch.Tensor, Places], torch.Tensor]


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    given: torch.Tensor
    places: Places
    result: torch.Tensor


class Graphs:
    """The graphs of one batch; they end with it, because its cache does."""

    def __init__(self) -> None:
        self._recorded: dict[Hashable, _Recorded] = {}
        self._enabled = devices.has_cuda_graphs()

    def run(
        self, key: Hashable, function: Function, *, given: torch.Tensor, places: Places
    ) -> torch.Tensor:
        """Returns function(given, places); valid until the next call with the same key.

        Args:
            key: stands for the function and all shapes.
            places: of one token per sequence.
        """
        if not self._enabled:
            return function(given, places)
        recorded = self._recorded.get(key)
        if recorded is None:
            result = function(given.clone(), places)
            self._record(key, function, given=given, places=places)
            return result
        recorded.given.copy_(given)
        recorded.places.table.copy_(places.table)
        recorded.places.positions.copy_(places.positions)
        recorded.graph.replay()
        return recorded.result

    def _record(
        self, key: Hashable, function: Function, *, given: torch.Tensor, places: Places
    ) -> None:
        given = given.clone()
        places = replace(places, table=places.table.clone(), positions=places.positions.clone())
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                result = function(given, places)
        except RuntimeError as error:
            self._enabled = False
            reason = str(error).splitlines()[0]
            logging.getLogger(__name__).warning("generation without CUDA graphs: %s", reason)
            return
        self._recorded[key] = _Recorded(graph, given, places, result)
