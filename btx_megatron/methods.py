"""Which stages each method has, by name; pipeline.py says what they read, rows what is compared.

method            stages after prepare and seed                    ends with
btx               experts, mix, average, finetune                  finetune
  with grow_from  grown_from, new experts, mix, finetune           finetune
sparse_upcycling  upcycle, sparse_upcycling_dm or ..._cm           that
dense             dense                                            dense
btm, timoe        experts, average                                 the experts
cbtm              cluster (before the seed), experts, average      the experts

and then the baselines. A baseline is the same stage, under the same name, beside btx and as a method of its
own, so that the two can be compared and neither needs rules of its own.
"""

from __future__ import annotations

from btx_megatron.recipe import GROWN_FROM, MATCHED_STAGES, Recipe

_NOT_TRAINED = ("prepare", "cluster", "mix", "average", "upcycle")


def main_stage(recipe: Recipe) -> str | None:
    """The training stage that ends the method; None where the experts are the end."""
    upcycling = {"data": "sparse_upcycling_dm", "compute": "sparse_upcycling_cm"}[recipe.upcycling_match]
    ends = {"btx": "finetune", "dense": "dense", "sparse_upcycling": upcycling}
    return ends.get(recipe.method)


def baseline_stages(recipe: Recipe) -> list[str]:
    """The baselines that are trained beside the method, which may be one of them itself."""
    return [name for name in recipe.baselines if name not in ("btm", main_stage(recipe))]


def stage_names(recipe: Recipe) -> list[str]:
    """All stages before the evaluation, each after those that it reads."""
    main = main_stage(recipe)
    grown_from = [GROWN_FROM] if recipe.mix.grow_from else []
    average = [] if grown_from else ["average"]  # of the old experts' models, which are not there any more
    after_experts = {"finetune": ["mix", *average, "finetune"], None: ["average"]}.get(main, [])
    from_seed = ([main] if main in MATCHED_STAGES else []) + baseline_stages(recipe)
    upcycle = ["upcycle"] if any(recipe.num_experts(stage) for stage in from_seed) else []
    cluster = ["cluster"] if recipe.cluster_names else []
    return [
        "prepare",
        *cluster,
        "seed",
        *grown_from,
        *recipe.expert_stages,
        *after_experts,
        *upcycle,
        *from_seed,
    ]


def training_stages(recipe: Recipe) -> list[str]:
    """The stages that train, in the pipeline's order; imported ones do not."""
    return [name for name in stage_names(recipe) if name not in (*_NOT_TRAINED, *recipe.imported_stages)]


def upcycling_stages(recipe: Recipe) -> list[str]:
    """The stages that train an upcycled seed."""
    return [name for name in training_stages(recipe) if name.startswith("sparse_upcycling")]


def has_moe(recipe: Recipe) -> bool:
    """Whether any of the recipe's models is a mixture of experts."""
    return any(recipe.num_experts(stage) for stage in stage_names(recipe))
