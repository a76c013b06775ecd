"""Time TRL's RLOOTrainer on the project's reference work and print one line of JSON.

The work: a random Llama-shaped fp32 model on CPU, 64 prompts x 4 samples a step, 16 prompt tokens,
64 new tokens at temperature 1, a KL penalty against a reference, one AdamW update over the 256
samples. Runs offline in its own environment (tools/requirements-trl.txt).

Seconds of wall clock. A step lasts from one optimizer step's end to the next; phases are disjoint:
  generate  RLOOTrainer._generate: tokenise, model.generate, decode
  score     log-probs before the update: of the policy, then of the reference
  reward    RLOOTrainer._calculate_rewards
  update    on_step_begin to on_step_end without _prepare_inputs: loss, backward, clip, AdamW
  other     the rest: data loading, padding, advantages, metrics
Left out: evaluation, saving, log output, vLLM, GPUs, several processes.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import Counter

os.environ["HF_HUB_OFFLINE"] = "1"  # the libraries read it when they are imported

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

VOCABULARY, PROMPTS, SAMPLES, PROMPT_TOKENS, NEW_TOKENS = 512, 64, 4, 16, 64
BATCH = PROMPTS * SAMPLES
EOS = VOCABULARY - 1  # padding too; in no prompt, and min_new_tokens keeps it out of completions


def build_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return a word-level tokenizer in which the word `t<i>` has the id i."""
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, f"t{EOS}"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=f"t{EOS}", pad_token=f"t{EOS}"
    )


def build_model(folder: str) -> transformers.LlamaForCausalLM:
    """Return a random model read from `folder`, where TRL finds the weights of the reference."""
    shape = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    transformers.LlamaForCausalLM(shape).save_pretrained(folder)
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def random_prompts(steps: int) -> Dataset:
    """Return PROMPTS prompts for each step, each of PROMPT_TOKENS random words."""
    tokens = torch.randint(EOS, (PROMPTS * steps, PROMPT_TOKENS)).tolist()
    return Dataset.from_dict({"prompt": [" ".join(f"t{t}" for t in row) for row in tokens]})


def even_share(completion_ids: list[list[int]], **_: object) -> list[float]:
    """Return each completion's reward: its share of even token ids."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


class StepClock(transformers.TrainerCallback):
    """Times TRL's own methods; `rows` gets the seconds of each step and of its phases."""

    METHODS = {
        "prepare": "_prepare_inputs",
        "generate": "_generate",  # prepare calls the others
        "reward": "_calculate_rewards",
        "score": "_get_per_token_logps_and_entropies",
    }

    def __init__(self, trainer: trl.RLOOTrainer) -> None:
        self.seconds, self.rows, self.last_end = Counter(), [], time.perf_counter()
        for phase, name in self.METHODS.items():
            setattr(trainer, name, self.timed(phase, getattr(trainer, name)))

    def timed(self, phase, method):
        def call(*args, **kwargs):
            start = time.perf_counter()
            result = method(*args, **kwargs)
            if phase != "score" or not torch.is_grad_enabled():  # with gradients: the loss
                self.seconds[phase] += time.perf_counter() - start
            return result

        return call

    def on_step_begin(self, *_, **__) -> None:
        self.begin = time.perf_counter()

    def on_step_end(self, *_, **__) -> None:
        spent, end = self.seconds, time.perf_counter()
        row = {phase: spent[phase] for phase in ("generate", "score", "reward")}
        row["update"] = end - self.begin - spent["prepare"]
        row["other"] = end - self.last_end - sum(row.values())
        self.rows.append({"step": end - self.last_end, **row})
        self.seconds, self.last_end = Counter(), end


def run(folder: str, steps: int, micro_batch: int) -> tuple[list[dict], dict]:
    """Train `steps` steps; return a row of seconds for each, and the settings used."""
    args = trl.RLOOConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=BATCH // micro_batch,
        num_generations=SAMPLES,
        beta=0.05,
        max_completion_length=NEW_TOKENS,
        generation_kwargs={"min_new_tokens": NEW_TOKENS},
        temperature=1.0,
        learning_rate=1e-5,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
    )
    trainer = trl.RLOOTrainer(
        model=build_model(folder),
        reward_funcs=even_share,
        args=args,
        train_dataset=random_prompts(steps),
        processing_class=build_tokenizer(),
    )
    clock = StepClock(trainer)
    trainer.add_callback(clock)
    trainer.remove_callback(transformers.PrinterCallback)  # standard output is for the JSON
    trainer.train()
    # Neither part can be longer, so equality means that no prompt and no completion was shorter.
    assert trainer.state.num_input_tokens_seen == steps * BATCH * (PROMPT_TOKENS + NEW_TOKENS)
    return clock.rows, {
        "samples": BATCH,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "parameters": trainer.model.num_parameters(),
        "dtype": str(trainer.model.dtype),
        "attention": trainer.model.config._attn_implementation,
        "micro_batch": micro_batch,
        "gradient_accumulation": args.gradient_accumulation_steps,
        "beta": args.beta,
        "generation_batch": args.generation_batch_size,
        "optimizer": args.optim.value,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them, not timed")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    parser.add_argument("--micro-batch", type=int, default=BATCH, choices=[2**i for i in range(9)])
    options = parser.parse_args()
    if min(options.steps, options.warmup, options.threads) < 1:
        parser.error("--steps, --warmup and --threads must be at least 1")
    torch.set_num_threads(options.threads)
    transformers.set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        rows, settings = run(folder, options.warmup + options.steps, options.micro_batch)
    rows = rows[options.warmup :]
    median = {key: round(statistics.median(row[key] for row in rows), 4) for key in rows[0]}
    steps = [round(row["step"], 4) for row in rows]
    print(
        json.dumps(
            {
                "trainer": "trl",
                "version": trl.__version__,
                "threads": torch.get_num_threads(),
                "step_seconds": {
                    "median": median.pop("step"),
                    "min": min(steps),
                    "max": max(steps),
                },
                "phases": median,
                "generated_tokens_per_second": round(BATCH * NEW_TOKENS / median["generate"]),
                "settings": settings | {"steps": options.steps, "warmup": options.warmup},
            }
        )
    )


if __name__ == "__main__":
    main()
