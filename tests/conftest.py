"""Marks by folder: what lies in tests/gpu needs a CUDA device, what lies in tests/slurm a Slurm cluster.

The marks themselves are registered in pyproject.toml, which also leaves them out by default.
"""

import os
import signal
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait shall not take the cores of others
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may themselves be run with nohup

_MARKED_FOLDERS = ("gpu", "slurm")


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by mark
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        room = item.path.relative_to(here).parts[0]
        if room in _MARKED_FOLDERS:
            item.add_marker(room)


def pytest_collection_finish() -> None:
    """Without CUDA megatron.core can only be imported behind btx_megatron.runtime.cpu_backend."""
    assert "megatron.core" not in sys.modules, "a test module imports megatron.core on top; do it in the test"
