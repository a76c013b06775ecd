"""vLLM's greedy answer to one prompt of token ids, for tools/verify_conversion.py --vllm.

Runs in vLLM's own environment (tools/requirements-vllm.txt), so it imports nothing of the project.
Its one argument is JSON: {"model": DIR, "dtype": "fp32" or "bf16", "prompt": [...], "new_tokens": N,
"answer": FILE}; the file gets the JSON list of new tokens, which an end-of-sequence does not end.
(vLLM's processes print to both standard streams.)
"""

import json
import os
import sys
from pathlib import Path

# Read when vLLM is imported: nothing is reported or downloaded, and on CPU 1 GB of cache is plenty.
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}

from vllm import LLM, SamplingParams

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def main(asked: str) -> None:
    options = json.loads(asked)
    prompt, count = options["prompt"], options["new_tokens"]
    model = LLM(
        options["model"],
        dtype=DTYPES[options["dtype"]],
        max_model_len=len(prompt) + count,
        enforce_eager=True,
        skip_tokenizer_init=not Path(options["model"], "tokenizer_config.json").exists(),
    )
    greedy = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    (answered,) = model.generate([{"prompt_token_ids": prompt}], greedy)
    Path(options["answer"]).write_text(json.dumps(list(answered.outputs[0].token_ids)))


if __name__ == "__main__":  # vLLM starts processes that import this file again
    main(sys.argv[1])
