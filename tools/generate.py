"""Answers prompts with a Megatron checkpoint or a Hugging Face model, on any layout.

    python tools/generate.py --model.hf_path DIR --prompt "..." [--section.key value ...]
    torchrun --nproc-per-node N tools/generate.py --model.init_path DIR --file prompts.txt ...

Prompts come from --prompt, which may be given more than once, or from --file, one per line in
UTF-8. Each is checked before the model is built: it must have tokens, and fit into the context
together with rollout.max_new_tokens. The settings are those of train.py, for example
`--data.apply_chat_template true`, `--rollout.max_new_tokens N`, `--rollout.top_p P` and
`--parallel.tensor N`. Prints one JSON line per prompt: prompt, response, tokens, truncated. Left
out: streaming, a server.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without an installation

from megatron_rpp.config import Config, cli, count_replicas
from megatron_rpp.data.json_lines import json_line
from megatron_rpp.data.tokenizer import Tokenizer
from megatron_rpp.lifecycle import entrypoint
from megatron_rpp.lifecycle.config_error import reading
from megatron_rpp.lifecycle.entrypoint import launched_world_size

if TYPE_CHECKING:
    from megatron_rpp.hf.source import Source
    from megatron_rpp.records import Generation, Sampling


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="generate.py",
        description=__doc__.splitlines()[0],
        epilog="All settings of training work here: python -m megatron_rpp.train --help lists them.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--prompt", action="append", default=[], help="a prompt; may be given more than once"
    )
    parser.add_argument("--file", type=Path, help="file of prompts in UTF-8, one per line")
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    options, words = parser.parse_known_args(argv)
    config = cli.parse(words).config
    # torch is imported only now, so that --help and a mistake on the command line answer at once.
    from megatron_rpp.parallel import groups
    from megatron_rpp.runtime.initial_weights import check_initial_weights
    from megatron_rpp.runtime.inputs import (
        model_vocabulary,
        open_tokenizer,
        response_format,
        samplings,
    )

    count_replicas(config.parallel, launched_world_size())
    if options.file and not options.file.is_file():
        parser.error(f"--file {options.file} is not a file")
    prompts = options.prompt + (lines_of(options.file) if options.file else [])
    if not prompts:
        parser.error("no prompt: give --prompt TEXT or --file FILE")
    source = check_initial_weights(config)
    tokenizer, form = open_tokenizer(config.data)
    limit = config.model.max_length - config.rollout.max_new_tokens
    vocab_size = model_vocabulary(config, tokenizer)
    encoded = [form.checked_tokens(prompt, limit) for prompt in prompts]
    answering = samplings(config.rollout, tokenizer)[1 if options.greedy else 0]
    groups.start(
        **config.parallel.sizes(), seed=config.seed, deterministic=config.train.deterministic
    )
    generations = generate(
        config,
        vocab_size,
        prompts=encoded,
        tokenizer=tokenizer,
        sampling=answering,
        source=source,
    )
    responses = response_format(config, tokenizer, answering)
    for prompt, generation in zip(prompts, generations, strict=True):
        answer = {
            "prompt": prompt,
            "response": responses.text(generation.tokens),
            "tokens": len(generation.tokens),
            "truncated": generation.truncated,
        }
        if groups.is_main():
            print(json_line(answer), flush=True)
    groups.stop()


def lines_of(file: Path) -> list[str]:
    """The prompts of a file, one per line, without blank lines.

    Only a line feed ends a line: U+2028 and a form feed are part of a prompt.
    """
    with reading(str(file.absolute()), "save it as UTF-8"):
        lines = file.read_bytes().decode().split("\n")
    return [line.removesuffix("\r") for line in lines if line.strip()]


def generate(
    config: Config,
    vocab_size: int,
    *,
    prompts: list[tuple[int, ...]],
    tokenizer: Tokenizer,
    sampling: Sampling,
    source: Source | None = None,
) -> list[Generation]:
    """One answer per prompt, in order, on every rank. Collective.

    source: what the check of model.hf_path found, if it was checked before.
    """
    from megatron_rpp.parallel import groups
    from megatron_rpp.records import Request
    from megatron_rpp.rollout.engine import MegatronEngine
    from megatron_rpp.rollout.planning import shard
    from megatron_rpp.runtime.cache_size import max_cache_tokens
    from megatron_rpp.runtime.policy import build_start

    stage = build_start(config, vocab_size, source)
    engine = MegatronEngine(
        stage.requires_grad_(False), tokenizer,
        max_batch=config.rollout.max_batch, max_cache_tokens=max_cache_tokens(config, vocab_size),
    )  # fmt: skip
    local = shard(len(prompts), groups.data_rank(), groups.data_size())
    requests = [Request(prompts[i], sample_id=i) for i in local]
    generations = engine.generate(requests, sampling, seed=config.seed, step=0)
    parts = groups.gather_objects(generations, groups.data_group())
    return [generation for part in parts for generation in part]


if __name__ == "__main__":
    entrypoint.run(main)
