"""Where the curves of a stage go beside losses.jsonl: TensorBoard, and Weights & Biases.

Both are given the records of losses.jsonl, step by step. A stage that goes on from a checkpoint repeats the
steps that the checkpoint did not keep; both are told where it goes on, so that no step is there twice.
TensorBoard's files lie in the stage's folder: ``tensorboard --logdir RUN`` shows all stages of a run.
"""

from __future__ import annotations

import secrets
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from btx_megatron.errors import UserError
from btx_megatron.job import Job
from btx_megatron.recipe import Stage, Training
from btx_megatron.recipe_file import recipe_to_dict

TENSORBOARD_FOLDER = "tensorboard"
WANDB_ID_FILE = "wandb-id.txt"

# Megatron's tags, where it has one
_TAGS = {
    "lm_loss": "lm loss",
    "learning_rate": "learning-rate",
    "grad_norm": "grad-norm",
    "load_balancing_loss": "load_balancing_loss",
    "seconds": "iteration-time",
    "tokens_per_second": "speed/tokens per second",
    "tflops_per_rank": "speed/TFLOP per second and rank",
    "mfu": "speed/MFU",
    "memory_bytes": "memory/bytes",
}


class Curves(Protocol):
    """Takes the scalars of step after step."""

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Add a step; it is on disk (or on its way) when this returns."""

    def close(self) -> None:
        """Nothing comes any more."""


def check_installed(training: Training) -> None:
    """Raise UserError where a package is missing that draws what the recipe asks for."""
    if training.tensorboard and find_spec("tensorboard") is None:
        raise UserError(
            "training.tensorboard: TensorBoard is not installed; pip install 'btx-megatron[train]', or set "
            "training.tensorboard=false"
        )
    if training.wandb_project is not None and find_spec("wandb") is None:
        raise UserError(
            "training.wandb_project: Weights & Biases is not installed; pip install 'btx-megatron[wandb]', "
            "or take the key out"
        )


def open_curves(job: Job, stage: Stage, done: int) -> list[Curves]:
    """The curves that the recipe asks for, from step ``done`` + 1 on."""
    curves: list[Curves] = []
    if stage.training.tensorboard:
        curves.append(TensorBoard(job.work_folder / TENSORBOARD_FOLDER, done))
    if stage.training.wandb_project is not None:
        curves.append(WeightsAndBiases(job, stage.training.wandb_project))
    return curves


def scalars_of(record: dict[str, Any]) -> dict[str, float]:
    """Tags and values of a record of losses.jsonl; what is not a finite number is left out."""
    scalars = {tag: record[key] for key, tag in _TAGS.items() if record.get(key) is not None}
    for kind, layers in record.get("expert_load", {}).items():
        scalars |= {f"expert load {kind}/layer {layer}": value for layer, value in enumerate(layers)}
    return scalars


class TensorBoard:
    """An event file of TensorBoard."""

    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # the steps from here on that an earlier file has are void
        self._writer = SummaryWriter(str(folder), purge_step=done + 1)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Add a step."""
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()  # a rank that is killed leaves no gap behind

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, named after the recipe and the stage; offline where WANDB_MODE says so.

    A stage that goes on continues its run: a step that is there already is not taken again.
    """

    def __init__(self, job: Job, project: str) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project=project,
                name=f"{job.recipe.name}/{job.stage}",
                id=_run_id(job.work_folder / WANDB_ID_FILE),
                resume="allow",
                dir=str(job.work_folder),
                config=recipe_to_dict(job.recipe),
            )
        except (wandb.Error, OSError) as error:
            raise UserError(
                f"training.wandb_project {project}: Weights & Biases cannot start ({_one_line(error)}); "
                "run `wandb login`, set WANDB_MODE=offline, or take the key out"
            ) from error

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Add a step."""
        self._run.log(scalars, step=step)

    def close(self) -> None:
        """Hand over what is left."""
        self._run.finish()


def _run_id(path: Path) -> str:
    """The id of the stage's run, drawn when the stage is begun."""
    if not path.exists():
        path.write_text(secrets.token_hex(8))
    return path.read_text()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
