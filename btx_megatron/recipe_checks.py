"""What a recipe's values must satisfy together, checked before anything starts.

A layout that does not divide the model would otherwise fail minutes later, in one rank of many, with a
message about a tensor's shape; some combinations (top-1 with softmax after top-k) would not fail at all.
Each rule below yields messages that name the key, the numbers and what to change. The first one is raised
and ends the check, so a rule may rely on all rules before it (and divide by sizes found positive).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from btx_megatron.errors import UserError
from btx_megatron.estimate import dense_train_iters
from btx_megatron.recipe import SEED, Data, Layout, Model, Recipe, Source, Training

RESERVED_NAMES = (SEED, "mean")
"""``seed`` names an expert of its own, ``mean`` a column of the report."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def check_recipe(recipe: Recipe, where: str) -> None:
    """Raise UserError, naming key, numbers and fix, for the first thing in a recipe that cannot hold.

    ``where`` is the recipe's file, put in front of the message.
    """
    for problem in _problems(recipe):
        raise UserError(f"{where}: {problem}")


def resolve_train_iters(recipe: Recipe) -> None:
    """Fill ``stages.dense.training.train_iters: null``: as many tokens as all experts and the MoE stage.

    Must run after check_recipe, which leaves the stage of a baseline that is not asked for unchecked.
    See estimate.dense_train_iters.
    """
    if "dense" in recipe.baselines and recipe.stages.dense.training.train_iters is None:
        recipe.stages.dense.training.train_iters = dense_train_iters(recipe)


def _problems(recipe: Recipe) -> Iterator[str]:
    if not recipe.run_folder:
        yield "run_folder is empty; name the folder to write to"
    yield from _data_problems(recipe.data)
    yield from _tokenizer_problems(recipe)
    yield from _model_problems(recipe.model)
    yield from _moe_problems(recipe)
    for name in recipe.stages.experts:
        if name not in recipe.domain_names:
            yield (
                f"stages.experts.{name}: no such domain; data.domains has {', '.join(recipe.domain_names)}"
            )
    for name in sorted({name for name in recipe.baselines if recipe.baselines.count(name) > 1}):
        yield f"baselines: '{name}' is given {recipe.baselines.count(name)} times; once is enough"
    for stage in training_stages(recipe):
        yield from _stage_problems(recipe, stage)
        if recipe.stage(stage).training.bf16 != recipe.training.bf16:
            yield (
                f"{stage_key(stage)}.training.bf16 differs from training.bf16: experts are mixed, and models "
                "compared, in one precision; set it for all under training"
            )
    yield from _evaluate_problems(recipe)
    yield from _at_least("launch", recipe.launch, 0, ("max_parallel_experts", "threads_per_rank"))


def training_stages(recipe: Recipe) -> list[str]:
    """The stages that train, in the pipeline's order."""
    experts = [f"expert:{name}" for name in recipe.domain_names]
    return ["seed", *experts, "finetune", *recipe.baselines]


# data, tokenizer


def _data_problems(data: Data) -> Iterator[str]:
    if not data.domains:
        yield "data.domains is empty; give at least one domain, each with name and sources"
    names = [domain.name for domain in data.domains]
    yield from _name_problems("data.domains", names)
    for name in names:
        if name in RESERVED_NAMES:
            yield f"data.domains: the name '{name}' is reserved; call the domain something else"
    for domain in data.domains:
        yield from _source_problems(f"data.domains.{domain.name}.sources", domain.sources)
    if not 0 < data.held_out_fraction < 1:
        yield (
            f"data.held_out_fraction {data.held_out_fraction}: must lie between 0 and 1, both excluded; "
            "0.05 is usual"
        )
    if data.held_out_max_tokens is not None and data.held_out_max_tokens < 1:
        yield f"data.held_out_max_tokens {data.held_out_max_tokens}: must be at least 1, or null for all"
    yield from _at_least("data", data, 0, ("random_seed", "num_workers"))


def _source_problems(where: str, sources: Sequence[Source]) -> Iterator[str]:
    if not sources:
        yield f"{where} is empty; give at least one source with a path"
    yield from _name_problems(where, [source.name for source in sources])
    for source in sources:
        key = f"{where}.{source.name}"
        if not source.path:
            yield f"{key}.path is missing; give a folder, a file, package:NAME, stdlib: or docstrings:NAME"
        if not source.include:
            yield f"{key}.include is empty, so no file would match; leave it out to take all files"
        if source.max_bytes is not None and source.max_bytes < 1:
            yield f"{key}.max_bytes {source.max_bytes}: must be at least 1, or null for all"
    yield from _weight_problems(where, {source.name: source.weight for source in sources}, ".weight")


