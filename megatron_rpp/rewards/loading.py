"""Finds a reward function by name: built in, in a Python file, in a module, or behind a URL."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.lifecycle.extras import require_extra
from megatron_rpp.rewards.builtin import (
    Length,
    MathVerify,
    Regex,
    exact_match,
    reasoning_gym,
    require_entry,
    require_golds,
    require_labels,
)
from megatron_rpp.rewards.http import HttpReward
from megatron_rpp.rewards.validation import SampleError

RewardFunction = Callable[
    [list[str], list[str], list[str | None], list[dict[str, Any]]], Sequence[float]
]
"""f(prompts, responses, labels, metadata) -> one score per response."""

_PLAIN: dict[str, RewardFunction] = {"exact_match": exact_match, "reasoning_gym": reasoning_gym}
_WITH_OPTIONS = {"length": Length, "math_verify": MathVerify, "regex": Regex}
_EXTRAS = {"math_verify": "math", "reasoning_gym": "tasks"}
"""Built-in functions that need an extra of the package."""
_TRUSTED = {"exact_match", "length"}
"""Built-in functions that run in the training process, because they always end. reasoning_gym is
not among them: a few of its scorers evaluate the response as an expression."""

_ROW_CHECKS: dict[str, Callable[[Any, str | None, dict[str, Any]], object]] = {
    "exact_match": lambda function, label, metadata: require_labels([label]),
    "math_verify": lambda function, label, metadata: require_golds([label]),
    "reasoning_gym": lambda function, label, metadata: require_entry(0, metadata),
    "regex": lambda function, label, metadata: function.equals_label and require_labels([label]),
}
"""Checks of a row for built-in functions. Each raises SampleError."""


def row_problem(
    name: str, function: RewardFunction, *, label: str | None, metadata: dict[str, Any]
) -> str | None:
    """Why the function could never score this row; None if it can, or if only running it would
    tell."""
    try:
        if name in _ROW_CHECKS:
            _ROW_CHECKS[name](function, label, metadata)
    except SampleError as error:
        return f"reward function {name!r} {error}"
    return None


def is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def needs_worker(name: str) -> bool:
    """Whether a function may hang or crash, so that it belongs in a worker process."""
    return name not in _TRUSTED and not is_url(name)


def load_reward(name: str, options: dict[str, Any] | None = None) -> RewardFunction:
    """The function of a built-in name, a URL, "path/to/file.py:function" or "package.module:name".

    Args:
        options: for a URL, or a built-in function that has options.

    Raises:
        ConfigError: there is no such name, file, module or function; it cannot be called; its
            import raised (the message holds the original error); it has no such options; or it
            needs a package that is not installed.
    """
    options = options or {}
    if is_url(name):
        return _with_options(HttpReward, name, options, url=name)
    if name in _EXTRAS:
        require_extra(_EXTRAS[name], f"reward function {name!r}")
    if name in _WITH_OPTIONS:
        return _with_options(_WITH_OPTIONS[name], name, options)
    if options:
        raise ConfigError(
            f"reward function {name!r} takes no reward.options, got {sorted(options)}"
        )
    if name in _PLAIN:
        return _PLAIN[name]
    source, colon, attribute = name.rpartition(":")
    if not (source and colon and attribute):
        raise ConfigError(
            f"unknown reward function {name!r}: use one of {sorted([*_PLAIN, *_WITH_OPTIONS])}, "
            "'path/to/file.py:function', 'package.module:function', 'http://...' or 'model:DIR'"
        )
    module = _load_file(Path(source), name) if source.endswith(".py") else _import(source, name)
    if not hasattr(module, attribute):
        functions = sorted(key for key, value in vars(module).items() if callable(value))
        raise ConfigError(
            f"reward function {name!r}: {source} has no {attribute!r}, only {functions}"
        )
    function = getattr(module, attribute)
    if not callable(function):
        raise ConfigError(
            f"reward function {name!r}: {attribute} is a {type(function).__name__}, not a function"
        )
    return function


def _with_options(kind: type, name: str, options: dict[str, Any], **given: Any) -> RewardFunction:
    known = {field.name: field for field in fields(kind) if field.name not in given}
    needed = {key for key, field in known.items() if field.default is MISSING}
    if options.keys() - known.keys() or needed - options.keys():
        raise ConfigError(
            f"reward.options of {name!r} must be among {sorted(known)} and hold {sorted(needed)}, "
            f"got {sorted(options)}"
        )
    try:
        return kind(**given, **options)
    except TypeError as error:
        raise ConfigError(f"reward.options of {name!r}: {error}") from error


def _load_file(path: Path, name: str) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"reward function {name!r}: there is no file {path.absolute()}")
    path = path.resolve()
    # Loaded once per process, under a unique name: two files may both be called reward.py.
    module_name = f"reward_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # before execution: dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise _import_error(name, error) from error
    return module


def _import(module: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise _import_error(name, error) from error


def _import_error(name: str, error: BaseException) -> ConfigError:
    return ConfigError(
        f"reward function {name!r} cannot be imported ({type(error).__name__}: {error}): a module "
        "must be on PYTHONPATH, a file must end in .py"
    )
