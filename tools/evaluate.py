"""Accuracy and reward of a model on held-out prompts: a table, and JSON for other programs.

    python tools/evaluate.py --config RECIPE --model.hf_path DIR [--output FILE] [...]
    torchrun --nproc-per-node N tools/evaluate.py --config RECIPE --model.init_path DIR ...

Measures what train.py logs as `eval/accuracy`: greedy answers to the prompts of data.eval (or
data.eval_split), scored by the functions of the reward section. An answer is correct if the first
reward function gives it 1.0 or more. Left out: several samples per prompt, confidence intervals.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without an installation

from megatron_rpp.config import cli, count_replicas
from megatron_rpp.lifecycle import entrypoint
from megatron_rpp.lifecycle.atomic_files import write_atomic
from megatron_rpp.lifecycle.entrypoint import launched_world_size

if TYPE_CHECKING:
    from megatron_rpp.stages.evaluation import Evaluation


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description=__doc__.splitlines()[0],
        epilog="All settings of training work here: python -m megatron_rpp.train --help lists them.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, help="also write the result to this JSON file")
    options, words = parser.parse_known_args(argv)
    config = cli.parse(words).config
    # torch is imported only now, so that --help and a mistake on the command line answer at once.
    from megatron_rpp.parallel import groups
    from megatron_rpp.rollout.engine import MegatronEngine
    from megatron_rpp.runtime.cache_size import max_cache_tokens
    from megatron_rpp.runtime.initial_weights import check_initial_weights
    from megatron_rpp.runtime.inputs import check_writable, load_inputs
    from megatron_rpp.runtime.policy import build_start
    from megatron_rpp.runtime.reward_models import build_scorer
    from megatron_rpp.stages.evaluation import evaluate

    count_replicas(config.parallel, launched_world_size())
    if options.output is not None:
        check_writable("the directory of --output", options.output.parent)
    inputs = load_inputs(config, train_is_scored=False)
    source = check_initial_weights(config)
    groups.start(
        **config.parallel.sizes(), seed=config.seed, deterministic=config.train.deterministic
    )
    stage = build_start(config, inputs.vocab_size, source).requires_grad_(False)
    engine = MegatronEngine(
        stage, inputs.tokenizer,
        max_batch=config.rollout.max_batch, max_cache_tokens=max_cache_tokens(config, inputs.vocab_size),
    )  # fmt: skip
    result = evaluate(
        engine, inputs.held_out, build_scorer(config, inputs), sampling=inputs.greedy,
        shown=config.evaluation.samples,
    )  # fmt: skip
    if groups.is_main():
        report(result, options.output)
    groups.stop()


def report(result: Evaluation, output: Path | None) -> None:
    """Prints the table, and writes the JSON if `output` names a file."""
    table = Table("prompts", "accuracy", "mean reward")
    table.add_row(str(result.count), f"{result.accuracy:.1%}", f"{result.reward:.4f}")
    answers = Table("prompt", "label", "response", "reward", title="the first answers")
    for sample in result.samples:
        texts = sample.prompt, str(sample.label), sample.response
        answers.add_row(*map(escape, texts), f"{sample.score:.3g}")
    console = Console(highlight=False)
    console.print(table)
    console.print(answers)
    if output is not None:
        write_atomic(output, (json.dumps(asdict(result), indent=2) + "\n").encode())


if __name__ == "__main__":
    entrypoint.run(main)
