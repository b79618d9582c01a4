"""Held-out loss of every model of a run, and the routes that the MoE takes, domain by domain.

Nats a token over fixed windows, each held-out token counted once. The windows of a domain are dealt out
over the data-parallel ranks; every rank runs the same number of micro-batches, filled up with empty
windows (mask 0), since ranks that share experts must meet in every layer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from btx_megatron.data.held_out import held_out_windows
from btx_megatron.evaluation.rows import EVALUATION_FILE, ensemble_rows, main_row, opted_out, rows_of
from btx_megatron.evaluation.tasks import documents_hash
from btx_megatron.expert_masks import allowed_experts
from btx_megatron.job import CHECKPOINTS, Job
from btx_megatron.methods import main_stage
from btx_megatron.recipe import Stage
from btx_megatron.run_folder import stage_folder
from btx_megatron.runtime import ranks
from btx_megatron.runtime.progress import Progress

if TYPE_CHECKING:
    from btx_megatron.evaluation.ensembles import Ensembles

Model = Sequence[torch.nn.Module]  # the chunks of this rank
Windows = list[tuple[np.ndarray, np.ndarray, np.ndarray]]


def run_evaluation(job: Job) -> dict[str, Any]:
    """Evaluate every row on every domain; rank 0 writes ``evaluation.json``.

    Rows that another run has measured (``job.measured``) are taken as they are.
    """
    recipe = job.recipe
    stage = Stage(
        training=replace(
            recipe.training,
            micro_batch_size=recipe.evaluate.micro_batch_size,
            fp8=None,  # what is compared is weights
            cuda_graph_impl="none",
        ),
        layout=recipe.evaluate.layout,
    )
    with ranks.joined_ranks():
        ranks.set_layout(stage.layout, recipe.training.seed)
        result = _evaluate_rows(job, stage)
        if torch.distributed.get_rank() == 0:
            (job.work_folder / EVALUATION_FILE).write_text(json.dumps(result, indent=2) + "\n")
    return {"held_out_tokens": result["held_out_tokens"]}


def _evaluate_rows(job: Job, stage: Stage) -> dict[str, Any]:
    from btx_megatron.model.build import build_model
    from btx_megatron.training.checkpoint import load_weights

    recipe = job.recipe
    vocabulary = json.loads((job.data_folder / "statistics.json").read_text())["padded_vocab_size"]
    windows = {name: _windows(job, name) for name in recipe.domain_names}
    rows = rows_of(recipe)
    progress = Progress(job.work_folder) if torch.distributed.get_rank() == 0 else None
    models: dict[int | None, Model] = {}
    losses: dict[str, dict[str, float]] = {}
    tasks: dict[str, Any] = {}
    routing: dict[str, Any] = {}
    ensembles = _ensembles(job, stage, windows)
    for done, (row, made_by) in enumerate(rows.items()):
        if row in job.measured and not (ensembles and ensembles.hears(row)):
            losses[row] = job.measured[row]["held_out_loss"]
            tasks[row] = job.measured[row]["tasks"]
            continue
        if progress:
            progress.update("evaluating", done, len(rows), row)
        experts = recipe.num_experts(made_by)
        if experts not in models:
            models[experts] = build_model(recipe, stage, vocabulary, experts)
        model = models[experts]
        load_weights(job.run_folder / stage_folder(made_by) / CHECKPOINTS, model)
        take_load(model, recipe.model.num_layers)  # of what ran before
        losses[row], loads = {}, []
        heard = ensembles.hear(row, model) if ensembles else None
        if heard is not None:
            losses[row] = heard
        for name in recipe.domain_names if heard is None else ():
            allowed = allowed_experts(recipe, name, made_by, opted_out(row)) if experts else None
            losses[row][name] = held_out_loss(model, windows[name], stage, recipe.model.seq_length, allowed)
            loads.append(take_load(model, recipe.model.num_layers))
        if row == main_row(recipe) and experts:
            routing = _routing(job, stage, model, windows, torch.stack(loads))
        if recipe.evaluate.tasks:  # after the routes of held-out text were read
            allowed = (
                allowed_experts(recipe, recipe.domain_names[0], made_by, opted_out(row)) if experts else None
            )
            tasks[row] = _tasks(job, stage, model, allowed)
    if ensembles:
        losses |= ensembles.losses(models[None])
    return {
        "held_out_loss": losses,
        "held_out_tokens": {name: int(sum(w[2].sum() for w in windows[name])) for name in windows},
        "held_out_sha256": {name: _digest(windows[name]) for name in windows},
        "tasks": tasks if recipe.evaluate.tasks else {},
        "task_files": {task.name: documents_hash(task) for task in recipe.evaluate.tasks},
        "routing": routing or None,
        "clusters": _clusters(job) if recipe.cluster_names else None,
    }


def _digest(windows: Windows) -> str:
    """SHA-256, in hex, over the tokens that count."""
    digest = hashlib.sha256()
    for _, labels, mask in windows:
        digest.update(np.where(mask > 0, labels, -1).astype("<i8").tobytes())
    return digest.hexdigest()


def _tasks(job: Job, stage: Stage, model: Model, allowed: list[bool] | None) -> dict[str, Any] | None:
    """Task -> what the harness says of the model's answers, on rank 0. A collective."""
    from btx_megatron.data.prepare import tokenizer_path
    from btx_megatron.data.tokenizer import open_tokenizer
    from btx_megatron.evaluation.scoring import Score, Scorer, asked_by_rank_0

    recipe, tokenizer = job.recipe, open_tokenizer(tokenizer_path(job.data_folder))

    def ask(score: Score) -> dict[str, Any]:
        from btx_megatron.evaluation.harness import ScoredModel, task_scores

        asked = ScoredModel(score, tokenizer, recipe.model.seq_length)
        return task_scores(asked, recipe.evaluate.tasks, recipe.evaluate.execute_code)

    scorer = Scorer(model, stage, tokenizer.vocab_size, allowed)
    scores: dict[str, Any] | None = asked_by_rank_0(scorer, ask)
    return scores


