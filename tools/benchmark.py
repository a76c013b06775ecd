"""Benchmarks of the trainer; one JSON line each.

    python tools/benchmark.py rl-step [--nproc 2] [--steps 5] [--versus trl] [--section.key value]
    python tools/benchmark.py logprobs [--nproc 2] [--vocabularies V ...] [--rows N ...]
    python tools/benchmark.py checkpoint [--nproc 2] [--steps 5] [--section.key value]

rl-step: whole REINFORCE++ steps on the reference work. A random Llama-shaped fp32 model (hidden
128, 4 layers, 4 heads, ffn 344, vocabulary 512, untied), 64 prompts × 4 samples, 16 prompt tokens,
exactly 64 new tokens at temperature 1, KL against a reference, one AdamW update over all samples.
Any layout by --nproc and --parallel.*; the default is two replicas. Seconds are of the main rank.

--versus trl: TRL's RLOOTrainer on the same work (tools/benchmark_trl.py, two threads, in an
environment of its own made from tools/requirements-trl.txt), runs of the two in turn, and the
ratio theirs / ours of whole steps and of each phase (above 1: ours is faster).

logprobs [--nproc 2] [--vocabularies 8192 32768] [--rows 1024 2048 4096]: peak memory and time of
token log-probs over --nproc tensor-parallel ranks against unfused and gathered logits
(tools/benchmark_logprobs.py).

checkpoint: how long a save holds a run up, waiting for it against writing it in the background
(tools/benchmark_checkpoint.py).

Left out: attention and memory of whole steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRL_ENVIRONMENT = ROOT / "runs" / "trl-environment"
PROMPTS, SAMPLES, PROMPT_TOKENS, NEW_TOKENS, VOCABULARY = 64, 4, 16, 64, 512
WARMUP = 2

REFERENCE_WORK = {
    "model.layers": 4, "model.hidden": 128, "model.heads": 4, "model.ffn_hidden": 344,
    "model.vocab_size": VOCABULARY, "model.max_length": PROMPT_TOKENS + NEW_TOKENS,
    "rollout.prompts_per_step": PROMPTS, "rollout.samples_per_prompt": SAMPLES,
    "rollout.max_new_tokens": NEW_TOKENS, "rollout.min_new_tokens": NEW_TOKENS,
    "reward.functions": f"[{Path(__file__).resolve()}:even_share]",
    "algorithm.kl_coef": 0.05, "optimizer.lr": 1e-5,
}  # fmt: skip


class NumberTokenizer:
    """Token ids as their own text: the reference work is about speed, not language."""

    vocab_size, bos_id, eos_id, pad_id = VOCABULARY, None, VOCABULARY - 1, VOCABULARY - 1
    eos_ids = (eos_id,)

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def even_share(prompts, responses, labels, metadata) -> list[float]:
    """The share of even token ids in each response."""
    return [
        statistics.mean(int(word) % 2 == 0 for word in response.split()) for response in responses
    ]


def reference_run(settings: list[str]):
    """One rank's run of the reference work, changed by `settings`; starts the process groups."""
    import torch

    from megatron_rpp.config import check_world_size, cli
    from megatron_rpp.data.chat import PromptFormat
    from megatron_rpp.data.prompts import Example, Prompt, PromptSet
    from megatron_rpp.parallel import groups
    from megatron_rpp.reporting.console import Console
    from megatron_rpp.rewards import RewardSet
    from megatron_rpp.runtime.inputs import Inputs, samplings
    from megatron_rpp.runtime.run import build

    work = [f"--{name}={value}" for name, value in REFERENCE_WORK.items()]
    config = cli.parse([*work, *settings]).config
    check_world_size(config, groups.launched_world_size())
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(VOCABULARY - 1, (1024, PROMPT_TOKENS), generator=generator).tolist()
    prompts = [Prompt(Example("benchmark"), tuple(row)) for row in rows]
    tokenizer = NumberTokenizer()
    inputs = Inputs(
        tokenizer, PromptFormat(tokenizer), PromptSet([prompts]), prompts[:1],
        RewardSet(config.reward.functions), VOCABULARY, *samplings(config.rollout),
    )  # fmt: skip
    groups.start(**config.parallel.sizes(), seed=config.seed)
    return build(config, inputs, Console(main=False))


