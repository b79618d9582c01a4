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
from btx_megatron.matching import matched_train_iters, reference_stages, unresolved_stages
from btx_megatron.methods import has_moe, main_stage, stage_names, training_stages
from btx_megatron.recipe import GROWN_FROM, MATCHED_STAGES, SEED, Data, Model, Recipe, Source, Stage, Training
from btx_megatron.recipe_compare_checks import compare_problems
from btx_megatron.recipe_ensemble_checks import ensemble_problems
from btx_megatron.recipe_gpu_checks import gpu_problems
from btx_megatron.recipe_layout_checks import dense_layout_problems, layout_problems
from btx_megatron.recipe_mask_checks import mask_problems
from btx_megatron.recipe_mix_checks import mix_problems
from btx_megatron.recipe_moe_checks import moe_problems
from btx_megatron.recipe_numbers import at_least, divisors, positive
from btx_megatron.recipe_slurm_checks import slurm_problems
from btx_megatron.recipe_tasks import task_problems

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
    """Fill ``train_iters: null`` of the baselines that are trained: as much as btx takes.

    Must run after check_recipe, which leaves the stage of a baseline that is not asked for unchecked.
    See matching.matched_train_iters.
    """
    for stage in unresolved_stages(recipe):
        recipe.stage(stage).training.train_iters = matched_train_iters(recipe, stage)


def _problems(recipe: Recipe) -> Iterator[str]:
    if not recipe.run_folder:
        yield "run_folder is empty; name the folder to write to"
    if recipe.launch.device == "cpu" and recipe.launch.transformer_impl == "transformer_engine":
        yield "launch.transformer_impl transformer_engine needs GPUs, and launch.device is cpu; leave one out"
    yield from _data_problems(recipe.data)
    yield from _tokenizer_problems(recipe)
    yield from _model_problems(recipe.model)
    yield from mix_problems(recipe)
    if has_moe(recipe):
        yield from moe_problems(recipe)
    with_expert = [domain.name for domain in recipe.data.domains if domain.expert]
    for name in recipe.stages.experts:
        if name not in (*with_expert, *recipe.cluster_names):
            yield f"stages.experts.{name}: no expert of that name; there are {', '.join(with_expert)}"
    for name in sorted({name for name in recipe.baselines if recipe.baselines.count(name) > 1}):
        yield f"baselines: '{name}' is given {recipe.baselines.count(name)} times; once is enough"
    yield from mask_problems(recipe)
    yield from ensemble_problems(recipe)
    if recipe.upcycling_match != "data" and recipe.method != "sparse_upcycling":
        yield "upcycling_match is for method sparse_upcycling; put sparse_upcycling_cm under baselines"
    yield from _import_problems(recipe)
    yield from _reference_problems(recipe)
    for stage in training_stages(recipe):
        yield from _stage_problems(recipe, stage)
        if recipe.stage(stage).training.bf16 != recipe.training.bf16:
            yield (
                f"{stage_key(stage)}.training.bf16 differs from training.bf16: experts are mixed, and models "
                "compared, in one precision; set it for all under training"
            )
    yield from _evaluate_problems(recipe)
    yield from compare_problems(recipe)
    if recipe.export.to and main_stage(recipe) is None:
        yield f"export.to: method {recipe.method} ends with experts apart, not with a model; leave it out"
    yield from at_least("launch", recipe.launch, 0, ("max_parallel_experts", "threads_per_rank"))
    if recipe.launch.peak_tflops is not None:
        yield from positive("launch", recipe.launch, ("peak_tflops",))
    yield from slurm_problems(recipe, [*stage_names(recipe), "evaluate", "report", "export"])


# data, tokenizer


