"""What a training stage writes for others to read."""

from __future__ import annotations

import json
import re
from pathlib import Path

from btx_megatron.training.metrics import LossFile, StepResult, iteration_line

RESULT = StepResult(lm_loss=2.345678, tokens=2048, grad_norm=0.8123, learning_rate=1e-4, seconds=0.5)


def test_the_iteration_line_is_megatrons() -> None:
    line = iteration_line(100, 1000, 12800, 128, 512.34, RESULT)
    assert re.fullmatch(
        r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}\] iteration      100/    1000 \| "
        r"consumed samples:        12800 \| elapsed time per iteration \(ms\): 512\.3 \| "
        r"learning rate: 1\.000000E-04 \| global batch size:   128 \| lm loss: 2\.345678E\+00 \| "
        r"loss scale: 1\.0 \| grad norm: 0\.812 \| number of skipped iterations:   0 \| "
        r"number of nan iterations:   0 \|",
        line,
    )


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_resumed_run_drops_the_steps_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "losses.jsonl"
    first = LossFile(path, done=0)
    for step in range(1, 8):
        first.write(step, step * 2048, RESULT)
    first.close()
    path.write_text(path.read_text() + '{"step": 8, "tok')  # killed while writing
    second = LossFile(path, done=5)
    assert steps(path) == [1, 2, 3, 4, 5]
    second.write(6, 6 * 2048, RESULT)
    second.close()
    assert steps(path) == [1, 2, 3, 4, 5, 6]
