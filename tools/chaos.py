"""Kills a small run many times, restarts it each time, and compares the result bit for bit.

    python tools/chaos.py [--kills 100] [--ranks 2] [--seed 0] [--section.key value ...]

Each kill is a SIGKILL to a random rank or to the whole job, at a random moment of a phase. Every
phase of a step and of a save is drawn once before any is drawn again. Then the run is restarted with
the same command. Every other run writes its checkpoints in the background. At the end, the final
weights, Adam's moments and the metrics must equal those of an undisturbed run bit for bit. Prints a
table and a verdict; the exit code is 1 if they differ.

The ranks are forked from this process, which has imported the program but started nothing, so a
restart costs no import. Otherwise they are real processes, over gloo. A kill comes within the phase
or up to DELAY seconds later. Left out: CUDA; launchers (tests of torchrun.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_rpp.lifecycle import heartbeat
from tests.small_run import arguments, make_data

PHASES = (
    "rollout", "save rollouts", "reward", "values", "logprobs", "critic", "update", "evaluation",
    "save: begin", "save: write", "save: manifest", "save: rename", "save: pointer", "save: remove old ones",
)  # fmt: skip
"""The phases in which a run is killed. Only the main rank enters those after "save: manifest"."""
OF_THE_CRITIC = ("values", "critic")
"""Left out unless algorithm.name is ppo."""
MAIN_ONLY = PHASES[PHASES.index("save: rename") :]
DELAY = 0.05
STEPS = 4
SETTINGS = {
    "train__steps": STEPS, "checkpoint__interval": 1, "checkpoint__save_rollouts": "true",
    "evaluation__interval": 2, "reward__functions": "[tests.whole_runs:varied]",
    "reward__workers": 0, "model__layers": 2, "rollout__prompts_per_step": 4,
}  # fmt: skip
MEASURED = ("time/", "throughput/", "memory/")


@dataclass(frozen=True)
class Kill:
    """SIGKILL for `victim` (None: every rank), `delay` seconds after it enters `phase` for the
    `count`-th time since its start."""

    victim: int | None
    phase: str
    count: int
    delay: float


def plan(phases: list[str], *, kills: int, ranks: int, seed: int) -> list[Kill]:
    generator = random.Random(seed)
    chosen: list[str] = []
    while len(chosen) < kills:
        chosen += generator.sample(phases, len(phases))
    result = []
    for phase in chosen[:kills]:
        victims = [0, None] if phase in MAIN_ONLY else [*range(ranks), None]
        delay = generator.choice((0.0, DELAY * generator.random()))
        result.append(Kill(generator.choice(victims), phase, 1, delay))
    return result


def _armed(kill: Kill, rank: int) -> None:
    """Prepares `kill` in this process, if this rank is its victim (rank 0 if all ranks are)."""
    if kill.victim not in (rank, None) or (kill.victim is None and rank != 0):
        return
    target = os.getpid() if kill.victim is not None else 0
    act = os.kill if target else (lambda _, number: os.killpg(0, number))
    entered: Counter[str] = Counter()

    def listen(name: str) -> None:
        entered[name] += 1
        if name == kill.phase and entered[name] == kill.count:
            if not kill.delay:
                act(target, signal.SIGKILL)
            threading.Timer(kill.delay, act, (target, signal.SIGKILL)).start()

    heartbeat.current.listeners.append(listen)


def _rank(
    rank: int, ranks: int, *, port: int, argv: list[str], kill: Kill | None, log: Path
) -> None:
    """Runs one rank of the program; in a forked process."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if kill is not None:
        _armed(kill, rank)
    from megatron_rpp import train  # quick: the parent has imported it

    train.main(argv)