def rl_step_worker(steps: int, settings: list[str]) -> None:
    """One rank: WARMUP + `steps` steps; the main rank prints the result."""
    from megatron_rpp.parallel import groups
    from megatron_rpp.parallel.device import describe
    from megatron_rpp.train import rl_step

    run, measured = reference_run(settings), []
    for _ in range(WARMUP + steps):
        row, buffer = rl_step(run)
        assert bool((buffer.response_lengths == NEW_TOKENS).all())
        run.state.step += 1
        run.state.prompts_seen += PROMPTS
        measured.append(row)
    whitening = whitening_seconds(buffer, groups)
    if groups.is_main():
        result = summary(measured[WARMUP:], groups, run.config.parallel, describe())
        result["whitening_share"] = whitening / result["step_seconds"]["median"]
        print(json.dumps(result))
    groups.stop()


def whitening_seconds(buffer, groups) -> float:
    """One normalisation of the step's returns over all replicas, its collective included."""
    from megatron_rpp.algorithms import global_whiten

    times = []
    for _ in range(20):
        start = time.perf_counter()
        global_whiten(buffer.returns, buffer.mask, groups.data_group())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def summary(rows: list[dict], groups, parallel, device: str) -> dict:
    phases = [tag for tag in rows[0] if tag.startswith("time/") and tag != "time/step"]
    seconds = [row["time/step"] for row in rows]
    median = statistics.median(seconds)
    return {
        "trainer": "megatron_rpp",
        "layout": {
            "tensor": parallel.tensor, "pipeline": parallel.pipeline, "data": groups.data_size(),
        },
        "device": device,
        "step_seconds": {"median": median, "min": min(seconds), "max": max(seconds)},
        "phases": {
            tag.removeprefix("time/"): statistics.median(row[tag] for row in rows)
            for tag in phases
        },
        "tokens_per_second": PROMPTS * SAMPLES * (PROMPT_TOKENS + NEW_TOKENS) / median,
        "generated_tokens_per_second": statistics.median(
            row["throughput/generated_tokens_per_second"] for row in rows
        ),
    }  # fmt: skip


def last_json(command: list[str], environment: dict[str, str] | None = None) -> dict:
    """Runs `command`; the JSON object of its last line."""
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_ours(benchmark: str, nproc: int, steps: int, settings: list[str]) -> dict:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(nproc), __file__, benchmark, "--worker"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return last_json([*command, "--steps", str(steps), *settings], environment)


def trl_python() -> Path:
    """The interpreter of TRL's own environment, made at first use."""
    python = TRL_ENVIRONMENT / "bin" / "python"
    if not python.exists():
        print("making an environment for TRL, a few minutes", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(TRL_ENVIRONMENT)], check=True)
        requirements = ROOT / "tools" / "requirements-trl.txt"
        install = [str(python), "-m", "pip", "install", "--quiet", "-r", str(requirements)]
        subprocess.run(install, check=True)
    return python


def versus_trl(nproc: int, steps: int, rounds: int, settings: list[str]) -> dict:
    """Interleaved runs of the two trainers, and the ratios of their medians."""
    theirs_command = [str(trl_python()), str(ROOT / "tools" / "benchmark_trl.py")]
    ours, theirs = [], []
    for _ in range(rounds):
        theirs.append(last_json([*theirs_command, "--steps", str(steps)]))
        ours.append(run_ours("rl-step", nproc, steps, settings))

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", choices=["rl-step", "logprobs", "checkpoint"])
    parser.add_argument("--nproc", type=int, default=2, help="processes (ranks)")
    parser.add_argument("--steps", type=int, default=5, help=f"timed steps, after {WARMUP} others")
    parser.add_argument("--versus", choices=["trl"], help="compare with this trainer, interleaved")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each trainer, with --versus")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options, settings = parser.parse_known_args()
    if options.benchmark == "logprobs":
        import benchmark_logprobs

        print(json.dumps(benchmark_logprobs.run(options.nproc, options.vocabularies, options.rows)))
    elif options.worker and options.benchmark == "checkpoint":
        import benchmark_checkpoint

        benchmark_checkpoint.worker(options.steps, settings)
    elif options.worker:
        rl_step_worker(options.steps, settings)
    elif options.versus:
        print(json.dumps(versus_trl(options.nproc, options.steps, options.rounds, settings)))
    else:
        print(json.dumps(run_ours(options.benchmark, options.nproc, options.steps, settings)))


if __name__ == "__main__":
    main()
