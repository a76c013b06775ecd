"""A real SLURM of several nodes on this machine: munged, slurmctld and a slurmd for each node.

Every daemon runs in the foreground as a child of the test, with directories, a munge key and ports
of its own, so that nothing is shared with a SLURM that may be installed. A node has one core: its
daemon is bound to it, and what the daemon starts inherits that. Needs root and Debian's slurm-wlm
and munge. Left out: cgroups, accounting, real GPUs.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import psutil

from tests.ports import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credential has expired.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=2
SlurmdTimeout=6
KillWait=10
SlurmdParameters=config_overrides
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def missing() -> str | None:
    """Why no cluster can be started here; None if one can."""
    if os.geteuid() != 0:
        return "SLURM's daemons need root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if absent:
        return f"no {', '.join(absent)}: install SLURM (Debian: apt-get install slurm-wlm munge)"
    return None


class Cluster:
    """Nodes n1, n2 ... of one partition. `stop` ends every daemon and every job."""

    def __init__(self, nodes: int):
        # The path of munge's socket must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))
        self.folder.chmod(0o755)
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self.env = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": PATH}
        self.daemons: dict[str, subprocess.Popen] = {}
        self._configure()
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _configure(self) -> None:
        host, ports = socket.gethostname().split(".")[0], free_ports(len(self.names) + 1)
        nodes = "\n".join(
            f"NodeName={name} NodeAddr=127.0.0.1 NodeHostname={host} Port={port} CPUs=2 "
            f"RealMemory=4000 State=UNKNOWN"
            for name, port in zip(self.names, ports[1:])
        )
        text = CONFIG.format(host=host, ports=ports, folder=self.folder, nodes=nodes)
        (self.folder / "slurm.conf").write_text(text)
        for name in ("state", *(f"spool.{node}" for node in self.names)):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)

    def _daemon(self, name: str, *command: str) -> None:
        """Starts a daemon that ends with the test's process, even if that is killed."""
        with open(self.folder / f"{name}.log", "ab") as log:
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=self.env, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def _start(self) -> None:
        kinds = ("key", "pid", "log", "seed")
        files = [f"--{kind}-file={self.folder}/munge.{kind}" for kind in kinds]
        socket_path = f"--socket={self.folder}/munge.socket"
        self._daemon("munged", "munged", "--foreground", "--force", *files, socket_path)
        self._until(lambda: (self.folder / "munge.socket").exists(), "munged is up")
        self._daemon("slurmctld", "slurmctld", "-D", "-c")
        for name in self.names:
            self.start_node(name)
        self._until(lambda: len(self.idle()) == len(self.names), "all nodes are idle")

    def start_node(self, name: str) -> None:
        """Starts a node on its own core if there are enough cores; otherwise it shares the last
        one. On two cores n3 shares with n2, which it replaces."""
        cores = sorted(os.sched_getaffinity(0))
        core = cores[min(self.names.index(name), len(cores) - 1)]
        self._daemon(name, "taskset", "-c", str(core), "slurmd", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """Kills the daemon and all processes that it started, as if the machine lost its power."""
        spool = str(self.folder / f"spool.{name}")
        daemon = psutil.Process(self.daemons.pop(name).pid)
        found = psutil.process_iter(["cmdline"])
        steps = [p for p in found if "slurmstepd" in " ".join(p.info["cmdline"] or [])]
        steps = [step for step in steps if self._is_of(step, spool)]
        doomed = [daemon, *steps, *(child for step in steps for child in step.children(True))]
        for process in doomed:
            process.kill()
        daemon.wait()

    def _is_of(self, process: psutil.Process, spool: str) -> bool:
        """Whether a process belongs to a node: a step's daemon keeps a socket in the node's spool
        directory open."""
        return any(spool in held.laddr for held in process.net_connections("unix"))

    def idle(self) -> list[str]:
        shown = self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False)
        return sorted(set(shown.split()))

    def run(self, *command: str | Path, check: bool = True, **env: str) -> str:
        """Runs one of SLURM's commands; returns its stdout."""
        words = [str(word) for word in command]
        result = subprocess.run(
            words, env=self.env | env, capture_output=True, text=True, timeout=60
        )
        assert not check or result.returncode == 0, f"{words}: {result.stderr}"
        return result.stdout

    def states(self, job: str) -> list[dict[str, str]]:
        """scontrol's fields (JobState, ExitCode, Restarts, NodeList ...) of each task of a job."""
        shown = self.run("scontrol", "show", "job", job).strip()
        return [
            dict(word.split("=", 1) for word in task.split() if "=" in word)
            for task in shown.split("\n\n")
        ]

    def wait(self, jobs: list[str], seconds: float = 300) -> list[dict[str, str]]:
        """Waits until the jobs have ended for good; returns the fields of all their tasks."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

        def ended() -> bool:
            return all(task["JobState"] in over for job in jobs for task in self.states(job))

        self._until(ended, "the jobs have ended", seconds)
        return [task for job in jobs for task in self.states(job)]

    def _until(self, condition, what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            logs = "\n".join(f"{log.name}: {log.read_text()[-1500:]}" for log in self.logs())
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}\n{logs}"
            time.sleep(0.3)

    def logs(self) -> list[Path]:
        return sorted(self.folder.glob("*.log"))

    def stop(self) -> None:
        if "slurmctld" in self.daemons:
            self.run("scancel", "--signal=KILL", "--full", "--user=root", check=False)
        for name in [name for name in self.names if name in self.daemons]:
            self.kill_node(name)
        for daemon in self.daemons.values():
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
