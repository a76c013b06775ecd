"""Tokens per second of other engines on the works of the benchmark `generate`; one line of JSON.

    python peers_generate.py {trl,vllm} {reference,smollm2,long-tail} [--rounds 3]

trl: transformers' generate, as TRL's trainers call it: one batch of all sequences, until the last one
has ended. vllm: vLLM's engine in its process, continuous batching, the samples of a prompt in one
request, log-probs of the sampled tokens. Each runs in an environment of its own with two threads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from generation_work import WORKS, Work


def llama(work: Work):
    """Its configuration for transformers."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=work.vocabulary,
        hidden_size=work.hidden,
        intermediate_size=work.ffn,
        num_hidden_layers=work.layers,
        num_attention_heads=work.heads,
        num_key_value_heads=work.kv_heads,
        tie_word_embeddings=False,
        max_position_embeddings=work.prompt + work.new_tokens,
        bos_token_id=None,
        eos_token_id=work.vocabulary - 1,
        pad_token_id=work.vocabulary - 1,
        dtype="float32",
    )


def transformers(work: Work) -> Callable[[], int]:
    """A call that generates everything once and returns the number of tokens."""
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama(work)).eval()
    prompts = torch.tensor(work.prompts()).repeat_interleave(work.samples, 0)
    ends = torch.tensor(work.end_tokens)

    @torch.no_grad()
    def run() -> int:
        out = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=1.0,
            top_k=0, top_p=1.0, max_new_tokens=work.new_tokens, eos_token_id=work.end_tokens,
            min_new_tokens=None if work.ends else work.new_tokens,
        )[:, work.prompt :]  # fmt: skip
        ended = torch.isin(out, ends).int().cumsum(1)
        return int((ended == 0).sum() + (ended > 0).any(1).sum())

    return run


def vllm(work: Work) -> Callable[[], int]:
    """See `transformers`."""
    os.environ |= {
        "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2",
    }  # fmt: skip
    folder = tempfile.mkdtemp()
    llama(work).save_pretrained(folder)
    config = Path(folder, "config.json")
    content = json.loads(config.read_text()) | {"architectures": ["LlamaForCausalLM"]}
    config.write_text(json.dumps(content))
    from vllm import LLM, SamplingParams

    engine = LLM(
        folder, load_format="dummy", skip_tokenizer_init=True, dtype="float32",
        max_model_len=work.prompt + work.new_tokens, max_num_seqs=256, enforce_eager=True,
        enable_chunked_prefill=False, disable_log_stats=True,
    )  # fmt: skip
    sampling = SamplingParams(
        n=work.samples, temperature=1.0, max_tokens=work.new_tokens, logprobs=0, detokenize=False,
        min_tokens=0 if work.ends else work.new_tokens, stop_token_ids=work.end_tokens,
        ignore_eos=not work.ends,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": prompt} for prompt in work.prompts()]

    def run() -> int:
        found = engine.generate(prompts, sampling, use_tqdm=False)
        return sum(len(output.token_ids) for request in found for output in request.outputs)

    return run


ENGINES = {"trl": transformers, "vllm": vllm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("work", choices=WORKS)
    parser.add_argument(
        "--rounds", type=int, default=3, help="timed rounds, after one that warms up"
    )
    options = parser.parse_args()
    run, rates = ENGINES[options.engine](WORKS[options.work]), []
    for _ in range(1 + options.rounds):
        start = time.perf_counter()
        tokens = run()
        rates.append(tokens / (time.perf_counter() - start))
    rate = statistics.median(rates[1:])
    print(json.dumps({"engine": options.engine, "tokens_per_second": rate}), flush=True)


if __name__ == "__main__":
    main()
