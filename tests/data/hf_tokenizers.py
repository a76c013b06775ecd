"""Hugging Face tokenizers made on the spot: real byte-level BPE, real templates, real files."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}"
    "<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
TEXTS = [
    "What is 12 + 30? Think step by step, then give the answer in \\boxed{}.",
    "The answer is 42.\n\nBecause 12 + 30 = 42.",
    "user assistant system You are a helpful assistant.",
]


def make_tokenizer(folder: Path, specials: list[str], bos: str | None, **saved) -> Path:
    """A byte-level BPE tokenizer with `specials`, saved as transformers saves one.

    bos: the token that the tokenizer puts in front of every text; saved: further fields.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
        ),
    )
    if bos is not None:
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))]
        )
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, **saved).save_pretrained(folder)
    return folder


def make_chatml(folder: Path) -> Path:
    """Like Qwen's: no begin-of-sequence; <|im_end|> ends a turn, <|endoftext|> ends a text."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    make_tokenizer(
        folder, specials, None, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"], chat_template=CHATML,
    )  # fmt: skip
    config = {"eos_token_id": [2, 0], "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(config))
    return folder


def make_llama3(folder: Path) -> Path:
    """Like Llama 3's: begin-of-sequence, three end tokens, no padding token."""
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                "<|eom_id|>", "<|eot_id|>"]  # fmt: skip
    make_tokenizer(
        folder, specials, "<|begin_of_text|>", eos_token="<|eot_id|>", chat_template=LLAMA3,
        additional_special_tokens=specials[2:5],
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [1, 4, 5]}))
    return folder
