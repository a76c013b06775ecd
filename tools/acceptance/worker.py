"""Runs checks in this process and sends what they find, one JSON object a line, to the supervisor.

After a check that raises, the process ends: the exception may have left CUDA, Megatron or the memory
in a state that would let the next checks fail. The supervisor starts another one.
"""

from __future__ import annotations

import gc
import importlib
import json
import traceback
from dataclasses import asdict
from typing import IO

import torch

import megatron_rpp
from acceptance.catalog import CHECKS, Entry
from acceptance.scale import FULL, SMALL, Scale
from megatron_rpp.lifecycle.config_error import reason
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import gpu_facts, groups


def work(names: list[str], small: bool, channel: IO[str]) -> None:
    """Runs the checks `names` of the catalog.

    Args:
        small: reduced sizes; a CPU always gets them.
        channel: takes the lines.
    """

    def send(**message: object) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    scale = SMALL if small or devices.ON_CPU else FULL
    for entry in (entry for entry in CHECKS if entry.name in names):
        send(begin=entry.name)
        try:
            if not torch.distributed.is_initialized():
                groups.start(1, 1, seed=1)  # before anything else touches the GPU, as in a run
                send(about=_about(scale))
            for figure in _figures(entry, scale):
                send(figure=asdict(figure))
        except Exception as error:  # whatever a library raises is the result of the check
            send(error=reason(error), trace=traceback.format_exc())
            raise SystemExit(1) from error
        send(end=entry.name)
        _free()
    groups.stop()


def _figures(entry: Entry, scale: Scale):
    module, _, function = entry.place.partition(":")
    yield from getattr(importlib.import_module(f"acceptance.{module}"), function)(scale)


def _free() -> None:
    """Gives back what the models of a check have held."""
    gc.collect()
    torch.cuda.empty_cache()


def _about(scale: Scale) -> dict:
    return {
        "megatron_rpp": megatron_rpp.__version__,
        "machine": devices.describe(),
        "node": asdict(gpu_facts.node_facts()),
        "scale": asdict(scale),
    }