def _data_problems(data: Data) -> Iterator[str]:
    if not data.domains:
        yield "data.domains is empty; give at least one domain, each with name and sources"
    names = [domain.name for domain in data.domains]
    yield from _name_problems("data.domains", names)
    for name in names:
        if name in RESERVED_NAMES:
            yield f"data.domains: the name '{name}' is reserved; call the domain something else"
    if names and not any(domain.expert for domain in data.domains):
        yield "data.domains: none has an expert; set expert: true for one at least"
    for domain in data.domains:
        yield from _source_problems(f"data.domains.{domain.name}.sources", domain.sources)
    if not 0 < data.held_out_fraction < 1:
        yield (
            f"data.held_out_fraction {data.held_out_fraction}: must lie between 0 and 1, both excluded; "
            "0.05 is usual"
        )
    if data.held_out_max_tokens is not None and data.held_out_max_tokens < 1:
        yield f"data.held_out_max_tokens {data.held_out_max_tokens}: must be at least 1, or null for all"
    yield from at_least("data", data, 0, ("random_seed", "num_workers"))


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
    tokenizer = recipe.tokenizer
    hugging_face = tokenizer.tokenizer_type == "HuggingFaceTokenizer"
    if hugging_face and tokenizer.tokenizer_model is None:
        yield (
            "tokenizer.tokenizer_model is missing; a HuggingFaceTokenizer is not trained here, name a "
            "tokenizer.json or a folder that has one"
        )
    if not hugging_face and (tokenizer.tokenizer_model or "").endswith(".json"):
        yield (
            f"tokenizer.tokenizer_model {tokenizer.tokenizer_model}: is no SentencePiece model; set "
            "tokenizer.tokenizer_type: HuggingFaceTokenizer"
        )
    if not hugging_face and tokenizer.eod_token is not None:
        yield "tokenizer.eod_token: a SentencePieceTokenizer ends documents with its eos; leave it out"
    if tokenizer.tokenizer_model is None:
        yield from at_least("tokenizer", tokenizer, 1, ("vocab_size", "training_bytes"))


# model, mixture


