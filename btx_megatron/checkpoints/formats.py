"""The formats: which one lies in a folder, and a checkpoint of any of them written whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from btx_megatron.checkpoints.config import ModelConfig, from_args, from_recipe, to_args
from btx_megatron.checkpoints.names import ROUTER, has_expert_axis
from btx_megatron.checkpoints.pieces import Index, Source, TensorInfo
from btx_megatron.checkpoints.stream import NO_BOUND, Effort, PlannedTensor, Reporter, stream
from btx_megatron.checkpoints.tracker import RELEASE, TRACKER, find_checkpoint, write_tracker
from btx_megatron.durable import sync, write_durably
from btx_megatron.errors import StageFailed, UserError
from btx_megatron.manifest import MANIFEST_FILE

Format = Literal["hf", "megatron", "megatron-legacy"]
FORMATS: tuple[Format, ...] = ("hf", "megatron", "megatron-legacy")

_LOCK = ".lock"


@dataclass(frozen=True)
class Parallel:
    """How a Megatron checkpoint is cut: legacy files by all three, torch_dist's experts by the last."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1


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
    """The model of a checkpoint, by what its format keeps of it. Raises UserError where nothing is kept."""
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
        raise UserError(
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
    tokenizer_files: list[Path] | None = None,
    effort: Effort = NO_BOUND,
    progress: Reporter | None = None,
    manifest: Callable[[dict[str, dict[str, Any]]], str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Make the plan's weights and write them as a checkpoint in ``output``; returns their table.

    ``config`` may be None for ``to="megatron"`` alone, whose files say nothing of the model then.
    ``manifest`` makes the text of ``manifest.json`` from the table. Everything is written under a name
    beside ``output`` and renamed at the end: under its own name a checkpoint is whole. Raises UserError if
    there is something in ``output`` or a source is damaged, StageFailed if the disk is full.
    """
    try:
        with _published(output) as partial:
            table = _write(
                partial, to, plan, config, parallel, common or {}, tokenizer_files or [], effort, progress
            )
            if manifest is not None:
                write_durably(partial / MANIFEST_FILE, manifest(table))
    except OSError as error:
        raise StageFailed(
            f"{output}: {error.strerror}; nothing is left of it: mend that, and run it again"
        ) from None
    return table


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
    lock = _locked(partial, output)
    try:
        _check_free(output)  # another may have written it before we had the lock
        _clear(partial)  # what one left that was killed
        yield partial
        sync(partial)
        os.rename(partial, output.resolve())  # takes the place of an empty folder
        (output / _LOCK).unlink()
        sync(output)
        sync(partial.parent)
    except BaseException:
        with contextlib.suppress(OSError):  # a folder that is in place by now, or another's
            _clear(partial)
            (partial / _LOCK).unlink()  # last: as long as it is there nobody else is here
            partial.rmdir()
        raise
    finally:
        os.close(lock)


def _check_free(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: exists; delete it, or name another --output")
    if output.resolve() == Path.cwd():
        raise UserError(f"{output}: the folder that you are in cannot be replaced; name another --output")


def _locked(partial: Path, output: Path) -> int:
    """Make the folder and lock a file in it, until that is closed or the process ends, however it ends."""
    while True:
        partial.mkdir(exist_ok=True)
        try:
            descriptor = os.open(partial / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another has just finished or given up: with it went its folder
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(f"{output}: another btx is writing it; wait for it, or name another") from None
        except OSError:
            pass  # a file system without locks
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(partial / _LOCK), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)


def _clear(partial: Path) -> None:
    """Delete all but the lock."""
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


def _write(
    folder: Path,
    to: Format,
    plan: list[PlannedTensor],
    config: ModelConfig | None,
    parallel: Parallel,
    common: Mapping[str, Any],
    tokenizer_files: list[Path],
    effort: Effort,
    progress: Reporter | None,
) -> dict[str, dict[str, Any]]:
    tensors = {planned.name: planned.info for planned in plan}
    if to == "hf":
        from btx_megatron.checkpoints.huggingface import HuggingFaceLayout

        assert config is not None
        _refuse_what_mixtral_cannot_say(config)
        hf = HuggingFaceLayout(folder, tensors, config)
        table = stream(plan, hf, effort, progress)
        hf.finish(tokenizer_files)
        return table
    padded = tensors["embedding.word_embeddings.weight"].shape[0]
    if to == "megatron-legacy":
        from btx_megatron.checkpoints.legacy_writer import LegacyLayout

        assert config is not None
        args = to_args(config, padded)
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
        dist.finish({"iteration": 0, "checkpoint_version": 3.0, **_said_of(config, padded, common), **common})
    write_tracker(folder, RELEASE)
    return table


def _said_of(config: ModelConfig | None, padded: int, common: Mapping[str, Any]) -> dict[str, Any]:
    """What a torch_dist checkpoint says of its model: Megatron-LM's arguments, where ours say nothing."""
    if config is None:
        return {}
    if "recipe" in common:
        return {"vocab_size": config.vocab_size} if config.vocab_size else {}
    return {"args": to_args(config, padded)}


def _refuse_what_mixtral_cannot_say(config: ModelConfig) -> None:
    if config.num_experts is None:  # a dense stage's recipe speaks of the routers of a later one
        return
    if config.moe_router_topk == 1 and not config.moe_router_pre_softmax:
        raise UserError("moe_router_topk 1 without pre-softmax has a constant gate; it cannot be exported")
    if config.moe_router_pre_softmax:
        raise UserError(
            "moe_router_pre_softmax: Mixtral renormalises the gates of the chosen experts, this model does "
            "not; train with moe_router_pre_softmax: false to export it"
        )


def _expert_files(tensors: Mapping[str, TensorInfo], ranks: int) -> Any:
    """Each expert-parallel rank's experts in a file of their own."""
    counts = {info.shape[1] for name, info in tensors.items() if has_expert_axis(name)}
    experts = counts.pop() if counts else 1
    if experts % ranks:
        raise UserError(
            f"--target-expert-model-parallel-size {ranks} must divide the number of experts {experts}"
        )

    def rank_of(name: str, index: Index) -> int:
        return index[1] // (experts // ranks) if has_expert_axis(name) else 0

    return rank_of
