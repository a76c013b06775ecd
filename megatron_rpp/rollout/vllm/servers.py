"""The vLLM servers that a rank starts, watches and ends: command line, environment, process, log."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rpp.config import Config
from megatron_rpp.rollout.vllm.api import Server

INSIDE = Path(__file__).parent / "inside"
_SUPERVISOR = Path(__file__).parent / "supervisor.py"
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_LOG_TAIL, _LOG_ERRORS = 10, 4
"""Lines of a server's log that messages show: the last ones, and errors before them."""
_LONGEST_PATH = 100
"""Bytes of a socket's path; Linux allows 107."""
_LOG_BYTES = 2**16
"""How much of a log's end is looked at."""
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK",
    "ROLE_NAME", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # fmt: skip
"""They would lead vLLM's ranks into the trainer's world."""
_OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_PRELOAD", "OMP_NUM_THREADS",
    "PYTHONDONTWRITEBYTECODE")  # fmt: skip
"""Variables that belong to the trainer's environment."""


@dataclass(frozen=True)
class Site:
    """What all servers of a run have in common on this host."""

    config: Config
    model: Path
    """Directory with the config.json of the model."""
    weights: Path
    """Directory of this run's weights with transport shared."""
    on_cpu: bool
    servers: int
    """Servers on this host."""


def command(config: Config, model: Path, *, listens: dict[str, Any], on_cpu: bool) -> list[str]:
    """The command line of a server. Its weights are random until the first push.

    listens: the options for its address, host and port or uds.
    """
    vllm = config.rollout.vllm
    # `vllm serve` asks for the metadata of a package "vllm", which CPU builds do not have.
    words = [str(vllm.python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    options = {
        "served-model-name": "policy",
        **listens,
        "dtype": DTYPES[config.model.dtype],
        "load-format": "dummy",
        "max-model-len": config.model.max_length,
        "max-num-seqs": config.rollout.max_batch,
        "tensor-parallel-size": vllm.tensor,
        "generation-config": "vllm",
        "weight-transfer-config": json.dumps({"backend": f"rpp_{vllm.transport}"}),
        "worker-extension-cls": "rpp_vllm.Extension",
        # Without it workers are killed at the end, and leave segments in /dev/shm.
        "shutdown-timeout": 5,
    }
    switches = ["skip-tokenizer-init", "enable-scale-out", "disable-uvicorn-access-log"]
    if on_cpu:
        # vLLM cannot yet continue a seeded request in chunks on a CPU.
        switches += ["enforce-eager", "no-enable-chunked-prefill"]
        options["max-num-batched-tokens"] = max(
            config.model.max_length, config.rollout.max_batch, 4096
        )
    else:
        options["gpu-memory-utilization"] = vllm.memory_share
        switches += ["enable-sleep-mode"] * (vllm.transport == "ipc")
    words += [f"--{name}={value}" for name, value in options.items()]
    return [*words, *(f"--{name}" for name in switches), *vllm.arguments]


def base_environment(given: Mapping[str, str]) -> dict[str, str]:
    """The variables of any process of vLLM's Python."""
    kept = {
        name: value
        for name, value in given.items()
        if name not in _TORCHRUN + _OURS and not name.startswith("TORCHELASTIC")
    }
    return kept | {
        "PYTHONPATH": str(INSIDE),
        "PYTHONSAFEPATH": "1",  # no module of the working directory hides one of vLLM
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def environment(
    given: Mapping[str, str], config: Config, *, on_cpu: bool, threads: int, gpus: str | None
) -> dict[str, str]:
    """The variables of a server. gpus: the value of CUDA_VISIBLE_DEVICES; None = as it is."""
    kept = base_environment(given) | {
        "VLLM_SERVER_DEV_MODE": "1",  # pause, weight updates, sleep
        "VLLM_HOST_IP": "127.0.0.1",  # of a server's workers, which are all on this host
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # rpp_vllm.py changes the sampler of the first
    }
    if config.rollout.vllm.transport == "ipc":
        # Handles, which only who may open the server's socket can send.
        kept["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    if on_cpu:
        kept |= {
            "VLLM_CPU_KVCACHE_SPACE": str(math.ceil(cache_bytes(config) / 2**30)),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else vLLM leaves one core idle
            "OMP_NUM_THREADS": str(threads),
        }
    if gpus is not None:
        kept["CUDA_VISIBLE_DEVICES"] = gpus
    return kept


_BLOCK = 128
"""Tokens of a block of vLLM's key-value cache on a CPU."""


def cache_bytes(config: Config) -> int:
    """Bytes of the key-value cache of rollout.max_batch sequences, on one worker of a server."""
    model = config.model
    tokens = math.ceil(model.max_length / _BLOCK) * _BLOCK * config.rollout.max_batch
    kv_heads = max(1, (model.kv_heads or model.heads) // config.rollout.vllm.tensor)
    size = model.head_dim or model.hidden // model.heads
    return tokens * model.layers * 2 * kv_heads * size * (2 if model.dtype == "bf16" else 4)


def socket_folder() -> str:
    """A new directory for a server's socket, which only this user may enter.

    So no other user can send it weights, or answer in its place.
    """
    folder = tempfile.mkdtemp(prefix="rpp-vllm-")
    if len(os.fsencode(folder)) > _LONGEST_PATH - len("/socket"):
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix="rpp-vllm-", dir="/tmp")
    return folder


class Child:
    """A server as a child process of this rank, under a supervisor."""

    def __init__(self, site: Site, *, name: str, gpus: str | None, log: Path):
        """Starts it. gpus: the value of CUDA_VISIBLE_DEVICES; None = as it is here."""
        self.log = log
        folder = socket_folder()
        path = f"{folder}/socket"
        words = command(site.config, site.model, listens={"uds": path}, on_cpu=site.on_cpu)
        threads = max(1, len(os.sched_getaffinity(0)) // site.servers)
        threads = max(1, threads // site.config.rollout.vllm.tensor)
        supervisor = [
            sys.executable, str(_SUPERVISOR), str(os.getpid()), str(site.weights), folder,
        ]  # fmt: skip
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            self._log_start = output.tell()
            self._process = subprocess.Popen(
                [*supervisor, *words],
                env=environment(
                    os.environ, site.config, on_cpu=site.on_cpu, threads=threads, gpus=gpus
                ),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.server = Server(path, name)
        self._end = weakref.finalize(self, _end, self._process, folder)

    @property
    def alive(self) -> bool:
        """vLLM ends with code 0 if its engine dies, so any end is a death."""
        return self._process.poll() is None

    def end(self) -> None:
        self._end()

    def tail(self) -> str:
        """The last errors and lines in the log since this start, and where it is."""
        with open(self.log, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_start, end - _LOG_BYTES))
            lines = file.read(_LOG_BYTES).decode(errors="replace").splitlines()
        errors = [line for line in lines[:-_LOG_TAIL] if re.search(r"\w+Error: ", line)]
        shown = [*dict.fromkeys(errors[-_LOG_ERRORS:]), "...", *lines[-_LOG_TAIL:]]
        return "\n".join([f"the end of {self.log}:", *shown])


def _end(process: subprocess.Popen, folder: str) -> None:
    process.terminate()
    process.wait()
    shutil.rmtree(folder, ignore_errors=True)  # if the supervisor was killed
