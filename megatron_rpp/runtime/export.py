"""Exports the final policy as a Hugging Face directory, from the last checkpoint of the run.

The main rank converts one tensor at a time while the others wait. Nothing is gathered.
"""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from megatron_rpp.config import Config
from megatron_rpp.config.infer_settings import HF_FOLDER, hf_source
from megatron_rpp.conversion import output_dir
from megatron_rpp.conversion.convert import to_hf_alone
from megatron_rpp.hf.architecture import CONFIG, family_of
from megatron_rpp.parallel import groups


def check_export(config: Config, checkpoints: str) -> None:
    """Raises ConfigError, before any work, if the export could not be written at the end."""
    if config.checkpoint.export_hf is not None:
        sources = [Path(checkpoints)]
        source = hf_source(config.model.hf_path, config.model.init_path)
        if source is None:
            family_of(config.model.architecture(config.model.vocab_size or 0))
        else:
            sources.append(source)
        output_dir.check_output(
            Path(config.checkpoint.export_hf), sources, marker=CONFIG, overwrite=True
        )


def copy_side_files(config: Config, checkpoints: str) -> None:
    """Copies config.json and tokenizer of the model to its checkpoints. Collective."""
    source = hf_source(config.model.hf_path, config.model.init_path)
    folder = Path(checkpoints) / HF_FOLDER
    if source is not None and groups.is_main() and source.resolve() != folder.resolve():
        output_dir.copy_side_files(source, folder)
    dist.barrier()


def export_policy(config: Config, checkpoints: str) -> None:
    """Writes checkpoint.export_hf from the current one of `checkpoints`. Collective.

    Replaces an older export. Does nothing if the setting is null.
    """
    target = config.checkpoint.export_hf
    if target is not None:
        groups.on_main(lambda: to_hf_alone(checkpoints, target))
