"""The report of a hand-made run: numbers against arithmetic done here, pictures, and honest sentences."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from btx_megatron.errors import UserError
from btx_megatron.evaluation.page import verdict
from btx_megatron.evaluation.pictures import curve_starts, draw_routing, running_mean
from btx_megatron.evaluation.report import (
    read_evaluation,
    read_manifests,
    rows_table,
    summarize,
    write_report,
)
from btx_megatron.manifest import make_manifest, manifest_text
from btx_megatron.recipe import Recipe
from btx_megatron.recipe_file import parse_recipe, recipe_to_dict
from btx_megatron.run_folder import stage_folder

LOSSES = {
    "seed": [4.0, 4.5, 5.0],
    "expert:prose": [3.5, 5.0, 5.6],
    "expert:code": [4.9, 3.0, 4.7],
    "expert:math": [4.8, 4.6, 3.2],
    "average": [4.2, 4.1, 4.3],
    "merged": [4.1, 4.0, 4.2],
    "dense": [3.7, 3.3, 3.5],
    "btx": [3.6, 3.1, 3.5],
}
DOMAINS = ["prose", "code", "math"]
TOKENS = {
    "seed": 500,
    "expert:prose": 100,
    "expert:code": 200,
    "expert:math": 300,
    "finetune": 50,
    "dense": 651,
}
SECONDS = {"prepare": 3.5, "seed": 60.0, "mix": 1.25, "average": 1.0, "evaluate": 9.0}


@pytest.fixture
def recipe() -> Recipe:
    domains = [{"name": name, "sources": [{"path": "x"}]} for name in DOMAINS]
    # small numbers, so that the parameters can be counted by hand
    model = {"num_layers": 2, "hidden_size": 4, "ffn_hidden_size": 8, "num_attention_heads": 2}
    experts = {"prose": {"layout": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}}
    stages = {"experts": experts}
    tree = {"data": {"domains": domains}, "tokenizer": {"vocab_size": 10}, "model": model, "stages": stages}
    return parse_recipe(tree)


@pytest.fixture
def run(tmp_path: Path, recipe: Recipe) -> Path:
    """A run folder as the stages leave it."""
    template = make_manifest("", recipe_to_dict(recipe), {}, {}, None, 0.0)
    for stage in ["prepare", *TOKENS, "mix", "average", "evaluate"]:
        folder = tmp_path / "run" / stage_folder(stage)
        folder.mkdir(parents=True)
        seconds, tokens = SECONDS.get(stage, 30.0), TOKENS.get(stage)
        manifest = replace(template, stage=stage, tokens=tokens, duration_seconds=seconds, fingerprint="")
        (folder / "manifest.json").write_text(manifest_text(manifest))
        if stage in TOKENS:
            write_losses(folder / "losses.jsonl", TOKENS[stage])
    (tmp_path / "run" / "evaluate" / "evaluation.json").write_text(json.dumps(evaluation()))
    return tmp_path / "run"


@pytest.fixture
def summary(recipe: Recipe, run: Path) -> dict[str, Any]:
    """The summary alone: pictures take a second."""
    return summarize(recipe, read_evaluation(recipe, run), read_manifests(recipe, run))


def write_losses(path: Path, tokens: int) -> None:
    steps = [{"step": s, "tokens": tokens * s // 5, "lm_loss": 6 - 0.4 * s} for s in range(1, 6)]
    path.write_text("".join(json.dumps(step) + "\n" for step in steps))


def evaluation() -> dict[str, Any]:
    share = [[[0.7, 0.1, 0.1, 0.1]] * 2, [[0.1, 0.6, 0.2, 0.1]] * 2, [[0.2, 0.2, 0.5, 0.1]] * 2]
    return {
        "held_out_loss": {row: dict(zip(DOMAINS, values, strict=True)) for row, values in LOSSES.items()},
        "held_out_tokens": {"prose": 1000, "code": 1100, "math": 1200},
        "routing": {
            "share": share,
            "domains": DOMAINS,
            "experts": [*DOMAINS, "seed"],
            "active_experts": [2.0] * len(share[0]),
            "mutual_information": [0.25] * len(share[0]),
            "balanced_accuracy": [0.75] * len(share[0]),
        },
    }


def test_tasks_have_a_table(recipe: Recipe, run: Path, tmp_path: Path) -> None:
    told = {
        "metric": "acc,none",
        "value": 0.25,
        "documents": 12,
        "num_fewshot": 3,
        "all": {"acc,none": 0.25, "acc_stderr,none": 0.125},
    }
    content = evaluation() | {"tasks": {"seed": {"quiz": told}, "btx": {"quiz": told | {"value": 0.5}}}}
    (run / "evaluate" / "evaluation.json").write_text(json.dumps(content))
    summary = write_report(recipe, run, tmp_path / "report")
    assert summary["tasks"] == {"seed": {"quiz": 0.25}, "btx": {"quiz": 0.5}}
    page = (tmp_path / "report" / "report.md").read_text()
    assert "| `btx` | 0.500 +- 0.125 |" in page
    assert "`quiz`: acc, 12 documents, 3 examples shown" in page
    assert "Other random seeds, and anything about larger models" in page


def test_summary_equals_arithmetic(summary: dict[str, Any]) -> None:
    assert list(summary) == ["held_out_loss", "tokens", "flops", "tasks", "stage_seconds", "parameters"]
    assert list(summary["held_out_loss"]) == list(LOSSES)
    assert list(summary["held_out_loss"]["btx"]) == [*DOMAINS, "mean"]
    assert summary["held_out_loss"]["expert:math"] == pytest.approx(
        {"prose": 4.8, "code": 4.6, "math": 3.2, "mean": 4.2}
    )
    assert summary["tokens"] == {
        "seed": 0,
        "expert:prose": 100,
        "expert:code": 200,
        "expert:math": 300,
        "average": 600,
        "merged": 600,
        "dense": 651,
        "btx": 650,
    }
    # 6 FLOPs a weight that is multiplied with (the padded vocabulary's too), and half a square of scores
    dense = 6 * (2 * 64 + 2 * 96 + 4 * 128) + 3 * 2 * 4 * 4 * 256 / 2
    moe = dense + 6 * (2 * 96 + 2 * 4 * 4)
    assert summary["flops"] == pytest.approx(
        {
            "seed": 0,
            "expert:prose": 100 * dense,
            "expert:code": 200 * dense,
            "expert:math": 300 * dense,
            "average": 600 * dense,
            "merged": 600 * dense,
            "dense": 651 * dense,
            "btx": 600 * dense + 50 * moe,
        }
    )
    assert summary["stage_seconds"]["mix"] == 1.25
    assert set(summary["stage_seconds"]) == {"prepare", *TOKENS, "mix", "average", "evaluate"}
    # embeddings and head 2*10*4; a layer: attention 4*4*4, norms 2*4; final norm 4; SwiGLU 3*4*8 a layer
    shared, feed_forward, router = 80 + 2 * (64 + 8) + 4, 2 * 96, 2 * 4 * 4
    assert summary["parameters"] == {
        "dense": shared + feed_forward,
        "moe_total": shared + 4 * feed_forward + router,
        "moe_active": shared + 2 * feed_forward + router,
    }


def test_the_folder_holds_summary_pictures_and_page(
    recipe: Recipe, run: Path, summary: dict[str, Any], tmp_path: Path
) -> None:
    assert write_report(recipe, run, tmp_path / "report") == summary
    files = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    assert set(files) == {"summary.json", "losses.png", "routing.png", "report.md"}
    assert json.loads(files["summary.json"]) == summary
    assert_is_picture(files["losses.png"])
    assert_is_picture(files["routing.png"])
    page = files["report.md"].decode()
    assert "| `btx` | 3.600 | 3.100 | 3.500 | **3.400** | 650 | 1.13e+07 |" in page
    assert "| `expert:prose` | **3.500** | 5.000 | 5.600 | 4.700 | 100 | 1.73e+06 |" in page
    assert "- 0.100 nats better than `dense`" in page
    assert "- 1.300 nats better than `expert:prose`; on its own domain, 0.100 nats worse than it." in page
    assert "| expert:prose | TP2 SP | 100 | 30.0 |" in page
    assert "prose goes most to the expert prose (70%)" in page
    assert str(tmp_path) not in page


def assert_is_picture(content: bytes) -> None:
    width, height = struct.unpack(">II", content[16:24])
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert width > 600
    assert height > 300
    assert len(content) > 10_000, "almost empty"


def test_a_defeat_is_called_one(summary: dict[str, Any]) -> None:
    summary["held_out_loss"]["dense"]["mean"] = 3.0
    summary["held_out_loss"]["average"]["mean"] = summary["held_out_loss"]["btx"]["mean"]
    lines = verdict(summary).splitlines()
    assert any(line.startswith("- 0.400 nats worse than `dense`") for line in lines)
    assert "- equal to `average` (to three digits)." in lines


def test_no_baseline_no_row(recipe: Recipe, run: Path) -> None:
    recipe.baselines = []
    summary = summarize(recipe, read_evaluation(recipe, run), read_manifests(recipe, run))
    assert "dense" not in summary["held_out_loss"].keys() | summary["tokens"].keys()
    assert "`dense`" not in verdict(summary)


def test_a_method_without_a_moe_tells_of_no_routing(recipe: Recipe, run: Path, tmp_path: Path) -> None:
    recipe.method = "dense"
    content = evaluation() | {"routing": None}
    (run / "evaluate" / "evaluation.json").write_text(json.dumps(content))
    summary = write_report(recipe, run, tmp_path / "report")
    assert list(summary["held_out_loss"]) == list(summary["tokens"]) == ["seed", "dense"]
    assert list(summary["stage_seconds"]) == ["prepare", "seed", "dense", "evaluate"]
    assert not (tmp_path / "report" / "routing.png").exists()
    page = (tmp_path / "report" / "report.md").read_text()
    assert "How `dense` stands" in page
    assert "- 1.000 nats better than `seed`." in page
    for word in ("routing.png", "experts (", "btx 0"):
        assert word not in page


def test_sparse_upcycling_is_held_against_btx(recipe: Recipe, run: Path) -> None:
    """Its tokens and its FLOPs, of a model as large as btx's."""
    recipe.baselines = ["sparse_upcycling_cm"]
    for stage in ("upcycle", "sparse_upcycling_cm"):
        (run / stage).mkdir()
        (run / stage / "manifest.json").write_text((run / "dense" / "manifest.json").read_text())
    content = evaluation()
    content["held_out_loss"]["sparse_upcycling_cm"] = content["held_out_loss"]["dense"]
    (run / "evaluate" / "evaluation.json").write_text(json.dumps(content))
    summary = summarize(recipe, read_evaluation(recipe, run), read_manifests(recipe, run))
    assert list(summary["held_out_loss"])[-2:] == ["sparse_upcycling_cm", "btx"]
    assert summary["tokens"]["sparse_upcycling_cm"] == TOKENS["dense"]
    a_token = summary["flops"]["sparse_upcycling_cm"] / TOKENS["dense"]
    of_btx = summary["flops"]["btx"] - sum(summary["flops"][f"expert:{name}"] for name in DOMAINS)
    assert a_token == pytest.approx(of_btx / TOKENS["finetune"])
    assert "than `sparse_upcycling_cm`, copies of the seed, trained for 651 tokens (btx 650) and" in verdict(
        summary
    )


