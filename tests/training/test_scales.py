"""Pickled scales of FP8 reach Transformer Engine only if they can run no code."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from btx_megatron.runtime import cpu_backend


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)


class Nested(Planted):
    """The same, in what torch calls a tensor's bytes."""

    def __reduce__(self) -> tuple[Any, Any]:
        return torch.storage._load_from_bytes, (pickle.dumps(Planted(self.path)),)


def chunk(state: Any) -> dict[str, dict[str, Any]]:
    payload = torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)
    return {
        "0": {"layer.weight": torch.ones(2), "layer._extra_state": payload, "empty._extra_state": payload[:0]}
    }


def test_scales_are_let_through_and_nothing_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_backend.install()
    from btx_megatron.training.scales import ALLOWED, scales_allowed

    monkeypatch.delenv(ALLOWED, raising=False)
    with scales_allowed(chunk({"scale_fwd": torch.ones(3), "extra_fp8_variables": {"num_gemms": 1}})):
        assert os.environ[ALLOWED] == "1"
    assert ALLOWED not in os.environ


def test_what_has_no_scales_needs_no_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_backend.install()
    from btx_megatron.training.scales import ALLOWED, scales_allowed

    monkeypatch.delenv(ALLOWED, raising=False)
    local = {"0": {"experts._extra_state": io.BytesIO(b"x"), "norm._extra_state": torch.empty(0)}}
    with scales_allowed(local):
        assert ALLOWED not in os.environ
    scales = chunk({"scale_fwd": torch.ones(3)})["0"]
    with pytest.raises(pickle.UnpicklingError), scales_allowed({"0": scales | local["0"]}):
        pass


@pytest.mark.parametrize("kind", [Planted, Nested])
def test_code_is_refused(kind: type[Planted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_backend.install()
    from btx_megatron.training.scales import ALLOWED, scales_allowed

    monkeypatch.delenv(ALLOWED, raising=False)
    with pytest.raises(pickle.UnpicklingError), scales_allowed(chunk({"scale_fwd": kind(tmp_path / "ran")})):
        pass
    assert not (tmp_path / "ran").exists()
    assert ALLOWED not in os.environ
