"""Verifies that a Megatron checkpoint holds a Hugging Face model: names, bits, logits, answers.

    python tools/verify_conversion.py --hf-path DIR --megatron-path DIR [--tp N] [--pp N]
        [--dtype bf16] [--tolerance X] [--vllm PYTHON]

Names and bits: every tensor has its counterpart on the other side, and the two are equal bit for
bit, both in Megatron's form and in Hugging Face's. Logits: the checkpoint, on tp × pp ranks that
this program starts, and transformers compute logits for the same random tokens; they may differ by
1e-5 (fp32) or 5e-2 (bf16) of the largest logit. Answers: 64 greedy tokens, which must be the same
in fp32; in bf16 they are only shown, because rounding decides near-ties. Of a classifier with one
label (a reward model) scores are compared instead of logits and answers. Prints a table and a
verdict. The exit code is 0 only if everything agrees.

--vllm also compares the answer of vLLM, run on the Hugging Face directory by the given interpreter.
vLLM pins its own torch and transformers, so it needs its own environment. Without a GPU:

    python3.11 -m venv runs/vllm
    runs/vllm/bin/pip install --no-deps -r tools/requirements-vllm.txt \\
        --extra-index-url https://download.pytorch.org/whl/cpu
    python tools/verify_conversion.py ... --vllm runs/vllm/bin/python
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without an installation

from megatron_rpp.config import ParallelConfig
from megatron_rpp.config.validation import check_layout
from megatron_rpp.hf.families import is_scalar
from megatron_rpp.lifecycle.config_error import ConfigError, reading

TOLERANCES = {"fp32": 1e-5, "bf16": 5e-2}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--hf-path", required=True, help="Hugging Face directory")
    parser.add_argument("--megatron-path", required=True, help="checkpoint directory")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size")
    parser.add_argument("--pp", type=int, default=1, help="pipeline-parallel size")
    parser.add_argument(
        "--dtype",
        choices=TOLERANCES,
        default="fp32",
        help="precision of the computation; default: fp32",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        help="largest difference of logits or scores, as a share of the largest",
    )
    parser.add_argument(
        "--vllm", metavar="PYTHON", help="also compare with the vLLM of this interpreter"
    )
    options = parser.parse_args(argv)
    if options.vllm and not has_vllm(options.vllm):
        parser.error(f"--vllm {options.vllm}: no Python that has vLLM; see the head of this file")
    # torch is imported only now, so that --help answers at once.
    from megatron_rpp.checkpoint import store
    from megatron_rpp.conversion.models import HfModel, MegatronModel, current
    from tools import model_outputs as outputs

    # A file or a pipe gets lines as wide as the table needs.
    width = None if sys.stdout.isatty() else 160
    console = Console(highlight=False, soft_wrap=True, width=width)
    try:
        parallel = ParallelConfig(tensor=options.tp, pipeline=options.pp)
        source = HfModel(options.hf_path)
        store.require(current(options.megatron_path))
        checkpoint = MegatronModel.open(options.megatron_path)
        if source.settings != checkpoint.settings:
            console.print(f"the architectures differ: {outputs.difference(source, checkpoint)}")
            return 1
        check_layout(outputs.compared_model(source.settings, options.dtype), parallel)
        sound = outputs.compare_weights(source, checkpoint, console)
        vocab_size, scalar = source.settings["vocab_size"], is_scalar(source.settings)
        oracle = outputs.transformers_scores if scalar else outputs.transformers_outputs
        with reading(f"{source.directory}", "transformers has to load it, to be compared with"):
            theirs = oracle(options.hf_path, vocab_size, options.dtype)
        ours = outputs.on_ranks(
            options.megatron_path, source.settings, parallel, dtype=options.dtype
        )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    tolerance = options.tolerance or TOLERANCES[options.dtype]
    exact = options.dtype == "fp32"
    sound &= outputs.compare_outputs(
        ours, theirs, tolerance=tolerance, exact=exact, console=console
    )
    if options.vllm and scalar:
        console.print("vLLM: left out, because a classifier does not generate")
    elif options.vllm:
        answer = outputs.vllm_answer(
            options.vllm, options.hf_path, vocab_size=vocab_size, dtype=options.dtype
        )
        sound &= outputs.compare_answers(
            "vLLM", answer, theirs.answer, exact=exact, console=console
        )
    console.print("verdict: the same model" if sound else "verdict: NOT the same model")
    return 0 if sound else 1


def has_vllm(python: str) -> bool:
    """Whether an interpreter has vLLM, without importing it, which would take many seconds."""
    asked = "import importlib.util as u; raise SystemExit(u.find_spec('vllm') is None)"
    return bool(shutil.which(python)) and not subprocess.run([python, "-c", asked]).returncode


if __name__ == "__main__":
    sys.exit(main())
