"""Runs the jobs of a reproduction: one process after the other on each core, finished ones once.

A job's directory has a digest of its settings in its name, so that changed settings give another
directory. In it are the job's checkpoints and logs, `output.txt`, `commits.json` with the commits it
ran on, and `done` once it has finished. An interrupted job resumes from its checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_rpp.config.yaml_files import read_yaml
from megatron_rpp.lifecycle.atomic_files import write_atomic
from megatron_rpp.lifecycle.exit_codes import RunFailure
from megatron_rpp.lifecycle.parent_death import end_with
from reproduction.protocol import ROOT, Job

RESULTS = ("docs/reproduction", "docs/reproduction.md")
"""What the tool itself writes: changes of these do not make the tree dirty."""


@dataclass(frozen=True)
class Runner:
    """Executes jobs below a directory."""

    run: Path
    cores: tuple[int, ...]
    """One job at a time on each; a job of several processes has all of them."""

    def directory(self, job: Job) -> Path:
        """Where the job writes."""
        return self.run / f"{job.name}-{self.digest(job)}"

    def digest(self, job: Job) -> str:
        """Of all that decides about the result: program, recipes, settings, and by the names of
        their directories the jobs before it. The same wherever the runs and the repository are."""
        recipes = [read_yaml(str(path)) for path in job.recipes]
        content = json.dumps([job.program, recipes, job.settings, job.processes], default=str)
        for place, name in ((self.run, "RUN"), (ROOT, "ROOT")):
            content = content.replace(str(place), name)
        return hashlib.sha256(content.encode()).hexdigest()[:8]

    def finish(self, jobs: Sequence[Job]) -> list[Path]:
        """Runs what is unfinished of the jobs; returns their directories. Raises RunFailure if one
        fails, after those that run beside it have ended."""
        free: queue.Queue[int] = queue.Queue()
        for core in self.cores:
            free.put(core)

        def on_a_core(job: Job) -> None:
            core = free.get()
            try:
                self._finish_one(job, (core,))
            finally:
                free.put(core)

        for job in (job for job in jobs if job.processes > 1):
            self._finish_one(job, self.cores)
        pool = ThreadPoolExecutor(len(self.cores))
        try:
            singles = [pool.submit(on_a_core, job) for job in jobs if job.processes == 1]
            for future in singles:
                future.result()
        finally:  # also after Ctrl-C, which the jobs get, too
            pool.shutdown(cancel_futures=True)
        return [self.directory(job) for job in jobs]

    def _finish_one(self, job: Job, cores: tuple[int, ...]) -> None:
        folder = self.directory(job)
        if (folder / "done").exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        _note_commit(folder / "commits.json")
        print(f"{time.strftime('%H:%M:%S')} {folder.relative_to(self.run)}", flush=True)
        command = ["taskset", "-c", ",".join(map(str, cores)), *command_of(job, folder)]
        # The output of tools/generate.py is its result; a resumed training run appends to its log.
        mode = "wb" if job.program == "generate" else "ab"
        with (
            (folder / "output.txt").open(mode) as output,
            (folder / "errors.txt").open("ab") as log,
        ):
            done = subprocess.run(
                command, stdout=output, stderr=log, cwd=ROOT, env=_environment(),
                preexec_fn=partial(end_with, os.getpid(), signal.SIGTERM),
            )  # fmt: skip
        if done.returncode:
            tail = (folder / "errors.txt").read_text(errors="replace")[-2000:]
            raise RunFailure(f"{folder} ended with exit code {done.returncode}:\n{tail}")
        (folder / "done").touch()


def command_of(job: Job, folder: Path) -> list[str]:
    """The command of a job that writes into `folder`."""
    python = sys.executable
    if job.program == "generate":
        command = [python, str(ROOT / "tools/generate.py")]
    elif job.processes == 1:
        command = [python, "-m", f"megatron_rpp.{job.program}"]
    else:
        script = str(ROOT / "launch/torchrun.sh")
        command = ["bash", script, "--nproc-per-node", str(job.processes), job.program]
    for recipe in job.recipes:
        command += ["--config", str(recipe)]
    for name, value in (job.settings | _outputs(job.program, folder)).items():
        text = json.dumps(value, default=str) if isinstance(value, list) else str(value)
        command.append(f"--{name}={text}")
    return command


def _outputs(program: str, folder: Path) -> dict[str, Any]:
    if program == "train":
        return {"checkpoint.dir": folder / "checkpoints", "logging.dir": folder / "logs"}
    return {} if program == "generate" else {f"{program}.dir": folder}


def _environment() -> dict[str, str]:
    """The environment of a job: the package of this tree, on the CPU, one thread per process."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": ":".join(paths),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def first_cores(count: int) -> tuple[int, ...]:
    """The first cores, up to `count`, that this process may use."""
    return tuple(sorted(os.sched_getaffinity(0))[:count])


def _note_commit(file: Path) -> None:
    """Adds the commit that a job runs on to the list in `file`, if it is new there."""
    commits = json.loads(file.read_text()) if file.exists() else []
    commit = current_commit()
    if commit not in commits:
        write_atomic(file, json.dumps([*commits, commit]).encode())


def current_commit() -> str:
    """The commit of this tree, with "+changes" if it has changes; "unknown" if it is not in git."""
    commit = _git("rev-parse", "--short=10", "HEAD")
    if commit is None:
        return "unknown"
    excluded = [f":(exclude){path}" for path in RESULTS]
    return commit + "+changes" * bool(_git("status", "--porcelain", "--", ".", *excluded))


def _git(*words: str) -> str | None:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None