def _name_problems(where: str, names: list[str]) -> Iterator[str]:
    for name in names:
        if not _NAME.fullmatch(name):
            yield (
                f"{where}: the name '{name}' must be made of letters, digits, '-' and '_' "
                "and start with a letter or digit"
            )
    for name in sorted(set(names)):
        if names.count(name) > 1:
            yield f"{where}: the name '{name}' is given {names.count(name)} times; names must differ"


def _weight_problems(where: str, weights: dict[str, float], suffix: str = "") -> Iterator[str]:
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            yield f"{where}.{name}{suffix} {weight}: a weight is a number that is not negative"
    if weights and not any(weights.values()):
        yield f"{where}: all weights are 0; at least one must be positive"


def _tokenizer_problems(recipe: Recipe) -> Iterator[str]:
    if recipe.tokenizer.tokenizer_model is None:
        yield from _at_least("tokenizer", recipe.tokenizer, 1, ("vocab_size", "training_bytes"))


# model, mixture


def _model_problems(model: Model) -> Iterator[str]:
    counts = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "seq_length")
    yield from _at_least("model", model, 1, (*counts, "make_vocab_size_divisible_by"))
    yield from _positive("model", model, ("rotary_base", "norm_epsilon", "init_method_std"))
    for key in ("attention_dropout", "hidden_dropout"):
        if not 0 <= getattr(model, key) < 1:
            yield f"model.{key} {getattr(model, key)}: a probability, from 0 to below 1"
    heads, groups = model.num_attention_heads, model.num_query_groups
    if groups is not None and (groups < 1 or heads % groups):
        yield (
            f"model.num_query_groups {groups} must divide model.num_attention_heads {heads}; "
            f"possible: {_divisors(heads)}"
        )
    if model.kv_channels is None and model.hidden_size % heads:
        yield (
            f"model.hidden_size {model.hidden_size} is not divisible by model.num_attention_heads "
            f"{heads}; change one of them, or give model.kv_channels"
        )
    width = model.hidden_size // heads if model.kv_channels is None else model.kv_channels
    if width < 2 or width % 2:
        yield (
            f"the width of a head is {width} (model.kv_channels, or hidden_size / num_attention_heads); "
            "rotary embeddings need an even one"
        )


def _moe_problems(recipe: Recipe) -> Iterator[str]:
    moe, experts = recipe.moe, len(recipe.expert_names)
    yield from _at_least("moe", moe, 1, ("moe_router_topk",))
    if moe.moe_router_topk > experts:
        yield (
            f"moe.moe_router_topk {moe.moe_router_topk} is more than the {experts} experts "
            f"({', '.join(recipe.expert_names)}); lower it"
        )
    if moe.moe_router_topk == 1 and not moe.moe_router_pre_softmax:
        yield (
            "moe.moe_router_topk 1 with moe.moe_router_pre_softmax false: the softmax over a single "
            "survivor is always 1, so the router gets no gradient; "
            "set moe_router_pre_softmax: true (Switch) or moe_router_topk >= 2"
        )
    yield from _at_least("moe", moe, 0, ("moe_aux_loss_coeff", "moe_z_loss_coeff"))
    yield from _positive("mix", recipe.mix, ("router_std",))
    yield from _at_least("mix", recipe.mix, 0, ("random_seed",))


# stages


def stage_key(stage: str) -> str:
    """Where a stage stands in the recipe: ``expert:math`` is ``stages.experts.math``."""
    kind, _, domain = stage.partition(":")
    return f"stages.experts.{domain}" if kind == "expert" else f"stages.{kind}"


def _stage_problems(recipe: Recipe, name: str) -> Iterator[str]:
    stage, key, is_moe = recipe.stage(name), stage_key(name), name == "finetune"
    yield from _layout_problems(f"{key}.layout", stage.layout, recipe, is_moe)
    if not is_moe:
        yield from _dense_layout_problems(f"{key}.layout", stage.layout)
    yield from _training_problems(f"{key}.training", stage.training)
    yield from _schedule_problems(f"{key}.training", stage.training, _train_iters(recipe, name))
    per_step = stage.training.micro_batch_size * stage.layout.data_parallel_size
    if stage.training.global_batch_size % per_step:
        yield (
            f"{key}.training.global_batch_size {stage.training.global_batch_size} is not divisible by "
            f"micro_batch_size {stage.training.micro_batch_size} x data_parallel_size "
            f"{stage.layout.data_parallel_size} = {per_step}; make it a multiple of {per_step}"
        )
    for domain in stage.blend:
        if domain not in recipe.domain_names:
            yield (f"{key}.blend.{domain}: no such domain; data.domains has {', '.join(recipe.domain_names)}")
    yield from _weight_problems(f"{key}.blend", stage.blend)


