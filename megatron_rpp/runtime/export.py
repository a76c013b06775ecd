"""The final policy as a Hugging Face directory, converted from the checkpoint that a run ends with.

The main rank converts, a tensor at a time, while the others wait: nothing is gathered.
"""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from megatron_rpp.config import Config
from megatron_rpp.config.infer_settings import HF_FOLDER, hf_source
from megatron_rpp.conversion.convert import to_hf_alone
from megatron_rpp.conversion.output_dir import check_output, copy_side_files
from megatron_rpp.hf.architecture import CONFIG, family_of
from megatron_rpp.parallel import groups


def check_export(config: Config, checkpoints: str) -> None:
    """Raises ConfigError, before any work, where the export could not be written at the end."""
    if config.checkpoint.export_hf is not None:
        sources = [Path(checkpoints)]
        source = hf_source(config.model.hf_path, config.model.init_path)
        if source is None:
            family_of(config.model.architecture(config.model.vocab_size or 0))
        else:
            sources.append(source)
        check_output(Path(config.checkpoint.export_hf), sources, CONFIG, overwrite=True)


def keep_side_files(config: Config, checkpoints: str) -> None:
    """Puts config.json and tokenizer of the model beside its checkpoints. Collective."""
    source = hf_source(config.model.hf_path, config.model.init_path)
    folder = Path(checkpoints) / HF_FOLDER
    if source is not None and groups.is_main() and source.resolve() != folder.resolve():
        copy_side_files(source, folder)
    dist.barrier()


def export_policy(config: Config, checkpoints: str) -> None:
    """Writes checkpoint.export_hf from the newest of `checkpoints`, over an older export.

    Collective; does nothing where no export is asked for.
    """
    target = config.checkpoint.export_hf
    if target is not None:
        groups.on_main(lambda: to_hf_alone(checkpoints, target))
