"""``btx mix`` and ``btx convert`` where nothing goes wrong: every format, every rule, against torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llamas import (
    GROUPS,
    HEADS,
    HIDDEN,
    LAYERS,
    VOCABULARY,
    WIDTH,
    hashes,
    mix_arguments,
    random_weights,
    read_hf,
    read_ours,
    run_btx,
    tree,
    write_llama,
)
from torch import Tensor

from btx_megatron.checkpoints import stream

FORMATS = ("hf", "megatron", "megatron-legacy")
FC1, FC2 = (f"decoder.layers.mlp.experts.experts.linear_fc{number}.weight" for number in (1, 2))
NORM = "decoder.layers.mlp.linear_fc1.layer_norm_weight"
ROUTER = "decoder.layers.mlp.router.weight"


@pytest.fixture(params=["large", "small"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are made in one block, and in blocks of a few rows that divide nothing evenly."""
    if request.param == "small":
        monkeypatch.setattr(stream, "BLOCK_BYTES", 5 * HIDDEN * 4 + 1)


def sources(folder: Path, count: int, **options: Any) -> list[Path]:
    return [write_llama(folder / f"s{i}", i, **options) for i in range(count)]


def done(*arguments: object) -> str:
    """The output of a command line that must succeed without a word on stderr."""
    code, out, err = run_btx(*arguments)
    assert (code, err) == (0, "")
    return out


