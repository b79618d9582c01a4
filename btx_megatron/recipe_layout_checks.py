"""What a layout must satisfy: its sizes divide the model, and its parts go together.

Rules are written as in recipe_checks: the first problem is raised, and each rule relies on those before it.
"""

from __future__ import annotations

from collections.abc import Iterator

from btx_megatron.recipe import Layout, Model, Recipe
from btx_megatron.recipe_numbers import at_least


def layout_problems(key: str, layout: Layout, recipe: Recipe, is_moe: bool) -> Iterator[str]:
    """Everything that keeps a model of the recipe from lying on a layout. ``key`` names the layout."""
    sizes = [name for name in vars(layout) if name.endswith("_parallel_size")]
    yield from at_least(key, layout, 1, sizes)
    yield from _tensor_parallel_problems(key, layout, recipe.model)
    if is_moe:
        yield from _expert_parallel_problems(key, layout, recipe)
    yield from _context_parallel_problems(key, layout, recipe.model)
    yield from _pipeline_problems(key, layout, recipe.model.num_layers)
    yield from _recompute_problems(key, layout)
    if layout.overlap_param_gather and not layout.use_distributed_optimizer:
        yield f"{key}.overlap_param_gather needs use_distributed_optimizer: true"
    if layout.overlap_param_gather and not layout.overlap_grad_reduce:
        yield f"{key}.overlap_param_gather needs overlap_grad_reduce: true"


def _context_parallel_problems(key: str, layout: Layout, model: Model) -> Iterator[str]:
    cp, tp = layout.context_parallel_size, layout.tensor_model_parallel_size
    if cp == 1:
        return
    if model.seq_length % (2 * cp):
        yield (
            f"{key}.context_parallel_size {cp}: model.seq_length {model.seq_length} is cut into 2 x {cp} "
            f"pieces, and must be a multiple of {2 * cp}"
        )
    if layout.sequence_parallel and model.seq_length // cp % tp:
        yield (
            f"{key}.context_parallel_size {cp}: model.seq_length {model.seq_length} / {cp} must be a "
            f"multiple of tensor_model_parallel_size {tp}, for sequence_parallel cuts it again"
        )


def _pipeline_problems(key: str, layout: Layout, num_layers: int) -> Iterator[str]:
    pp = layout.pipeline_model_parallel_size
    uneven = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
    yield from at_least(key, layout, 1, uneven)
    given = [f"{name} {getattr(layout, name)}" for name in uneven if getattr(layout, name) is not None]
    if given and pp == 1:
        yield f"{key}.{given[0]} needs pipeline_model_parallel_size > 1; leave it out"
    try:
        layers = layout.pipeline_layers(num_layers)
    except ValueError as clash:
        if given:
            yield (
                f"{key}: {' and '.join(given)} do not go with model.num_layers {num_layers} and "
                f"pipeline_model_parallel_size {pp}: {clash}"
            )
        yield f"{key}.pipeline_model_parallel_size {pp} must divide model.num_layers {num_layers}"
        return
    if layout.num_layers_per_virtual_pipeline_stage is not None:
        yield from _interleaving_problems(key, layout, layers[0], bool(given))


def _interleaving_problems(key: str, layout: Layout, layers: int, uneven: bool) -> Iterator[str]:
    """``layers``: of one rank."""
    chunk, key = layout.num_layers_per_virtual_pipeline_stage, f"{key}.num_layers_per_virtual_pipeline_stage"
    assert chunk is not None
    if chunk < 1:
        yield f"{key} {chunk}: must be at least 1, or null for one chunk a rank"
    if layout.pipeline_model_parallel_size == 1:
        yield f"{key} {chunk} needs pipeline_model_parallel_size > 1; set it to null"
    if uneven:
        yield f"{key} {chunk}: an uneven pipeline cannot be interleaved; leave one of the two out"
    if layers % chunk or layers == chunk:
        smaller = ", ".join(str(n) for n in range(1, layers) if layers % n == 0)
        yield (
            f"{key} {chunk} must divide the {layers} layers of a rank into at least 2 chunks; "
            + (f"possible: {smaller}" if smaller else "a single layer cannot be cut, set it to null")
        )


