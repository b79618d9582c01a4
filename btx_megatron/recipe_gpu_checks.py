"""What FP8 and the other things that need a GPU ask of a recipe.

Whether the machine has what they need is another question, which is asked where a stage is started
(``launch.machine``) and by its ranks (``model.implementation``): recipes are planned and submitted elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator

from btx_megatron.recipe import Recipe, Stage, Training
from btx_megatron.recipe_numbers import at_least

FP8_ALIGNMENT = 16
"""Sides of a matrix that is multiplied in FP8 are multiples of this (cuBLAS)."""


def needs_transformer_engine(stage: Stage) -> Iterator[str]:
    """Keys of a stage that ask for Transformer Engine, and so for a GPU, with their values."""
    training, layout = stage.training, stage.layout
    if training.fp8 is not None:
        yield f"training.fp8 {training.fp8} ({needed_capability(training)})"
    if training.cuda_graph_impl != "none":
        yield f"training.cuda_graph_impl {training.cuda_graph_impl}"
    if "layernorm" in (layout.recompute_modules or []):
        yield "layout.recompute_modules layernorm"


def gpu_problems(key: str, stage: Stage, recipe: Recipe, is_moe: bool) -> Iterator[str]:
    """What a stage cannot do; ``key`` names it."""
    training, layout = stage.training, stage.layout
    for asked in needs_transformer_engine(stage):
        if recipe.launch.device == "cpu":
            yield f"{key}.{asked} needs a GPU, and launch.device is cpu; leave one of the two out"
        if recipe.launch.transformer_impl == "local":
            yield f"{key}.{asked} needs Transformer Engine, but launch.transformer_impl is local; drop one"
    if training.cuda_graph_impl != "none" and layout.recompute_granularity == "full":
        yield (
            f"{key}.training.cuda_graph_impl {training.cuda_graph_impl}: a graph cannot hold layers that are "
            "recomputed in full; set layout.recompute_granularity to selective or null"
        )
    if training.cuda_graph_impl != "none" and is_moe:
        yield (
            f"{key}.training.cuda_graph_impl {training.cuda_graph_impl}: a graph cannot hold a mixture: its "
            "experts get another number of tokens in every step; set it for dense stages alone"
        )
    yield from at_least(f"{key}.training", training, 1, ("fp8_amax_history_len",))
    if training.fp8 is None:
        yield from _needless_problems(f"{key}.training", training)
    else:
        yield from _fp8_problems(key, stage, recipe, is_moe)


def _needless_problems(key: str, training: Training) -> Iterator[str]:
    """Keys that would change nothing without FP8."""
    if training.fp8_param_gather:
        yield f"{key}.fp8_param_gather needs fp8; set it to hybrid or e4m3"
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        if getattr(training, name):
            yield f"{key}.{name} {getattr(training, name)} needs fp8; without it all layers are alike"


def _fp8_problems(key: str, stage: Stage, recipe: Recipe, is_moe: bool) -> Iterator[str]:
    training, layout = stage.training, stage.layout
    if not training.bf16:
        yield f"{key}.training.fp8 {training.fp8} needs bf16: true, for what is no matrix product of a layer"
    if training.fp8_param_gather and not layout.use_distributed_optimizer:
        yield f"{key}.training.fp8_param_gather needs layout.use_distributed_optimizer: true"
    if training.fp8_recipe == "delayed" and "layernorm" in (layout.recompute_modules or []):
        yield (
            f"{key}.layout.recompute_modules layernorm does not go with fp8_recipe delayed; "
            "set fp8_recipe: tensorwise, or leave it out"
        )
    yield from _layer_problems(f"{key}.training", stage, recipe.model.num_layers)
    yield from _size_problems(key, stage, recipe, is_moe)


def needed_capability(training: Training) -> str:
    """Which GPUs can compute in the stage's FP8, in words."""
    major, minor = minimum_capability(training)
    return f"compute capability {major}.{minor}: {'Hopper' if minor == 0 else 'Ada, Hopper'} or later"


def minimum_capability(training: Training) -> tuple[int, int]:
    """The least compute capability for the stage's FP8."""
    return (9, 0) if training.fp8_recipe == "blockwise" else (8, 9)


def _layer_problems(key: str, stage: Stage, num_layers: int) -> Iterator[str]:
    training = stage.training
    limit = num_layers // stage.layout.pipeline_model_parallel_size
    names = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
    yield from at_least(key, training, 0, names)
    for name in names:
        number = getattr(training, name)
        if number and training.fp8_recipe == "delayed":
            yield f"{key}.{name} {number} does not go with fp8_recipe delayed; set tensorwise or blockwise"
        if number > limit:
            yield f"{key}.{name} {number}: at most the {limit} layers of a pipeline rank; lower it"


def _size_problems(key: str, stage: Stage, recipe: Recipe, is_moe: bool) -> Iterator[str]:
    """Sizes that are cut over TP and do not come out as multiples of the alignment."""
    model, layout, training = recipe.model, stage.layout, stage.training
    tp = layout.tensor_model_parallel_size
    ffn, cut = model.ffn_hidden_size, tp
    if is_moe:
        ffn, cut = recipe.expert_ffn_hidden_size, layout.expert_tensor_parallel_size or tp
    heads = model.num_attention_heads * (model.kv_channels or model.hidden_size // model.num_attention_heads)
    tokens = model.seq_length * training.micro_batch_size // layout.context_parallel_size
    sizes = {
        "model.hidden_size": (model.hidden_size, 1),
        "the feed-forward's size (model.ffn_hidden_size, mix.chunks)": (ffn, cut),
        "attention heads x kv_channels": (heads, tp),
        "tokens of a micro-batch": (tokens, tp if layout.sequence_parallel else 1),
    }
    for name, (size, over) in sizes.items():
        if (size // over) % FP8_ALIGNMENT:
            share = f" / {over} ranks" if over > 1 else ""
            yield (
                f"{key}.training.fp8 {training.fp8}: {name} {size}{share} is not a multiple of "
                f"{FP8_ALIGNMENT}, which FP8 needs; change it, or leave fp8 out"
            )
