"""Settings of the libraries under which a GPU gives the same bits in every run (train.deterministic).

PyTorch's flag chooses deterministic kernels, those of its attention too, and an operation that has none
raises. cuBLAS, NCCL and TransformerEngine read the environment instead: there is no other way to tell
them. They read it when CUDA starts, when a group is made and when a layer is built, so `set_up` comes
before all of these.

Left out: NCCL's protocol. It follows from the size of a message and the links, and so it is the same
in every run on the same machines.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch

from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.parallel.accelerators import Package

VARIABLES = {
    # Otherwise the streams of a process share buffers, in an order that varies.
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    # Otherwise NCCL may sum in the network switches, or change its algorithm with its tuning.
    "NCCL_ALGO": ("Ring", "Tree"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
}
"""What the libraries must find, the first value unless the user has chosen another of them."""


def set_up(deterministic: bool) -> None:
    """Turns PyTorch's deterministic kernels on or off, on any device."""
    torch.use_deterministic_algorithms(deterministic)
    # Nothing here reads such memory. (The attribute is a property of the module.)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def set_variables(environment: MutableMapping[str, str]) -> None:
    """Sets VARIABLES in `environment`, for the libraries of CUDA.

    Raises ConfigError if one of them has a value that is not deterministic.
    """
    for name, values in VARIABLES.items():
        found = environment.setdefault(name, values[0])
        if found not in values:
            raise ConfigError(
                f"train.deterministic needs {name}={' or '.join(values)}, but the environment has "
                f"{name}={found}: unset it, or turn train.deterministic off"
            )


def check_attention(dtype: str, *, fused: bool, flash_attention: Package) -> None:
    """Raises ConfigError if TransformerEngine has no deterministic attention for packed rows.

    Args:
        dtype: model.dtype; TransformerEngine's attention is for bf16 only.
        fused: whether the layers are TransformerEngine's.
    """
    if fused and dtype == "bf16" and not flash_attention.usable:
        raise ConfigError(
            f"train.deterministic with TransformerEngine in bf16 needs flash-attn, which is "
            f"{flash_attention}: cuDNN has no deterministic attention for all packed rows. Install "
            f"it (pip install --no-build-isolation flash-attn), or set model.transformer_impl to "
            f"local"
        )
