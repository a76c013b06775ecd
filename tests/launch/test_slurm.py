"""The SLURM scripts on a real SLURM: two nodes train; a signal or a lost node only costs time.

Jobs run at the same time if nodes are free. Every run has one rank on each of its nodes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from megatron_rpp.checkpoint.state import POINTER
from tests.launch.slurm_cluster import Cluster, missing
from tests.small_run import arguments, config_of, make_data
from tests.whole_runs import VARIED, compare_rows, compare_weights, rows, weights

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4
SETTINGS = VARIED | {"train__steps": STEPS, "train__epochs": 1, "checkpoint__interval": 1}
OWNED = ("--checkpoint.dir", "--logging.dir", "--sft.dir", "--reward_model.dir")


@pytest.fixture(scope="module")
def cluster():
    if why := missing():
        pytest.skip(why)
    cluster = Cluster(nodes=3)
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("slurm")
    make_data(base)
    return base


def words(base: Path, **settings) -> list[str]:
    """Arguments of `train` for a small run, without the directories, which the script sets."""
    given = arguments(base, base, **(SETTINGS | settings))
    return [word for word in given if not word.startswith(OWNED)]


def submit(cluster: Cluster, script: str, run: Path, options: str, argv: list[str], **env) -> str:
    """Submits launch/`script` of the repository; returns the job's number. Its log is in `run`.

    The job's working directory is not the repository, and RUN is relative to it.
    """
    run.mkdir()
    return cluster.run(
        "sbatch", "--parsable", f"--chdir={run.parent}", f"--output={run}/%a.log",
        *options.split(), f"--job-name={run.name}", ROOT / "launch" / script, "train", *argv,
        RUN=run.name, PYTHONPATH=str(ROOT), **env,
    ).strip()  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(cluster, base) -> tuple[Path, dict[str, str]]:
    """A run on two nodes with torchrun: its folder and SLURM's record."""
    run, argv = base / "undisturbed", words(base, parallel__tensor=2)
    (ended,) = cluster.wait([submit(cluster, "slurm.sbatch", run, "--nodes=2", argv)])
    assert ended["ExitCode"] == "0:0", log(run)
    return run, ended


def log(run: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(run.rglob("*.log")))


def same(base: Path, ours: Path, theirs: Path) -> None:
    """Checks that rows and final weights are equal bit for bit."""
    first, second = (rows(run / "logs/metrics.jsonl") for run in (ours, theirs))
    assert [row["step"] for row in first] == list(range(1, STEPS + 1))
    assert compare_rows(first, second).size == 0
    config = config_of(base, base, **SETTINGS)
    final = [weights(config, run / f"checkpoints/iter_{STEPS:07d}") for run in (ours, theirs)]
    assert compare_weights(*final).size == 0


def test_two_nodes_train(undisturbed):
    run, ended = undisturbed
    assert (ended["JobState"], ended["NumNodes"], ended["Restarts"]) == ("COMPLETED", "2", "0")
    (notes,) = (run / "slurm").glob("*/restart-0")
    assert {path.name.split(".")[0] for path in notes.iterdir()} == {"node0", "node1"}


def nodes_of(job: dict[str, str]) -> list[str]:
    """n[1-2] -> n1, n2; n[1,3] -> n1, n3."""
    digits = job["NodeList"].removeprefix("n").strip("[]").replace("-", ",").split(",")
    return [f"n{digit}" for digit in digits]


def test_a_task_per_rank_and_an_array_of_seeds(cluster, base, undisturbed):
    """Without torchrun the numbers are the same; each seed has its own directory."""
    pair, seeds = base / "pair", base / "seeds"
    jobs = [
        submit(cluster, "slurm_per_gpu.sbatch", pair, "--nodes=2 --ntasks-per-node=1",
               words(base, parallel__tensor=2)),
        submit(cluster, "slurm.sbatch", seeds, "--nodes=1 --array=7,8",
               words(base, train__steps=1)),
    ]  # fmt: skip
    ended = cluster.wait(jobs)
    assert [job["ExitCode"] for job in ended] == ["0:0"] * 3, log(pair) + log(seeds)
    same(base, pair, undisturbed[0])
    first, second = (rows(seeds / f"seed-{seed}/logs/metrics.jsonl") for seed in (7, 8))
    assert len(first) == len(second) == 1 and first[0]["policy/loss"] != second[0]["policy/loss"]


def wait_for_checkpoint(run: Path) -> None:
    deadline = time.monotonic() + 200
    while not (run / "checkpoints" / POINTER).exists():
        assert time.monotonic() < deadline, log(run)
        time.sleep(0.1)


def test_a_signal_requeues(cluster, base, undisturbed):
    """--signal=B:USR1@180 sends SIGUSR1 to the batch script before the time limit; so does this."""
    run = base / "signalled"
    job = submit(cluster, "slurm.sbatch", run, "--nodes=2", words(base, parallel__tensor=2))
    wait_for_checkpoint(run)
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    (ended,) = cluster.wait([job])
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log(run)
    assert "the step ended with code 75 after a signal" in log(run)
    assert len(list((run / "slurm" / job).glob("restart-*"))) == 2
    same(base, run, undisturbed[0])


