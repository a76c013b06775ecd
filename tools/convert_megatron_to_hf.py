"""Converts a Megatron checkpoint to a Hugging Face model that transformers and vLLM load.

    python tools/convert_megatron_to_hf.py --megatron-path DIR --hf-path DIR [--dtype bf16]
        [--max-shard-size 5GB] [--overwrite]

The source is a converted or trained checkpoint directory (its newest checkpoint is taken) or one
checkpoint itself. config.json, tokenizer and chat template come from its `hf` folder; a model that
came from no Hugging Face directory gets a config.json of its own. Memory holds one output file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without an installation

from megatron_rpp import sealing
from megatron_rpp.hf import convert
from tools.progress import counting


def _check_whole(checkpoint: Path) -> None:
    """Raises ValueError where a sealed checkpoint is not what it was when it was written."""
    if sealing.read_manifest(checkpoint) is not None:
        problem = sealing.own_damage(checkpoint)
        if problem is not None:
            raise ValueError(f"checkpoint {checkpoint} is damaged ({problem}): choose another")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--megatron-path", required=True, help="checkpoint directory")
    parser.add_argument("--hf-path", required=True, help="directory to write")
    parser.add_argument("--dtype", choices=convert.DTYPES, help="default: as it is stored")
    parser.add_argument("--max-shard-size", default="5GB", help="of a file; default: 5GB")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model")
    options = parser.parse_args(argv)
    try:
        model = convert.MegatronModel.open(options.megatron_path)
        rows = len(model.rows)
        _check_whole(model.checkpoint.directory)
        with counting("tensors", rows) as progress:
            convert.to_hf(
                options.megatron_path, options.hf_path, options.dtype, options.max_shard_size,
                options.overwrite, progress,
            )  # fmt: skip
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Console(highlight=False).print(f"wrote {options.hf_path}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
