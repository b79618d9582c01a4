"""The formats: which one lies in a folder, and a checkpoint of any of them written whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from btx_megatron.checkpoints.config import ModelConfig, from_recipe
from btx_megatron.checkpoints.megatron_args import SaysNothing, from_args, to_args
from btx_megatron.checkpoints.names import ROUTER, has_expert_axis
from btx_megatron.checkpoints.pieces import Index, Source, TensorInfo, dtype_name
from btx_megatron.checkpoints.stream import NO_BOUND, Effort, PlannedTensor, Reporter, stream
from btx_megatron.checkpoints.tokenizer_files import FOLDER as TOKENIZER
from btx_megatron.checkpoints.tokenizer_files import write_tokenizer
from btx_megatron.checkpoints.tracker import RELEASE, TRACKER, find_checkpoint, write_tracker
from btx_megatron.checkpoints.vocabulary import EMBEDDING, divisor, fit_vocabulary, rows_in
from btx_megatron.durable import sync, write_durably
from btx_megatron.errors import StageFailed, UserError
from btx_megatron.manifest import MANIFEST_FILE

Format = Literal["hf", "megatron", "megatron-legacy"]
FORMATS: tuple[Format, ...] = ("hf", "megatron", "megatron-legacy")


@dataclass(frozen=True)
class Parallel:
    """How a Megatron checkpoint is cut: legacy files by all three, torch_dist's experts by the last."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    vocabulary: int | None = None
    """``--make-vocab-size-divisible-by``: rows of the vocabulary are padded to a multiple of it x ``tensor``;
    None: they stay as they are."""


ONE_RANK = Parallel()


def format_of(path: Path) -> Format:
    """The format of a checkpoint's folder. Raises UserError where there is no checkpoint."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; name a checkpoint's")
    if (path / "config.json").exists():
        return "hf"
    if any(path.glob("mp_rank_*")):
        return "megatron-legacy"
    if (path / ".metadata").exists():
        return "megatron"
    if not (path / TRACKER).exists() and not (path / "checkpoints" / TRACKER).exists():
        if (path / "recipe.yaml").exists():
            raise UserError(
                f"{path}: a run, not a checkpoint; name one of its stages, as {path / 'finetune'}"
            )
        raise UserError(
            f"{path}: no checkpoint there (neither config.json, nor {TRACKER}, .metadata or mp_rank_*)"
        )
    folder = find_checkpoint(path)
    return "megatron-legacy" if any(folder.glob("mp_rank_*")) else "megatron"


def open_checkpoint(path: Path) -> Source:
    """The checkpoint in a folder, whatever its format. Raises UserError, see there."""
    kind = format_of(path)
    if kind == "hf":
        from btx_megatron.checkpoints.huggingface import HuggingFaceCheckpoint

        return HuggingFaceCheckpoint(path)
    if kind == "megatron-legacy":
        from btx_megatron.checkpoints.megatron_legacy import LegacyCheckpoint

        return LegacyCheckpoint(path)
    from btx_megatron.checkpoints.megatron_dist import DistCheckpoint

    return DistCheckpoint(path)


def config_of(source: Source) -> ModelConfig:
    """The model of a checkpoint, by what its format keeps of it.

    Raises SaysNothing where nothing is kept, UserError for a model that is no Llama or Mixtral.
    """
    config = getattr(source, "config", None)
    if config is not None:
        assert isinstance(config, ModelConfig)
        return config
    if hasattr(source, "args"):
        return from_args(source.args, str(source.folder))
    common: Mapping[str, Any] = source.common  # type: ignore[attr-defined]
    experts = source.tensors[ROUTER].shape[1] if ROUTER in source.tensors else None
    if "recipe" in common:
        found = from_recipe(common["recipe"], experts, common.get("vocab_size"))
    elif "args" in common:
        found = from_args(common["args"], str(source.folder))
    elif "model_config" in common:
        found = ModelConfig(**common["model_config"])
    else:
        raise SaysNothing(
            f"{source.folder}: does not say what model it is (no args, no recipe); save it with Megatron-LM"
        )
    return found


def write_checkpoint(
    output: Path,
    to: Format,
    plan: list[PlannedTensor],
    config: ModelConfig | None,
    *,
    parallel: Parallel = ONE_RANK,
    common: Mapping[str, Any] | None = None,
    tokenizer_files: Mapping[str, bytes] | None = None,
    approximate: bool = False,
    effort: Effort = NO_BOUND,
    progress: Reporter | None = None,
    manifest: Callable[[dict[str, dict[str, Any]]], str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Make the plan's weights and write them as a checkpoint in ``output``; returns their table.

    ``config`` may be None for ``to="megatron"`` alone, whose files say nothing of the model then.
    ``tokenizer_files`` by name lie beside Hugging Face's weights, and in ``tokenizer/`` beside Megatron's
    tracker. ``approximate``: write as a Mixtral what a Mixtral is not exactly (see ``approximations``).
    ``manifest`` makes the text of ``manifest.json`` from the table. Everything is written under a name
    beside ``output`` and renamed at the end: under its own name a checkpoint is whole. Raises UserError if
    there is something in ``output`` or a source is damaged, StageFailed if the disk is full.
    """
    plan, config = fitted(plan, config, to, parallel)
    check_target(plan, config, to, parallel, approximate)
    try:
        with _published(output) as partial:
            files = tokenizer_files or {}
            if to == "hf":
                table = _write_hf(partial, plan, config, files, effort, progress)
            else:
                table = _write_megatron(partial, to, plan, config, parallel, common or {}, effort, progress)
                write_tokenizer(partial / TOKENIZER, files)
                write_tracker(partial, RELEASE)
            if manifest is not None:
                write_durably(partial / MANIFEST_FILE, manifest(table))
    except OSError as error:
        raise StageFailed(
            f"{output}: {error.strerror}; nothing is left of it: mend that, and run it again"
        ) from None
    return table


