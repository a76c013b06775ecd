"""Tells whether the model in a directory is still the same, without reading all of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from megatron_rpp.checkpoint import manifest, store
from megatron_rpp.config.infer_settings import TOKENIZERS, tokenizer_folder
from megatron_rpp.hf.architecture import CONFIG
from megatron_rpp.hf.json_object import is_file

_BLOCKS, _BLOCK = 64, 4096
"""How many blocks of a file of weights are read, and their bytes. Training changes every weight."""


def model_digest(directory: str | Path) -> str:
    """Digest of the weights and the tokenizer in a Hugging Face directory, or of the current checkpoint in
    a directory of them.

    Raises ConfigError if there is no model.
    """
    folder = Path(directory).absolute()
    digest = hashlib.blake2b(digest_size=16)
    if is_file(folder / CONFIG):
        files = [folder / CONFIG, *sorted(folder.glob("*.safetensors"))]
    else:
        folder = store.current(folder)
        whole = folder / manifest.MANIFEST  # it has a checksum of every file
        files = [whole] if whole.exists() else sorted(folder.glob("*.distcp"))
    tokenizer = tokenizer_folder(directory)
    if tokenizer is not None:
        files += [tokenizer / name for name in TOKENIZERS if (tokenizer / name).exists()]
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        _add_blocks(digest, file)
    return digest.hexdigest()


def _add_blocks(digest: hashlib.blake2b, file: Path) -> None:
    """Adds blocks that are spread over the file; all of a small one."""
    size = file.stat().st_size
    step = max(_BLOCK, size // _BLOCKS)
    with file.open("rb") as content:
        for start in range(0, size, step):
            content.seek(start)
            digest.update(content.read(_BLOCK))
