"""Whole steps on a pretended CUDA device, with real ranks: no operation mixes places, and the hot
loops wait for the GPU no more often than the budget says. `pytest -s` shows where the host waits.

Faults that are seeded on purpose show that the check finds them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rpp.model.language_model import chunks
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import groups
from megatron_rpp.rollout import batch
from megatron_rpp.runtime.run import Run
from megatron_rpp.stages import update
from tests.distributed import run_ranks
from tests.preference_run import make_preferences
from tests.pretend_cuda import budget, work
from tests.pretend_cuda.device import pretended_cuda
from tests.pretend_cuda.watch import MixedPlaces, Watch
from tests.small_run import make_data

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not devices.ON_CPU, reason="there is a CUDA device"),
]

BF16 = {"model__dtype": "bf16"}
OFFLOAD = {"reference__placement": "offload"}
LAYOUTS = {
    "TP1": BF16,
    "TP1 Adam on the host": BF16 | {"optimizer__offload": "true"},
    "TP2 SP": BF16 | {"parallel__tensor": 2, "parallel__sequence_parallel": "true"},
    "TP1 PPO": BF16 | {"algorithm__name": "ppo"},
    "CP2": OFFLOAD | {"parallel__context": 2},  # in fp32
    "PP2": BF16 | OFFLOAD | {"parallel__pipeline": 2},
}
TIMEOUT = 400.0  # a busy machine is slow, not wrong
STAGES = {
    "rollout", "reward", "logprobs", "update", "evaluation", "supervised step",
    "reward-model step", "save: begin",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretended")
    make_data(folder)
    (folder / "preferences").mkdir()
    make_preferences(folder / "preferences")
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_whole_steps_mix_nothing_and_keep_to_the_budget(name: str, data: Path, tmp_path: Path):
    ranks = 1 if name.startswith("TP1") else 2
    settings = work.SETTINGS | LAYOUTS[name]
    results = run_ranks(work.everything, ranks, tmp_path, data, tmp_path, settings, timeout=TIMEOUT)
    for rank, found in enumerate(results):
        print(f"\n{name}, rank {rank}: where the host waits, {work.STEPS}\n{found.report}")
        assert found.mixes == []
        assert found.phases >= STAGES
        problems = [
            problem
            for loop, counts in found.loops.items()
            for problem in budget.excess(loop, counts, pipelined="PP" in name)
        ]
        assert problems == []


def without_uploads(patch: pytest.MonkeyPatch, run: Run) -> None:
    patch.setattr(devices, "upload", lambda values, target: values)


def weight_on_host(patch: pytest.MonkeyPatch, run: Run) -> None:
    weight = chunks(run.policy.model)[0].decoder.final_layernorm.weight
    patch.setattr(weight, "data", weight.detach().cpu())


def column_on_host(patch: pytest.MonkeyPatch, run: Run) -> None:
    loss = update.policy_loss

    def mixed(ours: torch.Tensor, old: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return loss(ours, old.cpu(), *args, **options)

    patch.setattr(update, "policy_loss", mixed)


def sums_on_host(patch: pytest.MonkeyPatch, run: Run) -> None:
    patch.setattr(devices, "device", lambda: torch.device("cpu"))


Seed = Callable[[pytest.MonkeyPatch, Run], None]
MIXES: dict[str, tuple[Seed, str, str]] = {
    "a micro-batch stays on the host": (without_uploads, "log-probs", "tensor_parallel/layers.py"),
    "a weight is on the host": (weight_on_host, "token", "megatron_rpp/model/norm.py"),
    "a column stays on the host": (column_on_host, "update", "megatron_rpp/algorithms/losses.py"),
    "a collective of host tensors": (sums_on_host, "sum", "megatron_rpp/parallel/groups.py"),
}
"""Seed, the work that meets it, and the file where it must be found."""


def read_loss(patch: pytest.MonkeyPatch, run: Run) -> None:
    loss = update.policy_loss

    def read(*args: Any, **options: Any) -> torch.Tensor:
        result = loss(*args, **options)
        float(result.detach().sum())
        return result

    patch.setattr(update, "policy_loss", read)


def read_tokens(patch: pytest.MonkeyPatch, run: Run) -> None:
    choose = batch.choose

    def read(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, logprobs = choose(*args, **options)
        tokens.tolist()
        return tokens, logprobs

    patch.setattr(batch, "choose", read)


WAITS: dict[str, tuple[Seed, str]] = {
    "the loss is read": (read_loss, "update"),
    "tokens are read twice": (read_tokens, "token"),
}


def seeded(rank: int, data: Path, folder: Path) -> tuple[dict[str, str], dict[str, list[str]]]:
    """What the check says of each fault."""
    with pretended_cuda() as watch, work.built(data, folder, work.SETTINGS | BF16) as run:
        buffer = work.sampled(run)
        works = {
            "token": lambda: work.decode(run, 2),
            "log-probs": lambda: work.score(run, buffer, work.WIDE),
            "update": lambda: work.update_once(run, buffer, work.WIDE),
            "sum": lambda: groups.reduce_sums([1.0], None),
        }
        mixes = {}
        for name, (seed, meets, _) in MIXES.items():
            with pytest.MonkeyPatch.context() as patch:
                seed(patch, run)
                with pytest.raises(MixedPlaces) as raised:
                    works[meets]()
            mixes[name] = str(raised.value)
            works[meets]()  # without the fault it runs
        assert len(watch.mixes) == len(MIXES)
        return mixes, {name: over_budget(watch, run, *case) for name, case in WAITS.items()}


def over_budget(watch: Watch, run: Run, seed: Seed, loop: str) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        seed(patch, run)
        counts = work.measure(watch, run, [loop])[loop]
    return budget.excess(loop, counts, pipelined=False)


def test_seeded_faults_are_found(data: Path, tmp_path: Path) -> None:
    ((mixes, waits),) = run_ranks(seeded, 1, tmp_path, data, tmp_path, timeout=TIMEOUT)
    assert mixes.keys() == MIXES.keys() and waits.keys() == WAITS.keys()
    for name, (_, _, file) in MIXES.items():
        assert file in mixes[name], mixes[name]
    for (problem,) in waits.values():
        assert "test_pretended_steps.py" in problem and "0 are allowed" in problem