def fitted(
    plan: list[PlannedTensor], config: ModelConfig | None, to: Format, parallel: Parallel = ONE_RANK
) -> tuple[list[PlannedTensor], ModelConfig | None]:
    """Plan and model with the rows of the vocabulary that the target has, see ``fit_vocabulary``.

    Where the size of the vocabulary was not known, all rows stood for tokens: that is known now.
    """
    multiple = 1 if to == "hf" else parallel.vocabulary and parallel.vocabulary * parallel.tensor
    if multiple is None or config is None:
        return fit_vocabulary(plan, None, multiple), config
    tokens = config.vocab_size or rows_in(plan)
    return fit_vocabulary(plan, tokens, multiple), replace(config, vocab_size=tokens)


def check_target(
    plan: list[PlannedTensor], config: ModelConfig | None, to: Format, parallel: Parallel, approximate: bool
) -> None:
    """Raise UserError where the plan's weights (``fitted``) cannot be written like that."""
    tensors = {planned.name: planned.info for planned in plan}
    if config is not None:
        _check_declared(tensors, config)
    if to == "megatron":
        _expert_files(tensors, parallel.expert)
    elif to == "megatron-legacy":
        from btx_megatron.checkpoints.legacy_layout import Grid
        from btx_megatron.checkpoints.legacy_writer import check_sizes

        assert config is not None
        grid = Grid(parallel.tensor, parallel.pipeline, parallel.expert, parallel.tensor)
        check_sizes(tensors, _args(config, rows_in(plan), parallel), grid)
    else:
        _check_one_dtype(tensors)
    if to == "hf" and config is not None and not approximate and (differs := approximations(config)):
        raise UserError(f"{differs[0]}; --approximate exports it all the same")


