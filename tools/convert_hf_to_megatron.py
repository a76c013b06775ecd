"""Converts a Hugging Face model to a Megatron checkpoint that any layout loads. No GPU is needed.

    python tools/convert_hf_to_megatron.py --hf-path DIR --megatron-path DIR [--overwrite]
    torchrun --nproc-per-node N tools/convert_hf_to_megatron.py ...        # shares the work

Reads language models, and classifiers with one label (reward models). Weights keep the type they
are stored in. The output directory appears whole or not at all, and holds a manifest of checksums
like a trained checkpoint. Memory holds one tensor and the mapped file that it is read from.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without an installation

from megatron_rpp.lifecycle.config_error import ConfigError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--hf-path", required=True, help="Hugging Face directory with config.json and weights"
    )
    parser.add_argument("--megatron-path", required=True, help="checkpoint directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint")
    options = parser.parse_args(argv)
    # torch is imported only now, so that --help answers at once.
    from megatron_rpp.conversion import convert
    from megatron_rpp.parallel.ranks import joined
    from tools.progress import counting_tensors, log, log_error

    with joined():
        try:
            written = convert.to_megatron(
                options.hf_path,
                options.megatron_path,
                options.overwrite,
                counting=counting_tensors,
                log=lambda note: log(f"note: {note}"),
            )
        except ConfigError as error:
            log_error(error)
            return 2
        log(f"wrote {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
