"""The metrics of a step: reduced over the data-parallel ranks, then written by the main rank.

docs/metrics.md explains every tag. `metrics.jsonl` has one row per step. TensorBoard has the same
tags as scalars, and histograms of the advantages and response lengths of the main rank's shard.

Left out: Weights & Biases and other trackers.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from megatron_rpp.algorithms import KL_KINDS, effective_share, importance_ratio, kl_estimate
from megatron_rpp.config import AlgorithmConfig
from megatron_rpp.lifecycle.atomic_files import write_atomic
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import groups
from megatron_rpp.rewards import Scores
from megatron_rpp.rollout.buffer import RolloutBuffer
from megatron_rpp.stages.advantage import AdvantageStats
from megatron_rpp.stages.critic import CriticStats
from megatron_rpp.stages.evaluation import Evaluation
from megatron_rpp.stages.update import UpdateStats

_TIME_TAGS = {"logprobs": "score"}
"""Stages whose tag time/... has another name than the stage: the tag is older."""


@dataclass
class StageTimes:
    """Seconds of each stage of one step on this rank, by the name in its tag."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        tag = _TIME_TAGS.get(stage, stage)
        self.seconds[tag] = self.seconds.get(tag, 0.0) + time.perf_counter() - start


def _rollout_difference(buffer: RolloutBuffer) -> torch.Tensor:
    """|log-prob by the rollout engine - that by the policy| of each masked token, fp64."""
    assert buffer.old_logprobs is not None
    return (buffer.rollout_logprobs.double() - buffer.old_logprobs)[buffer.mask].abs()


def _peaks(buffer: RolloutBuffer) -> tuple[float, float]:
    """Maxima over all ranks: memory in GB, and the difference of rollout and training log-probs."""
    difference = _rollout_difference(buffer)
    peaks = [devices.peak_memory_gb(), float(difference.max()) if len(difference) else 0.0]
    memory, largest = groups.reduce_sums(peaks, dist.group.WORLD, dist.ReduceOp.MAX)
    return memory, largest


def _shard_sums(buffer: RolloutBuffer, rewards: Scores) -> dict[str, float]:
    """What this replica's samples add to the step's means."""
    lengths = buffer.response_lengths
    difference = _rollout_difference(buffer)
    assert buffer.scores is not None and buffer.old_logprobs is not None
    ratio = importance_ratio(buffer.old_logprobs, buffer.rollout_logprobs)[buffer.mask].double()
    sums = {
        "samples": len(buffer),
        "timeouts": rewards.timeouts,
        "cut": rewards.cut,
        "truncated": int(buffer.truncated.sum()),
        "generated": int(lengths.sum()),
        "tokens": len(buffer.tokens),
        "masked": int(buffer.mask.sum()),
        "difference": float(difference.sum()),
        "weights": float(ratio.sum()),
        "squared_weights": float(ratio.square().sum()),
        "corrected": 0,
    }
    if buffer.rollout_weights is not None:
        sums["corrected"] = int((buffer.rollout_weights[buffer.mask] != ratio).sum())
    found, member = buffer.group_ids.unique(return_inverse=True)
    low, high = (
        torch.full((len(found),), start).scatter_reduce(0, member, buffer.scores, reduction)
        for start, reduction in ((torch.inf, "amin"), (-torch.inf, "amax"))
    )
    sums |= {"groups": len(found), "flat_groups": int((low == high).sum())}
    if buffer.ref_logprobs is not None:
        for kind in KL_KINDS:
            kl = kl_estimate(buffer.old_logprobs, buffer.ref_logprobs, kind)[buffer.mask]
            sums[f"kl/{kind}"] = float(kl.double().sum())
    return sums | {f"part/{name}": sum(values) for name, values in rewards.parts.items()}


