"""Which checkpoints stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from btx_megatron.checkpoints.tracker import find_checkpoint, latest_checkpoint, prune, write_tracker
from btx_megatron.errors import UserError


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("iter_*"))


@pytest.mark.parametrize(
    ("there", "keep", "stays"),
    [
        ([100, 120], 1, [120]),
        ([50, 100, 120], 2, [100, 120]),
        ([100, 120, 150], 1, [120]),  # 150: a save that was killed, before the run went on from 100
        ([100, 120, 150], 3, [100, 120]),
    ],
)
def test_prune_never_takes_the_latest(tmp_path: Path, there: list[int], keep: int, stays: list[int]) -> None:
    for step in there:
        (tmp_path / f"iter_{step:07d}").mkdir()
    write_tracker(tmp_path, "120")
    prune(tmp_path, 120, keep)
    assert folders(tmp_path) == [f"iter_{step:07d}" for step in stays]
    assert latest_checkpoint(tmp_path) == tmp_path / "iter_0000120"


def test_every_nth_checkpoint_stays(tmp_path: Path) -> None:
    for step in (50, 100, 150, 200, 220, 300):
        (tmp_path / f"iter_{step:07d}").mkdir()
    prune(tmp_path, 220, keep=1, retain_interval=100)  # 300: of a save that was killed
    assert folders(tmp_path) == [f"iter_{step:07d}" for step in (100, 200, 220)]


def test_a_run_is_no_checkpoint_but_its_stages_are(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(UserError, match="a run, not a checkpoint; name one of its stages"):
        find_checkpoint(tmp_path)
    (tmp_path / "seed" / "checkpoints" / "iter_0000005").mkdir(parents=True)
    write_tracker(tmp_path / "seed" / "checkpoints", "5")
    assert find_checkpoint(tmp_path / "seed").name == "iter_0000005"


def test_a_folder_without_a_tracker_has_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "iter_0000010").mkdir()
    assert latest_checkpoint(tmp_path) is None
