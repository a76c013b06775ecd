"""The loop of the programs that learn from data without rollouts: sft.py and reward_model.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron_rpp.config import Config, LoggingConfig, RewardModelConfig, SftConfig
from megatron_rpp.model import kernels
from megatron_rpp.parallel.device import describe
from megatron_rpp.runtime import checkpointing
from megatron_rpp.runtime.run import Run, evaluate_held_out
from megatron_rpp.runtime.session import training

Section = SftConfig | RewardModelConfig


def with_section(config: Config, section: Section) -> Config:
    """The settings with those of the section in the places where a run of train.py has its own."""
    return replace(
        config,
        optimizer=section.optimizer,
        train=replace(config.train, steps=section.steps, stop_accuracy=section.stop_accuracy),
        evaluation=replace(config.evaluation, interval=section.eval_interval),
        checkpoint=replace(
            config.checkpoint,
            dir=section.dir,
            load=None,
            interval=section.checkpoint_interval,
            keep_best=False,
            save_rollouts=False,
        ),  # fmt: skip
        logging=LoggingConfig(dir=section.dir),
    )


def train_steps(
    run: Run,
    section: Section,
    step: Callable[[Run], dict[str, float]],
    *,
    name: str,
    title: str,
    dry_run: bool,
    evaluate: checkpointing.Evaluate = evaluate_held_out,
) -> None:
    """Resumes and trains until the run is finished. Collective.

    Args:
        section: the settings of the program; name: that of the section.
        step: takes one optimizer step and returns its metrics.
        title: of the progress bar.
        dry_run: stop before the first step.
        evaluate: as checkpointing.evaluate_if_due takes it.
    """
    log = run.console.log
    checkpointing.resume(run, repair=not dry_run)
    log(describe())
    log(kernels.describe(run.policy.model))
    log(f"data: {run.inputs.counts}")
    if dry_run:
        log("dry run: everything is built and nothing was trained")
        return
    with training(run, f"{name}.steps"):
        with run.console.stage(title, run.config.train.steps) as advance_bar:
            advance_bar(run.state.step)
            while not run.finished:
                checkpointing.stop_if_requested(run)
                row = run.step_progress.supervised or step(run)
                run.step_progress.supervised = row
                evaluated = checkpointing.evaluate_if_due(run, evaluate)
                row = row | evaluated
                run.advance(section.batch_size)
                checkpointing.finish_step(run, row)
                if evaluated:
                    cells = {tag: f"{value:.4g}" for tag, value in row.items()}
                    run.console.row({"step": str(run.state.step)} | cells)
                advance_bar(1)
        log(f"checkpoint: {Path(run.config.checkpoint.dir) / (run.saves.current or '')}")
