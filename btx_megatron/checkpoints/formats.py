"""The formats: which one lies in a folder, and a checkpoint of any of them written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
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
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: exists; delete it, or name another --output")
    partial = output.with_name(f".{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # left by one that was killed
        partial.mkdir()
        table = _write(
            partial, to, plan, config, parallel, common or {}, tokenizer_files or [], effort, progress
        )
        if manifest is not None:
            write_durably(partial / MANIFEST_FILE, manifest(table))
        sync(partial)
        if output.exists():
            output.rmdir()
        os.rename(partial, output)
        sync(output.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StageFailed(
            f"{output}: {error.strerror}; nothing is left of it: mend that, and run it again"
        ) from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return table


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
