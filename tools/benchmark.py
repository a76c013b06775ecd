"""Benchmarks of the trainer; one JSON line each.

    python tools/benchmark.py generate [--nproc N] [--work NAME ...] [--versus trl vllm]
                                       [--baseline DIR] [--vllm-python FILE]
    python tools/benchmark.py rl-step [--nproc 2] [--steps 5] [--versus trl] [--section.key value]
    python tools/benchmark.py logprobs [--nproc 2] [--vocabularies V ...] [--rows N ...]
    python tools/benchmark.py checkpoint [--nproc 2] [--steps 5] [--section.key value]
    python tools/benchmark.py weights [--nproc 2] [--steps 5] [--section.key value]
    python tools/benchmark.py ahead [--steps 5] [--vllm-python FILE] [--section.key value]

rl-step: whole REINFORCE++ steps on the reference work. A random Llama-shaped fp32 model (hidden
128, 4 layers, 4 heads, ffn 344, vocabulary 512, untied), 64 prompts × 4 samples, 16 prompt tokens,
exactly 64 new tokens at temperature 1, KL against a reference, one AdamW update over all samples.
--nproc and --parallel.* choose the layout; the default is two replicas. The main rank's seconds count.

--versus trl: runs TRL's RLOOTrainer on the same work in turn with ours (tools/benchmarks/trl_rloo.py, two
threads, in an environment of its own made from tools/requirements-trl.txt) and prints the ratio
theirs / ours of whole steps and of each phase (above 1: ours is faster). With
--algorithm.old_logprobs rollout, ours takes the policy's log-probs from the rollout; TRL computes them
again.

generate: tokens per second of the engine on the works of tools/benchmarks/generation_work.py, on two
cores. --versus trl vllm runs these on the same work in turn with ours and prints the ratio ours /
theirs (above 1: ours is faster). vLLM's environment is made from tools/requirements-vllm.txt.
--baseline DIR compares with the engine of another checkout of this project, in the same way:
`git worktree add runs/before COMMIT` makes one.

logprobs: peak memory and time of token log-probs over --nproc tensor-parallel ranks, against
unfused and gathered logits (tools/benchmarks/logprobs.py).

checkpoint: how long a save stalls a run, in the foreground and in the background
(tools/benchmarks/checkpoint.py).

weights: bytes per second of new weights to vLLM, against a plain write (tools/benchmarks/weights.py).

ahead: whole steps of the reference work on vLLM, with rollout.ahead 0 and 1 in turn, in one rank and one
server (tools/benchmarks/ahead.py), on cores of their own and on shared ones; prints the ratio of the
medians (above 1: ahead is faster).

Left out: attention and memory of whole steps.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.generation_work import WORKS

ROOT = Path(__file__).resolve().parents[1]
TRL_ENVIRONMENT = ROOT / "runs" / "trl-environment"


def last_json(command: list[str], environment: dict[str, str] | None = None) -> dict:
    """Runs `command` and returns the last JSON object that it prints on a line of its own; vLLM's log
    may follow it."""
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def run_ours(
    benchmark: str, *, nproc: int, steps: int, settings: list[str], checkout: Path = ROOT
) -> dict:
    """The result of a benchmark, with the package of this or of another checkout."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(nproc), __file__, benchmark, "--worker"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)}
    return last_json([*command, "--steps", str(steps), *settings], environment)


def trl_python() -> Path:
    """The Python of TRL's own environment, which the first call makes."""
    python = TRL_ENVIRONMENT / "bin" / "python"
    if not python.exists():
        print("making an environment for TRL, a few minutes", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(TRL_ENVIRONMENT)], check=True)
        requirements = ROOT / "tools" / "requirements-trl.txt"
        install = [str(python), "-m", "pip", "install", "--quiet", "-r", str(requirements)]
        subprocess.run(install, check=True)
    return python


def versus_trl(*, nproc: int, steps: int, rounds: int, settings: list[str]) -> dict:
    """Runs the two trainers in turn; returns their results and the ratios of the medians."""
    theirs_command = [str(trl_python()), str(ROOT / "tools" / "benchmarks" / "trl_rloo.py")]
    ours, theirs = [], []
    for _ in range(rounds):
        theirs.append(last_json([*theirs_command, "--steps", str(steps)]))
        ours.append(run_ours("rl-step", nproc=nproc, steps=steps, settings=settings))

    def middle(runs: list[dict], pick) -> float:
        return statistics.median(pick(run) for run in runs)

    names = {"generate": "rollout", "score": "score", "update": "update"}
    ratios = {
        name: middle(theirs, lambda r: r["phases"][name])
        / middle(ours, lambda r: r["phases"][own])
        for name, own in names.items()
    }  # fmt: skip
    steps_theirs = middle(theirs, lambda r: r["step_seconds"]["median"])
    steps_ours = middle(ours, lambda r: r["step_seconds"]["median"])
    return {"ours": ours, "trl": theirs, "ratio": {"step": steps_theirs / steps_ours, **ratios}}


