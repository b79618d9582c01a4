"""btx inspect against a few lines of torch on whole tensors; its rules on models made to break them."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import LAYERS, random_weights, write_dense
from torch import Tensor

from btx_megatron.checkpoints.config import ModelConfig
from btx_megatron.checkpoints.formats import open_checkpoint, write_checkpoint
from btx_megatron.checkpoints.huggingface import our_tensors
from btx_megatron.checkpoints.stream import PlannedTensor
from btx_megatron.cli import main
from btx_megatron.errors import UserError
from btx_megatron.manifest import make_manifest, manifest_text
from btx_megatron.mixing.inspect import inspect, labels_of
from btx_megatron.mixing.inspect_output import as_json, as_text
from btx_megatron.mixing.relatedness import is_unrelated
from btx_megatron.mixing.task_vectors import RUN, Moments, kind_of, measure, row_runs, total

CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    seq_length=64,
    rotary_base=10_000.0,
    norm_epsilon=1e-5,
    tied=False,
    vocab_size=40,
)
Weights = dict[str, Tensor]


def initial(seed: int, config: ModelConfig = CONFIG) -> Weights:
    """A model as it starts: gains of 1, matrices normal with 0.02."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.ones(info.shape)
        if "norm" in name
        else torch.randn(info.shape, generator=generator) * 0.02
        for name, info in our_tensors(config, config.vocab_size or 0, torch.float32).items()
    }


def trained(weights: Weights, seed: int, distance: float, decay: float = 1.0) -> Weights:
    """A branch: every tensor shrunk by ``decay``, moved by ``distance`` of its norm in a way of its own."""
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, tensor in weights.items():
        step = torch.randn(tensor.shape, generator=generator)
        size = min(distance, 0.1) if "norm" in name else distance
        kept = 1.0 if "norm" in name else decay
        moved[name] = tensor * kept + step * (size * tensor.norm() / step.norm())
    return moved


def write(folder: Path, weights: Weights, config: ModelConfig = CONFIG, tokenizer: str = "{}") -> Path:
    """A Hugging Face folder."""
    infos = our_tensors(config, config.vocab_size or 0, weights["decoder.final_layernorm.weight"].dtype)

    def rows(name: str) -> Callable[..., Callable[[int, int], Tensor]]:
        return lambda index: lambda start, stop: weights[name][index][start:stop]

    plan = [PlannedTensor(name, info, "copy", (), rows(name)) for name, info in infos.items()]
    write_checkpoint(folder, "hf", plan, config)
    (folder / "tokenizer.json").write_text(tokenizer)
    return folder


def run_inspect(tmp_path: Path, base: Weights, **experts: Weights) -> list[str]:
    """The warnings of experts of a base."""
    paths = [write(tmp_path / name, weights) for name, weights in experts.items()]
    return inspect(paths, write(tmp_path / "base", base)).warnings


def flat(weights: Weights, kind: str, layer: int | None = None) -> Tensor:
    """All entries of a kind, of one layer or of all."""
    parts = [
        tensor if layer is None else tensor[layer]
        for name, tensor in weights.items()
        if kind_of(name) == kind and (layer is None or name.startswith("decoder.layers."))
    ]
    return torch.cat([part.double().reshape(-1) for part in parts])


# numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_those_of_whole_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    models = [random_weights(0, dtype)]
    for seed in (1, 2, 3):
        keep = {name: tensor.clone() for name, tensor in models[0].items()}
        for name, tensor in random_weights(seed, dtype).items():
            chosen = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
            keep[name][chosen] = tensor[chosen]
        models.append(keep)
    paths = [write_dense(tmp_path / f"m{i}", weights) for i, weights in enumerate(models)]
    found = inspect(paths).movement
    assert found is not None
    assert (found.base, found.share) == ("m0", 1.0)
    assert {kind for kind, _ in found.places} == {"attention", "feed-forward", "norms", "embedding", "head"}
    for (kind, layer), moments in found.places.items():
        if kind == "norms" and layer is None:
            continue  # the last norm alone, which flat() takes with the others
        base, *others = (flat(weights, kind, layer) for weights in models)
        tasks = torch.stack([other - base for other in others])
        for i, other in enumerate(others):
            assert moments.distance(i) == pytest.approx(float(tasks[i].norm() / base.norm()), rel=1e-5)
            cosine = torch.cosine_similarity(other, base, dim=0)
            assert moments.cosine_with_base(i) == pytest.approx(float(cosine), abs=1e-5)
            assert moments.scale(i) == pytest.approx(float(other.norm() / base.norm()), rel=1e-5)
            assert moments.moved_share(i) == pytest.approx(float((tasks[i] != 0).double().mean()))
            for j in range(3):
                expected = torch.cosine_similarity(tasks[i], tasks[j], dim=0)
                assert moments.cosine(i, j) == pytest.approx(float(expected), abs=1e-5)
        movers = (tasks != 0).sum(0)
        both = (tasks > 0).any(0) & (tasks < 0).any(0)
        assert moments.shared == int((movers >= 2).sum())
        assert moments.conflict_share == pytest.approx(float(both.sum() / (movers >= 2).sum()))
        tosses = (1 - 0.5 ** (movers.double() - 1))[movers >= 2]
        assert moments.chance == pytest.approx(float(tosses.mean()))


