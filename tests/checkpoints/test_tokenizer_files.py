"""Where a checkpoint's tokenizer is looked for, and what is found there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from btx_megatron import recipe
from btx_megatron.checkpoints.sentencepiece_json import parse
from btx_megatron.checkpoints.tokenizer_files import (
    NAMES,
    TokenizerFiles,
    find_tokenizer,
    special_ids,
    write_tokenizer,
)
from btx_megatron.checkpoints.tracker import write_tracker
from btx_megatron.data.tokenizer import train_tokenizer
from btx_megatron.errors import UserError

TEXT = "some words for a small tokenizer, which needs a few of them. " * 9


def make(path: Path, content: str = "{}") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def weights(folder: Path) -> Path:
    """The folder of a Megatron checkpoint's weights, with its tracker above."""
    (folder / "release").mkdir(parents=True)
    write_tracker(folder, "release")
    return folder / "release"


def test_beside_hugging_faces_weights_by_name_alone(tmp_path: Path) -> None:
    for name in (*NAMES, "config.json", "README.md", "tokenizer.py"):
        make(tmp_path / name, name)
    found = find_tokenizer(tmp_path)
    assert found.files == {name: name.encode() for name in NAMES}
    assert not found.of_run


def test_beside_the_tracker_of_megatrons(tmp_path: Path) -> None:
    release = weights(tmp_path / "checkpoint")
    assert find_tokenizer(release).files == {}
    write_tokenizer(tmp_path / "checkpoint" / "tokenizer", {"tokenizer.json": b"{}", "merges.txt": b"a b"})
    assert find_tokenizer(release).files == {"tokenizer.json": b"{}", "merges.txt": b"a b"}
    moved = tmp_path / "moved"
    release.rename(moved)
    assert find_tokenizer(moved).files == {}


def test_no_folder_is_made_for_no_files(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer", {})
    assert not (tmp_path / "tokenizer").exists()


def test_of_the_run_and_of_no_other_folder_above(tmp_path: Path) -> None:
    release = weights(tmp_path / "run" / "experts" / "code" / "checkpoints")
    model = tmp_path / "run" / "data" / "tokenizer" / "tokenizer.model"
    train_tokenizer([TEXT], recipe.Tokenizer(vocab_size=300), model)
    assert find_tokenizer(release).files == {}  # no run without a recipe
    make(tmp_path / "run" / "recipe.yaml")
    assert find_tokenizer(weights(tmp_path / "run" / "mine")).files == {}  # no stage of it
    found = find_tokenizer(release)
    assert found.of_run
    assert set(found.files) == {"tokenizer.json", "tokenizer.model", "tokenizer_config.json"}
    assert found.files["tokenizer.model"] == model.read_bytes()
    assert special_ids(found) == (1, 2)
    assert find_tokenizer(release) == found  # the same bytes every time
    write_tokenizer(release.parent / "tokenizer", {"tokenizer.json": b"{}"})
    assert find_tokenizer(release).files == {"tokenizer.json": b"{}"}  # its own comes first


def test_a_runs_own_tokenizer_json_travels_as_it_is(tmp_path: Path) -> None:
    release = weights(tmp_path / "run" / "seed" / "checkpoints")
    make(tmp_path / "run" / "recipe.yaml")
    make(tmp_path / "run" / "data" / "tokenizer" / "tokenizer.json", '{"added_tokens": []}')
    found = find_tokenizer(release)
    assert found.files["tokenizer.json"] == b'{"added_tokens": []}'
    assert json.loads(found.files["tokenizer_config.json"]) == {"tokenizer_class": "PreTrainedTokenizerFast"}
    assert special_ids(found) == (None, None)
    make(tmp_path / "run" / "data" / "tokenizer" / "tokenizer_config.json", '{"eos_token": "</s>"}')
    make(tmp_path / "run" / "data" / "tokenizer" / "tokenizer.json", '{"model": {"vocab": {"</s>": 5}}}')
    assert find_tokenizer(release).files["tokenizer_config.json"] == b'{"eos_token": "</s>"}'
    assert special_ids(find_tokenizer(release)) == (None, 5)


def test_a_model_that_no_tokenizer_json_can_say_travels_alone_and_says_so(tmp_path: Path) -> None:
    release = weights(tmp_path / "run" / "seed" / "checkpoints")
    make(tmp_path / "run" / "recipe.yaml")
    model = tmp_path / "run" / "data" / "tokenizer" / "tokenizer.model"
    train_tokenizer([TEXT], recipe.Tokenizer(vocab_size=300), model)
    content = model.read_bytes()
    at = content.rindex(b"\x20\x00")  # remove_extra_whitespaces, field 4 of the normaliser: false
    model.write_bytes(content[:at] + b"\x20\x01" + content[at + 2 :])
    assert parse(model.read_bytes(), "").removes_spaces
    found = find_tokenizer(release)
    assert set(found.files) == {"tokenizer.model", "tokenizer_config.json"}
    assert found.note is not None
    assert "it removes spaces, which tokenizer.json cannot say exactly" in found.note


def test_a_damaged_model_of_a_run_is_named(tmp_path: Path) -> None:
    release = weights(tmp_path / "run" / "seed" / "checkpoints")
    make(tmp_path / "run" / "recipe.yaml")
    make(tmp_path / "run" / "data" / "tokenizer" / "tokenizer.model", "no model")
    with pytest.raises(UserError, match=r"data/tokenizer/tokenizer.model: not a SentencePiece model"):
        find_tokenizer(release)


@pytest.mark.parametrize("bos", ["<s>", {"content": "<s>", "lstrip": False}])
def test_special_ids_by_text_or_object(tmp_path: Path, bos: object) -> None:
    tokenizer = json.dumps({"added_tokens": [{"id": 7, "content": "<s>"}]}).encode()
    config = json.dumps({"bos_token": bos, "eos_token": None}).encode()
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": config}
    assert special_ids(TokenizerFiles(tmp_path, files)) == (7, None)
    with pytest.raises(UserError, match=r"tokenizer_config.json: not JSON"):
        special_ids(TokenizerFiles(tmp_path, {**files, "tokenizer_config.json": b"{"}))
