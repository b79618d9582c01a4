"""What a training stage tells: Megatron's iteration line, losses.jsonl, and the progress bar's file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path


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


class LossFile:
    """losses.jsonl: one line a step. A resumed run drops the steps that its checkpoint did not keep."""

    def __init__(self, path: Path, done: int) -> None:
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines[:done] if line.endswith("}")]
        path.write_text("".join(f"{line}\n" for line in kept))
        self._file = path.open("a", buffering=1)

    def write(self, step: int, consumed_tokens: int, result: StepResult) -> None:
        """Append one step; ``step`` counts from 1."""
        record = {
            "step": step,
            "tokens": consumed_tokens,
            "lm_loss": result.lm_loss,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "seconds": round(result.seconds, 4),
        }
        if result.balancing_loss is not None:
            record["load_balancing_loss"] = result.balancing_loss
        self._file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def iteration_line(
    step: int, total: int, consumed_samples: int, batch: int, milliseconds: float, result: StepResult
) -> str:
    """Megatron's log line, so that the field's scripts read ours."""
    now = datetime.now().strftime("%Y-%m-%d %H:%M:%S.%f")
    balancing = result.balancing_loss
    balance = "" if balancing is None else f" load_balancing_loss: {balancing:.6E} |"
    return (
        f" [{now}] iteration {step:8d}/{total:8d} | consumed samples: {consumed_samples:12d} |"
        f" elapsed time per iteration (ms): {milliseconds:.1f} | learning rate: {result.learning_rate:.6E} |"
        f" global batch size: {batch:5d} | lm loss: {result.lm_loss:.6E} |{balance} loss scale: 1.0 |"
        f" grad norm: {result.grad_norm:.3f} | number of skipped iterations:   0 |"
        f" number of nan iterations:   0 |"
    )