def compare_generation(
    *,
    works: list[str],
    peers: dict[str, Path],
    checkouts: dict[str, Path],
    nproc: int | None,
    rounds: int,
) -> dict:
    """Rates of all engines on each work, in turn, and the ratios of the medians.

    Args:
        peers: the Python of each other engine.
        checkouts: directories with other versions of our package.
    """
    script, found = str(ROOT / "tools" / "benchmarks" / "peers_generate.py"), {}
    for work in works:
        ranks = nproc or WORKS[work].ranks
        runs: dict[str, list[dict]] = {name: [] for name in (*peers, *checkouts, "ours")}
        for _ in range(rounds):
            for peer, python in peers.items():
                runs[peer].append(last_json([str(python), script, peer, work]))
            for name, checkout in {**checkouts, "ours": ROOT}.items():
                result = run_ours(
                    "generate", nproc=ranks, steps=3, settings=[work], checkout=checkout
                )
                runs[name].append(result)
        rates = {name: [run["tokens_per_second"] for run in of] for name, of in runs.items()}
        middle = {name: statistics.median(values) for name, values in rates.items()}
        ratio = {name: middle["ours"] / middle[name] for name in (*peers, *checkouts)}
        found[work] = {"tokens_per_second": rates, "ratio": ratio}
    return found


def compare_ahead(*, steps: int, rounds: int, python: Path, settings: list[str]) -> dict:
    """Steps with rollout.ahead 0 and 1, in turn, on cores of their own and on shared ones; and the
    ratios of the medians."""
    found: dict[str, dict[int, list[dict]]] = {"apart": {0: [], 1: []}, "shared": {0: [], 1: []}}
    for _ in range(rounds):
        for place, by_ahead in found.items():
            for ahead, runs in by_ahead.items():
                with tempfile.TemporaryDirectory() as logs:
                    words = ["--rollout.engine=vllm", f"--rollout.vllm.python={python.absolute()}",
                             "--algorithm.rollout_correction=cap", f"--rollout.ahead={ahead}",
                             f"--logging.dir={logs}", *["--apart"] * (place == "apart")]  # fmt: skip
                    runs.append(run_ours("ahead", nproc=1, steps=steps, settings=words + settings))
    ratios = {}
    for place, by_ahead in found.items():
        now, ahead = (
            statistics.median(run["step_seconds"]["median"] for run in runs)
            for runs in by_ahead.values()
        )
        ratios[place] = now / ahead
    return {**found, "ratio": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "benchmark", choices=["rl-step", "generate", "logprobs", "checkpoint", "weights", "ahead"]
    )
    parser.add_argument(
        "--nproc", type=int, help="processes (ranks); default: 2, or what the work of generate says"
    )
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after two that warm up")
    parser.add_argument(
        "--versus", nargs="+", default=[], choices=["trl", "vllm"], help="compare, in turn"
    )
    parser.add_argument("--work", nargs="+", default=["reference", "smollm2", "long-tail"])
    parser.add_argument("--baseline", type=Path, help="another checkout (generate only)")
    parser.add_argument(
        "--vllm-python", type=Path, default=ROOT / "runs/vllm/bin/python", help="of its environment"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="runs of each, with --versus, --baseline and ahead"
    )
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options, settings = parser.parse_known_args()
    if options.baseline and options.benchmark != "generate":
        parser.error(f"--baseline is for generate, not for {options.benchmark}")
    if options.baseline and not (options.baseline / "megatron_rpp").is_dir():
        parser.error(
            f"--baseline {options.baseline}: no checkout of this project (no megatron_rpp)"
        )
    ranks = options.nproc or 2
    if options.worker:
        work(options.benchmark, options.steps, settings)
        return
    if options.benchmark == "logprobs":
        from benchmarks import logprobs  # only now: --help needs no torch

        result = logprobs.run(ranks, options.vocabularies, options.rows)
    elif options.benchmark == "generate":
        python = {"trl": trl_python, "vllm": lambda: options.vllm_python}
        result = compare_generation(
            works=options.work,
            peers={name: python[name]() for name in options.versus},
            checkouts={"baseline": options.baseline} if options.baseline else {},
            nproc=options.nproc,
            rounds=options.rounds,
        )
    elif options.benchmark == "ahead":
        result = compare_ahead(
            steps=options.steps, rounds=options.rounds, python=options.vllm_python,
            settings=settings,
        )  # fmt: skip
    elif options.versus:
        result = versus_trl(
            nproc=ranks, steps=options.steps, rounds=options.rounds, settings=settings
        )
    else:
        result = run_ours(options.benchmark, nproc=ranks, steps=options.steps, settings=settings)
    print(json.dumps(result))


def work(benchmark: str, steps: int, settings: list[str]) -> None:
    """One rank of a benchmark that torchrun has started."""
    module = importlib.import_module(f"benchmarks.{benchmark.replace('-', '_')}")
    module.worker(steps, settings)


if __name__ == "__main__":
    main()
