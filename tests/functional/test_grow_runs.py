"""A run of two domains, grown by a third, then shrunk, each finetuned again, through the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from faulty import RECIPE

from btx_megatron.checkpoints.formats import open_checkpoint
from btx_megatron.checkpoints.names import ROUTER
from btx_megatron.checkpoints.pieces import indices_of, read_part
from btx_megatron.run_folder import stage_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

JSON, MAIL, WEB = (
    {"name": name, "sources": [{"path": "stdlib:", "include": [f"{package}/*.py"]}]}
    for name, package in (("json", "json"), ("mail", "email"), ("web", "http"))
)
TRAINING = RECIPE["training"] | {"train_iters": 12, "save_interval": 100, "lr_warmup_iters": 2}
FC1, FC2 = (f"decoder.layers.mlp.experts.experts.linear_fc{n}.weight" for n in (1, 2))
DENSE_FC1 = "decoder.layers.mlp.linear_fc1.weight"
SHARED = "decoder.layers.self_attention.linear_proj.weight"


def btx(folder: Path, name: str, **values: Any) -> subprocess.CompletedProcess[str]:
    recipe = RECIPE | {"training": TRAINING, "run_folder": str(folder / name), "name": name} | values
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return subprocess.run(
        [sys.executable, "-m", "btx_megatron", "run", str(path)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def run(folder: Path, name: str, **values: Any) -> Path:
    done = btx(folder, name, **values)
    assert done.returncode == 0, done.stderr
    return folder / name


def weights(run: Path, stage: str, name: str) -> torch.Tensor:
    source = open_checkpoint(run / stage_folder(stage) / "checkpoints")
    info = source.tensors[name]
    return torch.stack([read_part(source, name, at) for at in indices_of(name, info)]).reshape(info.shape)


def told(run: Path) -> tuple[dict[str, Any], list[str], list[str]]:
    """Summary, the experts of the report, and the stages that were trained."""
    summary = json.loads((run / "report" / "summary.json").read_text())
    routing = json.loads((run / "evaluate" / "evaluation.json").read_text())["routing"]
    trained = sorted(path.parent.name for path in run.rglob("losses.jsonl"))
    return summary, routing["experts"], trained


def test_a_run_grows_and_shrinks(tmp_path: Path) -> None:
    old = run(tmp_path, "old", data={"domains": [JSON, MAIL]})

    grown = run(tmp_path, "grown", data={"domains": [JSON, MAIL, WEB]}, mix={"grow_from": "old"})
    summary, experts, trained = told(grown)
    assert experts == ["json", "mail", "seed", "web"]
    assert "(json, mail, seed, web)" in (grown / "report" / "report.md").read_text()
    assert trained == ["finetune", "web"]
    assert list(summary["held_out_loss"]) == ["seed", "expert:web", "grown_from", "merged", "btx"]
    assert summary["tokens"]["grown_from"] == 0
    assert summary["tokens"]["btx"] == 2 * 12 * 2 * 32
    for name in (FC1, FC2, ROUTER, SHARED):
        assert torch.equal(weights(grown, "grown_from", name), weights(old, "finetune", name))
        if name != SHARED:
            assert torch.equal(weights(grown, "mix", name)[:, :3], weights(old, "finetune", name))
    assert torch.equal(weights(grown, "mix", FC1)[:, 3], weights(grown, "expert:web", DENSE_FC1))
    wanted = 0.75 * weights(old, "finetune", SHARED) + 0.25 * weights(grown, "expert:web", SHARED)
    torch.testing.assert_close(weights(grown, "mix", SHARED), wanted, rtol=1e-5, atol=1e-7)
    assert torch.equal(weights(grown, "seed", SHARED), weights(old, "seed", SHARED))
    # the same text held out, under the same tokenizer: what was said of the old mixture is said again
    first = json.loads((old / "evaluate" / "evaluation.json").read_text())["held_out_loss"]["btx"]
    for domain in ("json", "mail"):
        assert summary["held_out_loss"]["grown_from"][domain] == pytest.approx(first[domain], abs=1e-5)

    # its own resolved recipe is the same run
    again = subprocess.run(
        [sys.executable, "-m", "btx_megatron", "run", str(grown / "recipe.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    assert "nothing to do" in again.stdout + again.stderr

    values = {"data": {"domains": [JSON, WEB]}, "mix": {"grow_from": "grown", "drop": ["mail"]}}
    less = run(tmp_path, "less", **values)
    summary, experts, trained = told(less)
    assert experts == ["json", "seed", "web"]
    assert trained == ["finetune"]
    assert list(summary["held_out_loss"]) == ["seed", "grown_from", "merged", "btx"]
    for name in (FC1, FC2, ROUTER):
        assert torch.equal(weights(less, "mix", name), weights(grown, "finetune", name)[:, [0, 2, 3]])
    assert torch.equal(weights(less, "mix", SHARED), weights(grown, "finetune", SHARED))

    (tmp_path / "other.model").write_bytes(b"another tokenizer")
    refused = btx(
        tmp_path,
        "refused",
        data={"domains": [JSON, WEB]},
        mix={"grow_from": "old"},
        tokenizer={"tokenizer_model": "other.model"},
    )
    assert refused.returncode == 2
    assert "tokenizer.tokenizer_model" in refused.stderr
    assert refused.stderr.count("\n") == 1
