"""The formats: which one lies in a folder, and a checkpoint of any of them written whole or not at all."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from btx_megatron.checkpoints.config import ModelConfig, from_recipe
from btx_megatron.checkpoints.megatron_args import SaysNothing, from_args, to_args
from btx_megatron.checkpoints.names import ROUTER, has_expert_axis
from btx_megatron.checkpoints.pieces import Index, Source, TensorInfo, dtype_name
from btx_megatron.checkpoints.published import published
from btx_megatron.checkpoints.stream import NO_BOUND, Effort, PlannedTensor, Reporter, stream
from btx_megatron.checkpoints.tokenizer_files import FOLDER as TOKENIZER
from btx_megatron.checkpoints.tokenizer_files import write_tokenizer
from btx_megatron.checkpoints.tracker import RELEASE, TRACKER, find_checkpoint, write_tracker
from btx_megatron.checkpoints.vocabulary import EMBEDDING, divisor, fit_vocabulary, rows_in
from btx_megatron.durable import write_durably
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
        with published(output) as partial:
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
