"""What a checkpoint is, by its headers and by what lies beside it: nothing of its weights is read."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from btx_megatron.checkpoints.config import ModelConfig
from btx_megatron.checkpoints.formats import Format, config_of, format_of
from btx_megatron.checkpoints.names import has_expert_axis
from btx_megatron.checkpoints.pieces import Source, TensorInfo, dtype_name
from btx_megatron.checkpoints.tokenizer_files import JSON, MODEL, find_tokenizer
from btx_megatron.checkpoints.weights_manifest import manifest_of_weights
from btx_megatron.errors import UserError

_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True)
class Facts:
    """What a checkpoint is, by its headers."""

    path: str
    format: Format
    model: ModelConfig | None
    """None where it does not say what model it is."""
    dtype: str
    parameters: int
    """Without padding of the vocabulary, where its size is known."""
    active_parameters: int
    """Those that a token meets; of a dense model all."""
    bytes: int
    """Of its weights as stored, padding too."""
    tokenizer: dict[str, str]
    """SHA-256 in hex, by file."""
    came_from: dict[str, str]
    """What its manifest, or its recipe, says of how it was made."""


def facts_of(path: Path, source: Source) -> tuple[Facts, list[str]]:
    """A checkpoint's facts, and warnings of what could not be read of them."""
    config, came_from, warnings = _config(source), {}, []
    try:
        came_from = _came_from(source)
    except UserError as error:
        warnings.append(str(error))
    sizes = {name: _parameters(name, info, config) for name, info in source.tensors.items()}
    inactive = 0
    if config is not None and config.num_experts:
        experts = sum(size for name, size in sizes.items() if has_expert_axis(name))
        inactive = experts - experts * config.moe_router_topk // config.num_experts
    facts = Facts(
        path=str(path),
        format=format_of(path),
        model=config,
        dtype="+".join(sorted({dtype_name(info.dtype) for info in source.tensors.values()})),
        parameters=sum(sizes.values()),
        active_parameters=sum(sizes.values()) - inactive,
        bytes=sum(_bytes(info) for info in source.tensors.values()),
        tokenizer=_tokenizer(source),
        came_from=came_from,
    )
    return facts, warnings


def _config(source: Source) -> ModelConfig | None:
    try:
        return config_of(source)
    except UserError:
        return None


def _parameters(name: str, info: TensorInfo, config: ModelConfig | None) -> int:
    shape = info.shape
    if name in _VOCABULARY and config is not None and config.vocab_size:
        shape = (min(shape[0], config.vocab_size), *shape[1:])
    return math.prod(shape)


def _bytes(info: TensorInfo) -> int:
    return math.prod(info.shape) * info.dtype.itemsize


def _tokenizer(source: Source) -> dict[str, str]:
    """The files that say which word has which number, and their SHA-256."""
    return {
        name: hashlib.sha256(content).hexdigest()
        for name, content in find_tokenizer(source.folder).files.items()
        if name in (JSON, MODEL)
    }


def _came_from(source: Source) -> dict[str, str]:
    found: dict[str, str] = {}
    common = getattr(source, "common", None)
    if isinstance(common, Mapping) and isinstance(recipe := common.get("recipe"), Mapping):
        found["recipe"] = str(recipe.get("name"))
    manifest = manifest_of_weights(source.folder)
    if manifest is not None:
        found |= {"stage": manifest.stage, "created": manifest.created}
        if isinstance(name := manifest.recipe.get("name"), str):
            found["recipe"] = name
        if isinstance(sources := manifest.recipe.get("sources"), Mapping):
            found["sources"] = ", ".join(f"{name}={where}" for name, where in sources.items())
        if manifest.tokens is not None:
            found["tokens"] = str(manifest.tokens)
        if manifest.code_commit:
            found["code_commit"] = manifest.code_commit
    return found
