"""Mix what Megatron saved, and let Megatron load and save what was mixed, under several layouts.

torchrun --nproc-per-node 2 mix_worker.py FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from layout_worker import EP2, EXPERTS, MODEL, PP2, TP2_SP, VOCABULARY
from torch import Tensor

from btx_megatron.checkpoints.tracker import write_tracker
from btx_megatron.mixing.hashes import hash_tensors
from btx_megatron.mixing.mix import Output, mix
from btx_megatron.mixing.plan import MixOptions
from btx_megatron.recipe import Layout, Recipe, Stage
from btx_megatron.runtime import ranks

DP2 = Layout(data_parallel_size=2)
TP2_EP2 = Layout(
    tensor_model_parallel_size=2,
    sequence_parallel=True,
    expert_model_parallel_size=2,
    expert_tensor_parallel_size=1,
)
# how the sources are saved: name -> (layout, one key a layer)
SAVED = {"DP2": (DP2, False), "TP2": (TP2_SP, False), "PP2": (PP2, False), "a key a layer": (DP2, True)}
# how the mixed model is loaded
LOADED = {"DP2": DP2, "EP2": EP2, "TP2": TP2_SP, "PP2": PP2, "TP2, EP2": TP2_EP2}


def build(layout: Layout, experts: int | None, seed: int = 0) -> torch.nn.Module:
    """This rank's part of a random model, with norms that are not 1."""
    ranks.set_layout(layout, seed)
    from btx_megatron.model.build import build_model

    recipe = Recipe(model=MODEL)
    recipe.model.init_method_std = 0.2
    (model,) = build_model(recipe, Stage(layout=layout), VOCABULARY, experts)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5)
    return model


def save(folder: Path, model: torch.nn.Module, key_a_layer: bool = False) -> None:
    """The weights alone, through Megatron."""
    import queue

    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    path = folder / "iter_0000001"
    on_rank_0(lambda: path.mkdir(parents=True))
    filesystem_async._results_queue = queue.Queue()  # as in training/checkpoint.py: no second process
    state = model.sharded_state_dict(metadata={"non_homogeneous_layers": key_a_layer})  # type: ignore[operator]
    dist_checkpointing.save({"model": state, "iteration": 1}, str(path))
    on_rank_0(lambda: write_tracker(folder, "1"))


def on_rank_0(act: Callable[[], Any]) -> None:
    """``act`` on rank 0 while the others wait."""
    if torch.distributed.get_rank() == 0:
        act()
    torch.distributed.barrier()


def logits(model: torch.nn.Module) -> Tensor:
    """Of a few fixed tokens, on a layout where every rank has the whole model."""
    from btx_megatron.training.trainer import evaluating

    tokens = torch.randint(VOCABULARY, (2, MODEL.seq_length), generator=torch.Generator().manual_seed(5))
    with evaluating([model]):
        return model(tokens, torch.arange(MODEL.seq_length).expand_as(tokens), attention_mask=None)


def save_sources(folder: Path) -> list[dict[str, Tensor]]:
    """The same experts, saved in every way; returns their weights as the model has them."""
    from btx_megatron.training.checkpoint import load_weights

    states = []
    for number in range(EXPERTS):
        model = build(DP2, None, seed=100 + number)
        states.append({key: value for key, value in model.state_dict().items() if torch.is_tensor(value)})
        save(folder / "DP2" / str(number), model)
    for name, (layout, key_a_layer) in SAVED.items():
        if name != "DP2":
            for number in range(EXPERTS):
                model = build(layout, None)
                load_weights(folder / "DP2" / str(number), [model])
                save(folder / name / str(number), model, key_a_layer)
    return states


def mix_sources(folder: Path, sources: list[Path], result: dict[str, Any], name: str) -> None:
    """Mix on rank 0."""

    def act() -> None:
        named = {str(number): source for number, source in enumerate(sources)}
        result["mixed"][name] = mix(
            named, Output(folder / "mixed" / name), MixOptions(router_std=0.1, random_seed=3)
        )

    on_rank_0(act)


def experts_equal_sources(moe: torch.nn.Module, sources: list[dict[str, Tensor]]) -> bool:
    """Whether expert i of a whole model has the feed-forward of source i, in every layer."""
    state = moe.state_dict()
    return all(
        torch.equal(state[f"{layer}mlp.experts.local_experts.{i}.{matrix}"], source[f"{layer}mlp.{matrix}"])
        for i, source in enumerate(sources)
        for layer in (f"decoder.layers.{number}." for number in range(MODEL.num_layers))
        for matrix in ("linear_fc1.weight", "linear_fc2.weight")
    )


def main() -> None:
    folder = Path(sys.argv[1])
    ranks.start_ranks()
    result: dict[str, Any] = {"mixed": {}, "saved_again": {}}
    states = save_sources(folder)
    for name in SAVED:
        mix_sources(folder, [folder / name / str(number) for number in range(EXPERTS)], result, name)
    from btx_megatron.training.checkpoint import load_weights

    for name, layout in LOADED.items():
        moe = build(layout, EXPERTS)
        load_weights(folder / "mixed" / "DP2", [moe])
        if name == "DP2":
            result["experts_equal_sources"] = experts_equal_sources(moe, states)
        again = folder / "again" / name
        save(again, moe)
        result["saved_again"][name] = hash_tensors(again)

    mix_sources(folder, [folder / "DP2" / "0"] * EXPERTS, result, "copies")
    dense, copies = build(DP2, None), build(DP2, EXPERTS)
    load_weights(folder / "DP2" / "0", [dense])
    load_weights(folder / "mixed" / "copies", [copies])
    dense_logits = logits(dense)
    result["logits"] = {
        "spread": dense_logits.std().item(),
        "difference": (logits(copies) - dense_logits).abs().max().item(),
    }
    on_rank_0(lambda: (folder / "result.json").write_text(json.dumps(result)))
    ranks.stop_ranks()


if __name__ == "__main__":
    main()
