"""What ``btx plan`` says of memory, disk, network and time: a line a training stage, by closed formulas."""

from __future__ import annotations

from btx_megatron.columns import columns, short_number
from btx_megatron.estimate import padded_vocab_size, vocab_size
from btx_megatron.estimate_comm import Setup, setup_of, step_traffic
from btx_megatron.estimate_fit import check_fit
from btx_megatron.estimate_flops import stage_flops
from btx_megatron.estimate_memory import checkpoint_bytes, fullest_rank
from btx_megatron.gpus import Gpu
from btx_megatron.launch.sbatch import asked_for
from btx_megatron.pipeline import stages_of
from btx_megatron.recipe import Recipe
from btx_megatron.recipe_checks import stage_key

MFU = 0.4
"""Share of the GPU's peak that training reaches, where nobody says better."""


def sizes_text(recipe: Recipe, gpu: Gpu, mfu: float) -> str:
    """A table of memory a rank, and one of checkpoints, bytes on the wire and GPU-hours."""
    memory = [["memory of the fullest rank, GB", *_PARTS, "sum"]]
    rest = [["disk, network, time", "weights", "with optimizer", "inside", "between nodes", "GPU-hours"]]
    known: dict[str, list[str]] = {}  # experts are mostly alike, and traffic over many ranks takes a while
    for stage, (setup, node) in setups_of(recipe).items():
        memory.append([stage, *_memory_row(setup)])
        same = repr((setup, node))
        if same not in known:
            known[same] = _disk_and_network(setup, node)
        hours = stage_flops(recipe, stage) / (gpu.flops * mfu) / 3600
        rest.append([stage, *known[same], short_number(hours)])
    tables = [columns(table, right=range(1, len(table[0]))) for table in (memory, rest)]
    notes = [
        "memory: local build, even routes; collectives' buffers, fragments and the CUDA context come on top",
        "weights, with optimizer: a checkpoint, GB; inside, between nodes: KB a token on the wire; "
        f"GPU-hours: {gpu.name} at an MFU of {mfu:g}, nothing but training",
    ]
    return f"{tables[0]}\n{notes[0]}\n\n{tables[1]}\n{notes[1]}"


_PARTS = ("weights", "gradients", "optimizer", "activations", "working")


def setups_of(recipe: Recipe) -> dict[str, tuple[Setup, int]]:
    """What memory and traffic of each stage that trains depend on, and the ranks of one of its nodes."""
    rows = padded_vocab_size(vocab_size(recipe), recipe.model.make_vocab_size_divisible_by)
    trained = [stage for stage in stages_of(recipe) if stage.task == "train"]
    return {
        stage.name: (
            setup_of(recipe, recipe.stage(stage.name), rows, recipe.num_experts(stage.name)),
            asked_for(recipe, stage).gpus_per_node or stage.ranks,
        )
        for stage in trained
    }


def check_sizes(recipe: Recipe, memory: float) -> None:
    """Raises UserError, with layouts that fit, where a stage needs more than ``memory`` bytes a GPU."""
    for stage, (setup, node) in setups_of(recipe).items():
        check_fit(recipe, stage_key(stage), setup, memory, node)


def _memory_row(setup: Setup) -> list[str]:
    memory = fullest_rank(setup)
    return [short_number(getattr(memory, part) / 1e9) for part in _PARTS] + [short_number(memory.total / 1e9)]


def _disk_and_network(setup: Setup, ranks_per_node: int) -> list[str]:
    sizes = [short_number(size / 1e9) for size in checkpoint_bytes(setup)]
    traffic = step_traffic(setup, ranks_per_node).total()
    wire = [short_number(amount / setup.tokens / 1e3) for amount in (traffic.inside, traffic.between)]
    return sizes + wire