def test_totals_are_sums_over_layers(tmp_path: Path) -> None:
    models = [random_weights(seed) for seed in range(2)]
    movement = inspect([write_dense(tmp_path / f"m{i}", w) for i, w in enumerate(models)]).movement
    assert movement is not None
    for kind in ("attention", "feed-forward", "norms"):
        moments = total(movement.places, (kind,))
        assert moments is not None
        base, expert = (flat(weights, kind) for weights in models)
        assert moments.distance(0) == pytest.approx(float((expert - base).norm() / base.norm()), rel=1e-5)
        one = total(movement.places, (kind,), LAYERS - 1)
        assert one is not None
        assert one.entries < moments.entries


def test_a_sample_is_near_the_whole_reads_less_and_is_the_same_again(tmp_path: Path) -> None:
    config = replace(CONFIG, num_layers=1, hidden_size=256, ffn_hidden_size=2048, vocab_size=4096)
    base = initial(0, config)
    # rows move more the later they come, so that a sample of the first rows would be wrong
    experts = []
    for seed in (1, 2):
        moved = trained(base, seed, 0.1)
        for name, tensor in moved.items():
            ramp = 1.0 if "norm" in name else torch.linspace(0, 1, tensor.shape[-2])[:, None]
            moved[name] = base[name] + (tensor - base[name]) * ramp
        experts.append(moved)
    paths = [write(tmp_path / f"m{i}", weights, config) for i, weights in enumerate((base, *experts))]
    whole, part, again = (inspect(paths, share=share).movement for share in (1, 0.25, 0.25))
    assert whole is not None
    assert part is not None
    assert again is not None
    assert part.read_bytes < 0.5 * whole.read_bytes
    for place, moments in whole.places.items():
        near = part.places[place]
        assert near.entries == moments.entries
        assert float(near.gram[0, 0]) == pytest.approx(float(moments.gram[0, 0]), rel=0.05)
        assert near.distance(0) == pytest.approx(moments.distance(0), rel=0.05)
        assert near.cosine(0, 1) == pytest.approx(moments.cosine(0, 1), abs=0.02)
        if place[0] != "norms":
            assert near.conflict_share == pytest.approx(moments.conflict_share, abs=0.02)
        assert torch.equal(near.gram, again.places[place].gram)


@given(st.integers(1, 5000), st.integers(1, 5000), st.floats(0.001, 1))
def test_runs_are_apart_in_order_and_cover_what_was_asked(rows: int, cols: int, share: float) -> None:
    runs = row_runs(rows, cols, share)
    assert all(start < stop for start, stop in runs)
    assert all(before[1] <= after[0] for before, after in pairwise(runs))
    assert runs[0][0] >= 0
    assert runs[-1][1] <= rows
    read = sum(stop - start for start, stop in runs) * cols
    longest = max(RUN, cols)
    assert read >= min(share * rows * cols - 2 * longest, rows * cols)
    assert read <= max(share * rows * cols, 4 * longest) + longest
    if share == 1 or rows * cols <= RUN or cols == 1:
        assert read == rows * cols


def test_formats_and_dtypes_compare(tmp_path: Path) -> None:
    """A stacked and a layered torch_dist checkpoint, in two dtypes: rounding is all that they differ in."""
    weights = random_weights(0)
    half = {name: tensor.bfloat16() for name, tensor in weights.items()}
    paths = [
        write_dense(tmp_path / "stacked", weights),
        write_dense(tmp_path / "layered", half, stacked=False),
    ]
    found = inspect(paths)
    assert {difference.what for difference in found.differences} == set(weights)
    assert found.movement is not None
    everything = total(found.movement.places)
    assert everything is not None
    assert 0 < everything.distance(0) < 2**-8


