"""Run a test function on real processes that share a gloo process group.

Nothing is mocked: every rank is a separate process, forked from a server that has only imported the
package (importing Megatron would cost each process seconds). Rank functions
must be importable (module level), because they are pickled by name. Left out: CUDA.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Imported once by the server that ranks are forked from; the second by torch's optimizers anyway.
PRELOADED = ["megatron_rpp.train", "torch._dynamo", "tests.preloaded"]


def fork(fn: Callable[..., Any], args: tuple, nprocs: int, join: bool = True) -> Any:
    """Like torch's ``mp.spawn``, but the processes have already imported everything."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    return mp.start_processes(fn, args, nprocs, join, start_method="forkserver")


class RankFailed(RuntimeError):
    """A rank raised; the message holds the tracebacks of all ranks that did, the first one first.

    (A rank that raises closes its connections, so its peers raise as well, and may be seen first.)
    """


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    tmp_path: Path,
    *args: Any,
    timeout: float = 120.0,
) -> list[Any]:
    """Runs ``fn(rank, *args)`` on every rank of a new gloo world; returns the results in rank order.

    The default group is ready when ``fn`` starts. Arguments travel by pickle, results by
    ``torch.save``. Each rank runs one thread.

    Raises:
        RankFailed: a rank raised.
        torch.multiprocessing.ProcessExitedException: a rank died without raising.
        TimeoutError: not done after ``timeout`` seconds. No process is left behind in any case.
    """
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    deadline = time.monotonic() + timeout
    # Hosted here, as torchrun does, so that it outlives every rank.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    main = (fn, world_size, store.port, folder, timeout, args)
    context = fork(_rank_main, main, world_size, join=False)
    try:
        while not context.join(timeout=max(0.0, min(1.0, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                raise TimeoutError(f"{fn.__name__} on {world_size} ranks ran over {timeout} s")
    except mp.ProcessRaisedException as error:
        reports = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
        raise RankFailed("\n".join(path.read_text() for path in reports)) from error
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank_main(
    rank: int,
    fn: Callable[..., Any],
    world_size: int,
    port: int,
    folder: Path,
    timeout: float,
    args: tuple,
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.TCPStore("127.0.0.1", port, is_master=False),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
    try:
        torch.save(fn(rank, *args), folder / f"{rank}.pt")
    except BaseException:
        # Written before the connections close, because that makes the peers fail.
        (folder / f"{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise
    finally:
        dist.destroy_process_group()
