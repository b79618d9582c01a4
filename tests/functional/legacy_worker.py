"""Models saved by Megatron the legacy way and as torch_dist, and our legacy files loaded by Megatron.

torchrun --nproc-per-node 2 legacy_worker.py FOLDER
"""

from __future__ import annotations

import argparse
import itertools
import queue
import sys
from pathlib import Path
from typing import Any

import torch

from btx_megatron.recipe import Layout, Model, Moe, Recipe, Stage
from btx_megatron.runtime import ranks

VOCABULARY, EXPERTS = 64, 4
EP2_ETP1 = Layout(
    tensor_model_parallel_size=2,
    sequence_parallel=True,
    expert_model_parallel_size=2,
    expert_tensor_parallel_size=1,
)
CASES: dict[str, tuple[Layout, int | None, bool]] = {
    "dense-tp2": (Layout(tensor_model_parallel_size=2), None, False),
    "dense-pp2": (Layout(pipeline_model_parallel_size=2), None, False),
    "tied-tp2": (Layout(tensor_model_parallel_size=2), None, True),
    "tied-pp2": (Layout(pipeline_model_parallel_size=2), None, True),
    "moe-tp2": (Layout(tensor_model_parallel_size=2, sequence_parallel=True), EXPERTS, False),
    "moe-pp2": (Layout(pipeline_model_parallel_size=2), EXPERTS, False),
    "moe-ep2": (Layout(data_parallel_size=2, expert_model_parallel_size=2), EXPERTS, False),
    "moe-tp2-ep2-etp1": (EP2_ETP1, EXPERTS, False),
}


def model_of(tied: bool) -> Model:
    return Model(
        num_layers=4,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        seq_length=16,
        untie_embeddings_and_output_weights=not tied,
    )


def make_distinct(model: torch.nn.Module) -> None:
    """Norms start at 1, and experts of two ranks alike: give each something to be told by."""
    from megatron.core import parallel_state

    for number, layer in enumerate(model.decoder.layers):  # type: ignore[union-attr,arg-type]
        for norm, parameter in enumerate(p for p in layer.parameters() if p.dim() == 1):
            generator = torch.Generator().manual_seed(10 * layer.layer_number + norm)
            parameter.data.uniform_(0.5, 1.5, generator=generator)
        for name, parameter in layer.named_parameters():
            if "experts" in name:
                parameter.data.add_(parallel_state.get_expert_model_parallel_rank() + number / 10)


def saved_args(layout: Layout, model: Model, experts: int | None, load: Path) -> argparse.Namespace:
    """What of Megatron's arguments its checkpointing reads."""
    return argparse.Namespace(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        padded_vocab_size=VOCABULARY,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        num_experts=experts,
        untie_embeddings_and_output_weights=model.untie_embeddings_and_output_weights,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
        virtual_pipeline_model_parallel_size=None,
        transformer_impl="local",
        ckpt_format="torch",
        no_save_optim=True,
        no_save_rng=True,
        load=str(load),
        ckpt_step=None,
        exit_on_missing_checkpoint=True,
        non_persistent_global_ckpt_dir=None,
        non_persistent_ckpt_type=None,
    )


def save_both(folder: Path, model: torch.nn.Module, args: argparse.Namespace) -> None:
    """Megatron's own naming and content, by its own functions."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.training.checkpointing import generate_state_dict, get_checkpoint_name

    if parallel_state.get_data_parallel_rank() == 0 or parallel_state.get_expert_data_parallel_rank() == 0:
        path = Path(get_checkpoint_name(str(folder / "legacy"), 5))
        path.parent.mkdir(parents=True)
        torch.save(generate_state_dict(args, [model], None, None, None, iteration=5), path)
    if torch.distributed.get_rank() == 0:
        (folder / "dist").mkdir(parents=True)
    torch.distributed.barrier()
    filesystem_async._results_queue = queue.Queue()  # no process of its own for a synchronous save
    dist_checkpointing.save(model.sharded_state_dict(), str(folder / "dist"))  # type: ignore[operator]


def rewrite(folder: Path, layout: Layout) -> None:
    """The same checkpoint once more, by our layout."""
    from btx_megatron.checkpoints.legacy_writer import LegacyLayout
    from btx_megatron.checkpoints.megatron_legacy import LegacyCheckpoint
    from btx_megatron.checkpoints.names import has_expert_axis, has_layer_axis
    from btx_megatron.checkpoints.pieces import TensorInfo, read_rows, write_rows
    from btx_megatron.checkpoints.tracker import write_tracker

    source = LegacyCheckpoint(folder / "legacy" / "iter_0000005")
    target = LegacyLayout(
        folder / "ours" / "release",
        source.tensors,
        source.args,
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.expert_model_parallel_size,
    )
    for name, info in source.tensors.items():
        axes = has_layer_axis(name) + has_expert_axis(name)
        part = TensorInfo(info.shape[axes:], info.dtype)
        for index in itertools.product(*map(range, info.shape[:axes])):
            block = read_rows(source.files, source.pieces(name, index), part, 0, part.shape[0])
            write_rows(target.files, target.pieces(name, index), 0, block)
    target.finish()
    write_tracker(folder / "ours", "release")


def load_ours(model: torch.nn.Module, args: argparse.Namespace) -> None:
    """Megatron's loader must find every key, and the weights that were saved."""
    from megatron.core.safe_globals import register_safe_globals
    from megatron.training.checkpointing import _load_base_checkpoint

    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    register_safe_globals()
    content: dict[str, Any] = _load_base_checkpoint(args.load, args)[0]
    model.load_state_dict(content["model"], strict=True)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def main() -> None:
    folder = Path(sys.argv[1])
    ranks.start_ranks()
    for case, (layout, experts, tied) in CASES.items():
        ranks.set_layout(layout, seed=11)
        from btx_megatron.model.build import build_model, unwrap

        shape = model_of(tied)
        recipe = Recipe(model=shape, moe=Moe())
        model = unwrap(build_model(recipe, Stage(layout=layout), VOCABULARY, experts)[0])
        make_distinct(model)
        args = saved_args(layout, shape, experts, folder / case / "ours")
        save_both(folder / case, model, args)
        torch.distributed.barrier()
        if layout is EP2_ETP1:  # we write experts cut like the rest
            continue
        if torch.distributed.get_rank() == 0:
            rewrite(folder / case, layout)
        torch.distributed.barrier()
        load_ours(model, args)
    ranks.stop_ranks()


if __name__ == "__main__":
    main()
