"""What can go wrong in ``btx mix`` and ``btx convert``: one line, the exit code, and nothing half written."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llamas import (
    HIDDEN,
    assert_mix_refused,
    assert_refused,
    mix_arguments,
    random_weights,
    run_btx,
    write_llama,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from btx_megatron.checkpoints import stream


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "good", 0)


# damaged files


def edit_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header of a safetensors file; the values stay where they are behind it."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def test_a_missing_shard_is_named(good: Path) -> None:
    bad = write_llama(good.parent / "bad", 1, shards=3)
    (bad / "model-00002-of-00003.safetensors").unlink()
    assert_mix_refused(good, bad, "bad/model-00002-of-00003.safetensors: cannot be read (No such file")


def test_shards_in_a_folder_that_is_named_from_here(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_llama(good.parent / "sharded", 1, shards=2)
    monkeypatch.chdir(good.parent)
    assert run_btx(*mix_arguments([Path("good"), Path("sharded")], Path("out")))[0] == 0


def test_a_tensor_that_two_shards_hold_is_named(good: Path) -> None:
    """Which one is the model's cannot be known: the last one won, and another program may take the first."""
    bad = write_llama(good.parent / "bad", 1, shards=3)
    norm, other = "model.norm.weight", bad / "model-00001-of-00003.safetensors"
    holder = json.loads((bad / "model.safetensors.index.json").read_text())["weight_map"][norm]
    assert holder != other.name
    save_file({**load_file(other), norm: torch.ones(16).bfloat16()}, other)
    assert_mix_refused(good, bad, f"bad: {norm} lies in {other.name} and in {holder}; delete the one")


@pytest.mark.parametrize("index", [True, False])
def test_a_file_beside_the_models_that_holds_one_of_its_tensors(good: Path, index: bool) -> None:
    bad = write_llama(good.parent / "bad", 1, shards=2 if index else 1)
    holder = "model-00001-of-00002.safetensors" if index else "model.safetensors"
    name = sorted(load_file(bad / holder))[0]
    save_file({name: load_file(bad / holder)[name]}, bad / "other.safetensors")
    assert_mix_refused(good, bad, f"bad: {name} lies in {holder} and in other.safetensors")
    save_file({"lora": torch.ones(3)}, bad / "other.safetensors")  # none of its tensors, or none of ours
    save_file({name: torch.ones(3, dtype=torch.int8)}, bad / "integers.safetensors")
    assert run_btx(*mix_arguments([good, bad], good.parent / "out"))[0] == 0


def test_a_shard_that_the_index_does_not_name_is_missed(good: Path) -> None:
    bad = write_llama(good.parent / "bad", 1, shards=2)
    index = bad / "model.safetensors.index.json"
    kept = {k: v for k, v in json.loads(index.read_text())["weight_map"].items() if "00001" in v}
    index.write_text(json.dumps({"weight_map": kept}))
    assert_mix_refused(good, bad, "is missing; restore the files")


@pytest.mark.parametrize("index", [{}, {"weight_map": 3}, {"weight_map": {}}, {"weight_map": {"a": 5}}])
def test_an_index_that_is_none(good: Path, index: dict[str, Any]) -> None:
    bad = write_llama(good.parent / "bad", 1, shards=2)
    (bad / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_mix_refused(good, bad, "bad/model.safetensors.index.json: ")


def test_no_weights_at_all(good: Path) -> None:
    bad = write_llama(good.parent / "bad", 1)
    (bad / "model.safetensors").unlink()
    assert_mix_refused(good, bad, "bad/model.safetensors: cannot be read (No such file")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -600])
def test_truncated_safetensors(good: Path, keep: int) -> None:
    """In the length, in the header, in the values."""
    bad = write_llama(good.parent / "bad", 1)
    path = bad / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert_mix_refused(good, bad, "bad/model.safetensors: not a safetensors file")


