"""Marks by folder: what lies in tests/gpu needs a CUDA device, what lies in tests/slurm a Slurm cluster.

The marks themselves are registered in pyproject.toml, which also leaves them out by default.
"""

import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Examples that take long tell of a busy machine, or of the first import of Megatron, not of the code.
settings.register_profile("patient", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

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


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """The test that forgot the backend fails, not a later one of the same process that installs it."""
    if "megatron.core" in sys.modules:
        from btx_megatron.runtime import cpu_backend

        cpu_backend.install()  # raises where this test imported megatron.core without it