def remove_manifest(run: Path) -> None:
    (run / "finetune" / "manifest.json").unlink()


def remove_evaluation(run: Path) -> None:
    (run / "evaluate" / "evaluation.json").unlink()


def remove_row(run: Path) -> None:
    content = evaluation()
    del content["held_out_loss"]["merged"]
    (run / "evaluate" / "evaluation.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "named"),
    [(remove_manifest, "'finetune'"), (remove_evaluation, "evaluation.json"), (remove_row, "'merged'")],
)
def test_what_is_missing_is_named(
    recipe: Recipe, run: Path, tmp_path: Path, damage: Callable[[Path], None], named: str
) -> None:
    damage(run)
    with pytest.raises(UserError, match=named):
        write_report(recipe, run, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_table_for_the_terminal(summary: dict[str, Any]) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(rows_table(summary))
    text = console.export_text()
    positions = [text.index(f" {row} ") for row in LOSSES]
    assert positions == sorted(positions)
    assert "3.400" in text


def test_stages_follow_each_other_on_the_token_axis() -> None:
    tokens = {"seed": 500, "expert:a": 100, "expert:b": 200, "finetune": 50, "dense": 350}
    starts = curve_starts({stage: [(1, 9.0), (count, 8.0)] for stage, count in tokens.items()})
    assert starts == {"seed": 0, "expert:a": 500, "expert:b": 600, "finetune": 800, "dense": 500}


def test_curves_without_those_of_imported_models() -> None:
    starts = curve_starts({"expert:b": [(5, 9.0)], "finetune": [(3, 8.0)], "dense": [(8, 7.0)]})
    assert starts == {"expert:b": 0, "finetune": 5, "dense": 0}


def test_running_mean_is_a_mean() -> None:
    values = np.arange(90.0)  # window 3
    smooth = running_mean(values)
    assert smooth[:2].tolist() == [0.0, 0.5]
    assert smooth[50] == pytest.approx((48 + 49 + 50) / 3)


def test_a_large_model_can_be_drawn(tmp_path: Path) -> None:
    share = [[[1 / 9] * 9] * 48] * 8
    names = [f"d{i}" for i in range(8)]
    draw_routing({"share": share, "domains": names, "experts": [*names, "seed"]}, tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 10_000