def _train_iters(recipe: Recipe, stage: str) -> int | None:
    iters = recipe.stage(stage).training.train_iters
    return dense_train_iters(recipe) if iters is None and stage == "dense" else iters


def _training_problems(key: str, training: Training) -> Iterator[str]:
    counts = ("micro_batch_size", "global_batch_size", "save_interval", "save_total_limit", "log_interval")
    yield from _at_least(key, training, 1, ("train_iters", *counts))
    yield from _positive(key, training, ("lr", "adam_eps"))
    yield from _at_least(key, training, 0, ("min_lr", "lr_warmup_iters", "weight_decay", "clip_grad", "seed"))
    for beta in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(training, beta) < 1:
            yield f"{key}.{beta} {getattr(training, beta)}: must be at least 0 and below 1"


def _schedule_problems(key: str, training: Training, iters: int | None) -> Iterator[str]:
    if iters is None:
        yield f"{key}.train_iters is missing; give the number of steps"
    elif training.lr_warmup_iters >= iters:
        yield (
            f"{key}.lr_warmup_iters {training.lr_warmup_iters} must be below train_iters {iters}, "
            "or the peak learning rate is never used; lower it"
        )
    if training.min_lr is not None and training.min_lr > training.lr:
        yield f"{key}.min_lr {training.min_lr} is above lr {training.lr}; lower it, or null for a tenth"


def _evaluate_problems(recipe: Recipe) -> Iterator[str]:
    yield from _at_least("evaluate", recipe.evaluate, 1, ("micro_batch_size",))
    yield from _layout_problems("evaluate.layout", recipe.evaluate.layout, recipe, is_moe=True)


# layouts


def _layout_problems(key: str, layout: Layout, recipe: Recipe, is_moe: bool) -> Iterator[str]:
    """Everything that keeps a model of the recipe from lying on a layout. ``key`` names the layout."""
    sizes = [name for name in vars(layout) if name.endswith("_parallel_size")]
    yield from _at_least(key, layout, 1, sizes)
    yield from _tensor_parallel_problems(key, layout, recipe.model)
    if is_moe:
        yield from _expert_parallel_problems(key, layout, recipe)
    pp, layers = layout.pipeline_model_parallel_size, recipe.model.num_layers
    if layers % pp:
        yield f"{key}.pipeline_model_parallel_size {pp} must divide model.num_layers {layers}"
    if layout.overlap_param_gather and not layout.use_distributed_optimizer:
        yield f"{key}.overlap_param_gather needs use_distributed_optimizer: true"
    if layout.overlap_param_gather and not layout.overlap_grad_reduce:
        yield f"{key}.overlap_param_gather needs overlap_grad_reduce: true"


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


def _dense_layout_problems(key: str, layout: Layout) -> Iterator[str]:
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
    if recipe.model.ffn_hidden_size % etp:
        yield (
            f"{key}.expert_tensor_parallel_size {etp} must divide model.ffn_hidden_size "
            f"{recipe.model.ffn_hidden_size}"
        )
    ranks = tp * layout.data_parallel_size
    if ranks % (etp * ep):
        yield (
            f"{key}: tensor_model_parallel_size {tp} x data_parallel_size {layout.data_parallel_size} = "
            f"{ranks} ranks are not divisible by expert_tensor_parallel_size {etp} x "
            f"expert_model_parallel_size {ep} = {etp * ep}; raise data_parallel_size or set "
            "expert_tensor_parallel_size: 1"
        )
    if tp > 1 and not layout.sequence_parallel:
        yield (
            f"{key}.tensor_model_parallel_size {tp}: a mixture of experts under tensor parallelism needs "
            "sequence_parallel: true"
        )


# numbers


def _at_least(key: str, values: object, least: int, names: Sequence[str]) -> Iterator[str]:
    for name in names:
        value = getattr(values, name)
        if value is not None and not value >= least:  # not >=: refuses nan too
            yield f"{key}.{name} {value}: must be at least {least}"


def _positive(key: str, values: object, names: Sequence[str]) -> Iterator[str]:
    for name in names:
        value = getattr(values, name)
        if not (math.isfinite(value) and value > 0):
            yield f"{key}.{name} {value}: must be above 0"


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
