"""What is told of a training step: Megatron's iteration line, and a line in losses.jsonl.

Throughput is that of the steps themselves, waiting for data included, saving left out. FLOPs are those of
btx_megatron.estimate_flops: the model's, whatever the layout recomputes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any


@dataclass
class StepResult:
    """Outcome of one optimizer step."""

    lm_loss: float
    """Mean loss over the step's tokens, nats a token."""
    tokens: int
    """Tokens in the step, over all ranks."""
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    learning_rate: float
    """Learning rate of the step."""
    seconds: float
    """Wall time."""
    balancing_loss: float | None = None
    """Balancing loss without alpha, mean over layers and micro-batches (1: even); None: not balanced."""
    stop: bool = False
    """A stop was asked for; all ranks see the same answer."""
    skipped: bool = False
    """Loss or gradient was not finite, so nothing moved. The gradient's norm is NaN where the loss was."""


@dataclass(frozen=True)
class Throughput:
    """How fast steps went."""

    tokens_per_second: float
    """Over all ranks."""
    tflops_per_rank: float
    """1e12 floating-point operations a second, of one rank."""
    mfu: float | None
    """Model FLOPs utilization: the share of what one rank's device could do; None: its peak is not known."""


@dataclass(frozen=True)
class Speedometer:
    """What it takes to turn seconds into throughput."""

    flops_per_token: float
    """Forward and backward."""
    ranks: int
    peak_tflops: float | None = None
    """Of one rank's device, in the precision of the run."""

    def read(self, steps: Sequence[StepResult]) -> Throughput:
        """The throughput of some steps together."""
        tokens_per_second = sum(step.tokens for step in steps) / sum(step.seconds for step in steps)
        tflops = tokens_per_second * self.flops_per_token / self.ranks / 1e12
        return Throughput(tokens_per_second, tflops, tflops / self.peak_tflops if self.peak_tflops else None)


@dataclass(frozen=True)
class Gauges:
    """What is read once a log interval, over all ranks."""

    memory_bytes: int
    """Of the rank that takes most: resident on a CPU; on a GPU the most that its tensors ever took."""
    routes: list[list[int]]
    """[layers][experts] routes that each expert took since the last reading; [] of a dense model."""
    dropped: list[int] = field(default_factory=list)
    """[layers] routes that found no room; [] where nothing bounds an expert's room."""

    @property
    def load(self) -> ExpertLoad | None:
        """The expert load of each layer; None of a dense model."""
        if not self.routes:
            return None
        totals = [max(1, sum(layer)) for layer in self.routes]
        each = list(zip(self.routes, totals, strict=True))
        return ExpertLoad(
            min=[round(min(layer) / total, 6) for layer, total in each],
            max=[round(max(layer) / total, 6) for layer, total in each],
            dead=[layer.count(0) for layer in self.routes],
        )


@dataclass(frozen=True)
class ExpertLoad:
    """How evenly the experts are used; an entry a layer. Even is 1 / number of experts."""

    min: list[float]
    """Share of the routes that the least used expert took."""
    max: list[float]
    """Share of the routes that the most used expert took."""
    dead: list[int]
    """Experts that no token took."""


class LossFile:
    """losses.jsonl: one line a step. A resumed run drops the steps that its checkpoint did not keep."""

    def __init__(self, path: Path, done: int) -> None:
        lines = path.read_text().splitlines() if path.exists() else []
        whole = (line for line in lines if line.endswith("}"))  # a kill may cut one short
        kept = [line for line in whole if json.loads(line)["step"] <= done]
        path.write_text("".join(f"{line}\n" for line in kept))
        self._file = path.open("a", buffering=1)

    def write(self, record: dict[str, Any]) -> None:
        """Append one step."""
        self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def step_record(
    step: int, consumed_tokens: int, result: StepResult, speed: Throughput, gauges: Gauges | None
) -> dict[str, Any]:
    """What losses.jsonl says of a step, which counts from 1; ``gauges`` where they were read after it."""
    record: dict[str, Any] = {
        "step": step,
        "tokens": consumed_tokens,
        "lm_loss": _finite(result.lm_loss),
        "grad_norm": _finite(result.grad_norm),
        "learning_rate": result.learning_rate,
        "seconds": round(result.seconds, 4),
        "tokens_per_second": round(speed.tokens_per_second, 1),
        "tflops_per_rank": round(speed.tflops_per_rank, 6),
    }
    if speed.mfu is not None:
        record["mfu"] = round(speed.mfu, 4)
    if result.balancing_loss is not None:
        record["load_balancing_loss"] = _finite(result.balancing_loss)
    if result.skipped:
        record["skipped"] = True
    if gauges:
        record["memory_bytes"] = gauges.memory_bytes
        if gauges.load:
            record["expert_load"] = asdict(gauges.load)
        if gauges.dropped:
            record["dropped_routes"] = gauges.dropped
    return record


def _finite(number: float) -> float | None:
    """JSON has neither NaN nor Inf."""
    return number if math.isfinite(number) else None


def iteration_line(
    step: int,
    total: int,
    consumed_samples: int,
    batch: int,
    since: Sequence[StepResult],
    speedometer: Speedometer,
    gauges: Gauges,
) -> str:
    """Megatron's log line, so that the field's scripts read ours; ``since`` are the steps since the last."""
    result = since[-1]
    milliseconds = 1000 * sum(one.seconds for one in since) / len(since)
    skipped = sum(one.skipped for one in since)
    not_finite = sum(not math.isfinite(one.lm_loss) for one in since)
    now = datetime.now().strftime("%Y-%m-%d %H:%M:%S.%f")
    balancing = result.balancing_loss
    balance = "" if balancing is None else f" load_balancing_loss: {balancing:.6E} |"
    return (
        f" [{now}] iteration {step:8d}/{total:8d} | consumed samples: {consumed_samples:12d} |"
        f" elapsed time per iteration (ms): {milliseconds:.1f} |{_throughput(speedometer.read(since))}"
        f" learning rate: {result.learning_rate:.6E} |"
        f" global batch size: {batch:5d} | lm loss: {result.lm_loss:.6E} |{balance} loss scale: 1.0 |"
        f" grad norm: {result.grad_norm:.3f} | number of skipped iterations: {skipped:3d} |"
        f" number of nan iterations: {not_finite:3d} |{_gauges(gauges)}"
    )


def _throughput(speed: Throughput) -> str:
    digits = 1 if speed.tflops_per_rank >= 10 else 4  # a CPU core has a few hundredths
    text = f" throughput per GPU (TFLOP/s/GPU): {speed.tflops_per_rank:.{digits}f} |"
    text += f" tokens per second: {speed.tokens_per_second:.1f} |"
    return text if speed.mfu is None else f"{text} MFU (%): {100 * speed.mfu:.1f} |"


def _gauges(gauges: Gauges) -> str:
    text = f" memory (MiB): {gauges.memory_bytes / 2**20:.0f} |"
    load = gauges.load
    if load is None:
        return text
    share = f"{min(load.min):.3f}/{max(load.max):.3f}"
    text = f"{text} expert load min/max: {share} | dead experts: {sum(load.dead):3d} |"
    return f"{text} dropped routes: {sum(gauges.dropped)} |" if gauges.dropped else text
