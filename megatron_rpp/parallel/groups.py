"""Process groups: which ranks compute together.

A data-parallel replica is the tensor × pipeline × context ranks that share one shard of the
rollout buffer. Its tensor × pipeline ranks hold one copy of the model; its context-parallel ranks
work on different parts of each sequence. Every rank of a group joins every collective, in the same
order.

Left out: expert parallelism.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.lifecycle.config_error import first_line
from megatron_rpp.lifecycle.entrypoint import launched_world_size
from megatron_rpp.lifecycle.exit_codes import RunFailure
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import progress_wait

from megatron.core import parallel_state, tensor_parallel

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
WAIT_SECONDS = 2.0


_replica: dist.ProcessGroup | None = None  # Megatron has no group of tensor × pipeline × context
_reports: progress_wait.Reports | None = None


def start(
    tensor: int,
    pipeline: int,
    *,
    seed: int,
    context: int = 1,
    virtual_pipeline: int = 1,
    deterministic: bool = False,
) -> None:
    """Joins the world that torchrun prepared, unless this is done, and splits it into groups.

    Without torchrun this process is a world of one. The caller has checked that
    tensor × pipeline × context divides the world size.

    deterministic: train.deterministic (determinism.py).
    """
    devices.set_up(
        int(os.environ.get("LOCAL_RANK", "0")),
        int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        deterministic,
    )
    if not dist.is_initialized():
        _join_world()
    _start_reports()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual_pipeline if virtual_pipeline > 1 else None,
        context_parallel_size=context,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    _start_replica_group(context)


def _start_reports() -> None:
    global _reports
    if dist.get_world_size() > 1:
        _reports = progress_wait.Reports()
        _reports.start()


def _start_replica_group(context: int) -> None:
    global _replica
    if context == 1:
        _replica = parallel_state.get_model_parallel_group()
        return
    replicas = gather_objects(data_rank(), dist.group.WORLD)
    for number in range(data_size()):  # every rank must join the creation of every group
        ranks = [rank for rank, replica in enumerate(replicas) if replica == number]
        group = dist.new_group(ranks, timeout=COLLECTIVE_TIMEOUT)
        if number == data_rank():
            _replica = group


def _join_world() -> None:
    # A world of one needs no rendezvous; under torchrun the address is in the environment.
    store = None if "RANK" in os.environ else dist.HashStore()
    try:
        dist.init_process_group(
            devices.backend(),
            store=store,
            rank=int(os.environ.get("RANK", "0")),
            world_size=launched_world_size(),
            timeout=COLLECTIVE_TIMEOUT,
        )
    except dist.DistNetworkError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RunFailure(
            f"the ranks cannot meet at {address} ({first_line(error)}): if another "
            f"program uses that port, choose another MASTER_PORT"
        ) from error


def destroy() -> None:
    """Destroys the parallel groups but not the world: `start` can build other groups over it."""
    _forget()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    _end_threads()


def stop() -> None:
    """Leaves all process groups."""
    _forget()
    dist.destroy_process_group()
    _end_threads()


def _end_threads() -> None:
    """Collects what still refers to destroyed groups: each of gloo's has threads that look for
    messages."""
    gc.collect()


def _forget() -> None:
    """Forgets the groups, as Megatron does."""
    global _replica, _reports
    _replica = None
    if _reports is not None:
        _reports.stop()
        _reports = None
    parallel_state.destroy_model_parallel()


def data_group() -> dist.ProcessGroup:
    """The ranks that hold the same part of the model and different shards of the buffer."""
    return parallel_state.get_data_parallel_group()


def context_group() -> dist.ProcessGroup:
    """The ranks of a replica that work on different parts of the same sequences."""
    return parallel_state.get_context_parallel_group()


def token_group() -> dist.ProcessGroup:
    """DP × CP: the ranks whose micro-batches hold different tokens of a mini-batch."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def tensor_group() -> dist.ProcessGroup:
    """The ranks that share each weight matrix of a pipeline stage."""
    return parallel_state.get_tensor_model_parallel_group()


