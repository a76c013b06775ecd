"""Plans a run on GPUs: which layouts fit, how fast they are by arithmetic, and what they cost.

    python tools/plan.py --config FILE --gpus 8 16 64 [--gpu h100|h200|b200] [--section.key value ...]

It needs no GPU, and of the model only config.json. For each number of GPUs it prints the fastest
layouts, below them what was assumed and what no layout can beat. Exit code 2 if the model fits on
none of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import MISSING, asdict, fields
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without an installation

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megatron_rpp.config import Config, cli
from megatron_rpp.lifecycle import entrypoint
from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.runtime.assumptions import Assumptions
from megatron_rpp.runtime.machines import MACHINES, Machine
from megatron_rpp.runtime.plan import USABLE, Limits, Plan, best_plans, limits

WIDTH = 180
"""Columns of the tables, where the output is no terminal."""


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The options of this tool, and the settings of the run."""
    parser = argparse.ArgumentParser(
        prog="plan.py",
        description=__doc__.splitlines()[0],
        epilog="All settings of training work here: python -m megatron_rpp.train --help lists them. "
        "--model.hf_path may name a directory that holds nothing but the model's config.json.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--gpus", type=int, nargs="+", required=True, help="numbers of GPUs to plan for"
    )
    parser.add_argument("--gpu", choices=MACHINES, default="h100", help="kind of GPU")
    parser.add_argument("--top", type=int, default=3, help="layouts to show for each number")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    assumptions = parser.add_argument_group("assumptions")
    for assumed in fields(Assumptions):
        default = "" if assumed.default in (None, MISSING) else f" (default: {assumed.default:g})"
        assumptions.add_argument(
            "--" + assumed.name.replace("_", "-"),
            type=float,
            default=assumed.default,
            metavar="X",
            help=assumed.metadata["meaning"] + default,
        )
    options, words = parser.parse_known_args(argv)
    if min(options.gpus) < 1 or options.top < 1:
        parser.error("--gpus and --top must be at least 1")
    return options, words


def vocabulary(config: Config) -> int:
    """Vocabulary of the model, as the run would find it."""
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    from megatron_rpp.runtime.inputs import open_tokenizer

    return open_tokenizer(config.data)[0].vocab_size


def layout_of(plan: Plan) -> dict[str, int | str]:
    parallel, train = plan.config.parallel, plan.config.train
    return {
        "gpus": plan.gpus,
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "virtual_pipeline": parallel.virtual_pipeline,
        "context": parallel.context,
        "data": plan.replicas,
        "recompute": train.recompute,
    }


def layout_text(plan: Plan) -> str:
    parallel = plan.config.parallel
    sizes = {
        "TP": parallel.tensor, "PP": parallel.pipeline, "VPP": parallel.virtual_pipeline,
        "CP": parallel.context, "DP": plan.replicas,
    }  # fmt: skip
    return " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "one GPU"


def table(title: str, plans: list[Plan]) -> Table:
    """The plans, a row each, without the models that the run does not have."""
    steps = plans[0].config.train.steps
    drawn = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("layout", "recompute"):
        drawn.add_column(name, no_wrap=True)
    columns = [_gigabytes(plan) | _times(plan, steps) for plan in plans]
    absent = {name for name in ("critic", "reward") if not any(plan[name] for plan in columns)}
    shown = [name for name in columns[0] if name not in absent]
    for name in shown:
        drawn.add_column(name, justify="right", no_wrap=True)
    for plan, cells in zip(plans, columns, strict=True):
        texts = (format(cells[name], _FORMATS.get(name, ".1f")) for name in shown)
        drawn.add_row(layout_text(plan), plan.config.train.recompute, *texts)
    return drawn


_FORMATS = {"GPU-h/step": ".2f", "GPU-h/run": ",.0f"}


def _gigabytes(plan: Plan) -> dict[str, float]:
    held = plan.memory
    kinds = {
        "weights": held.weights, "grads": held.gradients, "Adam": held.optimizer,
        "ref.": held.reference, "critic": held.critic, "reward": held.reward,
        "update": held.update, "rollout": held.rollout, "CUDA": held.overhead,
        "all GB": held.total, "host GB": plan.host.total,
    }  # fmt: skip
    return {name: size / 1e9 for name, size in kinds.items()}


