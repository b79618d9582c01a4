"""A stage that is imported and not trained: a checkpoint of any format in the place of the seed or an expert,
or a mixture that is grown.

The weights are taken as they are, in the type that the run trains in. Its model must be the recipe's: one
that differs in RoPE or an epsilon loads without a word and is another model.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from btx_megatron.checkpoints.config import ModelConfig, from_recipe
from btx_megatron.checkpoints.formats import config_of, open_checkpoint, write_checkpoint
from btx_megatron.checkpoints.pieces import dtype_name
from btx_megatron.checkpoints.stream import PlannedTensor, Reporter, Watched, copy_plan
from btx_megatron.checkpoints.tokenizer_files import JSON, MODEL, find_tokenizer
from btx_megatron.checkpoints.vocabulary import EMBEDDING, VOCABULARY, divisor, pad_rows, rows_in
from btx_megatron.errors import UserError
from btx_megatron.estimate import padded_vocab_size, vocab_size
from btx_megatron.mixing.grow import count_experts
from btx_megatron.recipe import GROWN_FROM, Recipe
from btx_megatron.recipe_checks import import_key
from btx_megatron.recipe_file import recipe_to_dict
from btx_megatron.tokenizer_json import json_vocabulary, tokenizer_json, tokens_in

_KEYS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "rotary_base", "norm_epsilon",
)  # fmt: skip


def check_pretrained(recipe: Recipe) -> None:
    """Raise UserError where a checkpoint that the recipe imports has not the recipe's model or tokenizer."""
    tokens = vocab_size(recipe)
    padded = padded_vocab_size(tokens, recipe.model.make_vocab_size_divisible_by)
    for stage in recipe.imported_stages:
        source, _ = _open(recipe, stage)
        _check_tokenizer(source, recipe, stage)
        _check_rows(source, tokens, padded)


def import_checkpoint(
    recipe: Recipe, stage: str, vocabulary: dict[str, int], output: Path, progress: Reporter | None = None
) -> dict[str, Any]:
    """Write a stage's pretrained checkpoint as the stage's own; returns the manifest's ``outputs``.

    ``vocabulary``: ``vocab_size`` and ``padded_vocab_size`` of the prepared data; missing rows are zeros.
    Raises UserError where model or vocabulary do not fit.
    """
    source, config = _open(recipe, stage)
    dtype = torch.bfloat16 if recipe.stage(stage).training.bf16 else torch.float32
    plan = _of_vocabulary(copy_plan(source), source, vocabulary)
    rounded = {tensor.info.dtype for tensor in plan if torch.promote_types(tensor.info.dtype, dtype) != dtype}
    for wide in rounded:  # as was asked for with bf16; but then it is not bit for bit
        print(
            f"{source.folder}: {dtype_name(wide)} is rounded to {dtype_name(dtype)}, the run's type",
            flush=True,
        )
    plan = [_as(tensor, dtype) for tensor in plan]
    common = {"recipe": recipe_to_dict(recipe)}
    config = replace(config, vocab_size=vocabulary["vocab_size"])
    table = write_checkpoint(output, "megatron", plan, config, common=common, progress=progress)
    return {"tensors": table, "imported": source.fingerprint()}


def _open(recipe: Recipe, stage: str) -> tuple[Watched, ModelConfig]:
    key, path = import_key(stage), recipe.stage(stage).pretrained_checkpoint
    assert path is not None
    try:
        source = Watched(open_checkpoint(Path(path)))
        config = config_of(source.source)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    if stage == GROWN_FROM:
        _check_mixture(source, recipe)
    elif config.num_experts is not None:
        raise UserError(f"{key} {path}: a mixture of experts; the seed and experts are dense models")
    changes = model_changes(config, recipe)
    if changes:
        raise UserError(f"{key} {path}: is another model than the recipe's; set {' '.join(changes)}")
    return source, config


def _check_mixture(source: Watched, recipe: Recipe) -> None:
    try:
        experts = count_experts(source)
    except UserError as error:
        raise UserError(f"{import_key(GROWN_FROM)}: {error}") from None
    names = recipe.mix.grow_experts
    if experts != len(names):
        raise UserError(
            f"{import_key(GROWN_FROM)} {source.folder}: has {experts} experts, and mix.grow_experts names "
            f"{len(names)} ({', '.join(names)}); name them all, in the order of its router's rows"
        )


def model_changes(config: ModelConfig, recipe: Recipe) -> list[str]:
    """The overrides of ``model`` that describe a checkpoint. Raises UserError for an unknown RoPE scaling."""
    mine = from_recipe(recipe_to_dict(recipe), None, None)
    changes = [
        f"model.{key}={getattr(config, key)}"
        for key in _KEYS
        if not math.isclose(getattr(config, key), getattr(mine, key), rel_tol=1e-6)  # 1e-5 in fp32 is 1e-5
    ]
    if config.tied != mine.tied:
        changes.append(f"model.untie_embeddings_and_output_weights={str(not config.tied).lower()}")
    if config.rope_scaling != mine.rope_scaling:
        factor = config.rope_scaling_factor()
        changes.append(f"model.use_rope_scaling={str(factor is not None).lower()}")
        changes += [f"model.rope_scaling_factor={factor}"] if factor is not None else []
    if mine.seq_length > config.seq_length:
        changes.append(f"model.seq_length={config.seq_length}")
    return changes


def _check_tokenizer(source: Watched, recipe: Recipe, stage: str) -> None:
    """Numbers of another tokenizer are rows of another's words: no loss says so, it is only high."""
    wanted = Path(recipe.tokenizer.tokenizer_model or "")
    hugging_face = recipe.tokenizer.tokenizer_type == "HuggingFaceTokenizer"
    found = find_tokenizer(source.folder).files.get(JSON if hugging_face else MODEL)
    if found is None:
        return
    if hugging_face:
        file = tokenizer_json(wanted)
        same = tokens_in(found, source.folder / JSON) == json_vocabulary(file)
    else:
        same = found == wanted.read_bytes()
    if not same:
        raise UserError(
            f"{import_key(stage)} {source.folder}: was trained with another "
            f"tokenizer than tokenizer.tokenizer_model {wanted}; name the checkpoint's own"
        )


def _of_vocabulary(
    plan: list[PlannedTensor], source: Watched, vocabulary: dict[str, int]
) -> list[PlannedTensor]:
    """The plan with as many rows as every model of the run has."""
    there, padded = rows_in(plan), vocabulary["padded_vocab_size"]
    _check_rows(source, vocabulary["vocab_size"], padded)
    return [
        pad_rows(tensor, padded) if tensor.name in VOCABULARY and there < padded else tensor
        for tensor in plan
    ]


def _check_rows(source: Watched, tokens: int, padded: int) -> None:
    there = source.tensors[EMBEDDING].shape[0]
    if there < tokens:
        raise UserError(
            f"{source.folder}: has rows for {there} tokens, and the tokenizer {tokens} tokens; name the "
            "checkpoint's own tokenizer with tokenizer.tokenizer_model"
        )
    if there > padded:
        raise UserError(
            f"{source.folder}: has {there} rows in its vocabulary, and the run's models {padded}; set "
            f"model.make_vocab_size_divisible_by={divisor(tokens, there)}"
        )


def _as(tensor: PlannedTensor, dtype: torch.dtype) -> PlannedTensor:
    rule = tensor.rule if tensor.info.dtype == dtype else f"{tensor.rule} as {dtype_name(dtype)}"
    return replace(tensor, info=replace(tensor.info, dtype=dtype), rule=rule)