def pipeline_group() -> dist.ProcessGroup:
    """The stages of this rank's pipeline."""
    return parallel_state.get_pipeline_model_parallel_group()


def model_group() -> dist.ProcessGroup:
    """The tensor × pipeline ranks that hold one copy of the model."""
    return parallel_state.get_model_parallel_group()


def replica_group() -> dist.ProcessGroup:
    """The tensor × pipeline × context ranks of this rank's replica."""
    assert _replica is not None, "call groups.start first"
    return _replica


def data_rank() -> int:
    return data_group().rank()


def data_size() -> int:
    return data_group().size()


def pipeline_link(sender: int) -> dist.ProcessGroup:
    """The group for messages from pipeline rank `sender` to the next one, in global ranks.

    Two stages send each other messages in both directions. In one group they would queue up behind each
    other on a GPU; so one direction goes through the world's group, as in Megatron.
    """
    group, world = pipeline_group(), dist.group.WORLD
    assert world is not None
    return world if group.size() == 2 and sender % 2 else group


def is_first_stage() -> bool:
    return pipeline_group().rank() == 0


def is_last_stage() -> bool:
    return pipeline_group().rank() == pipeline_group().size() - 1


def is_replica_leader() -> bool:
    """True on the rank that does what each replica must do exactly once."""
    return replica_group().rank() == 0


def is_main() -> bool:
    """True on the rank that writes the logs and prints to the console."""
    return dist.get_rank() == 0


def broadcast_object(value: Any, group: dist.ProcessGroup | None = None) -> Any:
    """Returns the first rank's `value` on every rank of `group` (default: the world)."""
    box = [value]
    source = dist.get_global_rank(group, 0) if group is not None else 0
    dist.broadcast_object_list(box, src=source, group=group, device=devices.device())
    return box[0]


def broadcast_from_last_stage(values: torch.Tensor) -> torch.Tensor:
    """Copies the last pipeline stage's `values` into those of every other stage, in place."""
    group = pipeline_group()
    if group.size() > 1:
        dist.broadcast(values, src=dist.get_global_rank(group, group.size() - 1), group=group)
    return values


def broadcast_in_model(values: torch.Tensor) -> dist.Work | None:
    """Starts to copy the `values` of one rank of the last pipeline stage into those of all ranks that
    hold this copy of the model, in place; None if there is one such rank."""
    group = model_group()
    if group.size() == 1:
        return None
    source = group.size() - tensor_group().size()  # the ranks of the last stage are the last ones
    return dist.broadcast(values, group=group, group_src=source, async_op=True)


def on_any(found: bool) -> bool:
    """Whether `found` is true on any rank of the world. Collective."""
    return bool(reduce_sums([float(found)], dist.group.WORLD, dist.ReduceOp.MAX)[0])


def gather_objects(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Returns every rank's `value`, in rank order, on every rank of `group` (None: the world)."""
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def on_main(task: Callable[[], None]) -> None:
    """Runs `task` on the main rank while the others wait, however long it takes. Collective.

    A barrier would end the run after COLLECTIVE_TIMEOUT, so all ranks meet every few seconds.

    Raises RunFailure on every rank if the task raises.
    """
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(task) if is_main() else None
        while True:
            heartbeat.enter("waiting for the main rank's task")
            done, problem = False, None
            if work is not None and wait([work], timeout=WAIT_SECONDS).done:
                error = work.exception()
                done, problem = True, error and f"{type(error).__name__}: {error}"
            done, problem = broadcast_object((done, problem))
            if problem:
                raise RunFailure(problem)
            if done:
                return


def reduce_sums(
    values: list[float], group: dist.ProcessGroup | None, op: Any = dist.ReduceOp.SUM
) -> list[float]:
    """Reduces `values` element by element over `group` (None: the world) in fp64."""
    total = torch.tensor(values, dtype=torch.float64, device=devices.device())
    dist.all_reduce(total, op=op, group=group)
    return total.tolist()
