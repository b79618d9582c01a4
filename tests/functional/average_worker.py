"""Parameters of three dense models averaged under several layouts; what came out goes to a JSON file.

torchrun --nproc-per-node 1 average_worker.py FOLDER     makes the models, and is the reference
torchrun --nproc-per-node 2 average_worker.py FOLDER     the layouts of two ranks
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from layout_worker import MODEL, PP2, TP2_SP, TRAINING, VOCABULARY, RandomSamples, Run

from btx_megatron.mixing.mix import Output, average
from btx_megatron.mixing.plan import MixOptions
from btx_megatron.recipe import Layout, Recipe, Stage
from btx_megatron.runtime import ranks

WEIGHTS = {"a": 0.7, "b": 0.2, "c": 0.1, "unread": 0.0}
LAYOUTS = {
    1: {"1": Layout()},
    2: {"TP2+SP": TP2_SP, "PP2": PP2, "DP2": Layout(data_parallel_size=2)},
}


def make(folder: Path) -> None:
    """Three models that have moved apart from one, and their average as the mix makes it."""
    from btx_megatron.training.saver import save

    names = [name for name, weight in WEIGHTS.items() if weight]
    for seed, name in enumerate(names):
        run = Run("dense", Layout(), folder)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in run.trainer.model[0].parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        save(folder / name, run.state, {}, keep=1)
    sources = {name: folder / name for name in names}
    weights = {name: WEIGHTS[name] for name in names}
    output = Output(folder / "mixed", to="megatron")
    average(sources, output, MixOptions(average="weighted", weights=weights))


def averaged(layout: Layout, folder: Path) -> dict[str, Any]:
    """Losses of the average made in the model, and how far it is from the mix's."""
    from btx_megatron.data.held_out import stream_windows
    from btx_megatron.evaluation.loss import held_out_loss
    from btx_megatron.evaluation.parameter_average import load_average
    from btx_megatron.evaluation.token_losses import token_losses
    from btx_megatron.model.build import build_model
    from btx_megatron.training.checkpoint import load_weights

    ranks.set_layout(layout, seed=7)
    stage = Stage(training=TRAINING, layout=layout)
    model = build_model(Recipe(model=MODEL, training=TRAINING), stage, VOCABULARY, None)
    load_average(model, {folder / name: weight for name, weight in WEIGHTS.items()})
    mine = [parameter.detach().clone() for chunk in model for parameter in chunk.parameters()]
    stream = np.concatenate([RandomSamples()[number]["tokens"].numpy() for number in range(6)])
    windows = list(stream_windows(stream[:-9], MODEL.seq_length))
    loss = held_out_loss(model, windows, stage, MODEL.seq_length)
    tokens_WS = token_losses(model, windows, stage, MODEL.seq_length)
    mask_WS = np.stack([mask for *_, mask in windows])
    load_weights(folder / "mixed", model)
    theirs = [parameter.detach() for chunk in model for parameter in chunk.parameters()]
    away = torch.stack([(a - b).abs().max() for a, b in zip(mine, theirs, strict=True)]).max()
    torch.distributed.all_reduce(away, torch.distributed.ReduceOp.MAX)
    mean = float(tokens_WS[mask_WS != 0].astype(np.float64).mean())
    return {"loss": loss, "mean": mean, "away": away.item()}


def main() -> None:
    folder = Path(sys.argv[1])
    ranks.start_ranks()
    world = torch.distributed.get_world_size()
    if world == 1:
        make(folder)
    result = {name: averaged(layout, folder) for name, layout in LAYOUTS[world].items()}
    if torch.distributed.get_rank() == 0:
        (folder / f"average-{world}.json").write_text(json.dumps(result))
    ranks.stop_ranks()


if __name__ == "__main__":
    main()
