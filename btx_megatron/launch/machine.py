"""What this machine has to share out: CPU cores, and GPUs where there are any."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from btx_megatron.data.loader import check_installed as check_loader
from btx_megatron.errors import UserError
from btx_megatron.evaluation.tasks import check_task
from btx_megatron.pipeline import PipelineStage
from btx_megatron.recipe import Recipe
from btx_megatron.recipe_gpu_checks import needs_transformer_engine
from btx_megatron.runtime.cores import NEEDS_GPU, available_cores
from btx_megatron.training import curves

_PACKAGES = {
    "train": ("megatron", "psutil"),
    "evaluate": ("megatron", "psutil"),
    "report": ("matplotlib",),
    "cluster": ("sklearn",),
}
"""What tasks need beyond the base install."""


@dataclass(frozen=True)
class Machine:
    """Cores and GPUs that this process may use."""

    cores: int
    gpus: tuple[str, ...] = ()
    """As CUDA_VISIBLE_DEVICES names them."""
    lock_patience_seconds: float = 1.0
    """How long a stage's lock is waited for."""

    def gpus_of(self, stage: PipelineStage) -> int:
        """GPUs that a stage needs: one a rank where models run, none for work on files."""
        return stage.ranks if self.gpus and stage.task in ("train", "evaluate") else 0

    def environment(self, gpus: tuple[str, ...]) -> dict[str, str]:
        """Variables of a stage's processes; ``gpus`` are those that it has, none for what needs none."""
        # gloo would look up the host's name, which may not resolve
        loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
        needed = {NEEDS_GPU: "1"} if gpus else {}
        return loopback | needed | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}

    def command(self, stage: PipelineStage, job_file: Path) -> list[str]:
        """Program and arguments that run a stage: under its own torchrun where it has several ranks."""
        command = [sys.executable]
        if stage.ranks > 1:
            command += ["-m", "torch.distributed.run", "--nproc-per-node", str(stage.ranks)]
            # it takes a port and keeps it; one that is chosen here could be another's before it is taken
            command += ["--standalone", "--local-addr", "127.0.0.1"]
        return [*command, "-m", "btx_megatron.launch.worker", str(job_file)]

    def check(self, stages: list[PipelineStage]) -> None:
        """Raise UserError if a stage needs more GPUs than there are. Cores may be shared, GPUs not."""
        for stage in stages:
            if self.gpus_of(stage) > len(self.gpus):
                raise UserError(
                    f"stage {stage.name} has {stage.ranks} ranks and this machine {len(self.gpus)} GPUs; "
                    "make its layout smaller, run it where there are more, or set launch.device=cpu"
                )

    def check_packages(self, recipe: Recipe, stages: list[PipelineStage]) -> None:
        """Raise UserError if a stage needs a package that the base install leaves out."""
        for stage in stages:
            for package in _PACKAGES.get(stage.task, ()):
                if find_spec(package) is None:
                    raise UserError(
                        f"stage {stage.name} needs the package {package}, which is not installed here; "
                        "install the extra 'train': pip install 'btx-megatron[train]'"
                    )
            if stage.task == "evaluate":
                for task in recipe.evaluate.tasks:
                    check_task(task, recipe.evaluate.execute_code)
        trained = [stage for stage in stages if stage.task == "train"]
        if trained:
            check_loader(recipe.data.loader)
        for stage in trained:
            curves.check_installed(recipe.stage(stage.name).training)

    def check_accelerator(self, recipe: Recipe, stages: list[PipelineStage]) -> None:
        """Raise UserError where a stage asks for FP8 or Transformer Engine, and it or a GPU is not here."""
        lacking = [] if self.gpus else ["a GPU, and none is visible here"]
        if find_spec("transformer_engine") is None:
            lacking.append("the package transformer_engine, which is not installed here (extra 'gpu')")
        trained = [stage.name for stage in stages if stage.task == "train"]
        for key in _needs_transformer_engine(recipe, trained) if lacking and trained else ():
            raise UserError(f"{key} needs {' and '.join(lacking)}; leave it out, or run where there is one")


def _needs_transformer_engine(recipe: Recipe, trained: list[str]) -> Iterator[str]:
    """Keys of the recipe that do, with what they need."""
    if recipe.launch.transformer_impl == "transformer_engine":
        yield "launch.transformer_impl transformer_engine"
    if recipe.moe.moe_grouped_gemm and any(recipe.num_experts(stage) for stage in trained):
        yield "moe.moe_grouped_gemm true"
    for stage in trained:
        for key in needs_transformer_engine(recipe.stage(stage)):
            yield f"stage {stage}: {key}"


def this_machine(device: str = "auto") -> Machine:
    """Cores of this process, and GPUs from CUDA_VISIBLE_DEVICES or /dev unless ``device`` is cpu."""
    return Machine(available_cores(), () if device == "cpu" else _gpus())


def _gpus() -> tuple[str, ...]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(name.strip() for name in visible.split(",") if name.strip())
    devices = (path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
    return tuple(str(number) for number in range(len([name for name in devices if name.isdigit()])))
