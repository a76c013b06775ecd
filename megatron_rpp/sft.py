"""Supervised fine-tuning: next-token loss on the assistant's turns, on any layout.

    torchrun --nproc-per-node N -m megatron_rpp.sft --config FILE [--section.key value ...]

The model learns the label of a row and, in a conversation, every turn of the assistant
(data/supervised.py). The loss is the mean over those tokens of the whole batch. Models, packed
micro-batches, evaluation, checkpoints, resume and stopping are those of `train.py`.
"""

from __future__ import annotations

import time
from functools import partial

from megatron_rpp.config import Config
from megatron_rpp.lifecycle import entrypoint, heartbeat
from megatron_rpp.runtime import startup

if __name__ == "__main__":
    STARTUP = entrypoint.run(startup.for_sft)  # --help and mistakes end here, before torch

import torch
import torch.distributed as dist

from megatron_rpp.data.chat import PromptFormat
from megatron_rpp.data.prompts import Prompt
from megatron_rpp.data.supervised import sft_example
from megatron_rpp.parallel import device as devices
from megatron_rpp.parallel import groups
from megatron_rpp.records import Generation, MicroBatch, Request
from megatron_rpp.reporting.console import Console
from megatron_rpp.rollout.buffer import RolloutBuffer, from_generations
from megatron_rpp.rollout.planning import shard
from megatron_rpp.runtime import supervised
from megatron_rpp.runtime.inputs import Inputs
from megatron_rpp.runtime.policy import build_policy
from megatron_rpp.runtime.run import Run, assemble, megatron_engine
from megatron_rpp.runtime.session import freeze_heap, session
from megatron_rpp.stages import nonfinite
from megatron_rpp.stages.logprobs import make_micro_batches, token_logprobs
from megatron_rpp.stages.minibatches import optimizer_step


def main(argv: list[str] | None = None, *, start: startup.Startup | None = None) -> None:
    start = start or startup.for_sft(argv)
    config = start.config
    groups.start(
        **config.parallel.sizes(), seed=config.seed, deterministic=config.train.deterministic
    )
    freeze_heap()
    finetune(config, start.inputs, start.dry_run)
    groups.stop()


def batch_of(prompts: list[Prompt], form: PromptFormat) -> RolloutBuffer:
    """A buffer with the labels as responses; the mask selects the tokens to learn."""
    examples = [sft_example(prompt, form) for prompt in prompts]
    requests = [Request(part.prompt, index) for index, part in enumerate(examples)]
    generations = [
        Generation(part.response, [0.0] * len(part.response), False) for part in examples
    ]
    buffer = from_generations(prompts, requests, generations, samples_per_prompt=1)
    learned = [mark for part in examples for mark in part.learned]
    buffer.mask = torch.tensor(learned, dtype=torch.bool)
    return buffer


def settings_of(config: Config) -> Config:
    """The settings of the run."""
    return supervised.with_section(config, config.sft)


def finetune(config: Config, inputs: Inputs, dry_run: bool = False) -> None:
    """Trains for sft.steps steps, or until sft.stop_accuracy is reached. Collective."""
    config, console = settings_of(config), Console(groups.is_main())
    with session(config, console) as stop:
        policy = build_policy(config, config.optimizer, inputs.vocab_size, source=inputs.source)
        engine = megatron_engine(config, policy, inputs)
        run = assemble(config, inputs, console, policy=policy, engine=engine)
        run.stop = stop
        supervised.train_steps(
            run, config.sft, sft_step, name="sft", title="supervised steps", dry_run=dry_run
        )


def sft_step(run: Run) -> dict[str, float]:
    """One optimizer step. Returns its metrics; the loss is in nats per token. Collective.

    Raises RunFailure if too many updates in a row were skipped (stages/nonfinite.py).
    """
    heartbeat.enter("supervised step")
    start = time.perf_counter()
    inputs, policy, train, key = run.inputs, run.policy, run.config.train, run.step_key
    size = run.config.sft.batch_size
    rows = inputs.train.order(key.prompts_seen, size, key.seed)
    positions = shard(size, groups.data_rank(), groups.data_size())
    buffer = batch_of([inputs.train[rows[i]] for i in positions], inputs.form)

    def loss(
        batch: MicroBatch, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logprobs, _ = token_logprobs(policy.model, batch, hidden, temperature=1.0)
        mask = devices.upload(buffer.mask[batch.column], logprobs.device)
        total = -torch.where(mask, logprobs, 0.0).sum()
        count = mask.sum().int()
        return total, count, torch.stack([total.detach().double(), count.double()])

    batches = make_micro_batches(
        policy.model, buffer, list(range(len(buffer))), max_tokens=train.max_tokens_per_microbatch
    )
    done = optimizer_step(policy, batches, loss)
    nonfinite.count_skipped(run.state, done.skip_reason, train.max_skipped_updates)
    row = {"sft/skipped_updates": 0, "sft/grad_norm": done.grad_norm}
    if done.skip_reason is None:
        row["sft/loss"] = _mean_loss(done.reports)
    else:
        row["sft/skipped_updates"] = 1
    return row | {"time/step": time.perf_counter() - start}


def _mean_loss(reports: list[torch.Tensor]) -> float:
    """The loss per token, from the sums and counts of all micro-batches. Collective."""
    empty = torch.zeros(2, dtype=torch.float64, device=devices.device())
    sums = torch.stack([empty, *reports]).sum(0)
    dist.all_reduce(sums, group=groups.token_group())
    total, count = groups.broadcast_from_last_stage(sums).tolist()
    return total / count


if __name__ == "__main__":
    entrypoint.run(partial(main, start=STARTUP))