def _clusters(job: Job) -> dict[str, Any]:
    """What c-BTM found: each cluster's heaviest words, and how many documents of each domain it has."""
    from btx_megatron.ensembles.cluster_documents import load_found

    clusters, documents_of = load_found(job.run_folder / stage_folder("cluster"))
    words = dict(zip(job.recipe.cluster_names, clusters.words(), strict=True))
    return {name: {"words": words[name], "documents_of": documents_of[name]} for name in words}


def _ensembles(job: Job, stage: Stage, windows: dict[str, Windows]) -> Ensembles | None:
    if not ensemble_rows(job.recipe):
        return None
    from btx_megatron.evaluation.ensembles import Ensembles

    return Ensembles(job, stage, windows)


def _windows(job: Job, domain: str) -> Windows:
    limit = job.recipe.data.held_out_max_tokens
    return list(held_out_windows(job.data_folder, domain, job.recipe.model.seq_length, limit))


def held_out_loss(
    model: Model, windows: Windows, stage: Stage, sequence: int, allowed: list[bool] | None = None
) -> float:
    """Mean loss in nats a token over all windows, equal on all ranks; the model in any layout.

    ``allowed`` [E]: the experts that may be taken; None: all.
    """
    from btx_megatron.training.trainer import evaluating, run_micro_batches, sum_over_ranks

    batches, count = micro_batches_of(model, windows, stage, allowed)
    with evaluating(model):
        losses = run_micro_batches(model, batches, count, stage, sequence, forward_only=True)
    loss, tokens = sum_over_ranks(losses)
    return loss / tokens