def _model_problems(model: Model) -> Iterator[str]:
    counts = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "seq_length")
    yield from at_least("model", model, 1, (*counts, "make_vocab_size_divisible_by"))
    yield from positive("model", model, ("rotary_base", "norm_epsilon", "init_method_std"))
    for key in ("attention_dropout", "hidden_dropout"):
        if not 0 <= getattr(model, key) < 1:
            yield f"model.{key} {getattr(model, key)}: a probability, from 0 to below 1"
    heads, groups = model.num_attention_heads, model.num_query_groups
    if groups is not None and (groups < 1 or heads % groups):
        yield (
            f"model.num_query_groups {groups} must divide model.num_attention_heads {heads}; "
            f"possible: {divisors(heads)}"
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


# stages


def _import_problems(recipe: Recipe) -> Iterator[str]:
    for name in ("finetune", *MATCHED_STAGES):
        if recipe.stage(name).pretrained_checkpoint is not None:
            yield (
                f"stages.{name}.pretrained_checkpoint: only stages.seed and stages.experts are imported; "
                "leave it out"
            )
    if recipe.imported_stages and recipe.tokenizer.tokenizer_model is None:
        yield (
            f"tokenizer.tokenizer_model is missing; {stage_key(recipe.imported_stages[0])} is a checkpoint, "
            "name the tokenizer that it was trained with"
        )


def _reference_problems(recipe: Recipe) -> Iterator[str]:
    """A baseline is matched to the stages of btx, which the recipe's method may not have."""
    for baseline in unresolved_stages(recipe):
        for name in reference_stages(recipe):
            stage, key = recipe.stage(name), stage_key(name)
            if name in training_stages(recipe) or stage.pretrained_checkpoint is not None:
                continue
            yield from at_least(f"{key}.training", stage.training, 1, ("train_iters", "global_batch_size"))
            if stage.training.train_iters is None:
                yield (
                    f"{key}.training.train_iters is missing; {baseline} trains as long as btx would: "
                    f"give it, or {stage_key(baseline)}.training.train_iters"
                )


def stage_key(stage: str) -> str:
    """Where a stage stands in the recipe: ``expert:math`` is ``stages.experts.math``."""
    kind, _, domain = stage.partition(":")
    return f"stages.experts.{domain}" if kind == "expert" else f"stages.{kind}"


def import_key(stage: str) -> str:
    """Where the checkpoint of an imported stage is named."""
    return "mix.grow_from" if stage == GROWN_FROM else f"{stage_key(stage)}.pretrained_checkpoint"


def _stage_problems(recipe: Recipe, name: str) -> Iterator[str]:
    stage, key, is_moe = recipe.stage(name), stage_key(name), recipe.num_experts(name) is not None
    yield from layout_problems(f"{key}.layout", stage.layout, recipe, is_moe)
    if not is_moe:
        yield from dense_layout_problems(f"{key}.layout", stage.layout)
    yield from _training_problems(f"{key}.training", stage.training)
    yield from _freeze_problems(f"{key}.training.freeze", name, stage.training.freeze, is_moe)
    yield from _schedule_problems(f"{key}.training", stage.training, _train_iters(recipe, name))
    per_step = stage.training.micro_batch_size * stage.layout.data_parallel_size
    if stage.training.global_batch_size % per_step:
        yield (
            f"{key}.training.global_batch_size {stage.training.global_batch_size} is not divisible by "
            f"micro_batch_size {stage.training.micro_batch_size} x data_parallel_size "
            f"{stage.layout.data_parallel_size} = {per_step}; make it a multiple of {per_step}"
        )
    yield from _micro_batch_problems(f"{key}", stage)
    for domain in stage.blend:
        if domain not in recipe.domain_names:
            yield (f"{key}.blend.{domain}: no such domain; data.domains has {', '.join(recipe.domain_names)}")
    yield from _weight_problems(f"{key}.blend", stage.blend)
    yield from gpu_problems(key, stage, recipe, is_moe)


def _train_iters(recipe: Recipe, stage: str) -> int | None:
    iters = recipe.stage(stage).training.train_iters
    matched = iters is None and stage in MATCHED_STAGES
    return matched_train_iters(recipe, stage) if matched else iters


def _training_problems(key: str, training: Training) -> Iterator[str]:
    counts = ("micro_batch_size", "global_batch_size", "save_interval", "save_total_limit", "log_interval")
    yield from at_least(key, training, 1, ("train_iters", *counts, "save_retain_interval"))
    yield from positive(key, training, ("lr", "adam_eps", "distributed_timeout_minutes"))
    yield from at_least(key, training, 0, ("min_lr", "lr_warmup_iters", "weight_decay", "clip_grad", "seed"))
    yield from at_least(key, training, 0, ("max_consecutive_skipped_steps",))
    yield from at_least(key, training, 1, ("loss_spike_factor",))
    for beta in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(training, beta) < 1:
            yield f"{key}.{beta} {getattr(training, beta)}: must be at least 0 and below 1"


def _micro_batch_problems(key: str, stage: Stage) -> Iterator[str]:
    """An interleaved pipeline takes micro-batches in groups of as many as it has ranks."""
    layout, training = stage.layout, stage.training
    pp = layout.pipeline_model_parallel_size
    count = training.global_batch_size // (training.micro_batch_size * layout.data_parallel_size)
    if layout.num_layers_per_virtual_pipeline_stage is not None and count % pp:
        yield (
            f"{key}.layout.num_layers_per_virtual_pipeline_stage: a rank's {count} micro-batches a step "
            f"(global_batch_size {training.global_batch_size} / micro_batch_size {training.micro_batch_size}"
            f" / data_parallel_size {layout.data_parallel_size}) are not divisible by "
            f"pipeline_model_parallel_size {pp}; change one of them"
        )


def _freeze_problems(key: str, stage: str, frozen: Sequence[str], is_moe: bool) -> Iterator[str]:
    for part in sorted({part for part in frozen if list(frozen).count(part) > 1}):
        yield f"{key}: '{part}' is given {list(frozen).count(part)} times; once is enough"
    if len(set(frozen)) == 3:
        yield f"{key} [{', '.join(frozen)}]: nothing would be left to train; leave one out"
    if stage == "seed" and frozen:
        yield f"{key} [{', '.join(frozen)}]: the seed is trained from random weights, none of which can stay"
    if not is_moe and "router" in frozen:
        yield f"{key}: this stage trains a dense model, which has no router; set it under stages.finetune"
    if not is_moe and "experts" in frozen:
        yield (
            f"{key}: this stage trains a dense model, whose feed-forwards are what becomes an expert; "
            "freeze experts under stages.finetune alone"
        )


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
    yield from at_least("evaluate", recipe.evaluate, 1, ("micro_batch_size",))
    yield from task_problems(recipe.evaluate.tasks, recipe.model.seq_length, recipe.moe.moe_router_time_mask)
    yield from layout_problems("evaluate.layout", recipe.evaluate.layout, recipe, has_moe(recipe))
    cp = recipe.evaluate.layout.context_parallel_size
    if cp > 1:
        yield (
            f"evaluate.layout.context_parallel_size {cp}: held-out losses are computed over whole sequences; "
            "set it to 1 (data_parallel_size shares the windows out)"
        )
