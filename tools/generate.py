"""Answers prompts with a Megatron checkpoint or a Hugging Face model, on any layout.

    python tools/generate.py --model.hf_path DIR --prompt "..." [--section.key value ...]
    torchrun --nproc-per-node N tools/generate.py --model.init_path DIR --file prompts.txt ...

Prompts: --prompt (may be given more than once), or --file with one a line. The settings are those of
train.py: `--data.apply_chat_template true`, `--rollout.max_new_tokens N`, `--rollout.top_p P`,
`--parallel.tensor N`; --greedy takes the likeliest tokens. One JSON line a prompt on stdout:
prompt, response, tokens, truncated. Left out: streaming, a server.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without an installation

from megatron_rpp import cli, launching
from megatron_rpp.config import Config, count_replicas
from megatron_rpp.inputs import open_tokenizer, samplings
from megatron_rpp.parallel import groups
from megatron_rpp.policy import build_start
from megatron_rpp.records import Request
from megatron_rpp.rollout.engine import MegatronEngine
from megatron_rpp.stages.rollout import shard


def main(argv: list[str] | None = None) -> None:
    own = argparse.ArgumentParser(prog="generate.py", add_help=False, allow_abbrev=False)
    own.add_argument("--prompt", action="append", default=[])
    own.add_argument("--file", type=Path)
    own.add_argument("--greedy", action="store_true")
    options, words = own.parse_known_args(argv)
    config = cli.parse(words).config
    count_replicas(config.parallel, groups.launched_world_size())
    if options.file and not options.file.is_file():
        own.error(f"--file {options.file} is not a file")
    prompts = options.prompt + (lines_of(options.file) if options.file else [])
    if not prompts:
        own.error("no prompt: give --prompt TEXT or --file FILE")
    groups.start(**config.parallel.sizes(), seed=config.seed)
    for answer in generate(config, prompts, options.greedy):
        if groups.is_main():
            print(json.dumps(answer, ensure_ascii=False), flush=True)
    groups.stop()


def lines_of(file: Path) -> list[str]:
    """The prompts of a file, one a line, empty lines left out."""
    return [line for line in file.read_text().splitlines() if line.strip()]


def generate(config: Config, prompts: list[str], greedy: bool) -> list[dict]:
    """One answer per prompt, in order, on every rank. Collective."""
    tokenizer, form = open_tokenizer(config.data)
    stage = build_start(config, config.model.vocab_size or tokenizer.vocab_size)
    engine = MegatronEngine(stage.requires_grad_(False), tokenizer, config.rollout.max_batch)
    rank, size = groups.data_rank(), groups.data_size()
    own = shard(len(prompts), rank, size)
    requests = [Request(tuple(form.tokens(prompts[i])), sample_id=i) for i in own]
    sampling = samplings(config.rollout)[1 if greedy else 0]
    found = zip(own, engine.generate(requests, sampling, config.seed, step=0))
    answers = {
        i: {
            "prompt": prompts[i],
            "response": tokenizer.decode(generation.tokens),
            "tokens": len(generation.tokens),
            "truncated": generation.truncated,
        }
        for i, generation in found
    }
    for other in groups.gather_objects(answers, groups.data_group()):
        answers |= other
    return [answers[i] for i in range(len(prompts))]


if __name__ == "__main__":
    launching.run(main)
