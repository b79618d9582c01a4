"""Whole runs of the methods beside the plain one, on tiny models, through the command line."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from faulty import RECIPE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

DOMAINS = [
    {"name": "json", "sources": [{"path": "stdlib:", "include": ["json/*.py"]}]},
    {"name": "mail", "sources": [{"path": "stdlib:", "include": ["email/*.py"]}]},
]
TRAINING = RECIPE["training"] | {"train_iters": 12, "save_interval": 100, "lr_warmup_iters": 2}


def run(folder: Path, **values: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Summary and evaluation of a run."""
    recipe = RECIPE | {"data": {"domains": DOMAINS}, "training": TRAINING, "run_folder": str(folder / "run")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | values))
    done = subprocess.run(
        [sys.executable, "-m", "btx_megatron", "run", str(folder / "recipe.yaml")],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = [folder / "run" / "report" / "summary.json", folder / "run" / "evaluate" / "evaluation.json"]
    summary, evaluation = (json.loads(path.read_text()) for path in told)
    for losses in summary["held_out_loss"].values():
        assert all(1 < loss < 7 for loss in losses.values())
    return summary, evaluation


def test_sampled_experts_beside_btm_and_sparse_upcycling(tmp_path: Path) -> None:
    summary, evaluation = run(
        tmp_path,
        mix={"average": "ties", "router_init": "centroid"},
        moe={"moe_router_type": "sample_top1", "moe_aux_loss_adaptive": True},
        baselines=["btm", "sparse_upcycling_dm"],
        stages={"finetune": {"layout": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}},
    )
    losses, routing = summary["held_out_loss"], evaluation["routing"]
    assert routing["experts"] == ["json", "mail", "seed"]
    assert routing["active_experts"] == pytest.approx([3, 1])  # the first layer is soft
    assert routing["mutual_information"][0] == pytest.approx(0, abs=1e-12)  # all tokens take all experts
    assert routing["balanced_accuracy"][0] == pytest.approx(0.5)
    assert 0 <= routing["mutual_information"][1] <= math.log(2)
    assert list(losses)[-1] == "btx"
    experts = ["expert:json", "expert:mail", "seed"]
    for domain in ("json", "mail"):
        apart = [losses[row][domain] for row in experts]
        for row in ("btm:top-1", "btm:top-2", "btm:uniform", "btm:cached", "btm:updating"):
            assert min(apart) - 0.5 < losses[row][domain] < max(apart) + 1e-6
        # between models that are branches of one the average is no worse than the worst of them
        assert min(apart) - 0.5 < losses["btm:parameters"][domain] < max(apart) + 0.1
        # of a posterior the regret is at most the log of the number of experts, over a window's tokens
        assert losses["btm:uniform"][domain] <= min(apart) + math.log(3) / 20
    tokens = summary["tokens"]
    assert tokens["btm:top-1"] == tokens["average"] < tokens["btx"] == tokens["sparse_upcycling_dm"]


YEARS = [domain | {"start": 2000 + year, "end": 2001 + year} for year, domain in enumerate(DOMAINS)]


def test_a_mixture_masked_by_time_and_by_choice(tmp_path: Path) -> None:
    """The earlier slice takes its own expert alone, in training and evaluation."""
    summary, evaluation = run(
        tmp_path,
        data={"domains": YEARS},
        mix={"include_seed": False},
        moe={"moe_router_time_mask": True},
        evaluate={"opt_out": ["mail"]},
        baselines=[],
        stages={"finetune": {"layout": {"data_parallel_size": 2, "expert_model_parallel_size": 2}}},
    )
    losses, routing = summary["held_out_loss"], evaluation["routing"]
    json_layers, mail_layers = routing["share"]
    assert all(share == [1, 0] for share in json_layers)
    assert all(share == pytest.approx([0.5, 0.5]) for share in mail_layers)
    assert 1 < routing["active_experts"][0] < 2
    assert losses["without:mail"]["json"] == losses["btx"]["json"]  # it had no part in it
    assert losses["without:mail"]["mail"] != pytest.approx(losses["btx"]["mail"], abs=1e-4)  # here it had


def test_time_slices(tmp_path: Path) -> None:
    """Of the earlier slice its own expert answers alone; of one without an expert both that were before."""
    third = {"name": "xml", "sources": [{"path": "stdlib:", "include": ["xml/**/*.py"]}]}
    summary, _ = run(
        tmp_path,
        method="timoe",
        data={"domains": [*YEARS, third | {"start": 2002, "end": 2003, "expert": False}]},
        mix={"include_seed": False},
        stages={"seed": {"blend": {"json": 1}}},
    )
    losses = summary["held_out_loss"]
    assert losses["timoe:uniform"]["xml"] < losses["expert:json"]["xml"] + losses["expert:mail"]["xml"]
    for row in ("timoe:uniform", "timoe:posterior"):
        assert losses[row]["json"] == pytest.approx(losses["expert:json"]["json"], abs=1e-6)
        assert losses[row]["mail"] != pytest.approx(losses["expert:mail"]["mail"], abs=1e-4)


def test_domains_that_nobody_named(tmp_path: Path) -> None:
    """Clusters, an expert of each, and mixtures of these."""
    from btx_megatron.ensembles.cluster_documents import load_found

    summary, evaluation = run(
        tmp_path,
        method="cbtm",
        clusters={"number": 2, "dimensions": 10},
        mix={"include_seed": False},
        baselines=["dense"],
        stages={"experts": {"cluster1": {"layout": {"tensor_model_parallel_size": 2}}}},
    )
    losses = summary["held_out_loss"]
    assert list(losses)[-1] == "cbtm:all"
    assert {"expert:cluster0", "expert:cluster1", "dense", "average", "cbtm:top-1"} <= set(losses)
    for domain in ("json", "mail"):
        apart = [losses[f"expert:cluster{k}"][domain] for k in (0, 1)]
        assert min(apart) - 0.3 < losses["cbtm:top-1"][domain] < max(apart) + 1e-6
        # of two experts top-2 is all of them, and a mixture is no worse than the mean of its parts
        assert losses["cbtm:top-2"][domain] == losses["cbtm:all"][domain] < max(apart) + 1e-6
    clusters, documents_of = load_found(tmp_path / "run" / "cluster")
    assert evaluation["clusters"]["cluster0"]["documents_of"] == documents_of["cluster0"]
    assert evaluation["clusters"]["cluster0"]["words"] == clusters.words()[0]
    statistics = json.loads((tmp_path / "run" / "data" / "statistics.json").read_text())["domains"]
    for domain in ("json", "mail"):
        found = sum(part.get(domain, 0) for part in documents_of.values())
        assert found == statistics[domain]["text"]["train"]["documents"]
    assert "## Clusters" in (tmp_path / "run" / "report" / "report.md").read_text()
    assert summary["tokens"]["dense"] == summary["tokens"]["cbtm:all"]
