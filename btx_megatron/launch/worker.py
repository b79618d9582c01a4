"""One process of a stage: ``python -m btx_megatron.launch.worker WORK/job.json``.

Under torchrun there is one a rank, else one alone. It does the job and writes how that ended into the
work folder, where the supervisor reads it (runtime/outcome.py).

This module is run again, as ``__mp_main__``, by every process that a worker spawns (a checkpoint's writers,
the tokenizing pool); so it imports nothing heavy, its last line is guarded, and the line before is not for
the worker alone: whatever a worker starts ends with it.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from btx_megatron.durable import temporary_of
from btx_megatron.errors import Stopped
from btx_megatron.job import CHECKPOINTS, LAUNCH_FILES, Job, Task, read_job
from btx_megatron.manifest import EXPORTED, package_versions
from btx_megatron.quick_import import quick_import
from btx_megatron.recipe import GROWN_FROM, SEED
from btx_megatron.recipe_file import recipe_to_dict
from btx_megatron.run_folder import stage_folder
from btx_megatron.runtime.outcome import error_line, write_error, write_result, write_stopped
from btx_megatron.runtime.parent import die_with_guardian
from btx_megatron.runtime.progress import Progress


def main() -> int:
    """Do the job named on the command line; returns the exit code of this rank."""
    job = read_job(Path(sys.argv[1]))
    rank = int(os.environ.get("RANK", "0"))
    try:
        result = _TASKS[job.task](job)
        if rank == 0:
            outputs = result.get("outputs") or _hash_outputs(job.work_folder)
            # the supervisor may run in another environment, beside the container
            told = {"outputs": outputs, "versions": package_versions()}
            write_result(job.work_folder, result | told)
    except Stopped:
        if rank == 0:
            write_stopped(job.work_folder)
    except BaseException as error:  # torch's CheckpointException is no Exception
        with suppress(OSError):  # the disk may be full; then the log says it
            write_error(job.work_folder, rank, *error_line(error))
        raise  # the traceback belongs into the log
    return 0


def _train(job: Job) -> dict[str, Any]:
    _verify_inputs(job)
    with quick_import():
        from btx_megatron.training.train import run_training

    return run_training(job)


def _evaluate(job: Job) -> dict[str, Any]:
    _verify_inputs(job)
    with quick_import():
        from btx_megatron.evaluation.loss import run_evaluation

    return run_evaluation(job)


def _prepare(job: Job) -> dict[str, Any]:
    from btx_megatron.data.prepare import prepare

    prepare(job.recipe, job.work_folder, Progress(job.work_folder).update)
    return {}


def _cluster(job: Job) -> dict[str, Any]:
    from btx_megatron.ensembles.cluster_documents import cluster_documents

    cluster_documents(job.recipe, job.data_folder, job.work_folder)
    return {}


def _import(job: Job) -> dict[str, Any]:
    from btx_megatron.data.folder import read_statistics
    from btx_megatron.mixing.pretrained import import_checkpoint

    vocabulary = read_statistics(job.data_folder)
    progress = Progress(job.work_folder)
    return {"outputs": import_checkpoint(job.recipe, job.stage, vocabulary, job.checkpoints, progress)}


def _mix(job: Job) -> dict[str, Any]:
    _verify_inputs(job)
    from btx_megatron.mixing.mix import mix
    from btx_megatron.mixing.of_recipe import mix_options, needs_base, router_tokens, upcycling_options

    if job.stage == "mix" and job.recipe.mix.grow_from is not None:
        return {"outputs": {"tensors": _grow(job)}}
    if job.stage == "upcycle":
        table = mix({SEED: _checkpoints(job, SEED)}, _output(job), upcycling_options(job.recipe))
    else:
        options = mix_options(job.recipe)
        base = _checkpoints(job, SEED) if needs_base(options) else None
        text = router_tokens(job.recipe, job.data_folder)
        table = mix(_source_checkpoints(job), _output(job), options, base, text)
    return {"outputs": {"tensors": table}}


def _grow(job: Job) -> dict[str, Any]:
    from btx_megatron.mixing.mix import grow_trained
    from btx_megatron.mixing.of_recipe import mix_options

    mix = job.recipe.mix
    kept = [mix.grow_experts.index(name) for name in mix.kept_experts]
    old, options = _checkpoints(job, GROWN_FROM), mix_options(job.recipe)
    new = _source_checkpoints(job)
    return grow_trained(old, kept, new, _output(job), share=mix.grow_share, options=options)


def _average(job: Job) -> dict[str, Any]:
    _verify_inputs(job)
    from btx_megatron.mixing.mix import average
    from btx_megatron.mixing.of_recipe import average_options, needs_base

    options = average_options(job.recipe)
    base = _checkpoints(job, SEED) if needs_base(options) else None
    return {"outputs": {"tensors": average(_source_checkpoints(job), _output(job), options, base)}}


def _output(job: Job) -> Any:
    from btx_megatron.mixing.mix import Output

    recipe = recipe_to_dict(job.recipe)
    return Output(job.checkpoints, to="megatron", recipe=recipe, progress=Progress(job.work_folder))


def _export(job: Job) -> dict[str, Any]:
    _verify_inputs(job)
    from btx_megatron.mixing.mix import Output, convert

    (source,) = job.inputs
    settings, progress = job.recipe.export, Progress(job.work_folder)
    target = job.work_folder / EXPORTED
    output = Output(target, settings.to, approximate=settings.approximate, progress=progress)
    return {"outputs": {"tensors": convert(_checkpoints(job, source), output)}}


def _report(job: Job) -> dict[str, Any]:
    from btx_megatron.evaluation.report import write_report

    write_report(job.recipe, job.run_folder, job.work_folder)
    return {}


_TASKS: dict[Task, Callable[[Job], dict[str, Any]]] = {
    "prepare": _prepare,
    "cluster": _cluster,
    "import": _import,
    "train": _train,
    "mix": _mix,
    "average": _average,
    "evaluate": _evaluate,
    "report": _report,
    "export": _export,
}


def _verify_inputs(job: Job) -> None:
    """Hold the weights that this stage reads against their manifests: damage on disk trains silently.

    Once a stage, by rank 0, before any rank loads a model (the others wait for it to join).
    """
    if os.environ.get("RANK", "0") != "0":
        return
    from btx_megatron.mixing.verify import verify

    for stage in job.inputs:
        checkpoints = _checkpoints(job, stage)
        if checkpoints.exists():
            verify(checkpoints)


def _source_checkpoints(job: Job) -> dict[str, Path]:
    """Checkpoint folder of each model that is mixed, in their order: the seed, if any, last."""
    stages = {name: SEED if name == SEED else f"expert:{name}" for name in job.recipe.joining_names}
    return {name: _checkpoints(job, stage) for name, stage in stages.items()}


def _checkpoints(job: Job, stage: str) -> Path:
    """Of a finished stage."""
    return job.run_folder / stage_folder(stage) / CHECKPOINTS


def _hash_outputs(work_folder: Path) -> dict[str, Any]:
    """Hashes of what the stage made: its weights, tensor by tensor, or all files of a stage without any.

    What lies beside a checkpoint (losses, caches) is left out: it holds times, and is no stage's input.
    """
    checkpoints = work_folder / CHECKPOINTS
    if checkpoints.exists():
        from btx_megatron.mixing.hashes import hash_tensors

        return {"tensors": hash_tensors(checkpoints)}
    passing = {*LAUNCH_FILES, *(temporary_of(Path(name)).name for name in LAUNCH_FILES)}
    names = sorted(str(path.relative_to(work_folder)) for path in work_folder.rglob("*") if path.is_file())
    return {"files": {name: _sha256(work_folder / name) for name in names if name not in passing}}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ in ("__main__", "__mp_main__"):
    die_with_guardian()

if __name__ == "__main__":
    sys.exit(main())
