"""Models saved by Megatron under several layouts, with their logits; and Megatron's own loader on our files.

torchrun --nproc-per-node 2 convert_worker.py two FOLDER       logits, and what Megatron loads
torchrun --nproc-per-node 4 convert_worker.py four FOLDER      TP2 PP2 beside TP1, torch_dist and legacy
torchrun --nproc-per-node 1 convert_worker.py train FOLDER     one step of a run's seed

    FOLDER/KIND-DTYPE-HEAD/LAYOUT/        torch_dist, KIND dense or moe, HEAD tied or untied
    FOLDER/KIND-DTYPE-HEAD/LAYOUT.pt      tokens, logits under that layout
    FOLDER/data, FOLDER/seed              of a run, by our training
"""

from __future__ import annotations

import argparse
import itertools
import queue
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from layout_worker import EP2, EXPERTS, PP2, TP2_SP
from layout_worker import MODEL as SMALL
from torch import Tensor

from btx_megatron.checkpoints.tracker import write_tracker
from btx_megatron.data.prepare import prepare
from btx_megatron.job import Job
from btx_megatron.recipe import (
    Data,
    Domain,
    Layout,
    Model,
    Recipe,
    Source,
    Stage,
    Stages,
    Tokenizer,
    Training,
)
from btx_megatron.recipe_file import recipe_to_dict
from btx_megatron.runtime import ranks

VOCABULARY, PADDED = 120, 128
DP2, DP4 = Layout(data_parallel_size=2), Layout(data_parallel_size=4)
TP2_PP2 = Layout(tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=2)
LAYOUTS = {"DP2": DP2, "TP2": TP2_SP, "PP2": PP2, "EP2": EP2}
CASES = [
    "-".join(words) for words in itertools.product(("dense", "moe"), ("fp32", "bf16"), ("untied", "tied"))
]
LOADED_BY_MEGATRON = {"moe": ("TP2", "EP2"), "dense": ("TP2", "PP2")}
SOURCES = 2


def layouts_of(case: str) -> dict[str, Layout]:
    """A dense model has no experts to spread."""
    return {name: layout for name, layout in LAYOUTS.items() if case.startswith("moe") or name != "EP2"}


def recipe_of(case: str, layers: int = 2) -> Recipe:
    model: Model = replace(
        SMALL,
        num_layers=layers,
        init_method_std=0.2,  # logits far from uniform, so that an error shows
        untie_embeddings_and_output_weights=case.endswith("untied"),
        rotary_base=50_000,
        norm_epsilon=1e-4,
    )
    recipe = Recipe(model=model, training=Training(bf16="bf16" in case))
    # a dense stage's checkpoint carries the recipe of a mixture that may be of any kind
    recipe.moe.moe_router_pre_softmax = case.startswith("dense")
    return recipe


def build(case: str, layout: Layout, seed: int, layers: int = 2) -> torch.nn.Module:
    """This rank's part of a random model, with norms that are not 1."""
    ranks.set_layout(layout, seed)
    from btx_megatron.model.build import build_model

    recipe = recipe_of(case, layers)
    experts = EXPERTS if case.startswith("moe") else None
    (model,) = build_model(recipe, Stage(layout=layout, training=recipe.training), PADDED, experts)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5)
    return model


def on_rank_0(act: Callable[[], Any]) -> None:
    """``act`` on rank 0 while the others wait."""
    if torch.distributed.get_rank() == 0:
        act()
    torch.distributed.barrier()


