"""Estimates the time of a step on GPUs by arithmetic alone; pure functions of the settings.

Matrix products: FLOPs over peak × efficiency. Element-wise operations and decoding: bytes over the
bandwidth of the memory. Communication: bytes over the speed of the link. Left out: rewards, saves,
evaluations, stragglers, and that sequences differ in length within a micro-batch.

Legend: h hidden, f feed-forward channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from megatron_rpp.config import Config, ModelConfig
from megatron_rpp.runtime.assumptions import Assumptions, Work
from megatron_rpp.runtime.machines import Machine
from megatron_rpp.runtime.memory_estimate import has_reference, optimizer_shards
from megatron_rpp.runtime.model_size import (
    FP32,
    heads_of,
    layer_parameters,
    optimizer_bytes,
    stage_parameters,
    weight_bytes,
)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by phase."""

    rollout: float
    logprobs: float
    update: float
    parts: dict[str, float] = field(default_factory=dict)
    """What the update consists of, and the decoding of one token."""

    @property
    def total(self) -> float:
        return self.rollout + self.logprobs + self.update


def body_flops_per_token(model: ModelConfig, length: float) -> float:
    """A forward pass through all layers; attention is causal (reporting/flops.py, for tensors)."""
    heads, _, size = heads_of(model)
    weights = layer_parameters(model, 1) - 2 * model.hidden
    return model.layers * (2 * weights + 4 * heads * size * (length + 1) / 2)


@dataclass(frozen=True)
class _Clock:
    """Converts work into seconds for one layout on one kind of machine."""

    config: Config
    machine: Machine
    assumed: Assumptions
    world: int
    vocab_size: int

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    def compute(self, flops: float) -> float:
        """Matrix products on one GPU."""
        width = self.model.hidden
        reached = self.assumed.efficiency * width / (width + self.assumed.half_width)
        return flops / (self.machine.flops(self.model.dtype) * reached)

    def read(self, count: float) -> float:
        """Bytes that a GPU reads from or writes to its memory."""
        return count / (self.machine.bandwidth * self.assumed.memory_efficiency)

    def send(self, count: float, ranks: int) -> float:
        """Bytes that each of `ranks` neighbouring GPUs sends."""
        within = ranks <= self.machine.per_node
        link = self.machine.node_link if within else self.machine.network
        return count / (link * self.assumed.link_efficiency)

    def layer(self, tokens: float, length: float, *, passes: float) -> float:
        """One layer over `tokens` tokens of a row, on one GPU; passes: forward = 1, backward = 2."""
        model, parallel = self.model, self.config.parallel
        width = weight_bytes(model)
        share = parallel.tensor * parallel.context
        flops = body_flops_per_token(model, length) / model.layers * tokens / share
        heads, _, size = heads_of(model)
        # Norms and residual additions; SwiGLU and rotary positions.
        split = parallel.tensor if parallel.sequence_parallel else 1
        touched = 10 * model.hidden / split
        touched += (3 * model.ffn_hidden + 3 * heads * size) / parallel.tensor
        elementwise = self.read(touched * width * tokens / parallel.context)
        return passes * (self.compute(flops) + elementwise + self._exchange(tokens))

    def _exchange(self, tokens: float) -> float:
        """Tensor- and context-parallel communication of one pass through one layer."""
        model, parallel = self.model, self.config.parallel
        tensor, context, width = parallel.tensor, parallel.context, weight_bytes(model)
        _, kv_heads, size = heads_of(model)
        seconds = 0.0
        if tensor > 1:  # two gathers and two scatters, or two all-reduces, which send as much
            sent = 4 * (tensor - 1) / tensor * model.hidden * width * tokens / context
            seconds += self.send(sent, tensor)
        if context > 1:  # the keys and values of the other ranks
            sent = (context - 1) / context * 2 * kv_heads * size / tensor * width * tokens
            seconds += self.send(sent, tensor * context)
        return seconds * (1 - self.assumed.hidden_share)

    def head(self, tokens: float, *, passes: float) -> float:
        """The output projection of response tokens, on the last stage."""
        parallel = self.config.parallel
        flops = 2 * self.model.hidden * self.vocab_size * tokens
        return passes * self.compute(flops / (parallel.tensor * parallel.context))


def micro_batches(config: Config, replicas: int, *, work: Work, fill: float) -> tuple[int, float]:
    """(number, tokens of each with its padding) for one optimizer step of one replica."""
    samples = config.rollout.samples_per_step / (config.train.minibatches * replicas)
    tokens = samples * work.length
    row = max(config.train.max_tokens_per_microbatch, work.length)
    count = max(1, math.ceil(tokens / (row * fill)))
    return count, tokens / fill / count


def _pass_time(clock: _Clock, count: int, tokens: float, *, training: bool) -> float:
    """Seconds of `count` micro-batches through the pipeline, with its bubble.

    The bubble is (p - 1) / v micro-batches (Narayanan et al., arXiv 2104.04473, section 2.2).
    """
    config, assumed = clock.config, clock.assumed
    parallel, work = config.parallel, Work.of(config, assumed)
    layers = config.model.layers // parallel.pipeline
    body = head = 1.0
    if training:
        body, head = 3.0, 4.0  # the head's backward pass computes the logits again
        body += _recomputed_share(config)
    stage = layers * clock.layer(tokens, work.length, passes=body)
    answered = tokens * assumed.row_fill * work.response / work.length
    slowest = stage + clock.head(answered, passes=head)
    if parallel.pipeline > 1:
        split = parallel.tensor if parallel.sequence_parallel else 1
        row = tokens / parallel.context * config.model.hidden * weight_bytes(config.model) / split
        ways = 2 if training else 1
        slowest += ways * parallel.virtual_pipeline * clock.send(row, clock.world)
    bubble = (parallel.pipeline - 1) / parallel.virtual_pipeline
    return count * slowest + bubble * stage


