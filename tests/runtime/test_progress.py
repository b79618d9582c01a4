"""Progress files, outcomes of several ranks, and the time a stage has taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from btx_megatron.errors import StageFailed, UserError
from btx_megatron.runtime.outcome import (
    Outcome,
    clear_outcome,
    error_line,
    read_outcome,
    write_error,
    write_result,
    write_stopped,
)
from btx_megatron.runtime.progress import Progress, read_progress
from btx_megatron.runtime.stop import clear_stop, request_stop, stop_requested
from btx_megatron.runtime.stopwatch import Stopwatch, read_duration


def test_progress_is_throttled_but_never_loses_first_and_last(tmp_path: Path) -> None:
    progress = Progress(tmp_path)
    written = set()
    for done in range(2001):
        progress.update("training", done, 2000, f"loss {done}")
        record = read_progress(tmp_path)
        assert record is not None
        written.add(record.done)
    assert {0, 2000} <= written
    assert len(written) < 500  # 2001 updates in far less than 100 s
    progress.update("saving", 0, 1)
    record = read_progress(tmp_path)
    assert record is not None
    assert (record.phase, record.done, record.total, record.text) == ("saving", 0, 1, "")


def test_rate_begins_with_the_first_report_of_a_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.time", lambda: now)
    progress = Progress(tmp_path)
    told = []
    reports = {1000.0: ("indexing", 1, 2), 1060.0: ("training", 51, 101), 1070.0: ("training", 71, 101)}
    for moment, report in reports.items():
        now = moment
        progress.update(*report)
        told.append(read_progress(tmp_path))
    assert [record and record.rate for record in told] == [None, None, 2.0]
    assert told[2]
    assert told[2].seconds_left == 15.0


def test_no_progress_yet(tmp_path: Path) -> None:
    assert read_progress(tmp_path) is None


def test_a_report_of_another_version_is_none(tmp_path: Path) -> None:
    (tmp_path / "progress.json").write_text('{"phase": "training", "done": 3, "total": 9}')
    assert read_progress(tmp_path) is None


def test_what_cannot_be_written_ends_no_work(tmp_path: Path) -> None:
    gone = tmp_path / "gone"  # as a full disk, or a file server that is away for a moment
    Progress(gone).update("training", 1, 2)
    stopwatch = Stopwatch(gone)
    stopwatch.save()
    assert stopwatch.seconds >= 0
    gone.mkdir()
    stopwatch.save()
    assert read_duration(gone) > 0


def test_stop_request(tmp_path: Path) -> None:
    assert not stop_requested(tmp_path)
    request_stop(tmp_path)
    request_stop(tmp_path)
    assert stop_requested(tmp_path)
    clear_stop(tmp_path)
    clear_stop(tmp_path)
    assert not stop_requested(tmp_path)


def test_the_lowest_ranks_user_error_comes_before_any_failure(tmp_path: Path) -> None:
    write_error(tmp_path, rank=0, exit_code=1, message="RuntimeError: connection closed by peer")
    write_error(tmp_path, rank=3, exit_code=2, message="corpus is empty (3)")
    write_error(tmp_path, rank=1, exit_code=2, message="corpus is empty (1)")
    assert read_outcome(tmp_path) == Outcome("user_error", "corpus is empty (1)")


def test_the_earliest_failure_is_the_cause(tmp_path: Path) -> None:
    for rank, message in ((1, "ValueError: the cause"), (0, "RuntimeError: connection closed by peer")):
        write_error(tmp_path, rank, exit_code=1, message=message)
    first = json.loads((tmp_path / "error-1.json").read_text())
    second = json.loads((tmp_path / "error-0.json").read_text())
    assert first["time"] <= second["time"]
    assert read_outcome(tmp_path) == Outcome("failed", "ValueError: the cause")


def test_outcomes(tmp_path: Path) -> None:
    assert read_outcome(tmp_path) is None
    write_stopped(tmp_path)
    assert read_outcome(tmp_path) == Outcome("stopped")
    write_result(tmp_path, {"tokens": 3})
    assert read_outcome(tmp_path) == Outcome("done", result={"tokens": 3})
    write_error(tmp_path, rank=1, exit_code=1, message="x")
    assert read_outcome(tmp_path) == Outcome("failed", "x")  # a rank that failed after rank 0 was done
    clear_outcome(tmp_path)
    assert read_outcome(tmp_path) is None


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("data.x: gone"), (2, "data.x: gone")),
        (StageFailed("the loss is nan"), (1, "the loss is nan")),
        (ValueError("two\n  lines"), (1, "ValueError: two lines")),
    ],
)
def test_error_line(error: Exception, line: tuple[int, str]) -> None:
    assert error_line(error) == line
