"""The mix against a few lines of torch, and everything that must stop it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import LAYERS, SHAPES, random_weights, write_dense

from btx_megatron.checkpoints.megatron_dist import DistCheckpoint
from btx_megatron.checkpoints.names import DENSE, DENSE_TO_MOE, ROUTER
from btx_megatron.checkpoints.tracker import RELEASE
from btx_megatron.errors import UserError
from btx_megatron.manifest import make_manifest, manifest_text
from btx_megatron.mixing.hashes import hash_tensors
from btx_megatron.mixing.mix import Output, average, convert, drop, mix
from btx_megatron.mixing.plan import MixOptions
from btx_megatron.mixing.verify import verify

FEED_FORWARD = [name for name, (kind, _) in DENSE.items() if kind == "feed_forward"]
SHARED = [name for name, (kind, _) in DENSE.items() if kind == "shared"]


def sources_of(folder: Path, count: int, dtype: torch.dtype = torch.float32) -> dict[str, Path]:
    return {f"e{i}": write_dense(folder / f"e{i}", random_weights(i, dtype)) for i in range(count)}


def run_mix(sources: dict[str, Path], output: Path) -> dict[str, object]:
    return mix(sources, Output(output), MixOptions(random_seed=5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_weights_are_the_mean_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    run_mix(sources_of(tmp_path, 3, dtype), tmp_path / "moe")
    result = DistCheckpoint(tmp_path / "moe")
    for name in SHARED:
        exact = torch.stack([random_weights(i, dtype)[name].double() for i in range(3)]).mean(0)
        got = result.read(DENSE_TO_MOE.get(name, name))
        assert got.dtype == dtype
        # one rounding: within half a unit in the last place of the exact mean (a shade more: fp32 sums)
        ulp = torch.finfo(dtype).eps * exact.abs().clamp(min=1e-3)
        assert ((got.double() - exact).abs() <= 0.5 * ulp * (1 + 2**-6) + 1e-7).all()


def test_expert_i_is_source_i(tmp_path: Path) -> None:
    run_mix(sources_of(tmp_path, 3), tmp_path / "moe")
    result = DistCheckpoint(tmp_path / "moe")
    for name in FEED_FORWARD:
        for expert in range(3):
            for layer in range(LAYERS):
                expected = random_weights(expert)[name][layer]
                assert torch.equal(result.read(DENSE_TO_MOE[name], layer, expert), expected)


def test_the_order_of_the_sources_is_the_order_of_the_experts(tmp_path: Path) -> None:
    sources = sources_of(tmp_path, 2)
    run_mix(dict(reversed(sources.items())), tmp_path / "moe")
    name = FEED_FORWARD[0]
    first = DistCheckpoint(tmp_path / "moe").read(DENSE_TO_MOE[name], 0, 0)
    assert torch.equal(first, random_weights(1)[name][0])


def test_router_is_normal_and_depends_on_the_seed_alone(tmp_path: Path) -> None:
    sources = sources_of(tmp_path, 2)
    tables = [
        mix(sources, Output(tmp_path / f"moe{i}"), MixOptions(router_std=0.5, random_seed=seed))
        for i, seed in enumerate((1, 1, 2))
    ]
    hashes = [table[ROUTER]["xxh3_128"] for table in tables]
    assert hashes[0] == hashes[1] != hashes[2]
    router = DistCheckpoint(tmp_path / "moe0").read(ROUTER)
    assert router.shape == (LAYERS, 2, SHAPES["decoder.final_layernorm.weight"][0])
    assert 0.3 < router.std().item() < 0.7
    assert not torch.equal(router[0], router[1])


def test_identical_sources_give_their_own_weights(tmp_path: Path) -> None:
    source = write_dense(tmp_path / "one", random_weights(0, torch.bfloat16))
    run_mix(dict.fromkeys("abcd", source), tmp_path / "moe")
    result = DistCheckpoint(tmp_path / "moe")
    for name in SHARED:
        assert torch.equal(result.read(DENSE_TO_MOE.get(name, name)), random_weights(0, torch.bfloat16)[name])
    with pytest.raises(UserError, match="are the same values"):
        verify(tmp_path / "moe")


def test_stacked_and_per_layer_sources_mix_to_the_same_bytes(tmp_path: Path) -> None:
    stacked = sources_of(tmp_path / "stacked", 2)
    layered = {
        f"e{i}": write_dense(tmp_path / f"layered{i}", random_weights(i), stacked=False) for i in range(2)
    }
    assert run_mix(stacked, tmp_path / "a") == run_mix(layered, tmp_path / "b")


def test_average_is_the_mean_of_everything(tmp_path: Path) -> None:
    sources = sources_of(tmp_path, 2)
    average(sources, Output(tmp_path / "average"), MixOptions())
    result = DistCheckpoint(tmp_path / "average")
    assert set(result.tensors) == set(SHAPES)
    for name in SHAPES:
        expected = (random_weights(0)[name] + random_weights(1)[name]) / 2
        torch.testing.assert_close(result.read(name), expected, rtol=1e-6, atol=1e-7)


def test_the_table_is_what_a_second_reading_finds(tmp_path: Path) -> None:
    table = run_mix(sources_of(tmp_path, 2), tmp_path / "moe")
    found = hash_tensors(tmp_path / "moe")
    assert set(found) == set(table)
    for name, row in found.items():
        assert row.items() <= table[name].items()
    assert verify(tmp_path / "moe")["tensors"] == len(table)


def test_a_source_of_another_shape_is_refused_with_both_shapes(tmp_path: Path) -> None:
    sources = sources_of(tmp_path, 2)
    wider = random_weights(9)
    wider["output_layer.weight"] = torch.zeros(24, 8)
    sources["wide"] = write_dense(tmp_path / "wide", wider)
    with pytest.raises(UserError, match=r"output_layer.weight is \[16, 8\].* and \[24, 8\].* in expert wide"):
        run_mix(sources, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(("change", "message"), [("extra", "no rule for"), ("absent", "is missing")])
def test_every_source_tensor_is_accounted_for(tmp_path: Path, change: str, message: str) -> None:
    weights = random_weights(3)
    if change == "extra":
        weights["decoder.layers.mlp.adapter.weight"] = torch.zeros(LAYERS, 4)
    else:
        del weights["decoder.layers.mlp.linear_fc2.weight"]
    sources = {
        "good": write_dense(tmp_path / "g", random_weights(0)),
        "bad": write_dense(tmp_path / "b", weights),
    }
    with pytest.raises(UserError, match=f"expert bad.*{message}|{message}"):
        run_mix(sources, tmp_path / "moe")


def test_nan_in_a_source_stops_the_mix_and_leaves_no_tracker(tmp_path: Path) -> None:
    weights = random_weights(1)
    weights["decoder.layers.mlp.linear_fc2.weight"][1, 0, 0] = float("nan")
    sources = {"a": write_dense(tmp_path / "a", random_weights(0)), "b": write_dense(tmp_path / "b", weights)}
    with pytest.raises(UserError, match=r"linear_fc2.weight \[1, 1\].*NaN"):
        run_mix(sources, tmp_path / "moe")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]  # nothing is left of it


def test_more_routes_than_experts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="moe_router_topk=3"):
        mix(sources_of(tmp_path, 2), Output(tmp_path / "moe"), MixOptions(router_topk=3))


def manifest_for(folder: Path) -> None:
    manifest = make_manifest("seed", {}, {}, {"tensors": hash_tensors(folder)}, None, 0.0)
    (folder / "manifest.json").write_text(manifest_text(manifest))


def test_verify_finds_a_changed_value(tmp_path: Path) -> None:
    folder = write_dense(tmp_path / "a", random_weights(0))
    manifest_for(folder)
    assert verify(folder)["hashes"] == "equal to the manifest's"
    changed = random_weights(0)
    changed["decoder.final_layernorm.weight"][0] += 1e-3
    write_dense(folder, changed)
    with pytest.raises(UserError, match=r"decoder.final_layernorm.weight: xxh3_128"):
        verify(folder)


def test_verify_never_accepts_a_flipped_byte_silently(tmp_path: Path) -> None:
    folder = write_dense(tmp_path / "a", random_weights(0))
    manifest_for(folder)
    data = folder / "release" / "__0_0.distcp"
    whole = data.read_bytes()
    payload = random_weights(0)["embedding.word_embeddings.weight"].numpy().tobytes()
    at = whole.index(payload) + 17
    data.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :])
    with pytest.raises(UserError, match=r"word_embeddings"):
        verify(folder)


def test_verify_does_not_hold_an_older_checkpoint_against_the_manifest(tmp_path: Path) -> None:
    write_dense(tmp_path, random_weights(0))
    (tmp_path / RELEASE).rename(tmp_path / "iter_0000050")
    write_dense(tmp_path, random_weights(1))
    manifest_for(tmp_path)
    assert verify(tmp_path)["hashes"] == "equal to the manifest's"
    assert verify(tmp_path / "iter_0000050")["hashes"] == "no manifest to compare with"


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    folder = write_dense(tmp_path / "a", random_weights(0))
    data = folder / "release" / "__0_0.distcp"
    if damage == "missing":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:500])
    with pytest.raises(UserError, match=r"__0_0\.distcp"):
        verify(folder)


def test_the_state_of_chained_optimizers_is_passed_over(tmp_path: Path) -> None:
    """As Megatron saves a mixture with one optimizer for its experts and another for the rest."""
    weights = random_weights(0)
    state = {
        f"chained_{number}.optimizer.state.exp_avg.{name}": weights[name]
        for number, name in enumerate(weights)
    }
    folder = write_dense(tmp_path / "a", {**weights, **state})
    assert verify(folder)["tensors"] == len(weights)
    assert set(hash_tensors(folder)) == set(weights)


def test_a_tensor_that_is_no_matrix_is_named(tmp_path: Path) -> None:
    folder = write_dense(tmp_path / "a", {**random_weights(0), "vision.patches.weight": torch.zeros(2, 3, 4)})
    with pytest.raises(UserError, match=r"vision.patches.weight is no matrix and no vector"):
        verify(folder)


def test_a_manifest_json_that_is_not_ours_is_let_be(tmp_path: Path) -> None:
    """In the weights' own folder, or above it."""
    folder = write_dense(tmp_path / "models" / "hub" / "a", random_weights(0))
    for above in (folder / RELEASE, folder, folder.parent, folder.parents[1]):
        (above / "manifest.json").write_text('{"models": ["a"]}')
    assert verify(folder)["hashes"] == "no manifest to compare with"
    manifest_for(folder)
    assert verify(folder)["hashes"] == "equal to the manifest's"
    (folder / "manifest.json").write_text('{"stage": "se')
    with pytest.raises(UserError, match="not a manifest; restore it"):
        verify(folder)


def test_a_manifest_of_another_model_above_is_let_be(tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    mix(sources_of(tmp_path, 2), Output(mixed, manifest=True), MixOptions())
    dense = write_dense(mixed / "epoch1", random_weights(7))
    assert verify(dense)["hashes"] == "no manifest to compare with"
    assert verify(mixed)["hashes"] == "equal to the manifest's"


@pytest.mark.parametrize(
    "options", [MixOptions(experts="copies", copies=3), MixOptions(experts="virtual", copies=2, chunks=2)]
)
def test_copies_stay_copies(tmp_path: Path, options: MixOptions) -> None:
    """Whatever is made of the mixture, its experts may be alike."""
    moe = tmp_path / "moe"
    mix(sources_of(tmp_path, 1), Output(moe, manifest=True), options)
    convert(moe, Output(tmp_path / "converted", manifest=True))
    drop(moe, 0, Output(tmp_path / "dropped", manifest=True))
    for name in ("moe", "converted", "dropped"):
        assert verify(tmp_path / name)["hashes"] == "equal to the manifest's", name