def micro_batches_of(
    model: Model, windows: Windows, stage: Stage, allowed: list[bool] | None = None
) -> tuple[Iterator[dict[str, Any]], int]:
    """This rank's micro-batches and their number, which is that of all ranks."""
    from megatron.core import parallel_state

    size, dp = stage.training.micro_batch_size, parallel_state.get_data_parallel_world_size()
    count = _next_multiple(len(windows), size * dp) // (size * dp)
    if len(model) > 1:  # an interleaved pipeline takes micro-batches in groups
        count = _next_multiple(count, stage.layout.pipeline_model_parallel_size)
    batches = _batches(windows, size, count, parallel_state.get_data_parallel_rank(), dp)
    if allowed is not None:
        allowed_BE = torch.tensor(allowed).expand(size, -1)
        batches = (batch | {"allowed_experts": allowed_BE} for batch in batches)
    return batches, count


def _next_multiple(count: int, of: int) -> int:
    return -(-count // of) * of


def _batches(windows: Windows, size: int, count: int, rank: int, dp: int) -> Iterator[dict[str, Any]]:
    """``count`` micro-batches of ``size`` windows for this rank; empty windows fill up the last ones."""
    empty = tuple(np.zeros_like(part) for part in windows[0])
    for number in range(count):
        first = (number * dp + rank) * size
        indices = range(first, first + size)
        chosen = [windows[i] if i < len(windows) else empty for i in indices]
        tokens, labels, mask = (torch.from_numpy(np.stack(part)) for part in zip(*chosen, strict=True))
        yield {
            "tokens": tokens.long(),
            "labels": labels.long(),
            "loss_mask": mask.float(),
            "position_ids": torch.arange(tokens.shape[1]).expand_as(tokens),
            "sample_index": torch.tensor(list(indices)),
            "step": 0,
        }


def take_load(model: Model, num_layers: int) -> torch.Tensor:
    """[layers, experts] routes that each expert took since the last call, over all ranks; empty if dense.

    Counted are those of the tokens that the loss counts.
    """
    from btx_megatron.model.routers import routers_of

    routers = routers_of(model)
    experts = next(iter(routers.values())).num_experts if routers else 0
    load = torch.zeros(num_layers, experts, dtype=torch.float64, device=ranks.device())
    for layer, router in routers.items():
        load[layer] = router.take_load().double()
    torch.distributed.all_reduce(load)
    return load


def shares(load: torch.Tensor) -> torch.Tensor:
    """Of the routes of each layer; the last dimension is the experts'."""
    return load / load.sum(dim=-1, keepdim=True).clamp(min=1)


def _routing(
    job: Job, stage: Stage, model: Model, windows: dict[str, Windows], load_DLE: torch.Tensor
) -> dict[str, Any]:
    """What the routes of the mixture tell, from its pass over all windows; and a second pass for the guesses.

    ``share`` is [domains][layers][experts], the others are [layers].
    """
    from btx_megatron.evaluation.specialization import DomainGuesses, log_likelihoods, mutual_information

    recipe = job.recipe
    tokens = sum(float(window[2].sum()) for part in windows.values() for window in part)
    fitted = []
    allowed = [allowed_experts(recipe, domain, str(main_stage(recipe))) for domain in windows]
    for may_take, part in zip(allowed, windows.values(), strict=True):
        held_out_loss(model, part[::2], stage, recipe.model.seq_length, may_take)
        fitted.append(take_load(model, recipe.model.num_layers))
    guesses = DomainGuesses(log_likelihoods(torch.stack(fitted)))
    for domain, part in enumerate(windows.values()):
        with guesses.listen(model, domain):
            held_out_loss(model, part[1::2] or part, stage, recipe.model.seq_length, allowed[domain])
    take_load(model, recipe.model.num_layers)
    return {
        "share": shares(load_DLE).tolist(),
        "active_experts": (load_DLE.sum(dim=(0, 2)) / tokens).tolist(),
        "mutual_information": mutual_information(load_DLE),
        "balanced_accuracy": guesses.balanced_accuracy(),
        "domains": recipe.domain_names,
        "experts": recipe.expert_names,
    }
