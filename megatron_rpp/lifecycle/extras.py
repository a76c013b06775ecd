"""Optional packages: the extras of pyproject.toml, which most runs do not need."""

from __future__ import annotations

from importlib.util import find_spec

from megatron_rpp.lifecycle.config_error import ConfigError

EXTRAS = {
    "data": ("datasets", "pandas", "pyarrow"),
    "math": ("math_verify", "latex2sympy2_extended", "antlr4", "sympy"),
    "plot": ("matplotlib",),
    "tasks": ("reasoning_gym",),
}
"""The modules that each extra installs and the code imports."""


def require_extra(extra: str, what: str) -> None:
    """Raises ConfigError if a package of `extra` is missing. Nothing is imported, so this is quick.

    Args:
        what: what needs the packages, as the message names it.
    """
    for module in EXTRAS[extra]:
        if find_spec(module) is None:
            raise ConfigError(
                f"{what} needs the package {module}, which is not installed: install it with "
                f"pip install -e '.[{extra}]' in the repository"
            )