def _recomputed_share(config: Config) -> float:
    """Forward passes of the layers that the backward pass repeats."""
    model, train = config.model, config.train
    if train.recompute == "none":
        return 0.0
    if train.recompute == "selective":
        return 3 * model.hidden * model.ffn_hidden / layer_parameters(model, 1)
    if train.recompute_method == "uniform":
        return 1.0
    parts = config.parallel.pipeline * config.parallel.virtual_pipeline
    return train.recompute_layers * parts / model.layers


def _optimizer_time(clock: _Clock, replicas: int) -> tuple[float, float]:
    """(reduction of gradients and gathering of weights, Adam) of one optimizer step."""
    config, model = clock.config, clock.model
    count = max(
        stage_parameters(model, config.parallel, vocab_size=clock.vocab_size, stage=stage)
        for stage in (0, config.parallel.pipeline - 1)
    )
    ranks = replicas * config.parallel.context
    sent = (ranks - 1) / ranks * count * (FP32 + weight_bytes(model))
    exchange = clock.send(sent, clock.world) if ranks > 1 else 0.0
    held = count / optimizer_shards(config.optimizer, config.parallel, replicas)
    touched = held * (2 * optimizer_bytes(model) + FP32)  # state read and written, gradients read
    adam = clock.read(count * 3 * FP32)  # gradients set to zero, and their norm
    if config.optimizer.offload:
        travel = (
            held
            * (FP32 + weight_bytes(model))
            / (clock.machine.host_link * clock.assumed.link_efficiency)
        )
        adam += travel + touched / clock.assumed.host_bandwidth
    else:
        adam += clock.read(touched)
    return exchange, adam


def decode_seconds(clock: _Clock, sequences: float, context: float) -> tuple[float, float]:
    """(seconds of the GPUs, of the host) for one token of each sequence; stages take turns.

    context: mean tokens that a sequence attends to.
    """
    model, parallel = clock.model, clock.config.parallel
    width = weight_bytes(model)
    _, kv_heads, size = heads_of(model)
    weights = model.layers * layer_parameters(model, parallel.tensor)
    weights += model.hidden * clock.vocab_size // parallel.tensor
    cache = sequences * context * model.layers * 2 * kv_heads * size / parallel.tensor
    flops = sequences * body_flops_per_token(model, context) / parallel.tensor
    gpu = max(clock.read((weights + cache) * width), clock.compute(flops))
    return gpu, model.layers * clock.assumed.host_ms_per_layer / 1e3


def _rollout_time(clock: _Clock, replicas: int) -> tuple[float, float]:
    """(seconds of the rollout, of one decoded token)."""
    config, work = clock.config, Work.of(clock.config, clock.assumed)
    rollout, parallel = config.rollout, config.parallel
    own = rollout.samples_per_step / (replicas * parallel.context)
    slots = min(own, rollout.max_batch)
    longest = work.prompt + rollout.max_new_tokens
    response = min(work.response, rollout.max_new_tokens)
    if rollout.max_cache_tokens is not None:
        slots = min(slots, max(1.0, rollout.max_cache_tokens / (work.prompt + response / 2)))
    token = max(decode_seconds(clock, slots, work.prompt + response / 2))
    last = max(decode_seconds(clock, 1, longest))
    # Slots stay full until no request waits; then the longest responses finish alone.
    seconds = own / slots * response * token
    seconds += (rollout.max_new_tokens - response) * last
    prompts = own / rollout.samples_per_prompt
    flops = prompts * work.prompt * body_flops_per_token(config.model, work.prompt)
    return seconds + clock.compute(flops / parallel.tensor), token


def step_time(
    config: Config,
    vocab_size: int,
    *,
    replicas: int,
    machine: Machine,
    assumed: Assumptions,
) -> StepTime:
    """Seconds of one step of `config` on its layout times `replicas`.

    A critic counts like a second policy that samples nothing: its head is smaller than assumed.
    """
    parallel, train = config.parallel, config.train
    world = replicas * parallel.tensor * parallel.pipeline * parallel.context
    clock = _Clock(config, machine, assumed, world, vocab_size)
    count, tokens = micro_batches(
        config, replicas, work=Work.of(config, assumed), fill=assumed.row_fill
    )
    steps = train.epochs * train.minibatches
    passes = _pass_time(clock, count, tokens, training=True)
    exchange, adam = _optimizer_time(clock, replicas)
    critic = config.algorithm.has_critic
    forward = (config.algorithm.old_logprobs == "recompute") + has_reference(config) + critic
    scored = _pass_time(clock, count * train.minibatches, tokens, training=False)
    rollout, token = _rollout_time(clock, replicas)
    steps *= 1 + critic
    parts = {"passes": steps * passes, "exchange": steps * exchange, "adam": steps * adam}
    return StepTime(rollout, forward * scored, sum(parts.values()), parts | {"token": token})
