"""Converts a Megatron checkpoint to a Hugging Face model that transformers and vLLM load.

    python tools/convert_megatron_to_hf.py --megatron-path DIR --hf-path DIR [--dtype bf16]
        [--max-shard-size 5GB] [--overwrite]
    torchrun --nproc-per-node N tools/convert_megatron_to_hf.py ...        # shares the files

The source is a converted or trained checkpoint directory, whose current checkpoint is taken, or one
checkpoint itself. config.json, tokenizer and chat template come from its `hf` folder. If the model
did not come from a Hugging Face directory, a new config.json is written. A reward model becomes a
classifier with one label. Memory holds one output file. A checkpoint whose files do not match its
manifest is an error.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without an installation

from megatron_rpp.conversion import DTYPE_NAMES
from megatron_rpp.lifecycle.config_error import ConfigError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--megatron-path", required=True, help="checkpoint directory")
    parser.add_argument("--hf-path", required=True, help="Hugging Face directory to write")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="default: the stored type")
    parser.add_argument(
        "--max-shard-size", default="5GB", help="largest size of one file; default: 5GB"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model")
    options = parser.parse_args(argv)
    # torch is imported only now, so that --help answers at once.
    from megatron_rpp.checkpoint import store
    from megatron_rpp.conversion import convert
    from megatron_rpp.conversion.models import current
    from megatron_rpp.parallel.ranks import joined, raise_on_all_ranks
    from tools.progress import counting_tensors, log, log_error

    with joined():
        try:
            # Only the current one: a silent fallback to an older one would go unnoticed.
            checkpoint = raise_on_all_ranks(lambda: current(options.megatron_path))
            store.require(checkpoint)
            convert.to_hf(
                options.megatron_path, options.hf_path, dtype=options.dtype, max_shard_size=options.max_shard_size,
                overwrite=options.overwrite, counting=counting_tensors,
            )  # fmt: skip
        except ConfigError as error:
            log_error(error)
            return 2
        log(f"wrote {options.hf_path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