def test_a_lost_node_requeues(cluster, base, undisturbed):
    """A node loses its power; the job restarts on the remaining nodes."""
    run = base / "lost"
    job = submit(cluster, "slurm.sbatch", run, "--nodes=2", words(base, parallel__tensor=2))
    wait_for_checkpoint(run)
    used = nodes_of(cluster.states(job)[0])
    cluster.kill_node(used[1])
    (ended,) = cluster.wait([job])
    assert ended["JobState"] == "COMPLETED" and int(ended["Restarts"]) >= 1, log(run)
    assert used[1] not in nodes_of(ended)
    cluster.start_node(used[1])
    same(base, run, undisturbed[0])


def test_a_job_without_progress_gives_up(cluster, base):
    """A job that always fails is requeued MAX_STALLED times; an invalid configuration never is."""
    failing, refusing = base / "failing", base / "refusing"
    (base / "reward.py").write_text("def score(prompts, *rest):\n    raise OSError('no reward')\n")
    argv = words(base, reward__functions=f"[{base}/reward.py:score]")
    jobs = [
        submit(cluster, "slurm_per_gpu.sbatch", failing, "--nodes=1", argv, MAX_STALLED="1"),
        submit(cluster, "slurm.sbatch", refusing, "--nodes=1", words(base, train__steps=0)),
    ]
    ended = cluster.wait(jobs)
    found = [(job["JobState"], job["ExitCode"], job["Restarts"]) for job in ended]
    assert found == [("FAILED", "1:0", "1"), ("FAILED", "2:0", "0")], log(failing) + log(refusing)
    assert "1 requeues and the newest checkpoint is still 'none': not requeued" in log(failing)


def dry_run(script: str, *argv: str, **env: str) -> subprocess.CompletedProcess:
    command = ["bash", f"launch/{script}", *argv]
    env = os.environ | {"DRYRUN": "1"} | env
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=30)


def test_a_dry_run_shows_the_command_and_no_secret():
    settings = {
        "RUN": "runs/x", "SECRETS": "HF_TOKEN", "HF_TOKEN": "hf_value", "MODULES": "cuda/12",
        "CONTAINER_IMAGE": "image.sqsh", "CONTAINER_MOUNTS": "/data:/data",
        "SLURM_NNODES": "4", "SLURM_GPUS_ON_NODE": "8",
    }  # fmt: skip
    shown = dry_run("slurm.sbatch", "train", "--config", "a b.yaml", **settings)
    assert shown.returncode == 0, shown.stderr
    assert "hf_value" not in shown.stdout and "secrets, by name: HF_TOKEN" in shown.stdout
    assert f"--container-mounts={ROOT}:{ROOT}\\,/data:/data" in shown.stdout
    assert "--container-env=MASTER_ADDR\\,MASTER_PORT\\,HF_TOKEN" in shown.stdout
    command = shown.stdout.splitlines()[-1]
    assert command.startswith("command: srun ")
    torchrun = "bash launch/torchrun.sh --nnodes 4 --nproc-per-node 8 --rdzv-endpoint FIRST_NODE:"
    assert torchrun in command
    assert "train --config a\\ b.yaml --checkpoint.dir runs/x/checkpoints" in command


def test_one_node_needs_no_rendezvous_port():
    shown = dry_run("slurm.sbatch", "train")
    assert "MASTER_ADDR=127.0.0.1" in shown.stdout
    assert "launch/torchrun.sh --nnodes 1 --nproc-per-node 1 train" in shown.stdout


def test_the_repository_is_found_from_elsewhere(tmp_path):
    """The container mounts both the repository and the working directory."""
    env = os.environ | {"DRYRUN": "1", "CONTAINER_IMAGE": "image.sqsh"}
    command = ["bash", str(ROOT / "launch/slurm_per_gpu.sbatch"), "train"]
    shown = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"directory: {tmp_path}\n" in shown.stdout
    assert f"--container-mounts={tmp_path}:{tmp_path}\\,{ROOT}:{ROOT} " in shown.stdout
    assert f"bash {ROOT}/launch/slurm_task.sh train" in shown.stdout


def test_a_script_outside_its_repository_is_an_error(tmp_path):
    """For example, sbatch may have read the script from standard input."""
    text = (ROOT / "launch/slurm.sbatch").read_text()
    command = ["bash", "-s", "train"]
    failed = subprocess.run(command, cwd=tmp_path, input=text, capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1
    assert failed.stderr.startswith("error: the repository of this script is not found")


@pytest.mark.parametrize(
    ("argv", "env", "message"),
    [
        ([], {}, "say what to run"),
        (["train", "--checkpoint.dir=x"], {}, "--checkpoint.dir=x: the script sets the dir"),
        (["train"], {"SECRETS": "NO_SUCH_TOKEN"}, "NO_SUCH_TOKEN, which is not set: export it"),
    ],
)
def test_mistakes_are_errors(argv, env, message):
    failed = dry_run("slurm_per_gpu.sbatch", *argv, **env)
    assert failed.returncode == 2 and message in failed.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck (apt: shellcheck)")
def test_shellcheck_finds_nothing():
    scripts = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch")])
    checked = ["shellcheck", "--external-sources", *map(str, scripts)]
    assert subprocess.run(checked, cwd=ROOT).returncode == 0
