"""Sees every operation: refuses mixed places as CUDA does, and lists where the host waits."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_rpp.parallel import device as _device  # noqa: F401  (before megatron)
from tests.pretend_cuda import rules
from tests.pretend_cuda.places import Place, on_cuda, put

import megatron.core

_ROOT = Path(__file__).parents[2]
_ASKING = tuple(
    str(folder)
    for folder in (
        *(_ROOT / name for name in ("megatron_rpp", "tests", "tools")),
        Path(megatron.core.__file__).parent,
    )
)
_OF_THE_CHECK = (
    str(_ROOT / "megatron_rpp/parallel/cuda_on_cpu.py"),
    *(str(Path(__file__).parent / f"{name}.py") for name in ("device", "rules", "watch")),
)


class Site(NamedTuple):
    """A line of code, and the function that it is in."""

    file: str
    line: int
    function: str

    @classmethod
    def of_caller(cls) -> Site:
        """The innermost line of this project or of Megatron that is not of the check."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and not _asks(frame.f_code.co_filename):
            frame = frame.f_back
        assert frame is not None
        code = frame.f_code
        name = code.co_filename.split("site-packages/")[-1].removeprefix(f"{_ROOT}/")
        return cls(name, frame.f_lineno, code.co_qualname.replace(".<locals>", ""))


def _asks(file: str) -> bool:
    return file.startswith(_ASKING) and file not in _OF_THE_CHECK


class Sync(NamedTuple):
    """A place where the host waits for the GPU."""

    phase: str
    kind: str
    site: Site


class MixedPlaces(RuntimeError):
    """Operands are in different places; torch raises a RuntimeError on a real GPU too."""


class Watch(TorchDispatchMode):
    """Tags results with their place, raises MixedPlaces, and counts host synchronisations.

    Dispatch modes belong to a thread: what other threads compute is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "start"
        self.phases = {self.phase}
        self.mixes: list[str] = []
        """Also those whose error was caught on its way."""
        self.syncs: Counter[Sync] = Counter()
        self._muted = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._muted:
            problem = rules.mix(func, args, kwargs)
            if problem is not None:
                self.refuse(problem)
            kind = rules.wait(func, args, kwargs)
            if kind is not None:
                self.note(kind)
        result = _compute(func, args, kwargs)
        operands = [*rules.tensors_in(args), *rules.tensors_in(list(kwargs.values()))]
        if func.overloadpacket is not rules.aten.copy_ and any(map(on_cuda, operands)):
            for made in rules.tensors_in(result):
                put(made, Place.CUDA)
        return result

    def enter(self, phase: str) -> None:
        """Begins a phase, by which synchronisations are listed."""
        self.phase = phase
        self.phases.add(phase)

    def refuse(self, problem: str) -> None:
        site = Site.of_caller()
        text = f"{site.file}:{site.line} in {site.function}, {self.phase}: {problem}"
        self.mixes.append(text)
        raise MixedPlaces(text)

    def note(self, kind: str) -> None:
        """Counts a host synchronisation at the caller's line."""
        if not self._muted:
            self.syncs[Sync(self.phase, kind, Site.of_caller())] += 1

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Neither refuses nor counts what happens inside."""
        self._muted += 1
        try:
            yield
        finally:
            self._muted -= 1

    def report(self) -> str:
        """One line per synchronisation: how often, how, where, in which phase."""
        return "\n".join(
            f"{count:6}  {sync.kind:24} {sync.site.file}:{sync.site.line} "
            f"{sync.site.function} ({sync.phase})"
            for sync, count in sorted(self.syncs.items(), key=lambda item: (-item[1], item[0]))
        )


def _compute(func: Any, args: tuple, kwargs: dict) -> Any:
    if func is rules.aten.mm.dtype:  # sums of bf16 products in fp32: a kernel that only CUDA has
        return torch.mm(args[0].to(args[2]), args[1].to(args[2]))
    return func(*args, **kwargs)
