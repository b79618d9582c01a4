"""Token sequences scored by a dense model and a mixture under several layouts; scores go to a JSON file.

torchrun --nproc-per-node 1 scoring_worker.py FOLDER     makes the models, and is the reference
torchrun --nproc-per-node 2 scoring_worker.py FOLDER     the layouts of two ranks
torchrun --nproc-per-node 4 scoring_worker.py FOLDER     and of four
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from layout_worker import (
    EP2,
    EXPERTS,
    INTERLEAVED,
    MODEL,
    MOES,
    PP2,
    TP2_EP2,
    TP2_SP,
    TRAINING,
    VOCABULARY,
    Run,
)

from btx_megatron.recipe import Layout, Moe, Recipe, Stage
from btx_megatron.runtime import ranks

if TYPE_CHECKING:
    from btx_megatron.evaluation.scoring import Score

LAYOUTS = {
    1: {name: Layout() for name in ("dense 1", "deep 1", "moe 1", "moe:switch 1", "moe:sample 1")},
    2: {
        "dense TP2+SP": TP2_SP,
        "dense PP2": PP2,
        "deep PP2 interleaved": INTERLEAVED,
        "dense DP2": Layout(data_parallel_size=2),
        "moe TP2+SP": TP2_SP,
        "moe EP2": EP2,
        "moe PP2": PP2,
        "moe:switch DP2": Layout(data_parallel_size=2),
        "moe:sample DP2": Layout(data_parallel_size=2),
    },
    4: {"moe TP2+SP+EP2": TP2_EP2},
}
ROUTERS = {
    "switch": Moe(moe_router_type="switch", moe_router_load_balancing_type="none"),
    "sample": Moe(moe_router_type="sample_top1", moe_router_load_balancing_type="none"),
}
"""Behind the colon of a name: the mixture with a router whose routes might depend on the batch."""
SAID = VOCABULARY - 5
"""The last tokens are padding: never the likeliest."""
LENGTHS = (1, 2, 31, 3, 17, 32, 33, 9, 8)


def sequences() -> list[list[int]]:
    """Of lengths that fill a micro-batch, and one more."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(SAID, (length,), generator=generator).tolist() for length in LENGTHS]


def make(folder: Path, kind: str) -> None:
    """A model whose tokens differ in likelihood; its padding would be the likeliest of all."""
    from btx_megatron.training.saver import save

    run = Run(kind, Layout(), folder)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in run.trainer.model[0].named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
            if "output_layer" in name:
                parameter[SAID:] *= 30
    save(folder / kind, run.state, {}, keep=1)


def scored(name: str, layout: Layout, folder: Path) -> list[dict[str, Any]]:
    from btx_megatron.evaluation.scoring import Scorer, asked_by_rank_0
    from btx_megatron.model.build import build_model
    from btx_megatron.training.checkpoint import load_weights

    kind, _, router = name.partition(" ")[0].partition(":")
    ranks.set_layout(layout, seed=7)
    stage = Stage(training=TRAINING, layout=layout)
    shape = replace(MODEL, num_layers=4 if kind == "deep" else MODEL.num_layers)
    moe = ROUTERS[router] if router else MOES[kind] or Moe()
    recipe = Recipe(model=shape, training=TRAINING, moe=moe)
    model = build_model(recipe, stage, VOCABULARY, EXPERTS if MOES[kind] else None)
    load_weights(folder / kind, model)

    def ask(score: Score) -> list[dict[str, Any]]:
        after_3 = score([[3, token] for token in range(SAID)])
        assert abs(sum(math.exp(its.log_p[0]) for its in after_3) - 1) < 1e-4
        first, rest = sequences()[:4], sequences()[4:]
        told = [*score(first), *score(rest)]  # as often as it likes, as many as it likes
        return [{"log_p": its.log_p.tolist(), "best": its.best.tolist()} for its in told]

    answer: list[dict[str, Any]] = asked_by_rank_0(Scorer(model, stage, SAID), ask)
    return answer


def main() -> None:
    folder = Path(sys.argv[1])
    ranks.start_ranks()
    world = torch.distributed.get_world_size()
    if world == 1:
        for kind in ("dense", "deep", "moe"):
            make(folder, kind)
    result = {name: scored(name, layout, folder) for name, layout in LAYOUTS[world].items()}
    if torch.distributed.get_rank() == 0:
        (folder / f"scores-{world}.json").write_text(json.dumps(result))
    ranks.stop_ranks()


if __name__ == "__main__":
    main()
