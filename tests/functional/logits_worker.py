"""Logits of a random dense model and a random MoE, with their weights, for a test to compare; and their
losses while they train, with the weights that they started from.

torchrun --nproc-per-node 1 logits_worker.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from layout_worker import EXPERTS, MODEL, STEPS, VOCABULARY, Run

from btx_megatron.recipe import Layout, Recipe, Stage
from btx_megatron.runtime import ranks


def main() -> None:
    folder = Path(sys.argv[1])
    ranks.start_ranks()
    ranks.set_layout(Layout(), seed=11)
    from btx_megatron.model.build import build_model
    from btx_megatron.training.trainer import evaluating

    tokens = torch.randint(VOCABULARY, (2, MODEL.seq_length), generator=torch.Generator().manual_seed(5))
    positions = torch.arange(MODEL.seq_length).expand_as(tokens)
    for kind, experts in (("dense", None), ("moe", EXPERTS)):
        recipe = Recipe(model=MODEL)
        recipe.model.init_method_std = 0.2  # logits far from uniform, so that an error shows
        (model,) = build_model(recipe, Stage(), VOCABULARY, experts)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms start at 1: give them something to get wrong
                parameter.data.uniform_(0.5, 1.5)
        with evaluating([model]):
            logits = model(tokens, positions, attention_mask=None)
        state = {key: value for key, value in model.state_dict().items() if torch.is_tensor(value)}
        torch.save({"tokens": tokens, "logits": logits, "state": state}, folder / f"{kind}.pt")
    for kind, trained in (("dense", "dense"), ("moe", "unbalanced")):
        run = Run(trained, Layout(), folder)
        (chunk,) = run.trainer.model
        state = {
            key: value.clone() for key, value in chunk.module.state_dict().items() if torch.is_tensor(value)
        }
        torch.save({"state": state, "losses": run.steps(STEPS)["loss"]}, folder / f"{kind}-trained.pt")
    ranks.stop_ranks()


if __name__ == "__main__":
    main()