# warnings


def test_a_light_and_a_long_finetune_are_no_warning(tmp_path: Path) -> None:
    """Moves of 5, 8 and 12 %; then one of 80 % after weight decay took a quarter, beside its like."""
    base = initial(0)
    light = {f"e{i}": trained(base, i, distance) for i, distance in ((1, 0.05), (2, 0.08), (3, 0.12))}
    assert run_inspect(tmp_path / "light", base, **light) == []
    long = {f"e{i}": trained(base, i, 0.8, decay=0.75) for i in (1, 2)}
    assert run_inspect(tmp_path / "long", base, **long) == []


def test_an_independent_model_is_unrelated(tmp_path: Path) -> None:
    base = initial(0)
    warnings = run_inspect(tmp_path, base, a=trained(base, 1, 0.1), b=initial(7), c=trained(base, 2, 0.1))
    (line,) = warnings
    assert line.startswith("b looks unrelated to base: cosine ")
    assert "distance 1.4" in line
    assert "give 1.41" in line


def test_an_independent_model_of_another_norm_is_unrelated_too(tmp_path: Path) -> None:
    base = initial(0)
    larger = {name: tensor * (1 if "norm" in name else 5) for name, tensor in initial(7).items()}
    (line,) = run_inspect(tmp_path, base, b=larger)
    assert "looks unrelated" in line
    assert line.endswith("distance 5.06, where independent weights of its norm give 5.06")


def test_a_branch_of_ten_times_the_norm_is_not_unrelated(tmp_path: Path) -> None:
    base = initial(0)
    larger = {name: tensor * (1 if "norm" in name else 10) for name, tensor in base.items()}
    assert run_inspect(tmp_path, base, b=larger) == []


@pytest.mark.parametrize(
    ("entries", "cosine", "unrelated"), [(10_000, 0.19, True), (10_000, 0.3, False), (100, 0.3, True)]
)
def test_few_entries_may_look_alike_by_chance(entries: int, cosine: float, unrelated: bool) -> None:
    """Of two unit vectors at this cosine; in 100 entries 0.3 is three standard deviations of chance."""
    gram = torch.tensor([[1, cosine - 1], [cosine - 1, 2 - 2 * cosine]], dtype=torch.float64)
    counts = torch.tensor([0.0, entries])
    moments = Moments(entries, entries, gram, counts[1:], counts, 0, torch.ones(1, 1, dtype=torch.bool))
    assert moments.cosine_with_base(0) == pytest.approx(cosine)
    assert is_unrelated(moments, 0) is unrelated


@pytest.mark.parametrize(
    ("drawn", "said"),
    [
        (lambda name, layer: layer == 1, "layer 1,"),
        (lambda name, layer: "self_attention" in name, "attention of all layers, layer 0"),
        (lambda name, layer: name.startswith("embedding"), "embedding,"),
    ],
)
def test_parts_that_are_unrelated_are_named(
    tmp_path: Path, drawn: Callable[[str, int | None], bool], said: str
) -> None:
    base, other = initial(0), initial(9)
    mixed = trained(base, 1, 0.05)
    for name in mixed:
        if "norm" in name:
            continue
        if not name.startswith("decoder.layers."):
            mixed[name] = other[name] if drawn(name, None) else mixed[name]
            continue
        for layer in range(2):
            if drawn(name, layer):
                mixed[name][layer] = other[name][layer]
    (line,) = run_inspect(tmp_path, base, e=mixed)
    if said.startswith("attention"):  # whether the layers count depends on the share of attention in them
        said = "attention of all layers"
    assert line.startswith(f"e: unrelated to base in {said}")


def test_one_that_moved_far_beyond_the_others_is_said_so(tmp_path: Path) -> None:
    base = initial(0)
    experts = {f"e{i}": trained(base, i, distance) for i, distance in ((1, 0.1), (2, 0.1), (3, 0.32))}
    (line,) = run_inspect(tmp_path, base, **experts)
    assert line == "e3 moved 3.2 times as far as the median of the others"


def test_the_paper_s_spread_of_training_lengths_is_no_warning(tmp_path: Path) -> None:
    base = initial(0)
    experts = {f"e{i}": trained(base, i, 0.05 * math.sqrt(x)) for i, x in enumerate((42, 42, 210))}
    assert run_inspect(tmp_path, base, **experts) == []


