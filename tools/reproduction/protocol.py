"""What the comparisons of docs/reproduction.md run: tasks, experiments, and the settings of every run.

Settings that all runs of a task share are in its recipe, launch/recipes/reproduction; those of an
algorithm in a recipe of its own. Here are the ones that change from run to run: seed, learning rate,
where the weights come from, and the reward.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reproduction.pairs import Labelling, by_correctness, by_correctness_or_length

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "launch/recipes/reproduction"
ALGORITHMS = ("reinforce++", "reinforce++_baseline", "grpo", "rloo", "ppo")
BASELINE = "reinforce++"
"""The algorithm that the others are compared with."""
CRITIC_RATE = 3.0
"""Learning rate of PPO's critic, as a multiple of the policy's."""
TARGET_ACCURACY = 0.75
"""Held-out accuracy to which the experiment speed measures the time."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task with its model."""

    name: str
    """Also the name of its recipe."""
    rule: str
    """The reward function that decides what is right."""
    supervised: str
    """The file that the warm start learns from."""
    labelling: Labelling
    """How the pairs of its reward model are made."""

    @property
    def recipe(self) -> Path:
        return RECIPES / f"{self.name}.yaml"


SUMS = Task(
    name="sums", rule="exact_match", supervised="train.jsonl",
    labelling=by_correctness,
)  # fmt: skip
STEPS = Task(
    name="steps", rule="tools/reproduction/last_number.py:score",
    supervised="supervised.jsonl", labelling=by_correctness_or_length,
)  # fmt: skip
TASKS = (SUMS, STEPS)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Runs of several algorithms that differ in nothing else."""

    name: str
    task: Task
    algorithms: tuple[str, ...] = ALGORITHMS
    learned_reward: bool = False
    """Whether the reward is that of the reward model; the rule still decides about accuracy."""
    processes: int = 1
    """Data-parallel processes of a run. With more than one, runs follow each other; otherwise as many
    run at a time as there are cores, up to two."""


CHOOSE = Experiment(name="choose", task=SUMS)
EXPERIMENTS = (
    Experiment(name="speed", task=SUMS, algorithms=("reinforce++", "ppo"), processes=2),
    Experiment(name="math", task=SUMS),
    Experiment(name="math-model", task=SUMS, learned_reward=True),
    Experiment(name="length", task=STEPS, learned_reward=True),
)
COMMANDS = {"speed": ("speed",), "length": ("length",), "math": ("math", "math-model")}
"""The names of the command line, and the experiments that each runs."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is run."""

    seeds: tuple[int, ...] = (1, 2, 3)
    rates: tuple[float, ...] = (5e-5, 1e-4, 2e-4)
    """Learning rates to choose from."""
    selection_seeds: tuple[int, ...] = (101,)
    """Seeds of the runs that choose; none of them is reported."""
    pair_prompts: int = 3600
    """Training prompts that pairs are made of."""
    held_out_pair_prompts: int = 400
    """Those among them whose pairs measure the reward model."""
    answers: int = 8
    """Answers sampled to each of these prompts."""
    pairs_per_prompt: int = 4
    """At most so many pairs of a prompt."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings that replace those of the recipes, by program."""


_SMALL = {
    "rollout.prompts_per_step": 8, "evaluation.prompts": 16, "evaluation.interval": 1,
    "train.minibatches": 2, "train.steps": 2,
}  # fmt: skip
QUICK = Scale(
    seeds=(1,), rates=(1e-4,), pair_prompts=300, held_out_pair_prompts=100, answers=8,
    settings={
        "train": _SMALL,
        "sft": _SMALL | {"sft.steps": 30, "sft.batch_size": 128, "sft.eval_interval": 0},
        "reward_model": {"reward_model.steps": 5, "reward_model.batch_size": 16, "reward_model.optimizer.decay_steps": 20,
                         "reward_model.eval_interval": 0},
    },
)  # fmt: skip
"""For a test of the tool: the numbers say nothing about the algorithms."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One call of a program of the trainer."""

    name: str
    """Where it writes, below the directory of all runs, without the digest of its settings."""
    program: str
    """train, sft, reward_model, or generate for the tool of that name."""
    recipes: tuple[Path, ...]
    settings: dict[str, Any]
    processes: int = 1


def data_settings(folder: Path) -> dict[str, Any]:
    """The settings that name the data of a task in `folder`."""
    files = {"train": "train.jsonl", "eval": "eval.jsonl", "tokenizer": "tokenizer.model"}
    return {f"data.{key}": folder / name for key, name in files.items()}


def warm_start_job(task: Task, data: Path, scale: Scale) -> Job:
    """Supervised training of the model that all runs of a task start from."""
    settings = data_settings(data) | {"data.train": data / task.supervised}
    settings |= scale.settings.get("sft", {})
    return Job(name=f"{task.name}/sft", program="sft", recipes=(task.recipe,), settings=settings)


def answers_job(task: Task, data: Path, *, warm_start: Path, prompts: Path) -> Job:
    """Answers of the warm start, one for each line of the file `prompts`."""
    settings = data_settings(data) | {"model.init_path": warm_start, "rollout.max_batch": 512}
    return Job(
        name=f"{task.name}/answers", program="generate", recipes=(task.recipe,),
        settings=settings | {"file": prompts},
    )  # fmt: skip


def reward_model_job(task: Task, data: Path, *, warm_start: Path, pairs: Path, scale: Scale) -> Job:
    """Training of a reward model on the pairs in the directory `pairs`, from the warm start."""
    settings = data_settings(data) | {
        "data.train": pairs / "train.jsonl",
        "data.eval": pairs / "eval.jsonl",
        "model.init_path": warm_start,
    }
    return Job(
        name=f"{task.name}/reward_model", program="reward_model",
        recipes=(task.recipe, RECIPES / "reward_model.yaml"),
        settings=settings | scale.settings.get("reward_model", {}),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Start:
    """What the runs of a task begin with: directories."""

    data: Path
    warm_start: Path
    reward_model: Path | None
    """None if no experiment needs it."""


def run_job(
    experiment: Experiment, algorithm: str, *, rate: float, seed: int, start: Start, scale: Scale
) -> Job:
    """The run of an algorithm in an experiment."""
    settings = data_settings(start.data) | {
        "model.init_path": start.warm_start,
        "optimizer.lr": rate,
        "seed": seed,
    }
    functions = [experiment.task.rule]
    if experiment.learned_reward:
        assert start.reward_model is not None
        functions.append(f"model:{start.reward_model}")
        settings["reward.weights"] = [0, 1]
    settings["reward.functions"] = functions
    if algorithm == "ppo":
        settings["critic.optimizer.lr"] = CRITIC_RATE * rate
    return Job(
        name=f"{experiment.name}/{algorithm}-{rate:g}-seed{seed}",
        program="train",
        recipes=(experiment.task.recipe, RECIPES / f"{algorithm}.yaml"),
        settings=settings | scale.settings.get("train", {}),
        processes=experiment.processes,
    )
