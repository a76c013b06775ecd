"""The order of the work: data, warm starts, learning rates, reward models, experiments, results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
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

RULES: dict[str, Callable[..., list[float]]] = {"sums": exact_match, "steps": last_number.score}
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
        tasks = {each.task.name: each.task for each in (CHOOSE, *experiments)}
        starts = self.start(list(tasks.values()), experiments)
        algorithms = {name for experiment in experiments for name in experiment.algorithms}
        rates = self.choose_rates(algorithms, starts[CHOOSE.task.name])
        for experiment in experiments:
            self.run_experiment(experiment, rates, starts[experiment.task.name])

    def start(self, tasks: list[Task], experiments: list[Experiment]) -> dict[str, Start]:
        """Data, warm start and, if an experiment needs it, reward model of each task; notes what they
        reach."""
        data = {task.name: self.make_data(task) for task in tasks}
        warm = self.finish_models("warm start", {
            task.name: protocol.warm_start_job(task, data[task.name], self.scale) for task in tasks
        })  # fmt: skip
        rewarded = [
            task for task in tasks
            if any(each.learned_reward and each.task is task for each in experiments)
        ]  # fmt: skip
        pairs = self.make_pairs(rewarded, data, warm)
        models = self.finish_models("reward model", {
            task.name: protocol.reward_model_job(
                task, data[task.name], warm_start=warm[task.name], pairs=pairs[task.name],
                scale=self.scale,
            )
            for task in rewarded
        })  # fmt: skip
        return {
            name: Start(data=data[name], warm_start=warm[name], reward_model=models.get(name))
            for name in warm
        }

    def finish_models(self, kind: str, jobs: dict[str, Job]) -> dict[str, Path]:
        """Trains models, one per task; writes what they reach into models.jsonl, in place of old
        rows. Returns their directories."""
        folders = dict(zip(jobs, self.runner.finish(list(jobs.values()))))
        path = self.results / "models.jsonl"
        rows = {row["model"]: row for row in results.read_rows(path)}
        for task, folder in folders.items():
            name = f"{kind}, {task}"
            rows[name] = results.evaluation_of(folder, name)
        results.write_rows(path, [rows[name] for name in sorted(rows)])
        return folders

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

    def make_pairs(
        self, tasks: list[Task], data: dict[str, Path], warm: dict[str, Path]
    ) -> dict[str, Path]:
        """The directories with train.jsonl and eval.jsonl of the reward models."""
        labels, jobs = {}, {}
        for task in tasks:
            folder = data[task.name]
            rows = results.read_rows(folder / "train.jsonl")
            labels[task.name] = {row["prompt"]: row["label"] for row in rows}
            prompts = self.write_prompts(folder, list(labels[task.name]))
            jobs[task.name] = protocol.answers_job(
                task, folder, warm_start=warm[task.name], prompts=prompts
            )
        folders = dict(zip(jobs, self.runner.finish(list(jobs.values()))))
        for task in tasks:
            self.write_pairs(task, folders[task.name], labels[task.name])
        return folders

    def write_prompts(self, folder: Path, prompts: list[str]) -> Path:
        """A file of the prompts to answer, each on as many lines as it gets answers."""
        path = folder / f"prompts-{self.scale.pair_prompts}x{self.scale.answers}.txt"
        chosen = prompts[: self.scale.pair_prompts]
        lines = (prompt for prompt in chosen for _ in range(self.scale.answers))
        write_atomic(path, "".join(f"{line}\n" for line in lines).encode())
        return path

    def write_pairs(self, task: Task, folder: Path, labels: dict[str, str]) -> None:
        """Makes pairs of the answers in `folder`."""
        answers = [json.loads(line) for line in (folder / "output.txt").open() if line[0] == "{"]

        def is_right(prompt: str, response: str) -> bool:
            return RULES[task.name]([prompt], [response], [labels[prompt]], [{}])[0] >= 1

        samples = group_samples(((row["prompt"], row["response"]) for row in answers), is_right)
        held_out = set(list(labels)[: self.scale.held_out_pair_prompts])
        rows = make_pairs(samples, task.labelling, per_prompt=self.scale.pairs_per_prompt, seed=0)
        parts = {"eval": [row for row in rows if row["prompt"] in held_out],
                 "train": [row for row in rows if row["prompt"] not in held_out]}  # fmt: skip
        for name, part in parts.items():
            if not part:
                raise RunFailure(
                    f"{folder}: no prompt has two answers that make a pair: train the warm start longer"
                )
            write_atomic(folder / f"{name}.jsonl", jsonl(part))

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
        file, own = self.results / f"{experiment.name}.jsonl", {name for name, _, _ in wanted}
        # An experiment may be asked for some of its algorithms; what the others reached stays.
        others = [row for row in results.read_rows(file) if row["algorithm"] not in own]
        results.write_rows(file, results.in_order([*others, *rows]))
        return rows