def test_models_that_are_alike_are_named(tmp_path: Path) -> None:
    base = initial(0)
    one, other = trained(base, 1, 0.1), trained(base, 2, 0.1)
    warnings = run_inspect(tmp_path, base, a=one, b=other, c=one, seed=base)
    assert warnings == [
        "seed is identical to base in all that was read (as the seed is, where it joins)",
        "a and c are identical in all that was read",
    ]


def test_gains_around_zero_are_another_scale(tmp_path: Path) -> None:
    base = initial(0)
    centred = trained(base, 1, 0.05)
    for name in centred:
        if "norm" in name:
            centred[name] -= 1
    (line,) = run_inspect(tmp_path, base, e=centred)
    assert line.startswith("e: norms of another scale than base's in 3 of 3 places, 0.")


def test_values_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    base = initial(0)
    bad = trained(base, 1, 0.1)
    bad["decoder.layers.mlp.linear_fc2.weight"][1, 3, 4] = float("nan")
    paths = [tmp_path / name for name in ("base", "good", "bad")]
    # as a disk or another program leaves it: our own writer refuses
    from safetensors.torch import load_file, save_file

    for path, weights in zip(paths, (base, trained(base, 2, 0.1), trained(base, 1, 0.1)), strict=True):
        write(path, weights)
    file = paths[2] / "model.safetensors"
    stored = load_file(file)
    stored["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(stored, file)
    assert inspect(paths).warnings == ["bad: NaN or infinite values in feed-forward of layer 1"]
    text = json.dumps(as_json(inspect(paths)), allow_nan=False)
    assert '"distance": null' in text
    (line,) = inspect([paths[2], paths[0]]).warnings
    assert line.startswith("bad: NaN or infinite values in feed-forward of layer 1; nothing")


# facts and differences


def test_facts_of_one_checkpoint(tmp_path: Path) -> None:
    config = replace(CONFIG, vocab_size=40)
    path = write(tmp_path / "m", initial(0, config), config)
    manifest = make_manifest("mix", {"sources": {"a": "x"}}, {}, {}, None, 1.0)
    (path / "manifest.json").write_text(manifest_text(manifest))
    found = inspect([path])
    facts = found.checkpoints["m"]
    count = sum(tensor.numel() for tensor in initial(0, config).values())
    assert (facts.format, facts.dtype, facts.parameters, facts.bytes) == ("hf", "float32", count, 4 * count)
    assert facts.model == replace(config, bos_token_id=None, eos_token_id=None)
    assert facts.came_from["stage"] == "mix"
    assert facts.came_from["sources"] == "a=x"
    assert len(facts.tokenizer["tokenizer.json"]) == 64
    assert found.movement is None
    text = as_text(found)
    for line in ("layers      2", "heads       4 of 8", "experts     none, dense", f"parameters  {count:,}"):
        assert line in text.splitlines()


def test_facts_of_a_mixture_and_its_movement(tmp_path: Path) -> None:
    moe = replace(CONFIG, num_experts=4, moe_router_topk=2)
    base = initial(0, moe)
    wild = trained(base, 1, 0.1)
    wild["decoder.layers.mlp.router.weight"] *= 8
    found = inspect([write(tmp_path / "a", base, moe), write(tmp_path / "b", wild, moe)])
    feed_forward = flat(base, "feed-forward").numel()
    facts = found.checkpoints["a"]
    assert facts.active_parameters == facts.parameters - feed_forward // 2
    (line,) = [line for line in found.warnings if "router" in line]
    assert line.startswith("b: router of another scale than a's in 2 of 2 places, 8")
    assert found.movement is not None
    moments = found.movement.places["feed-forward", 1]
    fc1, fc2 = (f"decoder.layers.mlp.experts.experts.linear_{x}.weight" for x in ("fc1", "fc2"))
    moved = torch.cat([(wild[name] - base[name])[1].flatten() for name in (fc1, fc2)]).norm()
    of_base = torch.cat([base[name][1].flatten() for name in (fc1, fc2)]).norm()
    assert moments.distance(0) == pytest.approx(float(moved / of_base), rel=1e-4)


def test_all_differences_are_listed(tmp_path: Path) -> None:
    a = write(tmp_path / "a", initial(0))
    other = replace(CONFIG, vocab_size=48, rotary_base=5e5, norm_epsilon=1e-6, seq_length=128)
    b = write(tmp_path / "b", initial(1, other), other, tokenizer='{"x": 1}')
    found = inspect([a, b])
    stops = [difference.what for difference in found.differences if difference.stops_mix]
    assert stops == [
        "embedding.word_embeddings.weight",
        "output_layer.weight",
        "rotary_base",
        "norm_epsilon",
        "tokenizer.json",
    ]
    noted = {difference.what: difference.values for difference in found.differences[len(stops) :]}
    assert noted == {"seq_length": {"a": "64", "b": "128"}, "vocab_size": {"a": "40", "b": "48"}}
    assert found.movement is not None
    assert found.movement.not_compared == ["embedding.word_embeddings.weight", "output_layer.weight"]
    assert "rotary_base" in as_text(found)


def test_nothing_to_compare_is_said(tmp_path: Path) -> None:
    wide = replace(CONFIG, hidden_size=64, num_layers=3)
    paths = [write(tmp_path / "a", initial(0)), write(tmp_path / "b", initial(0, wide), wide)]
    assert "not measured" in as_text(inspect(paths))


def test_labels_are_short_and_differ() -> None:
    assert labels_of([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert labels_of([Path("/x/a/ckpt"), Path("/x/b/ckpt")]) == ["a/ckpt", "b/ckpt"]
    assert labels_of([Path("/x/a"), Path("/x/a")]) == ["a#1", "a#2"]


def test_a_truncated_file_is_an_error_with_its_name(tmp_path: Path) -> None:
    a, b = (write_dense(tmp_path / name, random_weights(0)) for name in "ab")
    (b / "release" / "__0_0.distcp").write_bytes((a / "release" / "__0_0.distcp").read_bytes()[:700])
    with pytest.raises(UserError, match=r"__0_0\.distcp"):
        inspect([a, b])


def test_measure_counts_every_entry_once_in_threads(tmp_path: Path) -> None:
    weights = [random_weights(seed) for seed in range(3)]
    base, *experts = (open_checkpoint(write_dense(tmp_path / f"m{i}", w)) for i, w in enumerate(weights))
    one, four = (measure(base, experts, base.tensors, 1.0, workers) for workers in (1, 4))
    assert sum(moments.entries for moments in one.values()) == sum(t.numel() for t in weights[0].values())
    assert all(torch.equal(one[place].gram, four[place].gram) for place in one)


# command line


@pytest.fixture
def btx(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["btx", *map(str, arguments)])
        code = main()
        return code, *capsys.readouterr()

    return run


def test_the_command_prints_tables_and_writes_json(tmp_path: Path, btx) -> None:  # type: ignore[no-untyped-def]
    base = initial(0)
    paths = [write(tmp_path / f"e{i}", trained(base, i, 0.1)) for i in (1, 2)]
    where = write(tmp_path / "base", base)
    code, out, err = btx("inspect", *paths, "--base", where, "--json", tmp_path / "out.json")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert "base: base" in lines
    assert "differences: none" in lines
    assert lines[-1] == "no warnings"
    (row,) = [line.split() for line in lines if line.startswith("all    attention")]
    content = json.loads((tmp_path / "out.json").read_text())
    attention = content["movement"]["kinds"]["attention"]
    assert row[2] == f"{attention['experts']['e1']['distance']:.4f}" == "0.1000"
    assert row[4] == f"{attention['sign_conflicts']:.1%}"
    assert attention["task_vector_cosines"][0][:2] == ["e1", "e2"]
    assert abs(attention["task_vector_cosines"][0][2]) < 0.1
    assert len(content["movement"]["places"]) == 2 * 3 + 3
    assert content["checkpoints"]["base"]["model"]["hidden_size"] == 32


def test_mistakes_are_one_line_and_exit_code_2(tmp_path: Path, btx) -> None:  # type: ignore[no-untyped-def]
    path = write(tmp_path / "a", initial(0))
    for arguments, message in (
        ([tmp_path / "nowhere"], "no such folder"),
        ([tmp_path], "no checkpoint there"),
        ([path, path, "--sample", "0"], "--sample 0: must be above 0 and at most 1"),
        ([path, path, "--sample", "nan"], "--sample nan"),
        ([path, "--base", tmp_path / "nowhere"], "no such folder"),
        ([path, "--json", tmp_path / "no" / "x.json"], "cannot be written"),
    ):
        code, _, err = btx("inspect", *arguments)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1
