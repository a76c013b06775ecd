"""The order of the work: data, warm starts, learning rates, reward models, experiments, results."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import make_task

from megatron_rpp.config import cli
from megatron_rpp.data.tasks import jsonl
from megatron_rpp.lifecycle.atomic_files import write_atomic
from megatron_rpp.lifecycle.exit_codes import RunFailure
from megatron_rpp.rewards.builtin import exact_match
from reproduction import last_number, protocol, results
from reproduction.data import make_steps_data
from reproduction.execute import Runner
from reproduction.pairs import group_samples, make_pairs
from reproduction.protocol import CHOOSE, Experiment, Job, Scale, Start, Task
from reproduction.results import Row

RULES = {"sums": exact_match, "steps": last_number.score}
"""The rule of each task in Python."""


@dataclass(frozen=True)
class Campaign:
    """The experiments of one scale below one directory."""

    runner: Runner
    scale: Scale
    results: Path
    """Directory of the JSONL files."""

    def run(self, experiments: Iterable[Experiment]) -> None:
        """Runs the experiments, with all that comes before them, and writes their rows."""
        experiments = list(experiments)
        starts = {CHOOSE.task.name: self.start(CHOOSE.task, experiments)}
        for task in {experiment.task.name: experiment.task for experiment in experiments}.values():
            starts[task.name] = starts.get(task.name) or self.start(task, experiments)
        algorithms = {name for experiment in experiments for name in experiment.algorithms}
        rates = self.choose_rates(algorithms, starts[CHOOSE.task.name])
        for experiment in experiments:
            self.run_experiment(experiment, rates, starts[experiment.task.name])

    def start(self, task: Task, experiments: Iterable[Experiment]) -> Start:
        """Data, warm start and, if an experiment needs it, reward model of a task; notes what they
        reach."""
        data = self.make_data(task)
        (warm_start,) = self.runner.finish([protocol.warm_start_job(task, data, self.scale)])
        self.note_model(warm_start, f"warm start, {task.name}")
        if not any(each.learned_reward and each.task is task for each in experiments):
            return Start(data=data, warm_start=warm_start, reward_model=None)
        pairs = self.make_pairs(task, data, warm_start)
        job = protocol.reward_model_job(
            task, data, warm_start=warm_start, pairs=pairs, scale=self.scale
        )
        (reward_model,) = self.runner.finish([job])
        self.note_model(reward_model, f"reward model, {task.name}")
        return Start(data=data, warm_start=warm_start, reward_model=reward_model)

    def make_data(self, task: Task) -> Path:
        """The directory of the task's data; its name has the digest of the recipe's task."""
        content = cli.parse([f"--config={task.recipe}"]).config
        key = Job(name=f"{task.name}/data", program="data", recipes=(), settings=vars(content.task))
        folder = self.runner.directory(key)
        words = [f"--{name}={value}" for name, value in protocol.data_settings(folder).items()]
        words.append(f"--config={task.recipe}")
        if task is protocol.STEPS:
            if not (folder / "tokenizer.model").exists():  # the last one that is written
                make_steps_data(cli.parse(words).config, folder / task.supervised)
        elif make_task.main(words):
            raise RunFailure(f"the data of {task.name} was not made")
        return folder

    def make_pairs(self, task: Task, data: Path, warm_start: Path) -> Path:
        """The directory with train.jsonl and eval.jsonl of the task's reward model."""
        scale = self.scale
        labels = {row["prompt"]: row["label"] for row in results.read_rows(data / "train.jsonl")}
        chosen = list(labels)[: scale.pair_prompts]
        prompts = data / f"prompts-{scale.pair_prompts}x{scale.answers}.txt"
        lines = (prompt for prompt in chosen for _ in range(scale.answers))
        write_atomic(prompts, "".join(f"{line}\n" for line in lines).encode())
        job = protocol.answers_job(task, data, warm_start=warm_start, prompts=prompts)
        (folder,) = self.runner.finish([job])
        answers = [json.loads(line) for line in (folder / "output.txt").open() if line[0] == "{"]

        def is_right(prompt: str, response: str) -> bool:
            return RULES[task.name]([prompt], [response], [labels[prompt]], [{}])[0] >= 1

        samples = group_samples(((row["prompt"], row["response"]) for row in answers), is_right)
        held_out = set(chosen[: scale.held_out_pair_prompts])
        rows = make_pairs(samples, task.labelling, seed=0)
        parts = {"eval": [row for row in rows if row["prompt"] in held_out],
                 "train": [row for row in rows if row["prompt"] not in held_out]}  # fmt: skip
        for name, part in parts.items():
            if not part:
                raise RunFailure(
                    f"{folder}: no prompt has two answers that make a pair: train the warm start longer"
                )
            write_atomic(folder / f"{name}.jsonl", jsonl(part))
        return folder

    def choose_rates(self, algorithms: Iterable[str], start: Start) -> dict[str, float]:
        """The learning rate of each algorithm. A single one to choose from needs no run."""
        names = [name for name in protocol.ALGORITHMS if name in set(algorithms)]
        scale = self.scale
        if len(scale.rates) == 1:
            return dict.fromkeys(names, scale.rates[0])
        rows = self.finish(
            CHOOSE,
            [(name, rate, seed) for seed in scale.selection_seeds
             for name in names for rate in scale.rates],
            start,
        )  # fmt: skip
        return {
            name: results.best_rate(row for row in rows if row["algorithm"] == name)
            for name in names
        }

    def run_experiment(
        self, experiment: Experiment, rates: dict[str, float], start: Start
    ) -> list[Row]:
        """The runs of an experiment, seed by seed. In every other seed the algorithms come in the
        opposite order, so that a machine that warms up or slows down favours none."""
        wanted = []
        for number, seed in enumerate(self.scale.seeds):
            names = experiment.algorithms[:: -1 if number % 2 else 1]
            wanted += [(name, rates[name], seed) for name in names]
        return self.finish(experiment, wanted, start)

    def finish(
        self, experiment: Experiment, wanted: list[tuple[str, float, int]], start: Start
    ) -> list[Row]:
        """Runs (algorithm, rate, seed) of an experiment and writes their rows."""
        jobs = [
            protocol.run_job(experiment, name, rate=rate, seed=seed, start=start, scale=self.scale)
            for name, rate, seed in wanted
        ]
        folders = self.runner.finish(jobs)
        rows = [
            results.run_row(
                experiment, name, job=job, digest=self.runner.digest(job), folder=folder
            )
            for (name, _, _), job, folder in zip(wanted, jobs, folders)
        ]
        results.write_rows(self.results / f"{experiment.name}.jsonl", rows)
        return rows

    def note_model(self, folder: Path, name: str) -> None:
        """Writes what a model reached into models.jsonl, in place of its old row."""
        path = self.results / "models.jsonl"
        others = [row for row in results.read_rows(path) if row["model"] != name]
        row = results.evaluation_of(folder, name)
        results.write_rows(path, sorted([*others, row], key=lambda row: row["model"]))
