"""Tokens per second of our engine."""

from __future__ import annotations

import json
import statistics
import time

import torch.distributed as dist

from benchmarks import reference_work
from benchmarks.generation_work import WORKS, Work
from megatron_rpp.parallel import groups
from megatron_rpp.parallel.device import describe
from megatron_rpp.records import Request, Sampling


def settings_of(work: Work) -> list[str]:
    """The settings of a run of this work."""
    values = {
        "model.layers": work.layers, "model.hidden": work.hidden, "model.heads": work.heads,
        "model.kv_heads": work.kv_heads, "model.ffn_hidden": work.ffn,
        "model.vocab_size": work.vocabulary, "model.max_length": work.prompt + work.new_tokens,
        "rollout.max_new_tokens": work.new_tokens, "rollout.min_new_tokens": 0,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in values.items()]


class _Tokenizer(reference_work.NumberTokenizer):
    def __init__(self, work: Work) -> None:
        self.vocab_size = work.vocabulary
        self.eos_id = self.pad_id = work.vocabulary - 1
        self.eos_ids = tuple(work.end_tokens)


def worker(rounds: int, settings: list[str]) -> None:
    """One rank. The first word of `settings` names the work."""
    work = WORKS[settings[0]]
    run = reference_work.reference_run(
        [*settings_of(work), *settings[1:]], tokenizer=_Tokenizer(work)
    )
    share, rank = work.sequences // groups.data_size(), groups.data_rank()
    prompts = [tuple(prompt) for prompt in work.prompts()]
    requests = [
        Request(prompts[i // work.samples], i) for i in range(rank * share, (rank + 1) * share)
    ]
    least = 0 if work.ends else work.new_tokens
    sampling = Sampling(max_new_tokens=work.new_tokens, min_new_tokens=least)
    rates = []
    for number in range(1 + rounds):  # the first round warms up
        dist.barrier()
        start = time.perf_counter()
        found = run.engine.generate(requests, sampling, seed=1, step=number)
        seconds = groups.reduce_sums([time.perf_counter() - start], None, dist.ReduceOp.MAX)[0]
        tokens = groups.reduce_sums([float(sum(len(g.tokens) for g in found))], None)[0]
        rates.append(tokens / seconds)
    if groups.is_main():
        print(json.dumps({
            "engine": "megatron_rpp", "device": describe(),
            "tokens_per_second": statistics.median(rates[1:]),
        }))  # fmt: skip
    groups.stop()
