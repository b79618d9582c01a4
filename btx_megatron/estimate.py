"""Sizes by closed formulas, before anything is built: parameters and tokens.

Parameter counts are without vocabulary padding, so that they do not depend on how a checkpoint is laid
out and can be compared with a Hugging Face model's.
"""

from __future__ import annotations

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


def parameter_counts(
    model: Model, vocab_size: int, num_experts: int, topk: float, expert_width: int | None = None
) -> ParameterCounts:
    """Count the weights of a Llama-shaped model and of the MoE of ``num_experts`` experts.

    ``expert_width``: of an expert's feed-forward; None: the model's.

    The router is one linear map hidden -> experts a layer, without bias (paper, section 3.2); all of it
    is active. Of the experts ``topk`` are, on the mean over the layers.
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
    a_unit = model.num_layers * 3 * model.hidden_size  # gate, up, down
    expert = a_unit * (expert_width or model.ffn_hidden_size)
    router = model.num_layers * model.hidden_size * num_experts
    return ParameterCounts(
        dense=shared + a_unit * model.ffn_hidden_size,
        moe_total=shared + num_experts * expert + router,
        moe_active=round(shared + topk * expert + router),
    )


def recipe_parameter_counts(recipe: Recipe, experts: int | None = None) -> ParameterCounts:
    """The counts of the models that a recipe makes. Raises UserError as vocab_size does.

    ``experts``: of the mixture; by default as many as the recipe mixes.
    """
    experts = experts or len(recipe.expert_names)
    topk, width = recipe.moe.mean_topk(experts, recipe.model.num_layers), recipe.expert_ffn_hidden_size
    return parameter_counts(recipe.model, vocab_size(recipe), experts, topk, width)


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
    """Tokens that a training stage takes: steps x global batch size x sequence length; 0 of an imported one.

    ``train_iters`` must be known; for a baseline see matching.matched_train_iters.
    """
    if recipe.stage(stage).pretrained_checkpoint is not None:
        return 0
    training = recipe.stage(stage).training
    if training.train_iters is None:
        raise ValueError(f"stages.{stage}.training.train_iters is not resolved")
    return training.train_iters * step_tokens(recipe, stage)


def step_tokens(recipe: Recipe, stage: str) -> int:
    """Tokens of one step of a training stage."""
    return recipe.stage(stage).training.global_batch_size * recipe.model.seq_length
