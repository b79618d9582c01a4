"""Which checkpoint of a folder counts: Megatron's tracker file, written last.

CKPT/latest_checkpointed_iteration.txt      "100" or "release"
CKPT/iter_0000100/  or  CKPT/release/       the checkpoint that it names
"""

from __future__ import annotations

import shutil
from pathlib import Path

from btx_megatron.durable import write_durably
from btx_megatron.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"


def checkpoint_name(iteration: int) -> str:
    """``iter_0000100`` for 100."""
    return f"iter_{iteration:07d}"


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that the tracker of ``folder`` names; None where there is no tracker.

    Raises UserError if the tracker names none, or one that is not there.
    """
    tracker = folder / TRACKER
    if not tracker.exists():
        return None
    name = tracker.read_text(errors="replace").strip()
    if name != RELEASE and not name.isdecimal():
        raise UserError(f"{tracker}: holds {name[:40]!r}, not a step or 'release'; correct it")
    path = folder / (RELEASE if name == RELEASE else checkpoint_name(int(name)))
    if not path.is_dir():
        raise UserError(f"{tracker}: names {path.name}, which is not there; correct the tracker")
    return path


def find_checkpoint(path: Path) -> Path:
    """The folder with the tensors: ``path`` itself, or the one that its tracker names."""
    if (path / ".metadata").exists():
        return path
    if (path / "checkpoints" / TRACKER).exists():  # a stage of a run
        path = path / "checkpoints"
    latest = latest_checkpoint(path)
    if latest is None and (path / "recipe.yaml").exists():
        raise UserError(f"{path}: a run, not a checkpoint; name one of its stages, as {path / 'finetune'}")
    if latest is None:
        raise UserError(f"{path}: no Megatron checkpoint there (neither .metadata nor {TRACKER})")
    return latest


def write_tracker(folder: Path, name: str) -> None:
    """Say which checkpoint of ``folder`` is the latest; last of all."""
    write_durably(folder / TRACKER, name)


def prune(folder: Path, iteration: int, keep: int, retain_interval: int | None = None) -> None:
    """Keep the last ``keep`` checkpoints up to ``iteration``, the latest one, and every
    ``retain_interval``-th step.

    What lies beyond it was left by a save that never ended, of a run that then went on from before.
    """
    steps = {int(path.name.removeprefix("iter_")): path for path in folder.glob("iter_*")}
    whole = sorted(step for step in steps if step <= iteration)
    kept = set(whole[-keep:])
    if retain_interval is not None:
        kept |= {step for step in whole if step % retain_interval == 0}
    for step, path in steps.items():
        if step not in kept:
            shutil.rmtree(path)
