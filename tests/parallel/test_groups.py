"""Process groups on four real ranks, split into each of the layouts below.

Megatron orders ranks tensor first, then data, then pipeline: with TP2 x PP2 ranks 0, 1 are the
first stage and 2, 3 the second; with DP2 x TP2 the replicas are 0, 1 and 2, 3. One world of four
processes serves the whole module.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_rpp.lifecycle.entrypoint import launched_world_size
from megatron_rpp.lifecycle.exit_codes import RunFailure
from megatron_rpp.parallel import groups
from tests.distributed import run_ranks

# Tensor, pipeline and context size of each.
LAYOUTS = {
    "TP2 x PP2": (2, 2, 1),
    "DP2 x TP2": (2, 1, 1),
    "DP4": (1, 1, 1),
    "PP4": (1, 4, 1),
    "DP2 x CP2": (1, 1, 2),
    "PP2 x CP2": (1, 2, 2),
}
KINDS = {
    "data": groups.data_group,
    "context": groups.context_group,
    "token": groups.token_group,
    "model": groups.model_group,
    "tensor": groups.tensor_group,
    "pipeline": groups.pipeline_group,
    "replica": groups.replica_group,
}


def observe(rank):
    """What this rank sees of the current layout."""
    members = {kind: dist.get_process_group_ranks(of()) for kind, of in KINDS.items()}
    box = {"rank": rank, "text": "x" * rank}
    filled = torch.full((3,), float(rank))
    result = groups.broadcast_from_last_stage(filled)
    return {
        "members": members,
        "data rank": (groups.data_rank(), groups.data_size()),
        "stage": (groups.is_first_stage(), groups.is_last_stage()),
        "leader": groups.is_replica_leader(),
        "main": groups.is_main(),
        "world object": groups.broadcast_object(box)["rank"],
        "objects": {kind: groups.broadcast_object(box, of())["rank"] for kind, of in KINDS.items()},
        "gathered": {kind: groups.gather_objects(rank, of()) for kind, of in KINDS.items()},
        "in place": result is filled,
        "from last stage": filled.tolist(),
        # 1e9 and 1e-6 together: fp32 has 24 bits, not 53, so its sum would lose the second.
        "sums": groups.reduce_sums([rank + 1.0, 1e9 + 1e-6], groups.data_group()),
        "largest": groups.reduce_sums([float(rank)], groups.replica_group(), dist.ReduceOp.MAX),
    }


def fail_on_main():
    done = []
    groups.WAIT_SECONDS = 0.1
    groups.on_main(lambda: (time.sleep(0.35), done.append(dist.get_rank())))
    try:
        groups.on_main(lambda: Path("/nowhere").read_text())
    except RunFailure as error:
        return done, str(error)


def every_layout(rank):
    os.environ["LOCAL_WORLD_SIZE"] = "4"
    seen = {}
    for name, (tensor, pipeline, context) in LAYOUTS.items():
        groups.start(tensor, pipeline, seed=1234, context=context)
        seen[name] = observe(rank)
        seen[name]["threads"] = torch.get_num_threads()
        groups.destroy()
    return seen | {"on main": fail_on_main()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(every_layout, 4, tmp_path_factory.mktemp("ranks"))


def column(ranks, layout, key):
    return [rank[layout][key] for rank in ranks]


def members(ranks, layout, kind):
    return [rank["members"][kind] for rank in (each[layout] for each in ranks)]


def test_tensor_by_pipeline(ranks):
    layout = "TP2 x PP2"
    assert members(ranks, layout, "data") == [[0], [1], [2], [3]]
    assert members(ranks, layout, "tensor") == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert members(ranks, layout, "pipeline") == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert members(ranks, layout, "replica") == [[0, 1, 2, 3]] * 4
    assert column(ranks, layout, "data rank") == [(0, 1)] * 4
    assert column(ranks, layout, "stage") == [(True, False)] * 2 + [(False, True)] * 2


def test_data_by_tensor(ranks):
    layout = "DP2 x TP2"
    assert members(ranks, layout, "data") == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert members(ranks, layout, "tensor") == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert members(ranks, layout, "pipeline") == [[0], [1], [2], [3]]
    assert members(ranks, layout, "replica") == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert column(ranks, layout, "data rank") == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert column(ranks, layout, "stage") == [(True, True)] * 4


def test_context_parallel_ranks_share_a_replica(ranks):
    """Context-parallel ranks are neighbours; together they have one shard of the buffer."""
    layout = "DP2 x CP2"
    assert members(ranks, layout, "context") == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert members(ranks, layout, "replica") == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert members(ranks, layout, "data") == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert members(ranks, layout, "token") == [[0, 1, 2, 3]] * 4
    assert members(ranks, layout, "model") == [[0], [1], [2], [3]]
    assert column(ranks, layout, "data rank") == [(0, 2), (0, 2), (1, 2), (1, 2)]
    layout = "PP2 x CP2"
    assert members(ranks, layout, "replica") == [[0, 1, 2, 3]] * 4
    assert members(ranks, layout, "model") == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert members(ranks, layout, "token") == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_what_the_main_rank_does_alone_is_done_once_and_fails_on_all(ranks):
    message = "FileNotFoundError: [Errno 2] No such file or directory: '/nowhere'"
    assert [rank["on main"] for rank in ranks] == [([0], message)] + [([], message)] * 3


def test_one_kind_of_parallelism(ranks):
    assert column(ranks, "DP4", "data rank") == [(rank, 4) for rank in range(4)]
    assert column(ranks, "PP4", "stage") == [
        (True, False), (False, False), (False, False), (False, True)
    ]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exactly_one_leader_a_replica_and_one_main(ranks, layout):
    replicas = {tuple(replica) for replica in members(ranks, layout, "replica")}
    tensor, pipeline, context = LAYOUTS[layout]
    assert sorted(rank for replica in replicas for rank in replica) == [0, 1, 2, 3]
    assert {len(replica) for replica in replicas} == {tensor * pipeline * context}
    leader = column(ranks, layout, "leader")
    for replica in replicas:
        assert [leader[rank] for rank in replica].count(True) == 1
    assert column(ranks, layout, "main") == [True, False, False, False]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_objects_come_from_the_first_rank_and_gather_in_rank_order(ranks, layout):
    assert column(ranks, layout, "world object") == [0, 0, 0, 0]
    for rank in ranks:
        for kind, group in rank[layout]["members"].items():
            assert rank[layout]["objects"][kind] == group[0]
            assert rank[layout]["gathered"][kind] == group


def test_broadcast_from_the_last_stage(ranks):
    assert all(all(column(ranks, layout, "in place")) for layout in LAYOUTS)
    filled = {name: [x[0] for x in column(ranks, name, "from last stage")] for name in LAYOUTS}
    assert filled == {
        "TP2 x PP2": [2.0, 3.0, 2.0, 3.0],
        "DP2 x TP2": [0.0, 1.0, 2.0, 3.0],
        "DP4": [0.0, 1.0, 2.0, 3.0],
        "PP4": [3.0, 3.0, 3.0, 3.0],
        "DP2 x CP2": [0.0, 1.0, 2.0, 3.0],
        "PP2 x CP2": [2.0, 3.0, 2.0, 3.0],
    }


def test_reductions(ranks):
    sums = column(ranks, "DP2 x TP2", "sums")
    assert [first for first, _ in sums] == [4.0, 6.0, 4.0, 6.0]  # ranks 0, 2 and ranks 1, 3
    assert all(second == 2e9 + 2e-6 != 2e9 for _, second in sums), "not summed in fp64"
    assert column(ranks, "DP4", "sums")[0][0] == 10.0
    assert column(ranks, "DP2 x TP2", "largest") == [[1.0], [1.0], [3.0], [3.0]]


def test_ranks_share_the_hosts_cores(ranks):
    share = max(1, len(os.sched_getaffinity(0)) // 4)
    assert all(column(ranks, layout, "threads") == [share] * 4 for layout in LAYOUTS)


def test_a_world_of_one_needs_no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for _ in range(2):  # and it can be left and joined again
        groups.start(1, 1, seed=0)
        try:
            assert launched_world_size() == 1
            assert groups.data_size() == 1 and groups.is_replica_leader() and groups.is_main()
            assert groups.is_first_stage() and groups.is_last_stage()
            assert groups.broadcast_object("a") == "a"
            assert groups.gather_objects("a", groups.replica_group()) == ["a"]
            assert groups.reduce_sums([0.5], groups.data_group()) == [0.5]
        finally:
            groups.stop()
        assert not dist.is_initialized()
