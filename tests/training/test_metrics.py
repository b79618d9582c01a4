"""What a training stage writes for others to read."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from btx_megatron.training.metrics import (
    Gauges,
    LossFile,
    Speedometer,
    StepResult,
    Throughput,
    iteration_line,
    step_record,
)

RESULT = StepResult(lm_loss=2.345678, tokens=2048, grad_norm=0.8123, learning_rate=1e-4, seconds=0.5)
SPEEDOMETER = Speedometer(flops_per_token=4e7, ranks=2)
DENSE = Gauges(memory_bytes=700 * 2**20, routes=[])
MOE = replace(DENSE, routes=[[10, 20, 30, 40], [0, 0, 25, 75], [0, 0, 0, 0]])


def line_of(*since: StepResult, speedometer: Speedometer = SPEEDOMETER, gauges: Gauges = DENSE) -> str:
    return iteration_line(100, 1000, 12800, 128, since, speedometer, gauges)


def record_of(result: StepResult, gauges: Gauges | None = None, step: int = 1) -> dict[str, Any]:
    return step_record(step, step * 2048, result, SPEEDOMETER.read([result]), gauges)


def test_the_iteration_line_is_megatrons() -> None:
    assert re.fullmatch(
        r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}\] iteration      100/    1000 \| "
        r"consumed samples:        12800 \| elapsed time per iteration \(ms\): 512\.3 \| "
        r"throughput per GPU \(TFLOP/s/GPU\): 0\.0799 \| tokens per second: 3997\.3 \| "
        r"learning rate: 1\.000000E-04 \| global batch size:   128 \| lm loss: 2\.345678E\+00 \| "
        r"loss scale: 1\.0 \| grad norm: 0\.812 \| number of skipped iterations:   0 \| "
        r"number of nan iterations:   0 \| memory \(MiB\): 700 \|",
        line_of(replace(RESULT, seconds=0.52468), RESULT),
    )


def test_a_moe_and_a_device_that_is_known_have_more_to_tell() -> None:
    h100 = Speedometer(flops_per_token=6e11, ranks=4, peak_tflops=989.0)
    line = line_of(RESULT, speedometer=h100, gauges=MOE)
    assert "(TFLOP/s/GPU): 614.4 | tokens per second: 4096.0 | MFU (%): 62.1 |" in line
    assert line.endswith("| expert load min/max: 0.000/0.750 | dead experts:   6 |")


def test_throughput_is_that_of_the_steps_together() -> None:
    speed = SPEEDOMETER.read([RESULT, replace(RESULT, seconds=1.5, tokens=4096)])
    assert speed == Throughput(3072.0, 3072 * 4e7 / 2 / 1e12, None)


def test_expert_load() -> None:
    load = MOE.load
    assert load is not None
    assert (load.min, load.max, load.dead) == ([0.1, 0, 0], [0.4, 0.75, 0], [0, 2, 4])
    assert DENSE.load is None


def test_a_record() -> None:
    assert record_of(RESULT) == {
        "step": 1,
        "tokens": 2048,
        "lm_loss": 2.345678,
        "grad_norm": 0.8123,
        "learning_rate": 1e-4,
        "seconds": 0.5,
        "tokens_per_second": 4096.0,
        "tflops_per_rank": 0.08192,
    }
    more = record_of(replace(RESULT, balancing_loss=1.5), MOE)
    assert more["load_balancing_loss"] == 1.5
    assert more["memory_bytes"] == 700 * 2**20
    assert more["expert_load"] == {"min": [0.1, 0, 0], "max": [0.4, 0.75, 0], "dead": [0, 2, 4]}
    assert "expert_load" not in record_of(RESULT, DENSE)
    known = replace(SPEEDOMETER, peak_tflops=0.1)
    assert step_record(1, 2048, RESULT, known.read([RESULT]), None)["mfu"] == 0.8192


def test_skipped_steps_are_counted_in_the_line() -> None:
    skipped = replace(RESULT, grad_norm=math.inf, skipped=True)
    without_loss = replace(RESULT, lm_loss=math.nan, grad_norm=math.nan, skipped=True)
    line = line_of(skipped, without_loss, skipped, RESULT)
    assert "number of skipped iterations:   3 | number of nan iterations:   1 |" in line


def test_a_skipped_step_is_valid_json(tmp_path: Path) -> None:
    file = LossFile(tmp_path / "losses.jsonl", done=0)
    file.write(record_of(replace(RESULT, lm_loss=math.nan, grad_norm=math.inf, skipped=True)))
    file.close()
    text = (tmp_path / "losses.jsonl").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (record["lm_loss"], record["grad_norm"], record["skipped"]) == (None, None, True)


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_resumed_run_drops_the_steps_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "losses.jsonl"
    first = LossFile(path, done=0)
    for step in range(1, 8):
        first.write(record_of(RESULT, step=step))
    first.close()
    path.write_text(path.read_text() + '{"step": 8, "tok')  # killed while writing
    second = LossFile(path, done=5)
    assert steps(path) == [1, 2, 3, 4, 5]
    second.write(record_of(RESULT, step=6))
    second.close()
    assert steps(path) == [1, 2, 3, 4, 5, 6]


def test_no_step_is_told_twice_where_some_were_lost(tmp_path: Path) -> None:
    """A machine that crashes may lose lines of steps that its checkpoint has."""
    path = tmp_path / "losses.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 5, 6, 7)))
    LossFile(path, done=6).close()
    assert steps(path) == [1, 2, 5, 6]
