"""The section about vLLM servers that sample the responses (rollout.engine vllm)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from megatron_rpp.config.validation import check_choices, check_divides, check_filled, check_range
from megatron_rpp.lifecycle.config_error import ConfigError

if TYPE_CHECKING:
    from megatron_rpp.config import Config


@dataclass(frozen=True, kw_only=True)
class VllmConfig:
    """vLLM servers, which rollout.engine vllm uses."""

    python: str | None = None
    """Python of the environment in which vLLM is installed, on every node. The run starts its servers
    with it, watches them and ends them."""
    urls: list[str] = field(default_factory=list)
    """Addresses of servers that tools/vllm_server.py has started, such as http://node1:8000; they are
    used instead of servers of the run."""
    replicas: int | None = None
    """Servers of the run, on all nodes together; null = one for each data-parallel replica."""
    tensor: int = 1
    """Tensor-parallel size of each server."""
    transport: Literal["shared", "nccl", "ipc"] = "shared"
    """How new weights come to the servers. shared = files in dir; nccl = a broadcast to servers on
    other GPUs of the same nodes; ipc = through the memory of the same GPUs, while the server sleeps
    during training."""
    dir: str = "/dev/shm"
    """Directory of the weights with transport shared, which ranks and servers see; the memory of the
    host by default, which serves a single node."""
    memory_share: float = 0.5
    """Share of a GPU's memory that a server takes; a CPU's server takes what rollout.max_batch
    sequences need."""
    arguments: list[str] = field(default_factory=list)
    """Further arguments of each server, as its command line has them."""
    start_timeout: float = 900.0
    """Time limit in seconds for a server to start, for one push of weights, and for servers to go to
    sleep."""
    timeout: float = 120.0
    """Time limit in seconds for a response, besides the time for its tokens."""
    seconds_per_token: float = 0.5
    """Time limit in seconds for each token of the longest response; the limit of a response also
    grows with those that wait before it."""
    retries: int = 3
    """Failures in a row, with growing pauses, after which a server counts as lost; and how often lost
    servers are started, or asked, again in one rollout."""

    def __post_init__(self) -> None:
        check_choices("vllm", self)
        check_filled("vllm", self, "dir")
        check_range("vllm", self, "replicas tensor", at_least=1)
        check_range("vllm", self, "retries", at_least=0)
        check_range("vllm", self, "memory_share", above=0, below=1)
        check_range("vllm", self, "start_timeout timeout", above=0)
        check_range("vllm", self, "seconds_per_token", at_least=0)
        for url in self.urls:
            if not _is_address(url):
                raise ConfigError(f"vllm.urls must each be http://host:port, got {url!r}")
        places = [urlsplit(url).netloc.lower() for url in self.urls]
        if len(set(places)) < len(places):
            raise ConfigError(f"vllm.urls must differ from each other, got {self.urls}")


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        known = parts.port is not None
    except ValueError:
        return False
    rest = (parts.path.strip("/"), parts.query, parts.fragment, parts.username, parts.password)
    return parts.scheme == "http" and bool(parts.hostname) and known and not any(rest)


def check_ahead(config: Config) -> None:
    """Checks that samples can be drawn beside the training, and that the loss corrects for their
    older weights."""
    rollout, algorithm = config.rollout, config.algorithm
    if not rollout.ahead:
        return
    if rollout.engine != "vllm":
        raise ConfigError(
            f"rollout.ahead {rollout.ahead} needs rollout.engine vllm, got {rollout.engine}, which "
            "samples in the training processes themselves: set rollout.ahead to 0, or use vLLM"
        )
    if rollout.vllm.transport == "ipc":
        raise ConfigError(
            f"rollout.ahead {rollout.ahead} needs servers on other devices than the training, got "
            "rollout.vllm.transport ipc, with which they sleep while it works: set rollout.ahead to "
            "0, or the transport to nccl or shared"
        )
    if algorithm.old_logprobs == "recompute" and algorithm.rollout_correction == "none":
        raise ConfigError(
            f"rollout.ahead {rollout.ahead} needs a correction for samples of older weights, got "
            "algorithm.rollout_correction none: set it to cap or mask, or set "
            "algorithm.old_logprobs to rollout"
        )


def check_vllm(config: Config) -> None:
    """Checks what concerns the vLLM servers and other sections."""
    if config.rollout.engine != "vllm":
        return
    vllm, name = config.rollout.vllm, "rollout.vllm"
    if bool(vllm.urls) == (vllm.python is not None):
        raise ConfigError(
            f"rollout.engine vllm needs {name}.python or {name}.urls, and not both: got "
            f"{vllm.python} and {vllm.urls}"
        )
    if vllm.urls and vllm.transport != "shared":
        raise ConfigError(
            f"{name}.transport must be shared with {name}.urls, got {vllm.transport}: the run does "
            "not know the GPUs of servers that it has not started"
        )
    if vllm.urls and vllm.replicas is not None:
        raise ConfigError(
            f"{name}.replicas must be null with {name}.urls, got {vllm.replicas}: the URLs are the "
            "servers"
        )
    check_divides("model.heads", config.model.heads, f"{name}.tensor", divisor=vllm.tensor)