def test_a_file_cut_short_while_it_is_read(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The headers were whole: only the reading of the values can tell."""
    bad = write_llama(good.parent / "bad", 1)
    path, make = bad / "model.safetensors", stream._make_part
    whole = path.read_bytes()

    def cut_first(*arguments: Any) -> bytes:
        path.write_bytes(whole[: len(whole) // 2])
        return make(*arguments)

    monkeypatch.setattr(stream, "_make_part", cut_first)
    code, _, err = run_btx(*mix_arguments([good, bad], good.parent / "out"))
    assert (code, err.count("\n")) == (2, 1)
    assert "bad/model.safetensors: ends too early, it is cut short; restore it" in err
    assert sorted(path.name for path in good.parent.iterdir()) == ["bad", "good"]


def _set(key: str, **values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header[key].update(values)


NORM, HEAD = "model.norm.weight", "lm_head.weight"


@pytest.mark.parametrize(
    "change",
    [
        _set(NORM, data_offsets=[0, 1 << 40]),
        _set(NORM, data_offsets=[-32, 0]),
        _set(NORM, data_offsets=[32, 0]),
        _set(NORM, data_offsets="ab"),
        _set(NORM, shape=[2 * HIDDEN]),
        _set(NORM, shape=[-HIDDEN]),
        _set(NORM, shape=[1 << 70]),
        _set(NORM, shape=HIDDEN),
        _set(NORM, shape=[float(HIDDEN)]),
        _set(NORM, dtype="F32"),
        _set(NORM, dtype="I8"),
        _set(NORM, dtype=["F32"]),
        lambda header: header[NORM].pop("dtype"),
        lambda header: header.update({NORM: 5}),
        lambda header: header[NORM].update(data_offsets=header[HEAD]["data_offsets"][:1] * 2, shape=[0]),
        # another tensor's bytes: every size is right
        lambda header: header["model.layers.0.input_layernorm.weight"].update(
            data_offsets=header[NORM]["data_offsets"]
        ),
    ],
)
def test_a_header_that_lies(good: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    bad = write_llama(good.parent / "bad", 1)
    edit_header(bad, change)
    assert_mix_refused(good, bad, "bad/model.safetensors: not a safetensors file")


@pytest.mark.parametrize("text", [b"[]", b"[1]", b'"x"', b"{", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_a_header_that_is_none(good: Path, text: bytes) -> None:
    bad = write_llama(good.parent / "bad", 1)
    (bad / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    assert_mix_refused(good, bad, "bad/model.safetensors: not a safetensors file")


def test_a_scalar_is_no_matrix(good: Path) -> None:
    for name, message in (
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        (NORM, "model.norm.weight is [] bfloat16"),
    ):
        shutil.rmtree(good.parent / "bad", ignore_errors=True)
        scalar = {name: torch.tensor(1.0, dtype=torch.bfloat16)}
        bad = write_llama(
            good.parent / "bad", 1, change=lambda weights, scalar=scalar: weights.update(scalar)
        )
        assert_mix_refused(good, bad, message)


def test_verify_finds_a_flipped_byte_anywhere_in_the_values(tmp_path: Path) -> None:
    """The mix cannot know of one in a source; in its own output, the hash tells."""
    sources = [write_llama(tmp_path / name, seed) for seed, name in enumerate("ab")]
    for to, file in (("hf", "model.safetensors"), ("megatron", "release/__0_0.distcp")):
        output = tmp_path / to
        assert run_btx(*mix_arguments(sources, output, "--to", to))[0] == 0
        assert run_btx("verify", output)[0] == 0
        whole = (output / file).read_bytes()
        value = random_weights(1)["model.layers.1.mlp.down_proj.weight"].view(torch.uint8).numpy().tobytes()
        at = whole.index(value) + len(value) // 2
        (output / file).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert_refused(tmp_path, "experts.linear_fc2.weight: xxh3_128 is", "verify", output)


# values that are none


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("tensor", "shown"),
    [
        ("model.layers.1.mlp.down_proj.weight", "experts.linear_fc2.weight [1, 1]: "),
        ("model.layers.1.self_attn.k_proj.weight", "linear_qkv.weight [1]: "),
        ("model.norm.weight", "decoder.final_layernorm.weight []: "),
    ],
)  # fmt: skip
def test_nan_names_the_expert_and_the_tensor(good: Path, tensor: str, shown: str, value: float) -> None:
    bad = write_llama(
        good.parent / "bad", 1, change=lambda weights: weights[tensor].view(-1)[-1:].fill_(value)
    )
    third = write_llama(good.parent / "third", 2)
    sources = {"good": good, "bad": bad, "third": third}
    err = assert_refused(good.parent, shown, *mix_arguments(sources, good.parent / "out"))
    assert f"expert bad ({bad})" in err
    assert "expert good" not in err
    assert "expert third" not in err


@pytest.mark.parametrize("more", [["--average", "ties"], ["--experts", "blend"], ["--experts", "virtual"]])
def test_nan_is_found_under_every_rule(good: Path, more: list[str]) -> None:
    name = "model.layers.0.mlp.up_proj.weight" if more[0] == "--experts" else "lm_head.weight"
    bad = write_llama(good.parent / "bad", 1, change=lambda weights: weights[name][-1].fill_(math.nan))
    base = ["--base", good] if more[0] == "--average" else []
    err = assert_mix_refused(good, bad, "NaN or infinite values", *base, *more)
    assert f"expert bad ({bad})" in err


def test_nan_in_the_base_is_the_bases(good: Path) -> None:
    base = write_llama(good.parent / "base", 1, change=lambda weights: weights[HEAD][0].fill_(math.nan))
    other = write_llama(good.parent / "other", 2)
    arguments = mix_arguments([good, other], good.parent / "out", "--base", base, "--average", "ties")
    assert f"base ({base})" in assert_refused(good.parent, "output_layer.weight", *arguments)


def test_nan_that_no_source_has_is_the_rules(good: Path) -> None:
    """fp16 overflows where virtual groups scale it."""
    half = [
        write_llama(
            good.parent / name,
            seed,
            dtype=torch.float16,
            change=lambda weights: weights["model.layers.0.mlp.up_proj.weight"].fill_(65000),
        )
        for seed, name in enumerate("xy")
    ]
    more = ["--experts", "virtual", "--chunks", "2"]
    err = assert_refused(
        good.parent, "are finite, what the rule", *mix_arguments(half, good.parent / "out", *more)
    )
    assert "too large for the type" in err


def test_nan_stops_a_conversion_and_names_the_source(good: Path) -> None:
    bad = write_llama(good.parent / "bad", 1, change=lambda weights: weights[HEAD][0].fill_(math.nan))
    arguments = ("convert", bad, good.parent / "out", "--to", "megatron")
    assert str(bad) in assert_refused(good.parent, "output_layer.weight", *arguments)


# malice


class Planted:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.mkdir, (self.folder,)  # type: ignore[return-value]


def test_a_malicious_index_is_refused_and_not_run(good: Path) -> None:
    bad, planted = good.parent / "bad", good.parent / "planted"
    assert run_btx("convert", good, bad, "--to", "megatron")[0] == 0
    index = pickle.loads((bad / "release" / ".metadata").read_bytes())
    index.planner_data = Planted(planted)
    (bad / "release" / ".metadata").write_bytes(pickle.dumps(index))
    assert_mix_refused(good, bad, "release/.metadata: not a checkpoint index: it names pathlib")
    assert_refused(good.parent, "it names pathlib", "convert", bad, good.parent / "out", "--to", "hf")
    assert_refused(good.parent, "it names pathlib", "verify", bad)
    pickle.loads((bad / "release" / ".metadata").read_bytes())
    assert planted.exists()  # it would have


def test_a_malicious_legacy_shard_is_refused_and_not_run(good: Path) -> None:
    bad, planted = good.parent / "bad", good.parent / "planted"
    assert run_btx("convert", good, bad, "--to", "megatron-legacy")[0] == 0
    (file,) = bad.rglob("model_optim_rng.pt")
    content: dict[str, Tensor | Planted] = torch.load(file, weights_only=False)
    content["rng_state"] = Planted(planted)
    torch.save(content, file)
    assert_mix_refused(good, bad, "model_optim_rng.pt")
    assert_refused(good.parent, "model_optim_rng.pt", "convert", bad, good.parent / "out", "--to", "hf")
    assert_refused(good.parent, "model_optim_rng.pt", "verify", bad)
    torch.load(file, weights_only=False)
    assert planted.exists()  # it would have
