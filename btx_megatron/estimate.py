"""Sizes by closed formulas, before anything is built: parameters and tokens.

Parameter counts are without vocabulary padding, so that they do not depend on how a checkpoint is laid
out and can be compared with a Hugging Face model's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from btx_megatron.errors import UserError
from btx_megatron.recipe import Model, Recipe
from btx_megatron.tokenizer_json import json_vocab_size, tokenizer_json


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of one dense expert, of the MoE, and of the part of the MoE that one token uses."""

    dense: int
    moe_total: int
    moe_active: int


def parameter_counts(model: Model, vocab_size: int, num_experts: int, topk: int) -> ParameterCounts:
    """Count the weights of a Llama-shaped model and of the MoE made of ``num_experts`` of them.

    The router is one linear map hidden -> experts a layer, without bias (paper, section 3.2); all of it
    is active. Of the experts ``topk`` are.
    """
    heads = model.num_attention_heads
    groups = model.num_query_groups or heads
    head_width = model.kv_channels or model.hidden_size // heads
    query_and_output = 2 * model.hidden_size * heads * head_width
    key_and_value = 2 * model.hidden_size * groups * head_width
    norms = 2 * model.hidden_size
    vocabulary_matrices = 2 if model.untie_embeddings_and_output_weights else 1
    shared = vocabulary_matrices * vocab_size * model.hidden_size + model.hidden_size  # + final norm
    shared += model.num_layers * (query_and_output + key_and_value + norms)
    feed_forward = model.num_layers * 3 * model.hidden_size * model.ffn_hidden_size  # gate, up, down
    router = model.num_layers * model.hidden_size * num_experts
    return ParameterCounts(
        dense=shared + feed_forward,
        moe_total=shared + num_experts * feed_forward + router,
        moe_active=shared + topk * feed_forward + router,
    )


def recipe_parameter_counts(recipe: Recipe) -> ParameterCounts:
    """The counts of the models that a recipe makes. Raises UserError as vocab_size does."""
    return parameter_counts(
        recipe.model, vocab_size(recipe), len(recipe.expert_names), recipe.moe.topk(len(recipe.expert_names))
    )


def vocab_size(recipe: Recipe) -> int:
    """Pieces of the tokenizer: read from ``tokenizer_model`` where there is one, else as asked for.

    Raises UserError if the file is missing or is no tokenizer.
    """
    path = recipe.tokenizer.tokenizer_model
    if path is None:
        return recipe.tokenizer.vocab_size
    if recipe.tokenizer.tokenizer_type == "HuggingFaceTokenizer":
        return json_vocab_size(tokenizer_json(path))
    from sentencepiece import SentencePieceProcessor

    try:
        return int(SentencePieceProcessor(model_file=path).vocab_size())
    except (OSError, RuntimeError):
        raise UserError(
            f"tokenizer.tokenizer_model {path}: missing, or not a SentencePiece model; "
            "give its path, or null to train one"
        ) from None


def padded_vocab_size(vocab_size: int, make_vocab_size_divisible_by: int) -> int:
    """Rows of the embedding: ``vocab_size`` rounded up, the same under every layout."""
    return -(-vocab_size // make_vocab_size_divisible_by) * make_vocab_size_divisible_by


def stage_tokens(recipe: Recipe, stage: str) -> int:
    """Tokens that a training stage takes: steps x global batch size x sequence length.

    ``train_iters`` must be known; for ``dense`` see dense_train_iters.
    """
    if stage in recipe.imported_stages:
        return 0
    training = recipe.stage(stage).training
    if training.train_iters is None:
        raise ValueError(f"stages.{stage}.training.train_iters is not resolved")
    return training.train_iters * training.global_batch_size * recipe.model.seq_length


def dense_train_iters(recipe: Recipe) -> int:
    """Steps of ``dense`` for as many tokens as all experts and the MoE stage together, rounded up."""
    stages = [f"expert:{name}" for name in recipe.domain_names] + ["finetune"]
    tokens = sum(stage_tokens(recipe, stage) for stage in stages)
    return math.ceil(tokens / (recipe.stages.dense.training.global_batch_size * recipe.model.seq_length))