# formats


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_dense_model_through_every_format(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    """hf, and each pair of formats in turn; what comes back is what went in, by safetensors' own reader."""
    original = write_llama(tmp_path / "hf", 3, dtype=dtype, tied=tied, shards=2)
    through_all_formats(tmp_path, original)
    weights = random_weights(3, dtype, tied)
    for one in FORMATS:
        back = read_hf(tmp_path / f"{one}-hf")
        assert back.keys() == weights.keys()
        assert all(back[name].dtype == dtype and torch.equal(back[name], weights[name]) for name in weights)


def through_all_formats(folder: Path, original: Path) -> None:
    for one in FORMATS:
        done("convert", original, folder / one, "--to", one) if folder / one != original else None
        for other in FORMATS:
            done("convert", folder / one, folder / f"{one}-{other}", "--to", other)
            done("verify", folder / f"{one}-{other}")
            assert hashes(folder / f"{one}-{other}") == hashes(folder / "hf-hf")


def test_a_mixture_through_every_format(tmp_path: Path) -> None:
    done(*mix_arguments(sources(tmp_path, 3), tmp_path / "hf", "--to", "hf"))
    through_all_formats(tmp_path, tmp_path / "hf")
    expected = read_hf(tmp_path / "hf")
    for one in FORMATS:
        back = read_hf(tmp_path / f"{one}-hf")
        assert back.keys() == expected.keys()
        assert all(torch.equal(back[name], expected[name]) for name in expected)
        for key in ("num_local_experts", "num_experts_per_tok", "rope_theta", "rms_norm_eps", "vocab_size"):
            configs = [
                json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", f"{one}-hf")
            ]
            assert configs[0][key] == configs[1][key]


def test_every_cut_of_a_mixture_has_the_same_hashes(tmp_path: Path) -> None:
    done(*mix_arguments(sources(tmp_path, 4), tmp_path / "moe", "--to", "megatron"))
    for tensor, pipeline, expert in ((1, 1, 1), (2, 1, 2), (2, 2, 4), (1, 2, 1)):
        cut, back = tmp_path / f"cut{tensor}{pipeline}{expert}", tmp_path / f"back{tensor}{pipeline}{expert}"
        sizes = zip(("tensor", "pipeline", "expert"), (tensor, pipeline, expert), strict=True)
        options = [word for kind, size in sizes for word in (f"--target-{kind}-model-parallel-size", size)]
        done("convert", tmp_path / "moe", cut, "--to", "megatron-legacy", *options)
        done("convert", cut, back, "--to", "megatron", *options[-2:])
        assert len(list(cut.rglob("model_optim_rng.pt"))) == tensor * pipeline * expert
        assert len(list(back.rglob("*.distcp"))) == expert
        assert hashes(cut) == hashes(back) == hashes(tmp_path / "moe")


@pytest.mark.parametrize("kind", FORMATS)
def test_the_default_format_is_the_experts_own(tmp_path: Path, kind: str) -> None:
    one, two = sources(tmp_path, 2)
    done("convert", one, tmp_path / "one", "--to", kind)
    assert f"s, {kind}\n" in done(*mix_arguments([tmp_path / "one", two], tmp_path / "moe"))
    assert json.loads((tmp_path / "moe" / "manifest.json").read_text())["recipe"]["format"] == kind


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    models = sources(tmp_path, 2)
    before = tree(tmp_path)
    out = done(*mix_arguments(models, tmp_path / "moe", "--dry-run"))
    assert tree(tmp_path) == before
    assert not (tmp_path / "moe").exists()
    done(*mix_arguments(models, tmp_path / "moe"))
    rows = {
        line.split()[0]: line.split() for line in out.splitlines() if line.startswith(("dec", "emb", "out"))
    }
    table = json.loads((tmp_path / "moe" / "manifest.json").read_text())["outputs"]["tensors"]
    assert {name: row[1] for name, row in rows.items()} == {name: row["rule"] for name, row in table.items()}
    assert {name: row[-3] for name, row in rows.items()} == {
        name: "x".join(map(str, row["shape"])) for name, row in table.items()
    }


def test_the_printed_flags_are_the_models(tmp_path: Path) -> None:
    models = sources(tmp_path, 4, tied=True)
    more = ["--to", "megatron-legacy", "--router-topk", 3, "--target-tensor-model-parallel-size", 2]
    out = done(
        *mix_arguments(models, tmp_path / "moe", *more, "--target-expert-model-parallel-size", 2),
        *("--target-pipeline-model-parallel-size", 2),
    )
    flags = dict(
        (line.strip(" \\") + " ").split(" ", 1) for line in out.splitlines() if line.startswith("  --")
    )
    expected = {
        "--load": tmp_path / "moe",
        "--ckpt-format": "torch",
        "--num-layers": LAYERS,
        "--hidden-size": HIDDEN,
        "--ffn-hidden-size": WIDTH,
        "--num-attention-heads": HEADS,
        "--num-query-groups": GROUPS,
        "--kv-channels": HIDDEN // HEADS,
        "--rotary-base": 10000,
        "--num-experts": 4,
        "--moe-router-topk": 3,
        "--tensor-model-parallel-size": 2,
        "--pipeline-model-parallel-size": 2,
        "--expert-model-parallel-size": 2,
    }
    assert {name: flags[name].strip() for name in expected} == {n: str(v) for n, v in expected.items()}
    assert VOCABULARY % (2 * int(flags["--make-vocab-size-divisible-by"])) == 0
    assert "--untie-embeddings-and-output-weights" not in flags
    assert "--moe-router-pre-softmax" not in flags
    out = done(
        *mix_arguments(
            sources(tmp_path / "b", 2), tmp_path / "b" / "moe", "--router-pre-softmax", "--to", "megatron"
        )
    )
    assert "--moe-router-pre-softmax" in out
    assert "--untie-embeddings-and-output-weights" in out
    assert "--ckpt-format torch_dist" in out


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("more", [[], ["--average", "dare"], ["--experts", "split", "--chunks", "2"]])
def test_one_worker_and_four_write_the_same_bytes(tmp_path: Path, to: str, more: list[str]) -> None:
    models, trees = sources(tmp_path, 2), []
    base = ["--base", models[0]] if "dare" in more else []
    for workers in (1, 4):
        output = tmp_path / f"moe{workers}"
        done(*mix_arguments(models, output, "--to", to, "--workers", workers, *more, *base))
        found = tree(output)
        del found["manifest.json"]  # it says when
        trees.append(found)
    assert trees[0] == trees[1]
    assert hashes(tmp_path / "moe1") == hashes(tmp_path / "moe4")


# rules, against a few lines of torch on whole tensors


def shared_by_hf_name(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight for name, weight in weights.items() if ".mlp." not in name}


AVERAGES: dict[str, tuple[list[str], Callable[[list[Tensor], Tensor], Tensor]]] = {
    "mean": ([], lambda models, base: torch.stack(models).double().mean(0)),
    "weighted": (
        ["--weight", "a=3", "--weight", "c=0.5"],
        lambda models, base: (3 * models[0].double() + models[1] + 0.5 * models[2]) / 4.5,
    ),
    "base": ([], lambda models, base: base.double()),
    "ties": (["--density", "0.4"], lambda models, base: whole_ties(models, base, 0.4)),
    "dare": (["--density", "1"], lambda models, base: torch.stack(models).double().mean(0)),
}


def whole_ties(models: list[Tensor], base: Tensor, density: float) -> Tensor:
    tasks = []
    for model in models:
        task = (model.float() - base.float()).double()
        keep = max(1, round(density * task.numel()))
        order = task.abs().view(-1).sort(descending=True, stable=True).indices[:keep]
        tasks.append(torch.zeros_like(task).view(-1).index_copy(0, order, task.view(-1)[order]).view_as(task))
    stacked = torch.stack(tasks)
    agrees = (stacked.sign() == stacked.sum(0).sign()) & (stacked != 0)
    return base.double() + (stacked * agrees).sum(0) / agrees.sum(0).clamp(min=1)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("kind", AVERAGES)
def test_every_average(tmp_path: Path, kind: str) -> None:
    """Three experts and a base, one source in another format; by tensor and layer.

    TIES trims q, k and v together, as they lie packed, so there our packed matrix is the tensor.
    """
    more, expected = AVERAGES[kind]
    models = sources(tmp_path, 3, dtype=torch.float32)
    base = write_llama(tmp_path / "base", 9, dtype=torch.float32)
    done(
        "convert",
        models[1],
        tmp_path / "m1",
        "--to",
        "megatron-legacy",
        "--target-tensor-model-parallel-size",
        2,
    )
    arguments = mix_arguments([models[0], tmp_path / "m1", models[2]], tmp_path / "moe", "--to", "hf", *more)
    done(*arguments, "--average", kind, *(["--base", base] if kind in ("base", "ties", "dare") else []))
    found, ours = read_ours(tmp_path / "moe"), [read_ours(model) for model in (*models, base)]
    for name in ours[0]:
        if name.endswith(("linear_fc1.weight", "linear_fc2.weight")):
            continue
        got = found["decoder.layers.pre_mlp_layernorm.weight" if name == NORM else name]
        layers = range(LAYERS) if name.startswith("decoder.layers") else [...]
        for layer in layers:
            wanted = expected([model[name][layer] for model in ours[:3]], ours[3][name][layer])
            torch.testing.assert_close(got[layer].double(), wanted, rtol=1e-5, atol=1e-6)


def test_the_mean_by_their_names(tmp_path: Path) -> None:
    """Without our packing: what transformers would load, against what safetensors reads of the sources."""
    models = sources(tmp_path, 2)
    done(*mix_arguments(models, tmp_path / "moe", "--to", "hf"))
    got, one, two = read_hf(tmp_path / "moe"), *(shared_by_hf_name(random_weights(seed)) for seed in (0, 1))
    for name in one:
        assert torch.equal(got[name], ((one[name].float() + two[name].float()) / 2).bfloat16()), name
    theirs = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    for layer in range(LAYERS):
        for expert in range(2):
            for mine, dense in theirs.items():
                stacked = got[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{mine}.weight"]
                assert torch.equal(
                    stacked, random_weights(expert)[f"model.layers.{layer}.mlp.{dense}.weight"]
                )


@pytest.mark.usefixtures("blocks")
def test_dare_keeps_or_drops_whole_differences(tmp_path: Path) -> None:
    """Each entry is the base plus twice some of the (halved) differences; about half of each is kept."""
    models = sources(tmp_path, 2, dtype=torch.float32)
    base = write_llama(tmp_path / "base", 9, dtype=torch.float32)
    done(*mix_arguments(models, tmp_path / "moe", "--average", "dare", "--density", "0.5", "--base", base))
    found, ours = read_ours(tmp_path / "moe"), [read_ours(model) for model in (*models, base)]
    for name in ("embedding.word_embeddings.weight", "decoder.layers.self_attention.linear_qkv.weight"):
        one, two, of_base = (model[name] for model in ours)
        task, other = one - of_base, two - of_base
        choices = torch.stack([of_base, of_base + task, of_base + other, of_base + task + other])
        distance = (choices - found[name]).abs()
        assert distance.min(0).values.max() < 1e-5
        share = torch.bincount(distance.argmin(0).view(-1), minlength=4) / found[name].numel()
        assert ((share - 0.25).abs() < 4 * math.sqrt(0.1875 / found[name].numel())).all()
    table = run_again(models, base, tmp_path)
    assert table[0] == table[1] != table[2]


def run_again(models: list[Path], base: Path, folder: Path) -> list[dict[str, str]]:
    tables = []
    for number, seed in enumerate((5, 5, 6)):
        output = folder / f"again{number}"
        arguments = mix_arguments(models, output, "--average", "dare", "--base", base)
        done(*arguments, "--random-seed", seed, "--workers", number + 1)
        tables.append(hashes(output))
    return tables


KINDS: dict[str, tuple[list[object], int]] = {
    "stack": ([], 3),
    "split": (["--chunks", 4], 12),
    "blend": ([], 3),
    "copies": (["--copies", 2], 6),
    "virtual": (["--chunks", 2, "--copies", 2], 12),
}


def units_of(kind: str, expert: int, gates: list[Tensor]) -> Tensor:
    """The units (on the first axis) of an expert, from [F, ...] of each source."""
    size = WIDTH
    if kind == "stack":
        return gates[expert]
    if kind == "copies":
        return gates[expert // 2]
    if kind == "blend":
        return torch.cat([gate[expert * size // 3 : (expert + 1) * size // 3] for gate in gates])
    source, chunk, chunks = (expert // 4, expert % 4, 4) if kind == "split" else (expert // 4, expert % 2, 2)
    return gates[source][chunk * size // chunks : (chunk + 1) * size // chunks]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_expert(tmp_path: Path, kind: str, to: str) -> None:
    """Gate rows, up rows and down columns of each expert, by the names of the sources."""
    more, count = KINDS[kind]
    models = sources(tmp_path, 3, dtype=torch.float32)
    done("convert", models[1], tmp_path / "m1", "--to", "megatron")
    arguments = mix_arguments([models[0], tmp_path / "m1", models[2]], tmp_path / "moe", "--to", to)
    done(*arguments, "--experts", kind, *more)
    done("verify", tmp_path / "moe")
    found, theirs = read_ours(tmp_path / "moe"), [random_weights(seed, torch.float32) for seed in range(3)]
    scale = math.sqrt(2) if kind == "virtual" else 1.0  # factor = chunks, on up and down
    assert found[FC1].shape[1] == found[ROUTER].shape[1] == count
    for layer in range(LAYERS):
        for expert in range(count):
            gate, up, down = (
                [model[f"model.layers.{layer}.mlp.{matrix}_proj.weight"] for model in theirs]
                for matrix in ("gate", "up", "down")
            )
            got_gate, got_up = found[FC1][layer, expert].chunk(2)
            torch.testing.assert_close(got_gate, units_of(kind, expert, gate), rtol=0, atol=0)
            torch.testing.assert_close(got_up, units_of(kind, expert, up) * scale)
            columns = units_of(kind, expert, [matrix.T for matrix in down]).T
            torch.testing.assert_close(found[FC2][layer, expert], columns * scale)
        if kind == "virtual":
            assert torch.equal(found[ROUTER][layer, ::2], found[ROUTER][layer, 1::2])
        else:
            assert found[ROUTER][layer].unique(dim=0).shape[0] == count


@pytest.mark.usefixtures("blocks")
def test_dropped_units_are_the_same_in_all_three_matrices(tmp_path: Path) -> None:
    (model,) = sources(tmp_path, 1, dtype=torch.float32)
    more = ["--experts", "copies", "--copies", 3, "--drop-ratio", 0.25]
    done(*mix_arguments([model], tmp_path / "moe", *more))
    found, weights, dropped = read_ours(tmp_path / "moe"), random_weights(0, torch.float32), set()
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.mlp.{{}}_proj.weight"
        for expert in range(3):
            gate, up = found[FC1][layer, expert].chunk(2)
            changed = [
                (gate != weights[name.format("gate")]).any(1),
                (up != weights[name.format("up")]).any(1),
                (found[FC2][layer, expert] != weights[name.format("down")]).any(0),
            ]
            assert torch.equal(changed[0], changed[1])
            assert torch.equal(changed[0], changed[2])
            assert changed[0].sum() == WIDTH // 4
            dropped.add(tuple(changed[0].tolist()))
    assert len(dropped) > 1  # each expert, and layer, draws its own


@pytest.mark.usefixtures("blocks")
def test_the_router(tmp_path: Path) -> None:
    models = sources(tmp_path, 4, dtype=torch.float32)
    done(*mix_arguments(models, tmp_path / "normal", "--router-std", 0.5, "--random-seed", 3))
    router = read_ours(tmp_path / "normal")[ROUTER]
    assert router.shape == (LAYERS, 4, HIDDEN)
    assert 0.4 < router.std().item() < 0.6
    assert not torch.equal(router[0], router[1])
    done(*mix_arguments(models, tmp_path / "zero", "--router-init", "zero", "--router-topk", 4))
    assert not read_ours(tmp_path / "zero")[ROUTER].any()


def test_a_mixture_of_one_model_is_that_model(tmp_path: Path) -> None:
    (model,) = sources(tmp_path, 1)
    done(*mix_arguments([model], tmp_path / "moe", "--experts", "copies", "--copies", 2, "--to", "megatron"))
    dense, moe = read_ours(model), read_ours(tmp_path / "moe")
    for name, weight in moe.items():
        if name == ROUTER:
            continue
        source = dense[NORM if "pre_mlp" in name else name.replace("experts.experts.", "")]
        assert all(
            torch.equal(part, source) for part in (weight.unbind(1) if "experts" in name else [weight])
        )


def test_the_manifest_knows_the_sources(tmp_path: Path) -> None:
    """The same weights have the same fingerprint in every format, whatever the rule read of them."""
    one, two = sources(tmp_path, 2)
    done("convert", one, tmp_path / "one", "--to", "megatron")
    done(*mix_arguments([one, two], tmp_path / "x"))
    more = ["--average", "base", "--base", two, "--experts", "blend"]
    done(*mix_arguments([tmp_path / "one", two], tmp_path / "y", *more))
    inputs = [json.loads((tmp_path / name / "manifest.json").read_text())["inputs"] for name in "xy"]
    assert inputs[0] == {name: inputs[1][name] for name in "ab"}
    assert inputs[1]["(base)"] == inputs[1]["b"] != inputs[1]["a"]
