"""Finds a reward function by name: built in, in a Python file, or in an importable module."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_rpp.rewards.rules import exact_match, reasoning_gym

RewardFunction = Callable[
    [list[str], list[str], list[str | None], list[dict[str, Any]]], Sequence[float]
]
"""f(prompts, responses, labels, metadata) -> one score per response."""

_BUILT_IN: dict[str, RewardFunction] = {"exact_match": exact_match, "reasoning_gym": reasoning_gym}


def load_reward(name: str) -> RewardFunction:
    """The function of a built-in name, "path/to/file.py:function" or "package.module:function".

    Raises:
        ValueError: there is no such name, file, module or function, it cannot be called, or its
            import raised (the message holds the original error).
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    source, colon, attribute = name.rpartition(":")
    if not (source and colon and attribute):
        raise ValueError(
            f"unknown reward function {name!r}: use one of {sorted(_BUILT_IN)}, "
            "'path/to/file.py:function' or 'package.module:function'"
        )
    module = _load_file(Path(source), name) if source.endswith(".py") else _import(source, name)
    if not hasattr(module, attribute):
        functions = sorted(key for key, value in vars(module).items() if callable(value))
        raise ValueError(
            f"reward function {name!r}: {source} has no {attribute!r}, only {functions}"
        )
    function = getattr(module, attribute)
    if not callable(function):
        raise ValueError(
            f"reward function {name!r}: {attribute} is a {type(function).__name__}, not a function"
        )
    return function


def _load_file(path: Path, name: str) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"reward function {name!r}: there is no file {path.absolute()}")
    path = path.resolve()
    # Loaded once per process, under a name of its own: two files may both be called reward.py.
    module_name = f"reward_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # before execution: dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise _import_error(name, error) from error
    return module


def _import(module: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise _import_error(name, error) from error


def _import_error(name: str, error: Exception) -> ValueError:
    return ValueError(
        f"reward function {name!r} cannot be imported ({type(error).__name__}: {error}): a module "
        "must be on PYTHONPATH, a file must end in .py"
    )
