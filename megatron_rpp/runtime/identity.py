"""Identities of data, tokenizer and rewards. Checkpoints store them.

A resume compares the stored identities with those of its own inputs. If the prompts differ, the
data starts from the beginning, because the position in the checkpoint belongs to the old prompts.
Any other difference is logged, and the run continues. Identities depend on contents, not on paths:
a copied data set is the same data set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

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
    """The identity of one input of a run."""

    digest: str
    shown: str
    """Its text in messages."""


def identities(config: Config, inputs: Inputs) -> dict[str, Identity]:
    """The identities of all inputs, by the names that messages use."""
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
    models = {source.name: source.digest for source in inputs.reward_models}
    code = [
        models.get(name) or _digest(_files(name.rpartition(":")[0])) for name in reward.functions
    ]
    for name in _REWARD:
        value = getattr(reward, name)
        found[f"reward.{name}"] = _of([value, code * (name == "functions")], str(value))
    return found


def carry_over(
    state: RunState, now: dict[str, Identity], place: Path, *, log: Callable[[str], None]
) -> RunState:
    """Adapts the state of the checkpoint at `place` to a run whose inputs are `now`.

    log: called with a line about every difference.
    """
    before = {name: Identity(*values) for name, values in state.identity.items()}
    if not before:
        log(f"{place} records no inputs: the run continues at its position in the data")
    # Another version may know other inputs.
    common = before.keys() & now.keys()
    other = [name for name in now if name in common and before[name].digest != now[name].digest]
    for name in other:
        follows = "the data starts from the beginning" if name == PROMPTS else "the run continues"
        shown = f"then {before[name].shown}; now {now[name].shown}"
        log(f"changed since {place}: {name} ({shown}): {follows}")
    seen = 0 if PROMPTS in other else state.prompts_seen
    return replace(state, prompts_seen=seen, identity=recorded(now))


def recorded(now: dict[str, Identity]) -> dict[str, list[str]]:
    """Identities in the form in which a checkpoint holds them."""
    return {name: list(identity) for name, identity in now.items()}


def _of(value: object, shown: str) -> Identity:
    return Identity(_digest(json.dumps(value, sort_keys=True, default=str).encode()), shown)


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _files(path: str | None) -> bytes:
    """The content of a file, or of the tokenizer files of a directory; empty if there is none."""
    if not path:
        return b""
    place = Path(path)
    if place.is_dir():
        files = sorted({file for name in _TOKENIZER_FILES for file in place.glob(name)})
        return b"".join(file.read_bytes() for file in files if file.is_file())
    return place.read_bytes() if place.is_file() else b""
