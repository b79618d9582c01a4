"""What a model thinks of token sequences: log-probabilities of their tokens, and which it would have said.

The model is in any layout, all ranks take part: rank 0 asks, the others answer with it until it is done. The
tasks of harness.py are made of such questions. There is no cache of keys and values: a generated token costs
a pass over the text before it. What a sequence is told does not depend on the others: experts have room for
every token, and Sample Top-1 takes the likeliest expert.

Shapes: B micro-batch, S positions, V this rank's part of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from btx_megatron.evaluation.loss import Model, micro_batches_of
from btx_megatron.evaluation.token_losses import gathered
from btx_megatron.model.routers import batch_context
from btx_megatron.recipe import Stage

_MULTIPLE = 8
"""Sequences are filled up to a multiple of so many tokens, for each tensor-parallel rank."""


@dataclass(frozen=True)
class TokenScores:
    """Of one sequence of n tokens, at each of its first n - 1 places: of the token that follows."""

    log_p: NDArray[np.float32]
    """[n - 1] log-probability, in nats, of the token that does follow."""
    best: NDArray[np.int64]
    """[n] the likeliest token after each, the last one's included."""


Score = Callable[[Sequence[Sequence[int]]], list[TokenScores]]
"""Sequences of one token or more -> their scores."""


class Scorer:
    """Scores sequences with a model. Calls are collectives: every rank makes the same ones."""

    def __init__(
        self, model: Model, stage: Stage, vocab_size: int, allowed: list[bool] | None = None
    ) -> None:
        """``vocab_size``: tokens that can be said, padding left out; ``allowed`` [E]: experts, None: all."""
        from megatron.core import parallel_state

        self._model, self._stage, self._allowed = model, stage, allowed
        self._vocab_size = vocab_size
        self._multiple = _MULTIPLE * stage.layout.tensor_model_parallel_size
        self._at_once = stage.training.micro_batch_size * parallel_state.get_data_parallel_world_size()

    def __call__(self, sequences: Sequence[Sequence[int]]) -> list[TokenScores]:
        """The scores of each, long ones with long ones."""
        order = sorted(range(len(sequences)), key=lambda number: -len(sequences[number]))
        scores: dict[int, TokenScores] = {}
        for first in range(0, len(order), self._at_once):
            numbers = order[first : first + self._at_once]
            its = self._score([sequences[number] for number in numbers])
            scores |= dict(zip(numbers, its, strict=True))
        return [scores[number] for number in range(len(sequences))]

    def _score(self, sequences: list[Sequence[int]]) -> list[TokenScores]:
        from btx_megatron.training.trainer import evaluating, run_micro_batches

        length = -(-max(map(len, sequences)) // self._multiple) * self._multiple
        windows = [_window(sequence, length) for sequence in sequences]
        kept: list[tuple[Tensor, Tensor]] = []
        batches, count = micro_batches_of(self._model, windows, self._stage, self._allowed)
        batches = (batch | {"each_alone": True} for batch in batches)
        step = partial(_step, vocab_size=self._vocab_size, kept=kept)
        with evaluating(self._model):
            run_micro_batches(self._model, batches, count, self._stage, length, forward_only=True, step=step)
        return [
            TokenScores(log_p_S[: len(sequence) - 1], best_S[: len(sequence)].astype(np.int64))
            for sequence, (log_p_S, best_S) in zip(sequences, gathered(kept, len(windows)), strict=True)
        ]


def asked_by_rank_0(scorer: Scorer, ask: Callable[[Score], Any]) -> Any:
    """``ask`` runs on rank 0, with a function that scores; the others take part in every call it makes.

    Returns what it returns, on the others None. A collective.
    """
    if torch.distributed.get_rank() > 0:
        while (sequences := _told(None)) is not None:
            scorer(sequences)
        return None

    def score(sequences: Sequence[Sequence[int]]) -> list[TokenScores]:
        _told(sequences)
        return scorer(sequences)

    answer = ask(score)  # where it fails, torchrun ends the others
    _told(None)
    return answer


def _told(sequences: Sequence[Sequence[int]] | None) -> Any:
    """What rank 0 gives, on every rank."""
    from btx_megatron.runtime.ranks import device

    box = [sequences]
    torch.distributed.broadcast_object_list(box, src=0, device=device())
    return box[0]


def _window(sequence: Sequence[int], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, labels and mask [S] of a sequence; behind its end nothing counts."""
    tokens = np.zeros(length + 1, dtype=np.int64)
    tokens[: len(sequence)] = sequence
    mask = np.zeros(length, dtype=np.float32)
    mask[: len(sequence)] = 1
    return tokens[:-1], tokens[1:], mask


def _step(
    batches: Iterator[dict[str, Any]],
    chunk: torch.nn.Module,
    vocab_size: int,
    kept: list[tuple[Tensor, Tensor]],
) -> tuple[Tensor, Any]:
    from btx_megatron.training.trainer import entered

    batch = entered(next(batches))
    samples = batch_context.sample_index
    labels_BS = batch["labels"]
    output = chunk(batch["tokens"], batch["position_ids"], attention_mask=None)

    def keep(logits_BSV: Tensor) -> Any:
        log_p_BS, best_BS = _scored(logits_BSV.float(), labels_BS, vocab_size)
        kept.append((samples, torch.stack([log_p_BS, best_BS.float()], dim=1).cpu()))  # type: ignore[arg-type]
        nothing = torch.zeros((), device=logits_BSV.device)
        return nothing, nothing.int(), torch.zeros(2, device=logits_BSV.device)

    return output, keep


def _scored(logits_BSV: Tensor, labels_BS: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Log-probability of the labels, and the likeliest token, of logits whose vocabulary is cut over TP."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    ranks, rank = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    part = logits_BSV.shape[-1]
    ids_V = torch.arange(part, device=logits_BSV.device) + rank * part
    logits_BSV = logits_BSV.masked_fill(ids_V >= vocab_size, torch.finfo(logits_BSV.dtype).min / 2)
    value_BS, best_BS = logits_BSV.max(dim=-1)
    best_BS = best_BS + rank * part
    if ranks > 1:
        group = parallel_state.get_tensor_model_parallel_group()
        both = torch.stack([value_BS.double(), best_BS.double()])
        everybodys = [torch.empty_like(both) for _ in range(ranks)]
        torch.distributed.all_gather(everybodys, both, group=group)
        all_RBS = torch.stack(everybodys, dim=1)
        winner_BS = all_RBS[0].argmax(dim=0, keepdim=True)
        best_BS = all_RBS[1].gather(0, winner_BS)[0].long()
    loss_BS = vocab_parallel_cross_entropy(logits_BSV, labels_BS)  # the logits are overwritten
    return -loss_BS, best_BS
