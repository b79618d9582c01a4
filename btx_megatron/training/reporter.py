"""What a stage tells while it trains: the log, losses.jsonl, the progress bar, TensorBoard and the like."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import torch

from btx_megatron.data.folder import read_statistics
from btx_megatron.estimate_flops import known_peak_tflops, training_flops_per_token
from btx_megatron.job import Job
from btx_megatron.recipe import Stage
from btx_megatron.runtime.progress import Progress
from btx_megatron.runtime.ranks import device
from btx_megatron.training.curves import Curves, open_curves, scalars_of
from btx_megatron.training.gauges import read_gauges
from btx_megatron.training.metrics import (
    Gauges,
    LossFile,
    Speedometer,
    StepResult,
    iteration_line,
    step_record,
)

_STEPS_OF_THE_BAR = 20  # over which the progress bar's speed is taken


class Reporter:
    """Is told of every step, on all ranks; rank 0 passes it on. A context manager."""

    def __init__(self, job: Job, stage: Stage, model: Sequence[torch.nn.Module], done: int) -> None:
        """``done``: steps that the checkpoint has."""
        self._stage, self._model, self._layers = stage, model, job.recipe.model.num_layers
        self._experts = job.recipe.num_experts(job.stage)
        first = torch.distributed.get_rank() == 0
        self._teller = _Teller(job, stage, done) if first else None

    def step(self, iteration: int, consumed_samples: int, result: StepResult) -> None:
        """Tell of a step. Every ``log_interval`` steps a collective."""
        training, gauges = self._stage.training, None
        if iteration % training.log_interval == 0 or iteration == training.train_iters:
            gauges = read_gauges(self._model, self._layers, self._experts)
        if self._teller:
            self._teller.step(iteration, consumed_samples, result, gauges)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._teller:
            self._teller.close()


class _Teller:
    """Rank 0's part."""

    def __init__(self, job: Job, stage: Stage, done: int) -> None:
        self._training, self._sequence = stage.training, job.recipe.model.seq_length
        self._speedometer = Speedometer(
            training_flops_per_token(
                job.recipe, job.stage, read_statistics(job.data_folder)["padded_vocab_size"]
            ),
            torch.distributed.get_world_size(),
            job.recipe.launch.peak_tflops or _peak_here(stage.training.bf16),
        )
        self._losses = LossFile(job.work_folder / "losses.jsonl", done)
        self._curves: list[Curves] = open_curves(job, stage, done)
        self._progress = Progress(job.work_folder)
        self._since: list[StepResult] = []
        self._latest: deque[StepResult] = deque(maxlen=_STEPS_OF_THE_BAR)

    def step(self, iteration: int, samples: int, result: StepResult, gauges: Gauges | None) -> None:
        total, batch = self._training.train_iters or 0, self._training.global_batch_size
        record = step_record(
            iteration, samples * self._sequence, result, self._speedometer.read([result]), gauges
        )
        self._losses.write(record)
        for curves in self._curves:
            curves.write(iteration, scalars_of(record))
        self._latest.append(result)
        speed = self._speedometer.read(self._latest).tokens_per_second
        text = f"loss {result.lm_loss:.3f}, {speed:,.0f} tokens/s"
        self._progress.update("training", iteration, total, text)
        self._since.append(result)
        if gauges:
            print(
                iteration_line(iteration, total, samples, batch, self._since, self._speedometer, gauges),
                flush=True,
            )
            self._since.clear()

    def close(self) -> None:
        self._losses.close()
        for curves in self._curves:
            curves.close()


def _peak_here(bf16: bool) -> float | None:
    """Of this rank's GPU; what we know are peaks of bfloat16."""
    if device().type != "cuda" or not bf16:
        return None
    return known_peak_tflops(torch.cuda.get_device_name(device()))
