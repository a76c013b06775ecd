"""A directory of checkpoints: which one is current, how a new one is added, which ones are deleted.

    <dir>/latest_checkpointed_iteration.txt     the step (or the name) of the current one
    <dir>/best_checkpointed_iteration.txt       that of the best evaluation (checkpoint.keep_best)
    <dir>/iter_0000040/                         a checkpoint with its manifest (manifest.py)
    <dir>/damaged_iter_0000060/                 renamed by a resume: it did not match its manifest
    <dir>/.saving_*  .removing_*                left by a kill; deleted by the next save

A save writes to a temporary directory, adds the manifest, renames the directory, and moves the
pointer last. So after a kill or a power cut the previous checkpoint is still current. Checkpoints of
other programs (Megatron's own) have no manifest; they count as complete if they have `.metadata`,
which Megatron writes last.

A process that writes here holds the lock of the directory (directory_lock.py). `newest` without
repair and `require` need no lock.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_rpp.checkpoint import manifest
from megatron_rpp.lifecycle import heartbeat
from megatron_rpp.lifecycle.atomic_files import sync_directory, this_process, write_atomic
from megatron_rpp.lifecycle.config_error import ConfigError
from megatron_rpp.lifecycle.exit_codes import SaveFailed
from megatron_rpp.parallel import ranks

POINTER, BEST = "latest_checkpointed_iteration.txt", "best_checkpointed_iteration.txt"


def _pointed(directory: Path) -> str | None:
    """The checkpoint that the pointer names; None if there is no pointer, or it is empty."""
    pointer = directory / POINTER
    text = pointer.read_text().strip() if pointer.exists() else ""
    return f"iter_{int(text[:20]):07d}" if text.isdigit() else text or None


def _candidates(directory: Path) -> list[str]:
    """The checkpoints to try, newest first: the current one and older ones; all without a pointer."""
    names = sorted((path.name for path in directory.glob("iter_*")), reverse=True)
    pointed = _pointed(directory)
    if pointed is None or not (directory / pointed).is_dir():
        return names
    return [pointed, *(name for name in names if name < pointed or pointed not in names)]


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, the same on every rank. Collective."""
    if not ranks.gathered((path / ".metadata").exists())[0]:
        return ".metadata is missing"
    if not ranks.gathered((path / manifest.MANIFEST).exists())[0]:
        return None
    return manifest.damage(path)


def newest(
    directory: str | Path, log: Callable[[str], None] = print, repair: bool = False
) -> Path | None:
    """The newest intact checkpoint that the pointer allows; None in a new directory. Collective.

    Args:
        log: called with a line about each damaged one that is passed over.
        repair: rename those and move the pointer; only for the one writer of the directory.
    Raises:
        ConfigError: there are checkpoints and none is intact, or the pointer names one and there
            are none.
    """
    directory = Path(directory)
    damaged: dict[str, str] = {}
    for name in ranks.gathered(_candidates(directory))[0]:
        found = _damage(directory / name)
        if found is None:
            if repair:
                _set_aside(directory, name, list(damaged))
            if name != _pointed(directory) and not damaged:
                log(f"{directory / POINTER} names no checkpoint; using {name}")
            for other, problem in damaged.items():
                where = f", set aside as damaged_{other}" if repair else ""
                log(f"checkpoint {directory / other} is damaged ({problem}){where}; using {name}")
            return directory / name
        damaged[name] = found
    if damaged:
        listed = "; ".join(f"{name}: {problem}" for name, problem in damaged.items())
        raise ConfigError(
            f"no checkpoint in {directory} is intact ({listed}): restore one of them, or choose "
            f"another directory to start anew"
        )
    if (directory / POINTER).exists():
        raise ConfigError(
            f"{directory / POINTER} is there, but no checkpoint: restore the iter_* directories, "
            f"or remove that file to start anew"
        )
    return None


def _set_aside(directory: Path, intact: str, damaged: list[str]) -> None:
    def rename() -> None:
        for name in damaged:
            target = directory / f"damaged_{name}"
            shutil.rmtree(target, ignore_errors=True)
            (directory / name).rename(target)
        _point(directory / POINTER, intact)

    if damaged:
        ranks.on_main_rank(rename)  # all ranks wait for the new names


