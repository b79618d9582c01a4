"""``--approximate``: what Mixtral cannot say is refused, or written all the same and recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from llamas import assert_refused, mix_arguments, run_btx, write_llama

from btx_megatron.mixing.hashes import hash_tensors

PRE_SOFTMAX = (
    "moe_router_pre_softmax: Mixtral renormalises the gates of the chosen experts, this model does not"
)


@pytest.fixture
def experts(tmp_path: Path) -> list[Path]:
    return [write_llama(tmp_path / f"e{seed}", seed) for seed in range(3)]


def done(*arguments: object) -> str:
    code, out, err = run_btx(*arguments)
    assert (code, err) == (0, "")
    return out


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_pre_softmax_is_refused_with_the_option_that_writes_it(experts: list[Path], tmp_path: Path) -> None:
    done(*mix_arguments(experts, tmp_path / "moe", "--to", "megatron", "--router-pre-softmax"))
    line = assert_refused(tmp_path, PRE_SOFTMAX, "convert", tmp_path / "moe", tmp_path / "no", "--to", "hf")
    assert "--approximate exports it all the same" in line
    more = ["--to", "hf", "--router-pre-softmax"]
    assert_refused(tmp_path, "--approximate", *mix_arguments(experts, tmp_path / "no", *more))


@pytest.mark.parametrize("kind", ["convert", "mix"])
def test_what_differs_is_printed_and_recorded_twice(experts: list[Path], tmp_path: Path, kind: str) -> None:
    done(*mix_arguments(experts, tmp_path / "moe", "--to", "megatron", "--router-pre-softmax"))
    if kind == "convert":
        out = done("convert", tmp_path / "moe", tmp_path / "hf", "--to", "hf", "--approximate")
    else:
        more = ["--to", "hf", "--router-pre-softmax", "--approximate"]
        out = done(*mix_arguments(experts, tmp_path / "hf", *more))
    assert f"approximate: {PRE_SOFTMAX}\n" in out
    assert read(tmp_path / "hf" / "config.json")["btx_approximate"] == [PRE_SOFTMAX]
    assert read(tmp_path / "hf" / "manifest.json")["recipe"]["approximate"] == [PRE_SOFTMAX]
    assert "approximate" not in read(tmp_path / "moe" / "manifest.json")["recipe"]  # Megatron can say it
    assert hash_tensors(tmp_path / "hf") == hash_tensors(tmp_path / "moe")


@pytest.mark.parametrize("more", [[], ["--router-pre-softmax", "--router-topk", "3"]])
def test_without_need_nothing_is_recorded(experts: list[Path], tmp_path: Path, more: list[str]) -> None:
    """A token that takes all experts has gates that sum to 1, wherever the softmax is."""
    plain = done(*mix_arguments(experts, tmp_path / "plain", *more))
    out = done(*mix_arguments(experts, tmp_path / "asked", *more, "--approximate"))
    assert "approximate" not in plain + out
    files = [{path.name for path in (tmp_path / name).iterdir()} for name in ("plain", "asked")]
    assert files[0] == files[1]
    for name in files[0] - {"manifest.json"}:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "asked" / name).read_bytes()
    assert "approximate" not in read(tmp_path / "asked" / "manifest.json")["recipe"]


def test_a_dense_model_needs_no_approximation(experts: list[Path], tmp_path: Path) -> None:
    done("convert", experts[0], tmp_path / "again", "--to", "hf", "--approximate")
    assert "btx_approximate" not in read(tmp_path / "again" / "config.json")


@pytest.mark.parametrize("to", ["hf", "megatron", "megatron-legacy"])
def test_a_router_that_cannot_learn_is_not_mixed_towards_any_format(
    experts: list[Path], tmp_path: Path, to: str
) -> None:
    more = ["--to", to, "--router-topk", "1", *(["--approximate"] if to == "hf" else [])]
    arguments = mix_arguments(experts, tmp_path / "no", *more)
    assert_refused(tmp_path, "moe_router_topk 1 without pre-softmax has a constant gate", *arguments)
    done(*mix_arguments(experts, tmp_path / "yes", *more, "--router-pre-softmax"))
