"""What is shared out, and what is shown: cores and GPUs, pace, columns."""

from __future__ import annotations

from pathlib import Path

import pytest

from btx_megatron.columns import columns
from btx_megatron.errors import UserError
from btx_megatron.launch import machine
from btx_megatron.launch.allocation import Allocation
from btx_megatron.launch.display import PlainDisplay, clock, end_line, how_far, pace
from btx_megatron.launch.machine import Machine, this_machine
from btx_megatron.pipeline import PipelineStage
from btx_megatron.recipe import Layout, Recipe
from btx_megatron.runtime import cores as cores_module
from btx_megatron.runtime.outcome import Outcome
from btx_megatron.runtime.progress import ProgressRecord


@pytest.mark.parametrize(("quota", "cores"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 64)])
def test_cores_keep_to_affinity_and_container_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(cores_module, "_CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    assert this_machine().cores == cores


def test_gpus_are_those_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    assert this_machine().gpus == ("2", "5")
    assert this_machine("cpu").gpus == ()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert this_machine().gpus == ()


def test_gpus_are_not_shared_but_cores_are() -> None:
    stage = PipelineStage("seed", "train", (), ranks=4)
    Machine(cores=1).check([stage])
    Machine(cores=1, gpus=("0", "1", "2", "3")).check([stage])
    with pytest.raises(UserError, match="stage seed has 4 ranks and this machine 2 GPUs"):
        Machine(cores=64, gpus=("0", "1")).check([stage])
    Machine(cores=64, gpus=("0",)).check([PipelineStage("mix", "mix", (), ranks=1)])


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = [PipelineStage("prepare", "prepare", ()), PipelineStage("seed", "train", ())]
    recipe, here = Recipe(), Machine(cores=1)
    here.check_packages(recipe, stages)
    monkeypatch.setattr(machine, "find_spec", lambda package: None)
    here.check_packages(recipe, stages[:1])
    Allocation(cores=1, container=True).check_packages(recipe, stages)  # they are looked for in the image
    with pytest.raises(UserError, match="stage seed needs the package megatron, which is not installed here"):
        here.check_packages(recipe, stages)


def record(
    done: int, time: float, text: str = "loss 2.5", first: tuple[int, float] = (0, 0.0)
) -> ProgressRecord:
    return ProgressRecord("training", done, 200, text, time, *first)


def test_pace_starts_with_the_first_report_of_a_phase() -> None:
    resumed = record(100, 10.0, "", (100, 10.0))
    assert resumed.rate is None
    assert pace(resumed) == ""
    assert how_far(resumed) == "training 100/200"
    later = record(120, 20.0, "loss 3.2, 512 tokens/s", (100, 10.0))
    assert later.rate == 2.0
    assert how_far(later) == "training 120/200, 2/s, 0:40 left, loss 3.2, 512 tokens/s"


def test_plain_display_speaks_at_start_end_and_every_half_minute(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    display = PlainDisplay()
    display.start("seed", "DP2")
    for second in range(61):
        now = float(second)
        display.progress("seed", record(second, now))
    display.end("seed", Outcome("done"), 61.0)
    assert capsys.readouterr().out.splitlines() == [
        "seed: started (DP2)",
        "seed: training 30/200, 1/s, 2:50 left, loss 2.5",
        "seed: training 60/200, 1/s, 2:20 left, loss 2.5",
        "seed: done in 1:01, last batch: loss 2.5",
    ]


def test_texts() -> None:
    assert [clock(s) for s in (0, 59.6, 3599, 3600)] == ["0:00", "1:00", "59:59", "1:00:00"]
    mixed = ProgressRecord("mixing", 9, 9, "decoder.final_layernorm.weight", 9.0, 0, 0.0)
    assert end_line("mix", Outcome("done"), 5, mixed) == "mix: done in 0:05"
    assert end_line("a", Outcome("failed", "ValueError: x"), 5, None) == "a: failed after 0:05: ValueError: x"
    assert str(Layout()) == "1 rank"
    assert str(Layout(tensor_model_parallel_size=2, sequence_parallel=True)) == "TP2 SP"
    assert columns([["a", "bb"], ["ccc", "d"]], right=(1,)) == "a    bb\nccc   d"
