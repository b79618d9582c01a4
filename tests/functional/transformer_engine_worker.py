"""Models of both builds, without a GPU: what they are called on disk, and each other's weights.

torchrun --nproc-per-node N transformer_engine_worker.py FOLDER

Transformer Engine's modules compute on a GPU alone, but they can be made, saved and loaded on a CPU, if they
are told that there is one.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from layout_worker import EP2, EXPERTS, MODEL, TP2_SP, VOCABULARY

from btx_megatron.checkpoints.tracker import write_tracker
from btx_megatron.recipe import Launch, Layout, Recipe, Stage, Training
from btx_megatron.runtime import cpu_backend, ranks

IMPLS = ("local", "transformer_engine")
LAYOUTS = {1: {"1": Layout()}, 2: {"TP2": TP2_SP, "EP2": EP2}}
FP8 = {"none": Training(bf16=True)} | {
    kind: Training(bf16=True, fp8="hybrid", fp8_recipe=kind)  # type: ignore[arg-type]
    for kind in ("delayed", "tensorwise", "blockwise")
}
SHAPE = replace(MODEL, ffn_hidden_size=128)


def build(impl: str, layout: Layout, experts: int | None, training: Training, **moe: Any) -> torch.nn.Module:
    """This rank's part of a random model, with norms that are not 1."""
    ranks.set_layout(layout, seed=7)
    from btx_megatron.model.build import build_model

    recipe = Recipe(model=SHAPE, training=training, launch=Launch(transformer_impl=impl))  # type: ignore[arg-type]
    for key, value in moe.items():
        setattr(recipe.moe, key, value)
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
    ):
        (model,) = build_model(recipe, Stage(layout=layout, training=training), VOCABULARY, experts)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5)
    return model


def weights_on_disk(model: torch.nn.Module) -> dict[str, Any]:
    """Shape of each weight, as this rank's part of the checkpoint says it."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from btx_megatron.model.build import unwrap

    state = unwrap(model).sharded_state_dict(metadata={"singleton_local_shards": False})  # type: ignore[operator]
    apply_factories(state)
    parts = [part for part in nested_values(state) if isinstance(part, ShardedTensor)]
    return {f"{part.key} {part.global_offset}": [part.global_shape, str(part.dtype)] for part in parts}


def save(folder: Path, model: torch.nn.Module) -> None:
    from megatron.core import dist_checkpointing

    from btx_megatron.model.build import unwrap
    from btx_megatron.training.checkpoint import _metadata

    path = folder / "iter_0000001"
    if torch.distributed.get_rank() == 0:
        path.mkdir(parents=True)
    torch.distributed.barrier()
    state = {"model": {"0": unwrap(model).sharded_state_dict(metadata=_metadata())}}  # type: ignore[operator]
    dist_checkpointing.save(state, str(path))
    if torch.distributed.get_rank() == 0:
        write_tracker(folder, "1")
    torch.distributed.barrier()


def scrambled(model: torch.nn.Module) -> torch.nn.Module:
    for parameter in model.parameters():
        parameter.data.fill_(7.0)
    return model


def round_trip(folder: Path, layout: Layout, experts: int | None, grouped: bool) -> dict[str, Any]:
    """Weights of one build in the other, and back: how many differ, and whether their names on disk do."""
    from btx_megatron.training.checkpoint import load_weights

    options = {"moe_grouped_gemm": None if grouped else False} if experts else {}
    first = build("local", layout, experts, FP8["none"], **options)
    save(folder / "local", first)
    second = scrambled(build("transformer_engine", layout, experts, FP8["none"], **options))
    load_weights(folder / "local", [second])
    save(folder / "te", second)
    third = scrambled(build("local", layout, experts, FP8["none"], **options))
    load_weights(folder / "te", [third])
    pairs = zip(first.parameters(), third.parameters(), strict=True)
    left = sum((parameter == 7.0).all().item() for parameter in second.parameters())
    return {
        "different": sum(not torch.equal(a, b) for a, b in pairs) + int(left),
        "same_names": weights_on_disk(first) == weights_on_disk(second),
        "experts": type(second.module.decoder.layers[0].mlp.experts).__name__ if experts else None,
        "weights": len(weights_on_disk(second)),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    with mock.patch.object(cpu_backend, "_leave_out_transformer_engine"):
        ranks.start_ranks()
    world = torch.distributed.get_world_size()
    result: dict[str, Any] = {}
    for name, layout in LAYOUTS[world].items():
        cases = [(None, True), (EXPERTS, True), (EXPERTS, False)] if name != "EP2" else [(EXPERTS, True)]
        for experts, grouped in cases:
            case = f"{name} {experts} {'grouped' if grouped else 'sequential'}"
            result[case] = round_trip(folder / case.replace(" ", "-"), layout, experts, grouped)
    configs = {}
    for kind, training in FP8.items():
        model = build("transformer_engine", Layout(data_parallel_size=world), EXPERTS, training)
        config = model.module.config  # type: ignore[union-attr]
        configs[kind] = [config.fp8, str(config.fp8_recipe), config.moe_router_padding_for_quantization]
    result["fp8"] = configs
    if torch.distributed.get_rank() == 0:
        (folder / f"result{world}.json").write_text(json.dumps(result, indent=1))
    ranks.stop_ranks()


if __name__ == "__main__":
    main()