def _recompute_problems(key: str, layout: Layout) -> Iterator[str]:
    granularity, method = layout.recompute_granularity, layout.recompute_method
    layers, modules = layout.recompute_num_layers, layout.recompute_modules
    yield from at_least(key, layout, 1, ("recompute_num_layers",))
    if granularity == "full" and (method is None or layers is None):
        lacking = "recompute_method" if method is None else "recompute_num_layers"
        yield f"{key}.recompute_granularity full needs {lacking}; uniform with 1 keeps each layer's input"
    if granularity != "full" and (method is not None or layers is not None):
        name = "recompute_num_layers" if method is None else "recompute_method"
        yield f"{key}.{name} is for recompute_granularity full, not {granularity or 'null'}; leave it out"
    if granularity != "selective" and modules is not None:
        yield (
            f"{key}.recompute_modules is for recompute_granularity selective, not {granularity or 'null'}; "
            "leave it out"
        )
    if modules is not None and not modules:
        yield f"{key}.recompute_modules is empty; name one, or set recompute_granularity: null"


def _tensor_parallel_problems(key: str, layout: Layout, model: Model) -> Iterator[str]:
    tp = layout.tensor_model_parallel_size
    for name in ("num_attention_heads", "ffn_hidden_size", "make_vocab_size_divisible_by"):
        size = getattr(model, name)
        if size % tp:
            yield f"{key}.tensor_model_parallel_size {tp} must divide model.{name} {size}"
    groups = model.num_query_groups or model.num_attention_heads
    if groups % tp and tp % groups:
        yield (
            f"{key}.tensor_model_parallel_size {tp} must divide model.num_query_groups {groups}, "
            "or be a multiple of it"
        )
    if layout.sequence_parallel and tp == 1:
        yield (
            f"{key}.sequence_parallel true needs tensor_model_parallel_size > 1; there is nothing to cut, "
            "set it to false"
        )
    if layout.sequence_parallel and model.seq_length % tp:
        yield (
            f"{key}.sequence_parallel: tensor_model_parallel_size {tp} must divide model.seq_length "
            f"{model.seq_length}"
        )


def dense_layout_problems(key: str, layout: Layout) -> Iterator[str]:
    """What a stage that trains a dense model cannot do with a layout."""
    for name in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
        if getattr(layout, name) not in (None, 1):
            yield (
                f"{key}.{name} {getattr(layout, name)}: this stage trains a dense model, which has no "
                "experts to share out; set it under stages.finetune.layout alone"
            )


def _expert_parallel_problems(key: str, layout: Layout, recipe: Recipe) -> Iterator[str]:
    tp, ep = layout.tensor_model_parallel_size, layout.expert_model_parallel_size
    etp = layout.expert_tensor_parallel_size or tp
    experts = len(recipe.expert_names)
    if experts % ep:
        yield (
            f"{key}.expert_model_parallel_size {ep} must divide the number of experts {experts} "
            f"({', '.join(recipe.expert_names)})"
        )
    if recipe.expert_ffn_hidden_size % etp:
        cut = f" / mix.chunks {recipe.mix.chunks}" if recipe.mix.chunks > 1 else ""
        yield (
            f"{key}.expert_tensor_parallel_size {etp} must divide model.ffn_hidden_size "
            f"{recipe.model.ffn_hidden_size}{cut}"
        )
    cp = layout.context_parallel_size
    ranks = tp * cp * layout.data_parallel_size
    if ranks % (etp * ep):
        of_cp = f"context_parallel_size {cp} x " if cp > 1 else ""
        yield (
            f"{key}: tensor_model_parallel_size {tp} x {of_cp}data_parallel_size "
            f"{layout.data_parallel_size} = {ranks} ranks are not divisible by expert_tensor_parallel_size "
            f"{etp} x expert_model_parallel_size {ep} = {etp * ep}; raise data_parallel_size or set "
            "expert_tensor_parallel_size: 1"
        )
    if tp > 1 and not layout.sequence_parallel:
        yield (
            f"{key}.tensor_model_parallel_size {tp}: a mixture of experts under tensor parallelism needs "
            "sequence_parallel: true"
        )