def _fork(group: int, run: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setpgid(0, group)
        run()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # skips the clean-up of the parent


def start(ranks: int, argv: list[str], *, kill: Kill | None, log: Path) -> list[int]:
    """Runs all ranks to their end; returns their exit codes (below 0: the signal).

    Like a launcher, it ends the other ranks when one has failed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children: list[int] = []
    for rank in range(ranks):
        group = children[0] if children else 0
        run = partial(_rank, rank, ranks, port=port, argv=argv, kill=kill, log=log)
        child = _fork(group, run)
        with suppress(ProcessLookupError):
            os.setpgid(child, group or child)  # here too: the child may not have done it yet
        children.append(child)
    codes: dict[int, int] = {}
    deadline = None
    while len(codes) < ranks:
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
        if any(codes.values()) and deadline is None:
            deadline = time.monotonic() + 5  # its peers may notice and fail by themselves
        if deadline is not None and time.monotonic() > deadline:
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[child] for child in children]


def _rows(run: Path) -> list[dict]:
    lines = (run / "logs/metrics.jsonl").read_text().splitlines()
    return [
        {tag: value for tag, value in json.loads(line).items() if not tag.startswith(MEASURED)}
        for line in lines
    ]


def _content(run: Path) -> dict[str, str]:
    """Digests of the tensors in the final checkpoint: weights and Adam's moments.

    The files are not compared, because Megatron 0.19 writes an object among the tensors, and equal
    objects may be pickled differently.
    """
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(run / f"checkpoints/iter_{STEPS:07d}")
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as intended
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return {
        name: hashlib.blake2b(value.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, value in tensors.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options, settings = parser.parse_known_args()
    import megatron_rpp.train  # noqa: F401 (once, before the ranks are forked; --help needs none)
    from megatron_rpp.config import cli

    folder = Path(tempfile.mkdtemp(prefix="chaos_"))
    make_data(folder)

    def argv(run: Path) -> list[str]:
        return [*arguments(folder, run, **SETTINGS), *settings]

    started = time.monotonic()
    whole = folder / "whole"
    if any(start(options.ranks, argv(whole), kill=None, log=folder / "whole.log")):
        print((folder / "whole.log").read_text())
        return 1
    print(f"undisturbed: {time.monotonic() - started:.1f} s; kills in {folder}")
    has_critic = cli.parse(argv(whole)).config.algorithm.has_critic
    phases = [phase for phase in PHASES if has_critic or phase not in OF_THE_CRITIC]
    kills = plan(phases, kills=options.kills, ranks=options.ranks, seed=options.seed)
    happened: Counter[str] = Counter()
    problems: list[str] = []
    round_number = 0
    while kills:
        run, log = folder / f"run{round_number}", folder / f"run{round_number}.log"
        round_number += 1
        background = f"--checkpoint.async_save={str(round_number % 2 == 0).lower()}"
        done = False
        while not done:
            kill = kills[0] if kills else None
            codes = start(options.ranks, [*argv(run), background], kill=kill, log=log)
            if -signal.SIGKILL in codes and kill is not None:
                happened[kill.phase] += 1
                kills.pop(0)
                who = "the job" if kill.victim is None else f"rank {kill.victim}"
                print(f"{sum(happened.values()):4d}  {who:8s}  {kill.phase}", flush=True)
            elif any(codes):
                problems.append(f"{log}: exit codes {codes}")
                break
            done = not any(codes)
        if done and _rows(run) != _rows(whole):
            problems.append(f"{run}: other metrics")
        if done and _content(run) != _content(whole):
            problems.append(f"{run}: other weights or moments")
        if not problems:
            shutil.rmtree(run)
    print("\nkills by phase: " + ", ".join(f"{name} {happened[name]}" for name in phases))
    for problem in problems:
        print(f"PROBLEM {problem}")
    seconds = time.monotonic() - started
    verdict = "NOT equal" if problems else "bit for bit equal"
    print(f"{sum(happened.values())} kills, {round_number} runs, {seconds:.0f} s: {verdict}")
    if not problems:
        shutil.rmtree(folder)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
