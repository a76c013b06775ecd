"""The table of tensors: which Hugging Face tensors make up which of Megatron's, by architecture.

CONTRIBUTING.md lists the steps to add a family. A row names one of Megatron's parameters and the
tensors it is made of; `{layer}` stands for the number of the layer in the whole model. There are
three ways to combine them:

    COPY      the tensor itself
    QKV       queries, keys and values interleaved by key-value head: [q.. k v] per head
    GATE_UP   the gate projection above the up projection

In all three, the part of a tensor-parallel rank is made of the same part of each source. Each
source is followed by its shape:

    v vocabulary · h hidden · f feed-forward · d head · q all query heads · k all key-value heads

Each family is there twice: as a language model, and as a classifier with one label, which has a
scalar head `score` instead of the output projection (reward models).

Left out: mixtures of experts, multi-head latent attention, layers that differ from each other,
classifiers with several labels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

if TYPE_CHECKING:
    import torch

from megatron_rpp.lifecycle.config_error import ConfigError

Kind = Literal["COPY", "QKV", "GATE_UP"]


@dataclass(frozen=True)
class Row:
    """One of Megatron's parameters and the Hugging Face tensors that it is made of."""

    megatron: str
    hf: tuple[str, ...]
    shapes: tuple[str, ...]
    kind: Kind = "COPY"

    @classmethod
    def made_of(cls, megatron: str, *sources: str, kind: Kind = "COPY") -> Row:
        """A row from sources written as "name [shape]"."""
        names, shapes = zip(*(source.rstrip("]").split(" [") for source in sources))
        return cls(megatron, names, shapes, kind)

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.megatron

    def of_layer(self, layer: int) -> Row:
        """The row with its names filled in."""
        names = tuple(name.format(layer=layer) for name in self.hf)
        return Row(self.megatron.format(layer=layer), names, self.shapes, self.kind)

    def sizes(self, settings: dict[str, Any]) -> list[tuple[int, ...]]:
        """The shape of each source in a model of these settings (ModelConfig.architecture)."""
        size = {
            "v": settings["vocab_size"],
            "h": settings["hidden"],
            "f": settings["ffn_hidden"],
            "d": settings["head_dim"],
            "q": settings["heads"] * settings["head_dim"],
            "k": settings["kv_heads"] * settings["head_dim"],
            "1": 1,
        }
        return [tuple(size[letter] for letter in shape.split()) for shape in self.shapes]

    def whole_size(self, settings: dict[str, Any]) -> tuple[int, ...]:
        """The shape of Megatron's tensor: the sources stacked along the first dimension."""
        sizes = self.sizes(settings)
        return (sum(size[0] for size in sizes), *sizes[0][1:])

    def merge(self, parts: list[torch.Tensor], head_dim: int) -> torch.Tensor:
        """Megatron's tensor, made from `parts`: the tensors of `hf`, or one rank's part of each."""
        import torch  # imported here: the tables are read before any tensor

        if self.kind == "COPY":
            return parts[0]
        if self.kind == "GATE_UP":
            return torch.cat(parts)
        groups = parts[1].shape[0] // head_dim
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1)

    def split(self, whole: torch.Tensor, heads: int, kv_heads: int) -> list[torch.Tensor]:
        """The tensors of `hf`, made from Megatron's whole tensor; the inverse of `merge`."""
        if self.kind == "COPY":
            return [whole]
        if self.kind == "GATE_UP":
            return list(whole.chunk(2))
        queries = heads // kv_heads
        grouped = whole.unflatten(0, (kv_heads, queries + 2, -1))
        parts = grouped.split([queries, 1, 1], 1)
        return [part.flatten(0, 2).contiguous() for part in parts]


EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
SCORE = "score.weight"
HEAD = {"head": "score"}
"""What the settings of a model with a scalar head have in addition; language models have no such
key."""
CAUSAL, CLASSIFIER = "ForCausalLM", "ForSequenceClassification"
"""How the architectures of language models and of classifiers end."""


def _layer(megatron: str, *sources: str, kind: Kind = "COPY") -> Row:
    names = (f"model.layers.{{layer}}.{source}" for source in sources)
    return Row.made_of(f"decoder.layers.{{layer}}.{megatron}", *names, kind=kind)


_LLAMA = (
    Row.made_of(EMBEDDING, "model.embed_tokens.weight [v h]"),
    _layer("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight [h]"),
    _layer(
        "self_attention.linear_qkv.weight",
        "self_attn.q_proj.weight [q h]",
        "self_attn.k_proj.weight [k h]",
        "self_attn.v_proj.weight [k h]",
        kind="QKV",
    ),
    _layer("self_attention.linear_proj.weight", "self_attn.o_proj.weight [h q]"),
    _layer("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight [h]"),
    _layer(
        "mlp.linear_fc1.weight",
        "mlp.gate_proj.weight [f h]",
        "mlp.up_proj.weight [f h]",
        kind="GATE_UP",
    ),
    _layer("mlp.linear_fc2.weight", "mlp.down_proj.weight [h f]"),
    Row.made_of("decoder.final_layernorm.weight", "model.norm.weight [h]"),
)
_LM_HEAD = Row.made_of(OUTPUT, "lm_head.weight [v h]")
_SCORE = Row.made_of(SCORE, "score.weight [1 h]")
_QKV_BIAS = (
    _layer(
        "self_attention.linear_qkv.bias",
        "self_attn.q_proj.bias [q]",
        "self_attn.k_proj.bias [k]",
        "self_attn.v_proj.bias [k]",
        kind="QKV",
    ),
)
_QK_NORM = (
    _layer("self_attention.q_layernorm.weight", "self_attn.q_norm.weight [d]"),
    _layer("self_attention.k_layernorm.weight", "self_attn.k_norm.weight [d]"),
)