def _check_declared(tensors: Mapping[str, TensorInfo], config: ModelConfig) -> None:
    """The weights are those of the model that is declared beside them: each there, and none beyond."""
    from btx_megatron.checkpoints.huggingface import our_tensors

    embedding = tensors.get(EMBEDDING)
    declared = our_tensors(config, embedding.shape[0] if embedding else 0, torch.float32)
    for name in sorted({*tensors, *declared}):
        if name not in declared:
            raise UserError(f"{name}: the model that the checkpoint's configuration describes has none such")
        if name not in tensors:
            raise UserError(f"{name} is missing, which the checkpoint's configuration describes")
        there, said = list(tensors[name].shape), list(declared[name].shape)
        if there != said:
            raise UserError(f"{name} is {there}, and {said} by the checkpoint's configuration; correct that")


def _check_one_dtype(tensors: Mapping[str, TensorInfo]) -> None:
    usual = tensors[EMBEDDING].dtype
    for name, info in tensors.items():
        if info.dtype != usual:
            raise UserError(
                f"--to hf: weights must be of one type, and {name} is {dtype_name(info.dtype)} beside "
                f"{dtype_name(usual)}; save them in one"
            )


def partial_of(output: Path) -> Path:
    """The folder in which ``output`` is made: beside it, for a rename from there is one step."""
    output = output.resolve()  # "." has no name, and a link may lead to another file system
    return output.with_name(f".{output.name}.partial")


@contextlib.contextmanager
def _published(output: Path) -> Iterator[Path]:
    """A folder to fill, ours alone; renamed to ``output`` at the end, or deleted if that is not reached."""
    _check_free(output)
    partial = partial_of(output)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{output}: lies in a file, not in a folder; name another --output") from None
    with _locked(partial.with_suffix(".lock"), output):
        _check_free(output)  # another may have written it before we had the lock
        _remove(partial)  # what one left that was killed
        partial.mkdir()
        try:
            yield partial
            sync(partial)
            os.rename(partial, output.resolve())  # takes the place of an empty folder
            sync(partial.parent)
        except BaseException:
            with contextlib.suppress(OSError):  # it is in place by now
                _remove(partial)
            raise


