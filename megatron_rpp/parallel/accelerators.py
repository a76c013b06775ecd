"""Optional packages that make a GPU faster: TransformerEngine, NVIDIA Apex, flash-attn.

device.py imports this module before Megatron, because Megatron hides a TransformerEngine that does
not import, or does not import itself. So TransformerEngine is tried here first. If it is broken, its
error is kept for the user, and Megatron finds none.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from dataclasses import dataclass
from functools import cache
from typing import Literal

from megatron_rpp.lifecycle.config_error import ConfigError, reason

Setting = Literal["auto", "transformer_engine", "local"]
"""model.transformer_impl"""
GO_WITHOUT = "repair it, or set model.transformer_impl to local to go without"


@dataclass(frozen=True)
class Package:
    """An optional package as this process finds it."""

    version: str | None = None
    """None = it is not installed."""
    error: str | None = None
    """What its import raised."""

    @property
    def usable(self) -> bool:
        return self.version is not None and self.error is None

    def __str__(self) -> str:
        if self.version is None:
            return "absent"
        return f"{self.version}, broken" if self.error else self.version


@cache
def find(module: str, distribution: str | None = None) -> Package:
    """Imports `module` if it is installed.

    Args:
        distribution: the name under which it is installed; None = that of the module.
    """
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return Package()
    try:
        version = importlib.metadata.version(distribution or module)
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    try:
        importlib.import_module(module)
    except Exception as error:  # a missing library raises whatever the package makes of it
        return Package(version, reason(error))
    return Package(version)


def _find_transformer_engine() -> Package:
    package = find("transformer_engine.pytorch", "transformer_engine")
    if package.error is not None:
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # Python's own mark
    return package


TRANSFORMER_ENGINE = _find_transformer_engine()


def weight_gradient_kernel() -> Package:
    """Apex's kernel that adds weight gradients to Megatron's buffers.

    Megatron asks for this module. The registry's package `apex` does not have it, and Apex may be
    built without it.
    """
    return find("fused_weight_gradient_mlp_cuda", "apex")


def check_transformer_impl(setting: Setting, engine: Package, on_gpu: bool) -> None:
    """Raises ConfigError if `engine` is broken, or asked for and not there."""
    if engine.error is not None and on_gpu and setting != "local":
        raise ConfigError(
            f"TransformerEngine {engine.version} is installed but does not import "
            f"({engine.error}): {GO_WITHOUT}"
        )
    if setting == "transformer_engine" and not (engine.usable and on_gpu):
        lacking = "it is not installed" if on_gpu else "there is no GPU"
        raise ConfigError(
            f"model.transformer_impl is transformer_engine, but {lacking}: "
            f"{'bash launch/install.sh --gpu installs it' if on_gpu else 'leave it at auto'}"
        )


def check_dtype(dtype: str, gpu: str, has_bf16: bool) -> None:
    """Raises ConfigError if model.dtype is bf16 and the GPU, of this name, computes none."""
    if dtype == "bf16" and not has_bf16:
        raise ConfigError(
            f"model.dtype is bf16, but {gpu} has no bf16 (GPUs from A100 on have it): set "
            f"model.dtype to fp32, or use another GPU"
        )
