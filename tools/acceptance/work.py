"""The work of the checks: random models and random rows through the stages of a real step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from benchmarks.reference_work import NumberTokenizer

from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.config import (
    AlgorithmConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    TrainConfig,
)
from megatron_rpp.data.prompts import Example, Prompt
from megatron_rpp.model import build, pipeline
from megatron_rpp.model.optimizer import build_optimizer
from megatron_rpp.model.trained_model import TrainedModel
from megatron_rpp.parallel import device as devices
from megatron_rpp.records import Generation, MicroBatch, Request, Sampling, StepKey
from megatron_rpp.rollout.buffer import RolloutBuffer, from_generations
from megatron_rpp.rollout.engine import MegatronEngine
from megatron_rpp.stages.logprobs import make_micro_batches, response_logprobs, token_logprobs
from megatron_rpp.stages.minibatches import UpdateProgress
from megatron_rpp.stages.update import UpdateStats, update_policy

SEED = 5


def stage(model: ModelConfig, train: TrainConfig = build.INFERENCE) -> torch.nn.ModuleList:
    """A random model. The weights are drawn on the device: on the host it would take half a minute."""
    assert model.vocab_size is not None
    built = build.build_model(
        model, ParallelConfig(), vocab_size=model.vocab_size, seed=None, train=train
    )
    generator = torch.Generator(devices.device()).manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, model.init_std, generator=generator)
            elif not name.endswith("bias"):
                parameter.fill_(1.0)
    return built


def policy(model: ModelConfig, train: TrainConfig = build.INFERENCE) -> TrainedModel:
    wrapped = build.wrap_for_training(stage(model, train), distributed_optimizer=True)
    return TrainedModel(
        wrapped, *build_optimizer(wrapped, OptimizerConfig(), model.dtype == "bf16")
    )


def buffer(model: ModelConfig, row: Sequence[int]) -> RolloutBuffer:
    """Samples of random tokens, of which the first half is the prompt, with random advantages."""
    assert model.vocab_size is not None
    generator = torch.Generator().manual_seed(SEED)
    prompts, requests, generations = [], [], []
    for number, length in enumerate(row):
        tokens = torch.randint(model.vocab_size, (length,), generator=generator).tolist()
        prompts.append(Prompt(Example("acceptance"), tuple(tokens[: length // 2])))
        requests.append(Request(prompts[-1].tokens, number))
        answer = tokens[length // 2 :]
        generations.append(Generation(answer, [0.0] * len(answer), False))
    made = from_generations(prompts, requests, generations, samples_per_prompt=1)
    made.advantages = torch.randn(len(made.mask), generator=generator)
    return made


def score(trained: TrainedModel, samples: RolloutBuffer) -> torch.Tensor:
    """The log-probs of the samples' responses."""
    tokens = int(samples.lengths.sum())
    return response_logprobs(trained.model, samples, tokens, temperature=1.0)


def update(trained: TrainedModel, samples: RolloutBuffer) -> UpdateStats:
    """One optimizer step on all samples in one packed row. They have been scored."""
    train = TrainConfig(max_tokens_per_microbatch=int(samples.lengths.sum()))
    return update_policy(
        trained,
        samples,
        AlgorithmConfig(kl_coef=0.0),
        train=train,
        rollout=RolloutConfig(prompts_per_step=len(samples), samples_per_prompt=1),
        key=StepKey(SEED, 0, 0),
        state=RunState(),
        progress=UpdateProgress(),
        safe_point=lambda: None,
    )


def backward(trained: TrainedModel, samples: RolloutBuffer) -> None:
    """Leaves the gradient of the mean log-prob of the samples' responses in the buffers."""

    def loss(batch: MicroBatch, hidden: torch.Tensor):
        logprobs, _ = token_logprobs(trained.model, batch, hidden, temperature=1.0)
        total = -logprobs.sum()
        return total, torch.tensor(len(logprobs), dtype=torch.int32).to(total.device), None

    for chunk in trained.model:
        chunk.zero_grad_buffer()
    samples_of_row = list(range(len(samples)))
    tokens = int(samples.lengths.sum())
    batches = make_micro_batches(trained.model, samples, samples_of_row, max_tokens=tokens)
    pipeline.train(trained.model, batches, loss)


def generate(
    model: torch.nn.ModuleList, *, prompt: int, batch: int, tokens: int
) -> tuple[list[Request], list[Generation]]:
    """`batch` responses of exactly `tokens` tokens to random prompts of `prompt` tokens."""
    engine = MegatronEngine(model, NumberTokenizer(), max_batch=batch)
    words = torch.randint(500, (batch, prompt), generator=torch.Generator().manual_seed(SEED))
    requests = [Request(tuple(row), number) for number, row in enumerate(words.tolist())]
    sampling = Sampling(max_new_tokens=tokens, min_new_tokens=tokens)
    return requests, engine.generate(requests, sampling, seed=SEED, step=0)