# Llama 2 and 3, SmolLM2 · Mistral · Qwen2 and 2.5 · Qwen3 (dense)
_BODIES: dict[str, tuple[Row, ...]] = {
    "Llama": _LLAMA,
    "Mistral": _LLAMA,
    "Qwen2": (*_LLAMA, *_QKV_BIAS),
    "Qwen3": (*_LLAMA, *_QK_NORM),
}
FAMILIES: dict[str, tuple[Row, ...]] = {
    f"{family}{kind}": (*body, head)
    for kind, head in ((CAUSAL, _LM_HEAD), (CLASSIFIER, _SCORE))
    for family, body in _BODIES.items()
}
"""The rows of each architecture that config.json may name."""

# The names above are those of TransformerEngine's fused modules. Megatron's own modules keep the
# norms separate, but may write checkpoints with the fused names. Both are read.
_LOCAL_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
# Buffers in old Llama files, which follow from config.json.
IGNORED = ("rotary_emb.inv_freq",)


def canonical(name: str) -> str:
    """The name of a parameter in the table, given either of its names in a checkpoint."""
    for local, fused in _LOCAL_NAMES.items():
        if name.endswith(local):
            return name.removesuffix(local) + fused
    return name


def is_scalar(settings: Mapping[str, Any]) -> bool:
    """Whether a model of these settings has a scalar head instead of an output projection."""
    return settings.keys() >= HEAD.keys()


def refuse_scalar(directory: str | Path) -> NoReturn:
    """Raises ConfigError: a policy cannot start from the scalar model in `directory`."""
    raise ConfigError(
        f"{directory} holds a reward model (a classifier with one label): it has the head 'score' "
        f"and no output projection, so it cannot generate: give the directory of a language model"
    )


def rows_of(architecture: str, settings: dict[str, Any]) -> list[Row]:
    """All rows of a model with these settings, with layer numbers filled in."""
    rows: list[Row] = []
    for row in FAMILIES[architecture]:
        if row.per_layer:
            rows += [row.of_layer(layer) for layer in range(settings["layers"])]
        elif not (settings["tied_embeddings"] and row.megatron == OUTPUT):
            rows.append(row)
    return rows


def check_tensors(
    rows: list[Row],
    settings: dict[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    directory: str | Path,
) -> None:
    """Raises ConfigError if a tensor is missing, has another shape, or belongs to no row.

    If embeddings are tied, the output projection may be stored too. It is not read. A classifier
    must not have one.
    """
    needed = {name: size for row in rows for name, size in zip(row.hf, row.sizes(settings))}
    there = {name for name in shapes if not name.endswith(IGNORED)}
    if settings["tied_embeddings"] and not is_scalar(settings):
        there.discard("lm_head.weight")
    for problem, wrong in (
        ("lacks", needed.keys() - there),
        ("also has", there - needed.keys()),
        ("has in another shape", {n for n in there & needed.keys() if shapes[n] != needed[n]}),
    ):
        if wrong:
            shown = ", ".join(sorted(wrong)[:3])
            raise ConfigError(
                f"{directory} does not fit the table of its architecture: it {problem} "
                f"{shown}{' ...' if len(wrong) > 3 else ''} ({len(wrong)} in all): "
                f"{_explanation(needed, there, shapes)}"
            )


def _explanation(
    needed: Collection[str], there: Collection[str], shapes: Mapping[str, tuple[int, ...]]
) -> str:
    scalar = SCORE in needed
    if scalar and len(shapes.get(SCORE, (1,))) == 2 and shapes[SCORE][0] != 1:
        return (
            f"it has {shapes[SCORE][0]} labels, but config.json says 1; only classifiers with one "
            f"label (reward models) are supported: choose another model"
        )
    if any(f"model.{name}" in needed for name in there):
        return (
            "the names do not begin with 'model.', as in a model that was saved without its head: "
            f"load it with AutoModel{CLASSIFIER if scalar else CAUSAL} and save it with "
            "save_pretrained"
        )
    if scalar and "lm_head.weight" in there:
        return (
            f"config.json names a classifier ({CLASSIFIER}), the files are of a language model: "
            f"name {CAUSAL} in architectures, or save the classifier again without lm_head.weight"
        )
    if scalar and SCORE not in there:
        return "a classifier without its head: give the directory that its training saved"
    if not scalar and SCORE in there:
        return (
            f"the files are of a classifier: name its architecture (...{CLASSIFIER}) in config.json"
        )
    return "the files or config.json are of another model"
