"""One node needs no host name and no environment variables; rendezvous options; relative paths.

The ranks are small scripts if only the launcher is tested; paths are tested with the real program.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_rpp.launcher import rendezvous
from tests.launch.namespaces import two_namespaces
from tests.small_run import arguments, make_data

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 120.0
LAUNCHER = (sys.executable, "-P", "-m", "megatron_rpp.torchrun")
ONE_NODE = ("--nnodes", "1", "--rdzv-backend", "c10d", "--nproc-per-node", "2")

# All ranks connect through gloo, in the default group and in another one.
MEET = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total, group=dist.new_group(list(range(dist.get_world_size()))))
print(f"rank {dist.get_rank()} meets {int(total)} at {os.environ['MASTER_ADDR']}", flush=True)
dist.destroy_process_group()
"""

# Variables that SLURM, Kubernetes and an outer torchrun leave in the environment.
FOREIGN = {
    "SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "3", "SLURM_LOCALID": "3",
    "SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "node[1-4]",
    "MASTER_ADDR": "node1.invalid", "MASTER_PORT": "29999",
    "RANK": "3", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "GROUP_RANK": "1",
    "PET_NNODES": "4", "PET_NODE_RANK": "2", "PET_RDZV_BACKEND": "c10d",
    "PET_RDZV_ENDPOINT": "node1.invalid:29400", "PET_LOCAL_ADDR": "node3.invalid",
    "TORCHELASTIC_RUN_ID": "other", "TORCHELASTIC_USE_AGENT_STORE": "False",
    "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9",
}  # fmt: skip

# Runs a command on a machine whose name does not resolve and which does not know `localhost`.
NAMELESS = ("unshare", "--uts", "--mount", "bash", "-c")
NAMELESS += ('hostname nobody-knows-me && mount --bind /dev/null /etc/hosts && exec "$@"', "-")


def start(*words: str | Path, **settings) -> subprocess.Popen:
    """Starts a process in a new session, so that its children can be killed with it."""
    env = os.environ | {"PYTHONPATH": str(ROOT)} | settings.pop("env", {})
    return subprocess.Popen(
        [*map(str, words)], env=env, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings,
    )  # fmt: skip


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    """Waits, and returns (exit code, stdout, stderr); kills the process after LIMIT."""
    try:
        output, errors = process.communicate(timeout=LIMIT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output, errors


@pytest.fixture
def meet(tmp_path) -> Path:
    script = tmp_path / "meet.py"
    script.write_text(MEET)
    return script


def has_namespaces() -> bool:
    """Whether this user can make namespaces."""
    made = shutil.which("unshare") and subprocess.run([*NAMELESS, "true"], capture_output=True)
    return bool(made) and made.returncode == 0


def test_one_node_needs_no_name_and_no_variable(meet):
    """Two launches run at the same time on one machine and use different ports."""
    prefix = NAMELESS if has_namespaces() else ()
    pair = [start(*words, *LAUNCHER, *ONE_NODE, meet, env=FOREIGN) for words in (prefix, ())]
    for process in pair:
        code, output, errors = ended(process)
        assert code == 0, errors
        for rank in (0, 1):
            assert f"rank {rank} meets 2 at 127.0.0.1" in output
        said = "not read: PET_LOCAL_ADDR, PET_NNODES, PET_NODE_RANK, PET_RDZV_BACKEND, PET_RDZV_"
        assert said in errors


def test_several_nodes_need_no_name_of_their_own(meet):
    """No node can resolve a name, even its own. gloo uses the interface that leads to node 0."""
    options = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "run")
    if not has_namespaces():
        pytest.skip("this user cannot make namespaces here")
    with two_namespaces() as nodes:
        endpoint = f"{nodes[0].address}:29500"
        commands = [
            (*node.prefix, *NAMELESS, *LAUNCHER, *options, "--rdzv-endpoint", endpoint, meet)
            for node in nodes
        ]
        results = [ended(process) for process in [start(*command) for command in commands]]
    assert [code for code, _, _ in results] == [0, 0], results
    output = "".join(text for _, text, _ in results)
    for rank in (0, 1):
        assert f"rank {rank} meets 2 at {nodes[0].address}" in output