def _times(plan: Plan, steps: int) -> dict[str, float]:
    seconds = plan.time
    return {
        "rollout s": seconds.rollout, "scoring s": seconds.logprobs, "update s": seconds.update,
        "step s": seconds.total, "GPU-h/step": plan.gpu_hours, "GPU-h/run": plan.gpu_hours * steps,
    }  # fmt: skip


def notes(found: Limits, config: Config, *, machine: Machine, assumed: Assumptions) -> list[str]:
    """The assumptions and the limits, a line each."""
    lines = ["Assumed (each has a flag of its name):"]
    for entry in fields(Assumptions):
        value = getattr(assumed, entry.name)
        shown = "default" if value is None else f"{value:g}"
        lines.append(f"  {entry.name} = {shown}: {entry.metadata['meaning']}")
    state = "weights and gradients" if config.optimizer.offload else "weights, gradients, Adam"
    return [
        *lines,
        f"  a GPU has {machine.memory / 1e9:g} GB, of which {USABLE:.0%} are planned with, "
        f"{machine.flops(config.model.dtype) / 1e12:g} TFLOP/s, {machine.bandwidth / 1e12:g} TB/s "
        f"of memory, {machine.node_link / 1e9:g} GB/s to the {machine.per_node} GPUs of its node, "
        f"{machine.network / 1e9:g} GB/s beyond",
        "Not counted: rewards, saves, evaluations, nodes of different speed.",
        "No layout can beat:",
        f"  {state}: {found.state_bytes / 1e9:,.0f} GB, so at least {found.state_gpus} GPU(s)",
        f"  a decoded token takes at least {1e3 * found.read_seconds:.1f} ms to read all weights, "
        f"and {1e3 * found.launch_seconds:.1f} ms of the host to launch all layers",
        f"  a rollout with a response of {config.rollout.max_new_tokens} tokens takes at least "
        f"{found.rollout_seconds:.0f} s",
    ]


def main(argv: list[str] | None = None) -> None:
    options, words = parse(argv)
    config = cli.parse(words).config
    machine = MACHINES[options.gpu]
    assumed = Assumptions(**{f.name: getattr(options, f.name) for f in fields(Assumptions)})
    vocab_size = vocabulary(config)
    find = partial(best_plans, config, vocab_size, machine=machine, assumed=assumed)
    plans: dict[int, list[Plan]] = {}
    problems: dict[int, str] = {}
    for gpus in sorted(set(options.gpus)):
        try:
            plans[gpus] = find(gpus=gpus)[: options.top]
        except ConfigError as error:
            problems[gpus] = str(error)
    found = limits(config, vocab_size, machine=machine, assumed=assumed)
    if not plans:
        raise ConfigError(
            f"{problems[max(problems)]}. Weights, gradients and Adam's state that is not offloaded "
            f"fill {found.state_gpus} such GPU(s) by themselves"
        )
    if options.json:
        print(json.dumps(as_json(plans, problems, found=found, assumed=assumed)))
        return
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = WIDTH
    for gpus in sorted({*plans, *problems}):
        if gpus in problems:
            console.print(f"{gpus} x {options.gpu}: {problems[gpus]}", markup=False)
            continue
        title = f"{gpus} x {options.gpu}, GB of the fullest rank"
        if plans[gpus][0].gpus < gpus:
            title += f": {plans[gpus][0].gpus} of them are faster than all"
        console.print(table(title, plans[gpus]))
    for line in notes(found, config, machine=machine, assumed=assumed):
        console.print(line, markup=False)


def as_json(
    plans: dict[int, list[Plan]],
    problems: dict[int, str],
    *,
    found: Limits,
    assumed: Assumptions,
) -> dict:
    """Plans by number of GPUs (bytes, seconds, GPU-hours), with limits and assumptions."""

    def entry(plan: Plan) -> dict:
        return {
            "layout": layout_of(plan),
            "memory": asdict(plan.memory) | {"total": plan.memory.total},
            "host_memory": asdict(plan.host) | {"total": plan.host.total},
            "seconds": asdict(plan.time) | {"total": plan.time.total},
            "gpu_hours_per_step": plan.gpu_hours,
        }

    return {
        "plans": {gpus: [entry(plan) for plan in some] for gpus, some in plans.items()},
        "problems": problems,
        "limits": asdict(found),
        "assumptions": asdict(assumed),
    }


if __name__ == "__main__":
    entrypoint.run(main)