def save(folder: Path, model: torch.nn.Module, recipe: Recipe) -> None:
    """The weights, and what our training says beside them, through Megatron."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from btx_megatron.model.build import unwrap

    path = folder / "iter_0000001"
    on_rank_0(lambda: path.mkdir(parents=True))
    filesystem_async._results_queue = queue.Queue()  # as in training/checkpoint.py: no second process
    state = {"model": unwrap(model).sharded_state_dict(), "iteration": 1}  # type: ignore[operator]
    common = {"recipe": recipe_to_dict(recipe), "vocab_size": VOCABULARY}
    dist_checkpointing.save(state | common, str(path))
    on_rank_0(lambda: write_tracker(folder, "1"))


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (2, SMALL.seq_length), generator=torch.Generator().manual_seed(5))


def logits(model: torch.nn.Module) -> Tensor:
    """[B, S, padded vocabulary] of fixed tokens, on the last rank: gathered over TP, passed on over PP."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from btx_megatron.model.build import unwrap
    from btx_megatron.training.trainer import evaluating

    arguments = (tokens(), torch.arange(SMALL.seq_length).expand(2, -1), None)
    with evaluating([model]):
        if parallel_state.get_pipeline_model_parallel_world_size() == 1:
            return gather_from_tensor_model_parallel_region(model(*arguments))
        dtype = next(model.parameters()).dtype
        hidden = torch.empty(SMALL.seq_length, 2, SMALL.hidden_size, dtype=dtype)
        if parallel_state.is_pipeline_first_stage():
            hidden = model(*arguments)
        torch.distributed.broadcast(hidden, 0)
        unwrap(model).set_input_tensor(hidden)  # type: ignore[operator]
        return model(*arguments)


def save_case(folder: Path, case: str) -> None:
    """One model, saved and run under each layout."""
    from btx_megatron.training.checkpoint import load_weights

    for name, layout in layouts_of(case).items():
        model = build(case, layout, seed=CASES.index(case))
        if name != "DP2":
            load_weights(folder / case / "DP2", [model])
        save(folder / case / name, model, recipe_of(case))
        result = {"tokens": tokens(), "logits": logits(model).float()}
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            torch.save(result, folder / case / f"{name}.pt")


def load_with_megatron(folder: Path, case: str, name: str) -> None:
    """Megatron-LM's ``load_checkpoint``, with the flags that we print, finds the weights bit for bit."""
    from megatron.training.arguments import parse_args
    from megatron.training.checkpointing import load_args_from_checkpoint, load_checkpoint
    from megatron.training.global_vars import set_args

    from btx_megatron.checkpoints.formats import Parallel, config_of, open_checkpoint
    from btx_megatron.mixing.flags import megatron_flags
    from btx_megatron.model.build import unwrap
    from btx_megatron.training.checkpoint import load_weights

    layout, converted = LAYOUTS[name], folder / case / "converted"
    config = config_of(open_checkpoint(converted))
    flags = megatron_flags(config, VOCABULARY, converted, "megatron", Parallel())
    sys.argv[1:] = [*" ".join(flags).split(), "--micro-batch-size", "1"]
    sys.argv += ["--tensor-model-parallel-size", str(layout.tensor_model_parallel_size)]
    sys.argv += ["--pipeline-model-parallel-size", str(layout.pipeline_model_parallel_size)]
    args = parse_args()
    said, from_checkpoint = load_args_from_checkpoint(
        argparse.Namespace(**(vars(args) | {"num_layers": None}))
    )
    assert (said.num_layers, from_checkpoint.hidden_size) == (2, SMALL.hidden_size)
    assert said.rotary_base == 50_000
    set_args(args)
    model = unwrap(build(case, layout, seed=99))
    load_weights(folder / case / "DP2", [model])
    expected = {key: value.clone() for key, value in model.state_dict().items() if torch.is_tensor(value)}
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    load_checkpoint([model], None, None, strict=True)
    for key, value in expected.items():
        found = model.state_dict()[key]
        rows = real_rows(key, found)
        assert torch.equal(found[rows], value[rows]), key


def real_rows(key: str, tensor: Tensor) -> slice:
    """The rows of this rank that stand for a token: the padding did not travel through Hugging Face."""
    from megatron.core import parallel_state

    if "embedding" not in key and "output_layer" not in key:
        return slice(None)
    first = parallel_state.get_tensor_model_parallel_rank() * tensor.shape[0]
    return slice(min(tensor.shape[0], VOCABULARY - first))