@pytest.fixture
def gloo(monkeypatch):
    """Unsets GLOO_SOCKET_IFNAME; monkeypatch restores it after the test."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")


@pytest.mark.parametrize(
    ("words", "backend", "endpoint", "address"),
    [
        ("", "c10d", "[127.0.0.1]:0", "127.0.0.1"),
        ("--standalone", "c10d", "[127.0.0.1]:0", "127.0.0.1"),
        ("--nnodes=1", "c10d", "[127.0.0.1]:0", "127.0.0.1"),
        ("--nnodes 1:1 --rdzv-backend c10d", "c10d", "[127.0.0.1]:0", "127.0.0.1"),
        ("--local-addr localhost", "c10d", "[127.0.0.1]:0", "localhost"),
        ("--rdzv-backend c10d --rdzv-endpoint localhost:0", "c10d", "localhost:0", "127.0.0.1"),
        ("--master-port 29777", "static", "", "127.0.0.1"),
        ("--nnodes 2 --rdzv-backend c10d --rdzv-endpoint localhost:0", "c10d", "localhost:0",
         "localhost"),
    ],
)  # fmt: skip
def test_where_nodes_meet(words, backend, endpoint, address, gloo):
    args = rendezvous.options([*words.split(), "program.py"])
    found = (args.rdzv_backend, args.rdzv_endpoint, args.local_addr)
    assert found == (backend, endpoint, address)


def test_the_users_interface_is_not_changed(gloo, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    rendezvous.options(["program.py"])
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


def test_variables_count_if_the_command_line_names_no_nodes(gloo, monkeypatch):
    """torchrun does the same. This is for users who do not start it with launch/torchrun.sh."""
    for name, value in {"NNODES": "2", "RDZV_BACKEND": "c10d", "RDZV_ENDPOINT": "node0:1"}.items():
        monkeypatch.setenv(f"PET_{name}", value)
    monkeypatch.setattr(rendezvous, "is_this_machine", lambda host: False)
    args = rendezvous.options(["program.py"])
    assert (args.nnodes, args.rdzv_endpoint) == ("2", "node0:1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--standalone --nnodes 2", "--nnodes 2 for several: leave one out"),
        ("--nnodes 2 --rdzv-backend c10d", "needs a place to meet: --rdzv-endpoint FIRST_NODE:"),
        ("--nnodes two", "--nnodes two: invalid literal"),
        ("--local-addr 203.0.113.7", "203.0.113.7 is no address of this machine: leave it out"),
        ("--nproc-per-node 0", "--nproc-per-node 0: a node has one rank or more"),
        ("--nproc-per-node two", "--nproc-per-node two: Unsupported"),
        ("--nnodes 2 --rdzv-backend c10d --rdzv-endpoint node0:99999", "node0:99999: The port"),
        ("--log-dir /dev/null/logs", "--log-dir /dev/null/logs: [Errno 20] Not a directory"),
    ],
)
def test_invalid_options_are_errors(words, message, gloo, capsys):
    with pytest.raises(SystemExit, match="2"):
        rendezvous.options([*words.split(), "program.py"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: launcher: ") and message in line


# A user's package, and modules with the names of libraries, which must not be imported.
FILES = {
    "my_package/rewards.py": "from my_helper import SCORE\n"
    "def score(prompts, *rest):\n    return [SCORE] * len(prompts)\n",
    "my_helper.py": "SCORE = 0.25\n",
    "torch.py": "raise ImportError('not this one')\n",
    "datasets.py": "raise ImportError('not this one')\n",
    "megatron_rpp/__init__.py": "raise ImportError('not this one')\n",
}


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """A directory that is not the repository, with data and FILES."""
    folder = tmp_path / "a run[1]"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    make_data(folder)
    return folder


def launch(folder: Path, **settings) -> subprocess.Popen:
    """Starts launch/torchrun.sh in `folder` with relative paths."""
    words = arguments(
        Path("."), Path("out"), reward__functions="[my_package.rewards:score]",
        reward__workers=0, train__steps=1, train__epochs=1, **settings,
    )  # fmt: skip
    script = ("bash", ROOT / "launch/torchrun.sh", "train", *words)
    return start(*script, cwd=folder, env={"VENV": str(Path(sys.prefix))})


def test_relative_paths_are_relative_to_the_caller(elsewhere):
    code, _, errors = ended(launch(elsewhere))
    assert code == 0, errors
    assert [path.relative_to(elsewhere) for path in elsewhere.rglob("metrics.jsonl")] == [
        Path("out/logs/metrics.jsonl")
    ]


def test_ranks_end_with_a_launcher_that_is_killed(elsewhere):
    """The launcher dies while the ranks start; otherwise they would wait for minutes."""
    killing = "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\n"
    (elsewhere / "my_helper.py").write_text(killing + FILES["my_helper.py"])
    begin = time.monotonic()
    assert (
        ended(launch(elsewhere))[0] == -signal.SIGKILL
    )  # stderr closes only after the ranks have ended
    assert time.monotonic() - begin < LIMIT / 2 and not list(elsewhere.rglob("metrics.jsonl"))


def test_a_missing_virtual_environment_is_an_error(tmp_path):
    command = ["bash", ROOT / "launch/torchrun.sh", "train"]
    code, _, errors = ended(start(*command, cwd=tmp_path, env={"VENV": "none here"}))
    assert (code, errors.count("\n")) == (2, 1)
    assert f"error: VENV: there is no {tmp_path}/none here/bin/python" in errors


@pytest.mark.parametrize("script", ["slurm.sbatch", "slurm_per_gpu.sbatch"])
def test_the_choice_of_the_interpreter_reaches_the_container(script):
    env = {"DRYRUN": "1", "CONTAINER_IMAGE": "image.sqsh", "VENV": "none"}
    code, output, errors = ended(
        start("bash", ROOT / f"launch/{script}", "train", cwd=ROOT, env=env)
    )
    assert (code, errors) == (0, "")
    assert "--container-env=MASTER_ADDR\\,MASTER_PORT\\,VENV " in output


def test_an_image_has_no_virtual_environment():
    """The .venv of the mounted repository is not the image's (launch/Dockerfile sets VENV)."""
    shell = f"repository={ROOT}; source {ROOT}/launch/environment.sh; echo $python"
    assert ended(start("bash", "-c", shell, cwd=ROOT, env={"VENV": "none"}))[1] == "python3\n"
