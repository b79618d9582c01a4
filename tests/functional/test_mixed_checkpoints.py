"""The mix and the real Megatron: one reads what the other saved, under many layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from layout_worker import EXPERTS, MODEL, VOCABULARY
from mix_worker import LOADED, SAVED
from torchrun import torchrun

from btx_megatron.checkpoints.metadata import read_index
from btx_megatron.checkpoints.names import DENSE, DENSE_TO_MOE, ROUTER
from btx_megatron.mixing.hashes import hash_tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("mix")
    torchrun("mix_worker.py", 2, folder)
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return content


def shape_of(legend: str) -> list[int]:
    """``L 2F H`` in numbers."""
    head = MODEL.hidden_size // MODEL.num_attention_heads
    groups = MODEL.num_query_groups or MODEL.num_attention_heads
    sizes = {"L": MODEL.num_layers, "V": VOCABULARY, "H": MODEL.hidden_size, "F": MODEL.ffn_hidden_size}
    sizes |= {"2F": 2 * sizes["F"], "D": MODEL.num_attention_heads * head}
    sizes["Q"] = sizes["D"] + 2 * groups * head
    return [sizes[letter] for letter in legend.split()]


@pytest.mark.parametrize("name", SAVED)
def test_the_table_of_names_is_what_megatron_saves(folder: Path, name: str) -> None:
    found = hash_tensors(folder / name / "0")
    assert {key: row["shape"] for key, row in found.items()} == {
        key: shape_of(legend) for key, (_, legend) in DENSE.items()
    }


def test_the_sources_are_stored_as_differently_as_meant(folder: Path) -> None:
    """Else the tests below would compare one way of storing with itself."""
    index = {name: read_index(folder / name / "0" / "iter_0000001").tensors for name in SAVED}
    stacked, layer = "decoder.layers.mlp.linear_fc1.weight", "decoder.layers.1.mlp.linear_fc1.weight"
    assert {name for name in SAVED if layer in index[name]} == {"a key a layer"}
    chunks = {name: len(index[name][stacked].chunks) for name in ("DP2", "TP2")}
    # under TP2 a layer's gate rows and its up rows lie in two chunks each
    assert chunks["TP2"] == 4 * MODEL.num_layers > chunks["DP2"]
    files = {chunk.file for chunk in index["PP2"][stacked].chunks}
    assert len(files) == 2


def test_the_mixed_names_are_what_megatron_saves_for_a_moe(result: dict[str, Any]) -> None:
    expected = {DENSE_TO_MOE.get(name, name) for name in DENSE} | {ROUTER}
    assert set(result["mixed"]["DP2"]) == set(result["saved_again"]["DP2"]) == expected
    experts = result["mixed"]["DP2"][DENSE_TO_MOE["decoder.layers.mlp.linear_fc1.weight"]]
    assert experts["shape"] == [MODEL.num_layers, EXPERTS, 2 * MODEL.ffn_hidden_size, MODEL.hidden_size]


@pytest.mark.parametrize("name", SAVED)
def test_sources_mix_to_the_same_values_however_they_were_saved(result: dict[str, Any], name: str) -> None:
    assert result["mixed"][name] == result["mixed"]["DP2"]


@pytest.mark.parametrize("name", LOADED)
def test_megatron_loads_the_mix_bit_for_bit(result: dict[str, Any], name: str) -> None:
    """Loaded under this layout and saved again from it, every tensor has the hash that the mix reported."""
    again, mixed = result["saved_again"][name], result["mixed"]["DP2"]
    assert set(again) == set(mixed)
    for key, row in again.items():
        assert row["xxh3_128"] == mixed[key]["xxh3_128"], key


def test_expert_i_of_the_loaded_model_is_source_i(result: dict[str, Any]) -> None:
    assert result["experts_equal_sources"] is True


def test_copies_of_one_model_give_its_logits(result: dict[str, Any]) -> None:
    assert result["logits"]["spread"] > 0.1
    assert result["logits"]["difference"] < 1e-4