def _is_checkpoint(path: Path) -> bool:
    return (path / ".metadata").exists() or (path / manifest.MANIFEST).exists()


def current(directory: str | Path) -> Path:
    """The current checkpoint of `directory`, which may also be a checkpoint itself; not checked.

    Raises ConfigError if there is none.
    """
    path = Path(directory).absolute()
    if _is_checkpoint(path):
        return path
    names = _candidates(path)
    if not names:
        raise ConfigError(
            f"no checkpoint at {path}: it holds neither .metadata nor a {POINTER} that names one; "
            f"give the directory of an earlier run or of a converted model"
        )
    return path / names[0]


def require(directory: str | Path, log: Callable[[str], None] = print) -> Path:
    """The newest checkpoint of `directory`, which may also be a checkpoint itself. Collective.

    Raises ConfigError if there is none, or it is damaged. Changes nothing.
    """
    path = Path(directory).absolute()
    if _is_checkpoint(path):
        found = _damage(path)
        if found is not None:
            raise ConfigError(f"checkpoint {path} is damaged ({found}): choose another")
        return path
    latest = newest(path, log)
    if latest is None:
        raise ConfigError(
            f"no checkpoint at {path}: it holds no {POINTER}; give the directory of an earlier run"
        )
    return latest


def _point(pointer: Path, name: str) -> None:
    step = name.removeprefix("iter_")
    write_atomic(pointer, f"{int(step) if step.isdigit() else name}\n".encode())


def clear(directory: Path) -> None:
    """Deletes what kills have left."""
    for pattern in (".saving_*", ".removing_*"):
        for stale in directory.glob(pattern):
            # What the writer of a killed run still adds is deleted by the next save.
            shutil.rmtree(stale, ignore_errors=True)


def _delete(path: Path) -> None:
    """Deletes a checkpoint. After a kill it is either whole or no longer there by its name."""
    doomed = path.with_name(f".removing_{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def begin(directory: Path, name: str) -> Path:
    """A temporary directory for the checkpoint `name`. Collective.

    Raises OSError, on every rank.
    """

    def make() -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        clear(directory)
        # Named by process: a writer of a killed run may still write to its own.
        temporary = directory / f".saving_{name}_{this_process()}"
        temporary.mkdir()
        return temporary

    return ranks.on_main_rank(make)


def publish(temporary: Path, final: Path, *, keep: int, keep_best: bool) -> Path:
    """Makes a complete checkpoint current and deletes old ones. Collective.

    Args:
        keep: how many of the newest checkpoints stay.
        keep_best: the one of the best evaluation stays too.
    Raises:
        SaveFailed: on every rank, if the file system fails.
    """
    try:
        ranks.on_main_rank(partial(_make_current, temporary, final, keep=keep, keep_best=keep_best))
    except OSError as error:
        raise SaveFailed(
            f"the checkpoint {final} is written and could not be made current: {error}. "
            f"The current one is as it was: make room (or repair the file system) and run again"
        ) from error
    return final


def _make_current(temporary: Path, final: Path, *, keep: int, keep_best: bool) -> None:
    heartbeat.enter("save: rename")
    if final.exists():
        _delete(final)
    temporary.rename(final)
    sync_directory(final.parent)
    heartbeat.enter("save: pointer")
    _point(final.parent / POINTER, final.name)
    heartbeat.enter("save: remove old ones")
    _prune(final, keep, keep_best)


def _prune(newest: Path, keep: int, keep_best: bool) -> None:
    directory = newest.parent
    names = sorted(path.name for path in directory.glob("iter_*"))
    staying = {*names[-keep:], newest.name}
    best = _best(directory, names) if keep_best else None
    if best is not None:
        _point(directory / BEST, best)
        staying.add(best)
    for name in names:
        if name not in staying:
            _delete(directory / name)


def _best(directory: Path, names: list[str]) -> str | None:
    """The newest checkpoint with the highest held-out accuracy; None if no accuracy is known."""
    found = []
    for name in names:
        content = manifest.read_manifest(directory / name)
        accuracy = content["notes"].get("accuracy") if content is not None else None
        if accuracy is not None:
            found.append((accuracy, name))
    return max(found)[1] if found else None
