"""Computes a model's outputs for the same tokens in Megatron, transformers and vLLM, and compares
them. tools/verify_conversion.py prints the verdict."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

from megatron_rpp.config import ModelConfig, ParallelConfig
from megatron_rpp.conversion.models import HfModel, MegatronModel
from megatron_rpp.conversion.settings import model_config
from megatron_rpp.hf.families import is_scalar

SEQUENCES, LENGTH, PROMPT, ANSWER = 2, 48, 16, 64
SCORED = (1, 12, 24, 48)
"""Lengths at which a classifier scores each of the sequences."""
VLLM_SECONDS = 900
KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Outputs:
    """A model's outputs for the same tokens."""

    numbers: torch.Tensor
    """fp32 logits [b, s, v]; of a classifier scores [b, number of SCORED]."""
    answer: list[int] | None
    """Greedy tokens; None: a classifier has none."""


class NoEnd:
    """A tokenizer without end-of-sequence: answers run to their full length."""

    eos_ids = ()


def difference(source: HfModel, checkpoint: MegatronModel) -> str:
    """The settings in which the architectures differ, in words."""
    theirs, absent = checkpoint.settings, "output projection"  # the key of a scalar head
    return ", ".join(
        f"{name} is {source.settings.get(name, absent)} in Hugging Face, "
        f"{theirs.get(name, absent)} in Megatron"
        for name in source.settings | theirs
        if theirs.get(name) != source.settings.get(name)
    )


def compare_weights(source: HfModel, checkpoint: MegatronModel, console: Console) -> bool:
    """Prints a line per tensor. Returns whether all are equal bit for bit, in either form."""
    table, sound = Table("weight", "shape", "type", "largest difference", "verdict"), True
    table.columns[0].no_wrap = True
    for row in source.rows:
        theirs, ours = source.read(row), checkpoint.read(row)
        back = zip(row.hf, checkpoint.split(row), strict=True)
        equal = theirs.dtype == ours.dtype and torch.equal(theirs, ours)
        equal &= all(torch.equal(source.weights.read(name), part) for name, part in back)
        difference = float((theirs.double() - ours.double()).abs().max())
        kind = str(ours.dtype).removeprefix("torch.")
        verdict = "equal" if equal else "DIFFERENT"
        table.add_row(row.megatron, str(list(ours.shape)), kind, f"{difference:.3g}", verdict)
        sound &= equal
    console.print(table)
    return sound


def compare_outputs(
    ours: Outputs, theirs: Outputs, *, tolerance: float, exact: bool, console: Console
) -> bool:
    """Whether logits (of a classifier: scores) agree within `tolerance` of the largest and, if
    `exact`, answers are equal."""
    name = "score" if theirs.answer is None else "logit"
    largest = float(theirs.numbers.abs().max())
    share = float((ours.numbers - theirs.numbers).abs().max()) / largest
    near = share <= tolerance
    console.print(
        f"{name}s: largest difference {share:.2e} of the largest {name} {largest:.3g}, tolerance "
        f"{tolerance:.0e}: {'within' if near else 'OUTSIDE'}"
    )
    if ours.answer is None or theirs.answer is None:
        console.print("greedy tokens: left out, because a classifier does not generate")
        return near
    return near & compare_answers(
        "Megatron", ours.answer, theirs.answer, exact=exact, console=console
    )


def compare_answers(
    name: str, ours: list[int], theirs: list[int], *, exact: bool, console: Console
) -> bool:
    """Whether the answer equals that of transformers; if not `exact`, it is only printed."""
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    console.print(f"greedy tokens, {name} and transformers: {same} of {ANSWER} equal")
    return same == ANSWER or not exact


def sample_tokens(vocab_size: int) -> torch.Tensor:
    """[b, s] token ids, the same for both sides."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (SEQUENCES, LENGTH), generator=generator)


def on_ranks(path: str, settings: dict, parallel: ParallelConfig, *, dtype: str) -> Outputs:
    """The checkpoint's outputs, computed by tensor × pipeline processes."""
    world = parallel.tensor * parallel.pipeline
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        result = Path(folder) / "outputs.pt"
        mp.spawn(_rank, (world, port, path, settings, parallel, dtype, result), nprocs=world)
        numbers, answer = torch.load(result, weights_only=True)
    return Outputs(numbers, answer)


def _rank(  # noqa: PLR0917 (spawn calls it by position)
    rank, world, port, path, settings, parallel, dtype, result
) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    from megatron_rpp.parallel import groups

    groups.start(**parallel.sizes(), seed=0)
    outputs = megatron_outputs(path, settings, parallel, dtype=dtype)
    if rank == world - 1:
        torch.save((outputs.numbers.cpu(), outputs.answer), result)
    groups.stop()


