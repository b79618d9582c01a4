"""A mixture that gains or loses an expert, against a few lines of torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import LAYERS, random_weights, write_dense
from torch_dist import save_torch_dist

from btx_megatron.checkpoints.megatron_dist import DistCheckpoint
from btx_megatron.checkpoints.names import DENSE, DENSE_TO_MOE, ROUTER
from btx_megatron.checkpoints.tracker import RELEASE, write_tracker
from btx_megatron.errors import UserError
from btx_megatron.mixing.hashes import hash_tensors
from btx_megatron.mixing.mix import Output, drop, grow, mix
from btx_megatron.mixing.option_checks import is_mixed_again
from btx_megatron.mixing.plan import MixOptions
from btx_megatron.mixing.verify import verify

FEED_FORWARD = [DENSE_TO_MOE[name] for name, (kind, _) in DENSE.items() if kind == "feed_forward"]
SHARED = {DENSE_TO_MOE.get(name, name): name for name, (kind, _) in DENSE.items() if kind == "shared"}
OPTIONS = MixOptions(random_seed=5)


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    return {name: write_dense(tmp_path / name, random_weights(i)) for i, name in enumerate("abc")}


def mixed(sources: dict[str, Path], names: str, output: Path) -> Path:
    mix({name: sources[name] for name in names}, Output(output, manifest=True), OPTIONS)
    return output


def test_an_untrained_mixture_is_mixed_again(sources: dict[str, Path], tmp_path: Path) -> None:
    two, three = mixed(sources, "ab", tmp_path / "two"), mixed(sources, "abc", tmp_path / "three")
    grow(two, "c", sources["c"], Output(tmp_path / "grown", manifest=True), share=None, options=MixOptions())
    assert hash_tensors(tmp_path / "grown") == hash_tensors(three)
    assert list(json.loads((tmp_path / "grown" / "manifest.json").read_text())["inputs"]) == ["a", "b", "c"]


def test_sources_are_found_from_another_folder(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mix({name: Path(name) for name in "ab"}, Output(Path("two"), manifest=True), OPTIONS)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    grow(Path("../two"), "c", sources["c"], Output(Path("grown")), share=None, options=MixOptions())
    mixed(sources, "abc", tmp_path / "three")
    assert hash_tensors(tmp_path / "elsewhere" / "grown") == hash_tensors(tmp_path / "three")


def test_a_source_that_changed_since_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    two = mixed(sources, "ab", tmp_path / "two")
    write_dense(sources["a"], random_weights(9))
    with pytest.raises(UserError, match=r"expert a .* has changed since it was mixed; put it back"):
        grow(two, "c", sources["c"], Output(tmp_path / "grown"), share=None, options=OPTIONS)
    with pytest.raises(UserError, match="--add-expert b: the mixture has an expert of this name"):
        grow(two, "b", sources["c"], Output(tmp_path / "grown"), share=None, options=OPTIONS)


def test_a_base_that_changed_since_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    base, options = write_dense(tmp_path / "base", random_weights(8)), MixOptions(average="base")
    two = {name: sources[name] for name in "ab"}
    mix(two, Output(tmp_path / "two", manifest=True), options, base)
    grow(tmp_path / "two", "c", sources["c"], Output(tmp_path / "x"), share=None, options=MixOptions())
    mix(sources, Output(tmp_path / "three"), options, base)
    assert hash_tensors(tmp_path / "x") == hash_tensors(tmp_path / "three")
    write_dense(base, random_weights(9))
    with pytest.raises(UserError, match=r"the base .* has changed since it was mixed; put it back"):
        grow(tmp_path / "two", "c", sources["c"], Output(tmp_path / "y"), share=None, options=MixOptions())


@pytest.mark.parametrize("how", ["iteration", "in place"])
def test_trained_in_its_own_folder_it_keeps_what_it_learned(
    sources: dict[str, Path], tmp_path: Path, how: str
) -> None:
    """As Megatron-LM does with --load and --save of one folder: the manifest stays."""
    two, options = mixed(sources, "ab", tmp_path / "two"), MixOptions()
    source = DistCheckpoint(two)
    trained = {name: source.read(name) + 1 for name in source.tensors}
    if how == "iteration":
        save_torch_dist(two / "iter_0000100", trained)
        write_tracker(two, "100")
    else:
        save_torch_dist(two / RELEASE, trained)
    grow(two, "c", sources["c"], Output(tmp_path / "grown", manifest=True), share=None, options=options)
    grown = DistCheckpoint(tmp_path / "grown")
    for name in FEED_FORWARD:
        assert torch.equal(grown.read(name)[:, :2], trained[name])
    assert json.loads((tmp_path / "grown" / "manifest.json").read_text())["stage"] == "grow"
    assert not is_mixed_again(two)


@pytest.mark.parametrize("share", [None, 0.0, 0.25, 1.0])
def test_a_trained_mixture_moves_by_lambda(
    sources: dict[str, Path], tmp_path: Path, share: float | None
) -> None:
    trained = mixed(sources, "ab", tmp_path / "two")
    (trained / "manifest.json").unlink()  # nobody knows any more what it was made from
    grow(trained, "c", sources["c"], Output(tmp_path / "grown"), share=share, options=OPTIONS)
    before, after = DistCheckpoint(trained), DistCheckpoint(tmp_path / "grown")
    weight = 1 / 3 if share is None else share
    for name, dense in SHARED.items():
        new = random_weights(2)[dense].double()
        expected = (1 - weight) * before.read(name).double() + weight * new
        torch.testing.assert_close(after.read(name).double(), expected, rtol=1e-6, atol=1e-7)
    for name in FEED_FORWARD:
        dense = next(key for key, moe in DENSE_TO_MOE.items() if moe == name)
        for layer in range(LAYERS):
            for expert in range(2):
                assert torch.equal(after.read(name, layer, expert), before.read(name, layer, expert))
            assert torch.equal(after.read(name, layer, 2), random_weights(2)[dense][layer])
    assert torch.equal(after.read(ROUTER)[:, :2], before.read(ROUTER))
    assert 0 < after.read(ROUTER)[:, 2].abs().max() < 0.2
    assert not torch.equal(after.read(ROUTER)[0, 2], after.read(ROUTER)[1, 2])


def test_dropping_takes_the_expert_and_its_router_row(sources: dict[str, Path], tmp_path: Path) -> None:
    three = mixed(sources, "abc", tmp_path / "three")
    drop(three, 1, Output(tmp_path / "two", manifest=True))
    before, after = DistCheckpoint(three), DistCheckpoint(tmp_path / "two")
    for name in (*FEED_FORWARD, ROUTER):
        assert torch.equal(after.read(name), before.read(name)[:, [0, 2]])
    for name in SHARED:
        assert torch.equal(after.read(name), before.read(name))
    assert verify(tmp_path / "two")["hashes"] == "equal to the manifest's"
    with pytest.raises(UserError, match="--drop-expert 3: the mixture has experts 0 to 2"):
        drop(three, 3, Output(tmp_path / "none"))


def test_what_does_not_fit_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    two = mixed(sources, "ab", tmp_path / "two")
    with pytest.raises(UserError, match="a dense model, not a mixture"):
        drop(sources["a"], 0, Output(tmp_path / "x"))
    with pytest.raises(UserError, match=r"--lambda 1\.5: must lie between 0 and 1"):
        grow(two, "c", sources["c"], Output(tmp_path / "x"), share=1.5, options=OPTIONS)
    other = random_weights(2)
    other["decoder.final_layernorm.weight"] = torch.ones(3)
    write_dense(tmp_path / "d", other)
    with pytest.raises(
        UserError, match=r"final_layernorm.weight is \[8\] in the mixture and \[3\] in expert d"
    ):
        grow(two, "d", tmp_path / "d", Output(tmp_path / "x"), share=0.5, options=OPTIONS)
    assert not (tmp_path / "x").exists()