def step_metrics(
    buffer: RolloutBuffer,
    algorithm: AlgorithmConfig,
    *,
    rewards: Scores,
    advantage: AdvantageStats,
    update: UpdateStats,
    critic: CriticStats | None,
    times: StageTimes,
    flops: float,
    staleness: int,
) -> dict[str, float]:
    """The metrics of a step by tag, the same on every rank. Collective over the data-parallel group.

    Args:
        algorithm: with the KL coefficients of the step.
        rewards: the scores of this replica's samples.
        critic: None if there is none.
        flops: what this replica's samples need (flops.py).
        staleness: steps that have updated the policy since the weights of the rollout.
    """
    shard = _shard_sums(buffer, rewards) | {"flops": flops}
    values = [float(value) for value in shard.values()]
    sums = dict(zip(shard, groups.reduce_sums(values, groups.data_group())))
    memory, largest_difference = _peaks(buffer)
    tokens, scores = max(sums["masked"], 1), advantage.scores
    seconds = times.seconds
    whole = sum(seconds.values())
    row = {
        "reward/mean": scores.raw.mean,
        "reward/std": scores.raw.var**0.5,
        "reward/shaped_mean": scores.shaped.mean,
        "reward/shaped_std": scores.shaped.var**0.5,
        "reward/shaped_min": scores.low,
        "reward/shaped_max": scores.high,
        "reward/clipped_share": scores.clipped_share,
        "reward/zero_variance_share": sums["flat_groups"] / sums["groups"],
        "reward/timeouts": sums["timeouts"],
        "reward/cut": sums["cut"],
        "policy/loss": update.loss,
        "policy/clip_fraction": update.clip_fraction,
        "policy/entropy": update.entropy,
        "policy/grad_norm": update.grad_norm,
        "policy/ratio_max": update.ratio_max,
        "policy/approx_kl": update.approx_kl,
        "policy/learning_rate": update.learning_rate,
        "policy/skipped_updates": len(update.skip_reasons),
        "advantage/count": advantage.advantages.count,
        "advantage/mean": advantage.advantages.mean,
        "advantage/var": advantage.advantages.var,
        "response/length_mean": sums["generated"] / sums["samples"],
        "response/truncated_share": sums["truncated"] / sums["samples"],
        "rollout/logprob_abs_diff": sums["difference"] / tokens,
        "rollout/logprob_abs_diff_max": largest_difference,
        "rollout/ess": effective_share(sums["weights"], sums["squared_weights"], sums["masked"]),
        "rollout/correction_clipped_share": sums["corrected"] / tokens,
        "rollout/staleness": staleness,
        "throughput/tokens_per_second": sums["tokens"] / whole,
        "throughput/generated_tokens_per_second": sums["generated"] / seconds["rollout"],
        "memory/peak_gb": memory,
    }
    if (peak := devices.peak_flops()) is not None:
        row["throughput/mfu"] = sums["flops"] / (whole * dist.get_world_size() * peak)
    if critic is not None:
        row |= _critic_row(critic, advantage)
    if len(rewards.parts) > 1:
        row |= {f"reward/{name}": sums[f"part/{name}"] / sums["samples"] for name in rewards.parts}
    if buffer.ref_logprobs is not None:
        row |= {f"kl/{kind}": sums[f"kl/{kind}"] / tokens for kind in KL_KINDS}
        row["kl/coef"] = algorithm.kl_coef if algorithm.kl_in_reward else algorithm.kl_loss_coef
    return row | {f"time/{stage}": value for stage, value in seconds.items()} | {"time/step": whole}


def _critic_row(critic: CriticStats, advantage: AdvantageStats) -> dict[str, float]:
    found = advantage.values
    assert found is not None
    return {
        "critic/loss": critic.loss,
        "critic/explained_variance": found.explained_variance,
        "critic/value_mean": found.values.mean,
        "critic/return_mean": found.returns.mean,
        "critic/clip_fraction": critic.clip_fraction,
        "critic/grad_norm": critic.grad_norm,
        "critic/learning_rate": critic.learning_rate,
        "critic/skipped_updates": len(critic.skip_reasons),
    }


class MetricsLog:
    """Writes the metrics files of a run on the main rank; does nothing on the others.

    metrics.jsonl has a row per step (steps count from 1). evaluations.jsonl has a row per
    evaluation, with sample answers (step 0 is before training). TensorBoard has all of it.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.rows = self.directory / "metrics.jsonl"
        self.evaluations = self.directory / "evaluations.jsonl"
        self.writer: SummaryWriter | None = None

    def open(self, steps_done: int, *, resumed: bool) -> None:
        """Opens the files.

        A resumed run appends to them after the row of step `steps_done`; later rows are removed.
        Any other run starts new files, because it repeats the evaluation of step 0.
        """
        if not groups.is_main():
            return
        for path in (self.rows, self.evaluations):
            rows = [row for row in read_rows(path) if resumed and row["step"] <= steps_done]
            write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        purged = steps_done + 1 if resumed else 0
        self.writer = SummaryWriter(str(self.directory), purge_step=purged)

    def step(self, step: int, row: dict[str, float]) -> None:
        """Writes the metrics of step `step`; they are on the disk when this returns."""
        if self.writer is None:
            return
        self._append(self.rows, {"step": step, **row})
        for tag, value in row.items():
            self.writer.add_scalar(tag, value, step)
        self.writer.flush()

    def evaluation(self, step: int, result: Evaluation) -> None:
        """Writes an evaluation after `step` steps."""
        if self.writer is None:
            return
        self._append(self.evaluations, {"step": step, **asdict(result)})
        if step == 0:  # later ones are in the row of their step
            for tag, value in evaluation_row(result).items():
                self.writer.add_scalar(tag, value, step)
        for number, sample in enumerate(result.samples):
            text = f"{sample.prompt}\n\n**{sample.response}** (label {sample.label})"
            self.writer.add_text(f"eval/sample_{number}", text, step)

    def histograms(self, step: int, buffer: RolloutBuffer) -> None:
        """Writes histograms of the main rank's advantages and response lengths."""
        assert buffer.advantages is not None
        if self.writer is not None and len(buffer.advantages):
            self.writer.add_histogram("advantage/histogram", buffer.advantages, step)
            self.writer.add_histogram("response/length_histogram", buffer.response_lengths, step)

    @staticmethod
    def _append(path: Path, row: dict) -> None:
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def evaluation_row(result: Evaluation) -> dict[str, float]:
    return {"eval/accuracy": result.accuracy, "eval/reward": result.reward}


def read_rows(path: str | Path) -> list[dict]:
    """The rows of a JSONL file; a last line that a kill has cut off is left out."""
    if not Path(path).exists():
        return []
    lines = Path(path).read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
