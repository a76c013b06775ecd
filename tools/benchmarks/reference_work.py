"""The work that the benchmarks time: REINFORCE++ on random prompts with a small random model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_rpp.config import check_world_size, cli
from megatron_rpp.data.chat import PromptFormat
from megatron_rpp.data.prompts import Example, Prompt, PromptSet
from megatron_rpp.lifecycle.entrypoint import launched_world_size
from megatron_rpp.parallel import groups
from megatron_rpp.reporting.console import Console
from megatron_rpp.runtime.inputs import Inputs, open_rewards, response_format, samplings
from megatron_rpp.runtime.run import Run, build

PROMPTS, SAMPLES, PROMPT_TOKENS, NEW_TOKENS, VOCABULARY = 64, 4, 16, 64, 512
SETTINGS = {
    "model.layers": 4, "model.hidden": 128, "model.heads": 4, "model.ffn_hidden": 344,
    "model.vocab_size": VOCABULARY, "model.max_length": PROMPT_TOKENS + NEW_TOKENS,
    "rollout.prompts_per_step": PROMPTS, "rollout.samples_per_prompt": SAMPLES,
    "rollout.max_new_tokens": NEW_TOKENS, "rollout.min_new_tokens": NEW_TOKENS,
    "reward.functions": f"[{Path(__file__).with_name('even_share.py').resolve()}:even_share]",
    "algorithm.kl_coef": 0.05, "optimizer.lr": 1e-5,
    "train.max_tokens_per_microbatch": 2048,  # activations of a layer fit a core's cache
}  # fmt: skip


class NumberTokenizer:
    """Writes token ids as numbers: the reference work is about speed, not language."""

    vocab_size, bos_id, eos_id, pad_id = VOCABULARY, None, VOCABULARY - 1, VOCABULARY - 1
    eos_ids = (eos_id,)

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        return " ".join(map(str, ids))

    def special_id(self, text: str) -> int | None:
        return None

    def render(self, messages: Sequence[dict], generation_prompt: bool) -> str:
        raise NotImplementedError("the reference work has no conversations")


def reference_run(settings: list[str], tokenizer: NumberTokenizer | None = None) -> Run:
    """One rank's run of the reference work, changed by `settings`. Starts the process groups."""
    tokenizer = tokenizer or NumberTokenizer()
    work = [f"--{name}={value}" for name, value in SETTINGS.items()]
    config = cli.parse([*work, *settings]).config
    check_world_size(config, launched_world_size())
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(VOCABULARY - 1, (1024, PROMPT_TOKENS), generator=generator).tolist()
    prompts = [Prompt(Example("benchmark"), tuple(row)) for row in rows]
    sampling, greedy = samplings(config.rollout, tokenizer)
    inputs = Inputs(
        tokenizer=tokenizer,
        form=PromptFormat(tokenizer),
        train=PromptSet([prompts]),
        held_out=prompts[:1],
        rewards=open_rewards(config.reward),
        vocab_size=tokenizer.vocab_size,
        response_form=response_format(config, tokenizer, sampling),
        sampling=sampling,
        greedy=greedy,
    )
    groups.start(**config.parallel.sizes(), seed=config.seed)
    return build(config, inputs, Console(main=False))