def compared_model(settings: dict, dtype: str) -> ModelConfig:
    """The model of an architecture, with a context that holds prompt and answer."""
    return model_config(settings, max_length=max(LENGTH, PROMPT + ANSWER), dtype=dtype)


@torch.no_grad()
def megatron_outputs(path: str, settings: dict, parallel: ParallelConfig, *, dtype: str) -> Outputs:
    """The outputs on the last pipeline stage; the other stages have no numbers. Collective."""
    from megatron_rpp.checkpoint import state as checkpoint
    from megatron_rpp.model import build, pipeline
    from megatron_rpp.model.language_model import LanguageModel, chunks
    from megatron_rpp.model.scalar_model import ScalarModel
    from megatron_rpp.parallel import device, groups
    from megatron_rpp.records import Request, Sampling
    from megatron_rpp.rollout.engine import MegatronEngine

    model, scalar = compared_model(settings, dtype), is_scalar(settings)
    kind = ScalarModel if scalar else LanguageModel
    stage = build.build_model(model, parallel, vocab_size=model.vocab_size, seed=0, kind=kind)
    checkpoint.load_weights(stage, path)
    stage.requires_grad_(False).eval()
    tokens = sample_tokens(model.vocab_size)
    hidden = pipeline.stage_forward(stage, tokens.to(device.device()))
    numbers, last = torch.empty(0), chunks(stage)[-1]
    if groups.is_last_stage():
        project = last.score if isinstance(last, ScalarModel) else last.sampling_logits
        numbers = project(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2]).transpose(0, 1)
        numbers = numbers[:, [length - 1 for length in SCORED]] if scalar else numbers
    if scalar:
        return Outputs(numbers, None)
    engine = MegatronEngine(stage, NoEnd(), max_batch=1)
    prompt = Request(tuple(tokens[0, :PROMPT].tolist()), sample_id=0)
    sampling = Sampling(max_new_tokens=ANSWER, temperature=0.0)
    return Outputs(numbers, engine.generate([prompt], sampling, seed=0, step=0)[0].tokens)


@torch.no_grad()
def transformers_scores(path: str, vocab_size: int, dtype: str) -> Outputs:
    """The oracle of a classifier: the scores of the first tokens of each sequence."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        path, dtype=KINDS[dtype], attn_implementation="eager", local_files_only=True
    ).eval()
    model.config.pad_token_id = None  # the last token counts, whatever it is
    tokens = sample_tokens(vocab_size)
    scores = [
        [float(model(row[None, :length], use_cache=False).logits) for length in SCORED]
        for row in tokens
    ]
    return Outputs(torch.tensor(scores), None)


@torch.no_grad()
def transformers_outputs(path: str, vocab_size: int, dtype: str) -> Outputs:
    """The oracle: logits, and the answer generated token by token with the cache."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=KINDS[dtype], attn_implementation="eager", local_files_only=True
    ).eval()
    tokens = sample_tokens(vocab_size)
    logits = model(tokens, use_cache=False).logits.float()
    answer, cache, given = [], None, tokens[:1, :PROMPT]
    for _ in range(ANSWER):
        result = model(given, past_key_values=cache, use_cache=True)
        cache, given = result.past_key_values, result.logits[:, -1:].argmax(-1)
        answer.append(int(given))
    return Outputs(logits, answer)


def vllm_answer(python: str, path: str, *, vocab_size: int, dtype: str) -> list[int]:
    """The greedy tokens of `python`'s vLLM (tools/vllm_answer.py) after the same prompt.

    Raises SystemExit if vLLM fails or takes longer than VLLM_SECONDS.
    """
    prompt = sample_tokens(vocab_size)[0, :PROMPT].tolist()
    asked = {"model": path, "dtype": dtype, "prompt": prompt, "new_tokens": ANSWER}
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder) / "answer.json", Path(folder) / "log"
        words = json.dumps(asked | {"answer": str(answer)})
        command = [python, str(Path(__file__).with_name("vllm_answer.py")), words]
        with (
            log.open("w") as output,
            subprocess.Popen(
                command, stdout=output, stderr=output, start_new_session=True
            ) as process,
        ):
            try:
                code = process.wait(VLLM_SECONDS)
            except subprocess.TimeoutExpired:
                code = f"none within {VLLM_SECONDS} s"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # its engine is a separate process
        if code:
            raise SystemExit(f"error: vLLM failed, exit code {code}:\n{log.read_text()[-2000:]}")
        return json.loads(answer.read_text())
