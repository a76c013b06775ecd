"""What a run was made with, as its checkpoints keep it: data, tokenizer and reward.

A resume compares it with what it is given now. Other prompts begin at their start: the place of the
checkpoint is one in the order of the old ones. Any other difference is said, and the run goes on.
Identities are of contents, not of paths: a copied data set is the same data set.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Callable, NamedTuple

from megatron_rpp.checkpoint.run_state import RunState
from megatron_rpp.config import Config
from megatron_rpp.runtime.inputs import Inputs

PROMPTS = "the training data"
_TOKENIZER_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model",
    "*.tiktoken", "chat_template*",
)  # fmt: skip
_REWARD = ("functions", "options", "weights", "normalize", "scale", "clip", "timeout_score",
           "keep_special_tokens")  # fmt: skip


class Identity(NamedTuple):
    """Of one thing that a run is made with."""

    digest: str
    shown: str
    """In words, for messages."""


def identities(config: Config, inputs: Inputs) -> dict[str, Identity]:
    """By what they are of, in words."""
    data, reward = config.data, config.reward
    prompts, labels = inputs.train.identities()
    named = f"{', '.join(data.sources)}: {len(inputs.train)} prompts"
    held_out = [[p.example.prompt, p.example.label] for p in inputs.held_out]
    form = [data.apply_chat_template, data.system_prompt, _digest(_files(data.chat_template))]
    found = {
        PROMPTS: Identity(prompts, named),
        "the labels of the training data": Identity(labels, f"{data.label_key} of {named}"),
        "the held-out data": _of(held_out, f"{data.eval or 'a split'}: {len(held_out)} prompts"),
        "the tokenizer": Identity(_digest(_files(data.tokenizer)), data.tokenizer),
        "the form of prompts": _of(form, f"template {data.chat_template}, {form[:2]}"),
    }
    code = [_digest(_files(name.rpartition(":")[0])) for name in reward.functions]
    for name in _REWARD:
        value = getattr(reward, name)
        found[f"reward.{name}"] = _of([value, code * (name == "functions")], json.dumps(value))
    return found


def carry_over(
    state: RunState, now: dict[str, Identity], place: Path, say: Callable[[str], None]
) -> RunState:
    """The state of the checkpoint at `place`, for a run that is made with `now`.

    say: is told of every difference.
    """
    before = {name: Identity(*values) for name, values in state.identity.items()}
    if not before:
        say(f"{place} does not say what it was made with: the run goes on at its place in the data")
    other = [name for name, old in before.items() if old.digest != now[name].digest]
    for name in other:
        follows = "it begins at its start" if name == PROMPTS else "the run goes on"
        shown = f"then {before[name].shown}; now {now[name].shown}"
        say(f"changed since {place}: {name} ({shown}): {follows}")
    seen = 0 if PROMPTS in other else state.prompts_seen
    return replace(state, prompts_seen=seen, identity=recorded(now))


def recorded(now: dict[str, Identity]) -> dict[str, list[str]]:
    """As a checkpoint keeps it."""
    return {name: list(identity) for name, identity in now.items()}


def _of(value: object, shown: str) -> Identity:
    return Identity(_digest(json.dumps(value, sort_keys=True, default=str).encode()), shown)


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _files(path: str | None) -> bytes:
    """The content of a file, or of the tokenizer's files in a directory; empty where there is none."""
    if not path:
        return b""
    place = Path(path)
    if place.is_dir():
        files = sorted({file for name in _TOKENIZER_FILES for file in place.glob(name)})
        return b"".join(file.read_bytes() for file in files if file.is_file())
    return place.read_bytes() if place.is_file() else b""
