"""Where everything of a run lies on disk, and how a stage's folder comes to be.

    RUN/recipe.yaml            the resolved recipe, written first
    RUN/data, seed, experts/NAME, mix, average, finetune, upcycle, dense, ..., evaluate, report
                               finished stages, each with its manifest.json
    RUN/.work/<the same>       stages that are under way
    RUN/.locks/STAGE           held by the ``btx`` that works on the stage
    RUN/.locks/run             held, together, by all that work here by its recipe
    RUN/slurm                  what ``btx submit`` sent to a cluster: scripts, frozen code, logs, job numbers

A stage works below ``.work`` and is renamed into place once it is whole and on disk: no reader ever sees
half a stage, and a rename on one file system either happens or does not. Several ``btx`` may work in one
run, each on stages of its own: experts trained apart, on as many machines, meet in one folder. A finished
stage may be a link to another run's that is equal to it (comparison/sharing.py).
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import yaml

from btx_megatron.durable import sync, sync_tree, temporary_of, write_durably
from btx_megatron.errors import UserError
from btx_megatron.manifest import MANIFEST_FILE, Manifest, manifest_text, read_manifest
from btx_megatron.recipe import Recipe
from btx_megatron.recipe_file import RECIPE_FILE, parse_recipe, recipe_to_dict

LOCKS = ".locks"

_CLAIM = "recipe"  # the lock of those who read and write the recipe
_USE = "run"  # and of those who work by it
_CLAIM_PATIENCE_SECONDS = 120.0  # hundreds of experts may start at one moment
_LOCK_PATIENCE_SECONDS = 1.0  # `btx status` holds the lock for a moment
_FREE_KEYS = re.compile(
    r"run_folder|launch\..*|slurm\..*|export\..*|compare(\..*)?|data\.(num_workers|loader)"
    r"|(evaluate\.|stage\.|stages\.(?!experts\.)[^.]+\.|stages\.experts\.[^.]+\.)?layout\..*"
    r"|(.*\.)?training\.(log_interval|save_interval|save_total_limit|save_retain_interval|async_save"
    r"|max_consecutive_skipped_steps|loss_spike_factor|distributed_timeout_minutes|tensorboard|wandb_project)"
)
"""Keys that change no result: where and how the work is done. A layout changes the last digits alone."""


def stage_folder(stage: str) -> Path:
    """Where a stage lies, relative to the run folder."""
    kind, _, domain = stage.partition(":")
    if kind == "expert":
        return Path("experts", domain)
    return Path("data" if stage == "prepare" else stage)


class RunFolder:
    """One run on disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()

    def published(self, stage: str) -> Path:
        """Folder of a finished stage."""
        return self.path / stage_folder(stage)

    def work(self, stage: str) -> Path:
        """Folder of a stage under way."""
        return self.path / ".work" / stage_folder(stage)

    def manifest(self, stage: str) -> Manifest | None:
        """Manifest of a finished stage; None where it is not finished."""
        return read_manifest(self.published(stage))

    def claim(self, recipe: Recipe) -> IO[str]:
        """Make this folder the recipe's run, or find that it is; no other's until what is returned is closed.

        A folder without results, in which nobody works, is taken over; in another the recipe may differ in
        what changes none (layouts, intervals, launch), in its tasks until they were asked and in its export
        until that was made. Raises UserError if the folder cannot be written or holds other things, or
        (naming the first key that differs) if another recipe made it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._refuse_foreign_files()
            (self.path / LOCKS).mkdir(exist_ok=True)
            refusal = "another btx starts here at this moment; try again"
            with self._locked(_CLAIM, refusal, _CLAIM_PATIENCE_SECONDS):
                self._claim(recipe)
                used = (self.path / LOCKS / _USE).open("a")
                _try_lock(used, fcntl.LOCK_SH)  # nobody holds it alone while we have the claim
                return used
        except OSError as error:
            raise UserError(
                f"run_folder {self.path}: {error.strerror}; give a run_folder that can be written"
            ) from None

    def _claim(self, recipe: Recipe) -> None:
        resolved = recipe_to_dict(recipe)
        if (self.path / RECIPE_FILE).exists() and self._holds_results():
            made = recipe_to_dict(self.recipe())
            if self._is_to_come("evaluate"):
                made["evaluate"] |= {key: resolved["evaluate"][key] for key in ("tasks", "execute_code")}
            difference = first_difference(made, resolved)
            if difference:
                key, there, here = difference
                raise UserError(
                    f"{self.path} was made by another recipe: {key} is {there} there and {here} here; "
                    "set it back, or give another run_folder"
                )
            if made["export"] != resolved["export"] and not self._is_to_come("export"):
                there, here = made["export"], resolved["export"]
                raise UserError(
                    f"{self.published('export')} was made with {there}, the recipe says {here}; "
                    "set it back, or delete the folder to export again"
                )
        text = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
        write_durably(self.path / RECIPE_FILE, text)

    def _is_to_come(self, stage: str) -> bool:
        return self.manifest(stage) is None and not self.is_locked(stage)

    def lock(self, stage: str, patience_seconds: float = _LOCK_PATIENCE_SECONDS) -> IO[str]:
        """Keep every other ``btx`` from a stage until the file that is returned is closed.

        The kernel lets go of it when the process ends, however it ends. Raises UserError if another
        ``btx`` works on the stage, and still does after ``patience_seconds``.
        """
        refusal = "another btx works on it; wait for it, or give another run_folder"
        return self._locked(stage, refusal, patience_seconds)

    def is_locked(self, stage: str) -> bool:
        """True while a ``btx`` works on the stage."""
        try:
            with (self.path / LOCKS / stage).open() as file:
                return not _try_lock(file, fcntl.LOCK_SH)
        except FileNotFoundError:
            return False

    def _locked(self, name: str, refusal: str, patience_seconds: float) -> IO[str]:
        file = (self.path / LOCKS / name).open("a")
        deadline = time.monotonic() + patience_seconds
        while not _try_lock(file, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                file.close()
                raise UserError(f"{self.path}, {name}: {refusal}")
            time.sleep(0.05)
        return file

    def _holds_results(self) -> bool:
        """True once a stage is finished, has a checkpoint or somebody works here; then the recipe stays."""
        return (
            any(
                (path / MANIFEST_FILE).exists()
                for path in [*self.path.iterdir(), *self.path.glob("experts/*")]
            )
            or any(self.path.glob(".work/**/checkpoints/*"))
            or self._is_used()
        )

    def _is_used(self) -> bool:
        with (self.path / LOCKS / _USE).open("a") as file:
            return not _try_lock(file, fcntl.LOCK_EX)

    def recipe(self) -> Recipe:
        """The recipe that made this run. Raises UserError if the folder is no run."""
        path = self.path / RECIPE_FILE
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise yaml.YAMLError
            recipe = parse_recipe(content, where=str(path))
        except FileNotFoundError:
            raise UserError(f"{self.path}: not a run folder, it has no {RECIPE_FILE}") from None
        except (yaml.YAMLError, UnicodeDecodeError):
            raise UserError(f"{path}: broken; give another run_folder") from None
        recipe.run_folder = str(self.path)  # the folder may have been moved
        return recipe

    def publish(self, manifest: Manifest) -> None:
        """Turn a stage's work folder into the finished stage; an older result of it is replaced."""
        work, target = self.work(manifest.stage), self.published(manifest.stage)
        write_durably(work / MANIFEST_FILE, manifest_text(manifest))
        sync_tree(work)
        target.parent.mkdir(parents=True, exist_ok=True)
        replaced = work.with_name(f".{work.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)  # left by a crash in the middle of these lines
        if target.is_symlink():
            target.unlink()  # to a stage of another run, which stays
        elif target.exists():
            os.rename(target, replaced)
        os.rename(work, target)
        sync(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    def _refuse_foreign_files(self) -> None:
        names = {entry.name for entry in self.path.iterdir()}
        foreign = sorted(names - {LOCKS, temporary_of(self.path / RECIPE_FILE).name})  # of a btx that begins
        if foreign and RECIPE_FILE not in names:
            raise UserError(
                f"run_folder {self.path} is not empty ({foreign[0]}) and no run of btx; "
                "give an empty or new run_folder"
            )


def first_difference(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """First key, with both values, in which two resolved recipes differ so that results may differ."""
    old_values, new_values = dict(_flatten(old)), dict(_flatten(new))
    for key in new_values | old_values:
        there, here = old_values.get(key, "absent"), new_values.get(key, "absent")
        if there != here and not _FREE_KEYS.fullmatch(key):
            return key, there, here
    return None


def result_keys(recipe: dict[str, Any]) -> dict[str, Any]:
    """Of a resolved recipe, or a part of one, what results depend on: ``a.b[0].c`` -> value."""
    return {key: value for key, value in _flatten(recipe) if not _FREE_KEYS.fullmatch(key)}


def _flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a tree of plain values, as ``a.b[0].c``; an empty list or mapping is a leaf."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _flatten(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _flatten(item, f"{key}[{index}]")
    else:
        yield key, value


def _try_lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file.fileno(), kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"{file.name}: this file system has no file locks ({error.strerror}); mount it with them "
            "(Lustre: -o flock), or give a run_folder on another one"
        ) from None
    return True