def _check_free(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: exists; delete it, or name another --output")
    if output.resolve() == Path.cwd():
        raise UserError(f"{output}: the folder that you are in cannot be replaced; name another --output")


@contextlib.contextmanager
def _locked(lock: Path, output: Path) -> Iterator[None]:
    """Hold a lock until the block or the process ends, however that ends.

    Its file lies beside the output, not in it: nothing that is published has to be taken away afterwards. A
    run that is killed leaves the file, empty and not locked; the next one takes it, and deletes it.
    """
    descriptor = _lock(lock, output)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.unlink()  # while it is ours: whoever has it open finds that it is gone, and makes a new one
        os.close(descriptor)


def _lock(lock: Path, output: Path) -> int:
    deadline = time.monotonic() + 1  # whom a killed run was just starting may hold it a moment longer
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            raise UserError(f"{output}: another btx is writing it; wait for it, or name another") from None
        except OSError:
            pass  # a file system without locks
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(lock), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Delete a folder with all that is in it, or what else is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_hf(
    folder: Path,
    plan: list[PlannedTensor],
    config: ModelConfig | None,
    tokenizer_files: Mapping[str, bytes],
    effort: Effort,
    progress: Reporter | None,
) -> dict[str, dict[str, Any]]:
    from btx_megatron.checkpoints.huggingface import HuggingFaceLayout

    assert config is not None
    hf = HuggingFaceLayout(folder, {planned.name: planned.info for planned in plan}, config)
    table = stream(plan, hf, effort, progress)
    hf.finish(tokenizer_files, approximations(config))
    return table


def _write_megatron(
    folder: Path,
    to: Format,
    plan: list[PlannedTensor],
    config: ModelConfig | None,
    parallel: Parallel,
    common: Mapping[str, Any],
    effort: Effort,
    progress: Reporter | None,
) -> dict[str, dict[str, Any]]:
    """All but the tracker."""
    tensors = {planned.name: planned.info for planned in plan}
    args = _args(config, rows_in(plan), parallel) if config is not None else None
    if to == "megatron-legacy":
        from btx_megatron.checkpoints.legacy_writer import LegacyLayout

        (folder / RELEASE).mkdir()
        legacy = LegacyLayout(
            folder / RELEASE, tensors, args, parallel.tensor, parallel.pipeline, parallel.expert
        )
        table = stream(plan, legacy, effort, progress)
        legacy.finish()
    else:
        from btx_megatron.checkpoints.megatron_dist import DistLayout

        dist = DistLayout(folder / RELEASE, tensors, _expert_files(tensors, parallel.expert))
        table = stream(plan, dist, effort, progress)
        dist.finish({"iteration": 0, "checkpoint_version": 3.0, **_said_of(config, args, common), **common})
    return table


def _args(config: ModelConfig, rows: int, parallel: Parallel) -> Namespace:
    """Megatron-LM's arguments of the model, and the number that pads its vocabulary to these rows."""
    args = to_args(config, rows)
    args.make_vocab_size_divisible_by = vocabulary_divisor(config, rows, parallel)
    return args


def vocabulary_divisor(config: ModelConfig, rows: int, parallel: Parallel) -> int:
    """The ``--make-vocab-size-divisible-by`` with which Megatron-LM makes the checkpoint's rows."""
    return parallel.vocabulary or divisor(config.vocab_size, rows, parallel.tensor)


def _said_of(config: ModelConfig | None, args: Namespace | None, common: Mapping[str, Any]) -> dict[str, Any]:
    """What a torch_dist checkpoint says of its model: Megatron-LM's arguments, where ours say nothing."""
    if config is None:
        return {}
    if "recipe" in common:
        return {"vocab_size": config.vocab_size} if config.vocab_size else {}
    return {"args": args}


def approximations(config: ModelConfig) -> list[str]:
    """What of a mixture Mixtral cannot say, a line each. Its gates of the chosen experts always sum to 1."""
    differs: list[str] = []
    if config.num_experts is None:  # a dense stage's recipe speaks of the routers of a later one
        return differs
    if config.moe_router_topk == 1 and not config.moe_router_pre_softmax:
        differs.append("moe_router_topk 1 without pre-softmax: the gate is always 1, and no router can learn")
    if config.moe_router_pre_softmax and config.moe_router_topk < config.num_experts:
        differs.append(
            "moe_router_pre_softmax: Mixtral renormalises the gates of the chosen experts, this model "
            "does not"
        )
    return differs + [
        _ROUTER_LIMITS[key].format(value=value) for key, value in config.moe_router if key in _ROUTER_LIMITS
    ]


_ROUTER_LIMITS = {
    "moe_router_type": "moe_router_type {value}: Mixtral takes the best k experts in every layer",
    "moe_expert_capacity_factor": "moe_expert_capacity_factor {value}: Mixtral drops no token",
    "moe_router_logit_norm_scale": "moe_router_logit_norm_scale {value}: Mixtral's logits are not normalised",
    "moe_router_one_per_group": "moe_router_one_per_group: Mixtral's experts have no groups",
    "moe_router_time_mask": "moe_router_time_mask: Mixtral's experts have no time; later ones will answer",
}


def _expert_files(tensors: Mapping[str, TensorInfo], ranks: int) -> Any:
    """Each expert-parallel rank's experts in a file of their own."""
    experts = tensors[ROUTER].shape[1] if ROUTER in tensors else 1
    if ranks > 1 and ROUTER not in tensors:
        raise UserError(
            f"--target-expert-model-parallel-size {ranks}: a dense model has no experts to spread; "
            "leave it out"
        )
    if experts % ranks:
        raise UserError(
            f"--target-expert-model-parallel-size {ranks} must divide the number of experts {experts}"
        )

    def rank_of(name: str, index: Index) -> int:
        return index[1] // (experts // ranks) if has_expert_axis(name) else 0

    return rank_of
