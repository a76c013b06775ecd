"""Converts a Megatron checkpoint to a Hugging Face model that transformers and vLLM load.

    python tools/convert_megatron_to_hf.py --megatron-path DIR --hf-path DIR [--dtype bf16]
        [--max-shard-size 5GB] [--overwrite]
    torchrun --nproc-per-node N tools/convert_megatron_to_hf.py ...        # shares the files

The source is a converted or trained checkpoint directory (its newest checkpoint is taken) or one
checkpoint itself. config.json, tokenizer and chat template come from its `hf` folder; a model that
came from no Hugging Face directory gets a config.json of its own. Memory holds one output file. A
checkpoint that is not what it was when it was sealed is refused.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without an installation

from megatron_rpp.checkpoint import store
from megatron_rpp.conversion import convert
from megatron_rpp.conversion.models import in_force
from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.parallel.ranks import joined, raise_on_all_ranks
from tools.progress import counting_tensors, say, say_error


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--megatron-path", required=True, help="checkpoint directory")
    parser.add_argument("--hf-path", required=True, help="directory to write")
    parser.add_argument("--dtype", choices=convert.DTYPES, help="default: as it is stored")
    parser.add_argument("--max-shard-size", default="5GB", help="of a file; default: 5GB")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model")
    options = parser.parse_args(argv)
    with joined():
        try:
            # The one in force or none: an older one in its place would go unnoticed in a file.
            checkpoint = raise_on_all_ranks(lambda: in_force(options.megatron_path))
            store.require(checkpoint)
            convert.to_hf(
                options.megatron_path, options.hf_path, options.dtype, options.max_shard_size,
                options.overwrite, counting_tensors,
            )  # fmt: skip
        except ConfigError as error:
            say_error(error)
            return 2
        say(f"wrote {options.hf_path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