def train(folder: Path) -> None:
    """One step of a run's seed; its vocabulary is no multiple of 128, to which embeddings are padded."""
    from btx_megatron.training.train import run_training

    source = Source(name="json", path="package:json", include=["*.py"])
    training = Training(train_iters=1, micro_batch_size=1, global_batch_size=2)
    recipe = Recipe(
        run_folder=str(folder),
        data=Data(domains=[Domain(name="json", sources=[source])], held_out_fraction=0.2, num_workers=1),
        tokenizer=Tokenizer(vocab_size=600),
        model=SMALL,
        training=training,
        stages=Stages(seed=Stage(training=training)),
    )
    job = Job("train", "seed", recipe, run_folder=folder, work_folder=folder / "seed")
    for path in (job.data_folder, job.work_folder):
        path.mkdir()
    prepare(recipe, job.data_folder, lambda phase, done, total: None)
    run_training(job)


def two_ranks(folder: Path) -> None:
    """Every case saved and run; some taken to Hugging Face and back, and loaded by Megatron-LM."""
    from btx_megatron.mixing.mix import Output, convert

    for case in CASES:
        save_case(folder, case)
    for case in (case for case in CASES if "fp32-untied" in case or "bf16-tied" in case):

        def there_and_back(path: Path = folder / case) -> None:
            convert(path / "TP2", Output(path / "hf", "hf"))
            convert(path / "hf", Output(path / "converted", "megatron"))

        on_rank_0(there_and_back)
        for name in LOADED_BY_MEGATRON[case.partition("-")[0]]:
            load_with_megatron(folder, case, name)


def legacy_args(recipe: Recipe, layout: Layout) -> argparse.Namespace:
    """What Megatron-LM would have in its arguments: the model, and what its checkpointing reads."""
    model = recipe.model
    return argparse.Namespace(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        group_query_attention=True,
        num_query_groups=model.num_query_groups,
        kv_channels=model.hidden_size // model.num_attention_heads,
        seq_length=model.seq_length,
        max_position_embeddings=model.seq_length,
        rotary_base=model.rotary_base,
        norm_epsilon=model.norm_epsilon,
        untie_embeddings_and_output_weights=model.untie_embeddings_and_output_weights,
        padded_vocab_size=PADDED,
        vocab_size=VOCABULARY,
        num_experts=None,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        expert_model_parallel_size=1,
        expert_tensor_parallel_size=layout.tensor_model_parallel_size,
        virtual_pipeline_model_parallel_size=None,
        transformer_impl="local",
        ckpt_format="torch",
        no_save_optim=True,
        no_save_rng=True,
    )


def save_legacy(folder: Path, model: torch.nn.Module, recipe: Recipe, layout: Layout) -> None:
    """The old way, by Megatron's own functions: each rank its file."""
    from megatron.training.checkpointing import generate_state_dict, get_checkpoint_name

    from btx_megatron.model.build import unwrap

    path = Path(get_checkpoint_name(str(folder), 1))
    path.parent.mkdir(parents=True)
    args = legacy_args(recipe, layout)
    torch.save(generate_state_dict(args, [unwrap(model)], None, None, None, iteration=1), path)
    on_rank_0(lambda: write_tracker(folder, "1"))


def four_ranks(folder: Path) -> None:
    """The same dense models at TP1, and at TP2 PP2 in both of Megatron's formats."""
    from btx_megatron.training.checkpoint import load_weights

    for case in ("dense-bf16-untied", "dense-fp32-tied"):
        recipe = recipe_of(case, layers=4)
        for number in range(SOURCES):
            whole = build(case, DP4, seed=50 + number, layers=4)
            save(folder / case / "TP1" / str(number), whole, recipe)
            model = build(case, TP2_PP2, seed=1, layers=4)
            load_weights(folder / case / "TP1" / str(number), [model])
            save(folder / case / "TP2PP2" / str(number), model, recipe)
            save_legacy(folder / case / "legacy" / str(number), model, recipe, TP2_PP2)


def main() -> None:
    work, folder = sys.argv[1], Path(sys.argv[2])
    if work == "train":  # a stage starts its ranks itself
        train(folder)
        return
    ranks.start_ranks()
    {"two": two_ranks, "four": four_ranks}[work](folder)
    ranks.stop_ranks()


if __name__ == "__main__":
    main()
