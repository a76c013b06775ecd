"""Small random models of every family, made and saved by transformers: the oracle of these tests.

Odd vocabularies, grouped queries, head sizes other than hidden / heads, norms other than one and
biases other than zero: any mix-up changes the logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ABSENT = object()
_PLAIN = {"rope_type": "default", "rope_theta": 500.0}
# Family: its class in transformers, and its special settings.
FAMILIES = {
    "llama2": ("Llama", {"rope": _PLAIN, "num_key_value_heads": 4}),
    "llama3": ("Llama", {"rope": LLAMA3, "head_dim": 16}),
    "smollm2": ("Llama", {"rope": _PLAIN, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"rope": _PLAIN, "head_dim": 16, "sliding_window": 512}),
    "qwen2": ("Qwen2", {"rope": _PLAIN}),
    "qwen2-tied": ("Qwen2", {"rope": _PLAIN, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"rope": _PLAIN, "head_dim": 12}),
    "qwen3-tied": ("Qwen3", {"rope": LLAMA3, "tie_word_embeddings": True}),
}
# The same for classifiers with one label. They have no output projection that could be tied.
CLASSIFIERS = {
    "llama-score": ("Llama", {"rope": LLAMA3, "head_dim": 16, "tie_word_embeddings": True}),
    "mistral-score": ("Mistral", {"rope": _PLAIN, "sliding_window": 512}),
    "qwen2-score": ("Qwen2", {"rope": _PLAIN, "tie_word_embeddings": True}),
    "qwen3-score": ("Qwen3", {"rope": _PLAIN, "head_dim": 12}),
}


def positions(rope: dict) -> dict:
    """Settings of a configuration for `rope`, in the spelling of the installed transformers."""
    import transformers

    if int(transformers.__version__.partition(".")[0]) >= 5:
        return {"rope_parameters": rope}
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    if rope["rope_type"] == "default":
        scaling = None
    return {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}


def make(family: str, seed: int = 3, **settings):
    """A model of transformers with random weights, in fp32."""
    import transformers

    name, special = (FAMILIES | CLASSIFIERS)[family]
    kind = "ForSequenceClassification" if family in CLASSIFIERS else "ForCausalLM"
    given = SIZES | special | ({"num_labels": 1} if family in CLASSIFIERS else {}) | settings
    given |= positions(given.pop("rope"))
    config = getattr(transformers, f"{name}Config")(**given)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}{kind}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.rand(len(parameter)) + 0.5)
    return model


def save(folder: Path, family: str, shards: str = "50KB", **settings) -> Path:
    """The directory of such a model, in files of up to `shards`."""
    path = folder / family
    make(family, **settings).save_pretrained(path, max_shard_size=shards)
    return path


@torch.no_grad()
def logits(directory: Path, tokens: torch.Tensor, dtype=torch.float32) -> torch.Tensor:
    """Logits [b, s, v] of transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager", local_files_only=True
    )
    return model.eval()(tokens, use_cache=False).logits


@torch.no_grad()
def scores(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Scores [b, s] of transformers' classifier: entry i is that of the first i + 1 tokens."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    model.config.pad_token_id = None  # the last token counts, whatever it is
    lengths = range(1, tokens.shape[1] + 1)
    return torch.tensor([[float(model(row[None, :n]).logits) for n in lengths] for row in tokens])


@torch.no_grad()
def greedy(directory: Path, prompt: torch.Tensor, count: int) -> list[int]:
    """`count` greedy tokens of transformers after `prompt` [1, s], past any end of sequence."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", local_files_only=True
    ).eval()
    model.generation_config.eos_token_id = None
    found = model.generate(prompt, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return found[0, prompt.shape[1] :].tolist()


def set_config(directory: Path, **values) -> None:
    """Sets keys in config.json; ABSENT removes one."""
    path = directory / "config.json"
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: value for k, value in content.items() if value is not ABSENT}))


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes the tensors of a model in one file."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({n: value.contiguous() for n, value in tensors.items()}, file, {"format": "pt"})
