"""Starts a vLLM server for rollout.vllm.urls, in the foreground, until it is told to stop.

    python tools/vllm_server.py --port P [--host H] --config FILE --rollout.engine vllm \
        --rollout.vllm.python DIR/bin/python [--section.key value ...]

Give it the settings of the run. The server has random weights until the run sends its own through
rollout.vllm.dir. Whoever reaches its port can change its weights, so HOST should be the loopback
interface (the default) or an address of the cluster's own network, on a node that no one else uses.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without an installation

from megatron_rpp.config import cli
from megatron_rpp.lifecycle import entrypoint
from megatron_rpp.lifecycle.config_error import ConfigError


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="vllm_server.py",
        description=__doc__.splitlines()[0],
        epilog="All settings of training work here: python -m megatron_rpp.train --help lists them.",
        allow_abbrev=False,
    )
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    options, words = parser.parse_known_args(argv)
    config = cli.parse(words).config
    vllm = config.rollout.vllm
    if vllm.python is None:
        raise ConfigError("tools/vllm_server.py needs rollout.vllm.python, got null: set it")
    # torch is imported only now, so that --help and mistakes answer at once.
    from megatron_rpp.parallel import device as devices
    from megatron_rpp.rollout.vllm import environment, servers, supervisor
    from megatron_rpp.runtime.inputs import model_vocabulary, open_tokenizer

    environment.check_installed(vllm.python)
    vocab_size = config.model.vocab_size or model_vocabulary(config, open_tokenizer(config.data)[0])
    threads = max(1, len(os.sched_getaffinity(0)) // vllm.tensor)
    variables = servers.environment(
        os.environ, config, on_cpu=devices.ON_CPU, threads=threads, gpus=None
    )
    listens = {"host": options.host, "port": options.port}
    with tempfile.TemporaryDirectory(prefix="megatron_rpp-vllm-") as model:
        environment.write_model_config(config, vocab_size, Path(model))
        words = servers.command(config, Path(model), listens=listens, on_cpu=devices.ON_CPU)
        code = supervisor.run(words, lambda: True, variables)
    sys.exit(code)


if __name__ == "__main__":
    entrypoint.run(main)
