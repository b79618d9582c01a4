"""Rows of the vocabulary that stand for no token: how many Megatron-LM wants, added or taken away.

Megatron pads the embedding and the output layer so that tensor-parallel ranks get equal shares and products
have sizes that hardware likes: to a multiple of ``--make-vocab-size-divisible-by`` times TP. Hugging Face
keeps the tokens' rows alone. Padding is made of zeros here. A model never sees the padding of its embedding;
as logits, rows of zeros count in the softmax, as they do wherever Megatron pads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from btx_megatron.checkpoints.pieces import Index, TensorInfo
from btx_megatron.checkpoints.stream import PlannedTensor, Rows
from btx_megatron.errors import UserError

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
VOCABULARY = (EMBEDDING, OUTPUT)
"""The weights with a row for every token."""


def padded_rows(vocab_size: int, divisible_by: int, tensor_parallel: int = 1) -> int:
    """Rows that Megatron-LM gives a vocabulary: the next multiple of ``divisible_by`` x TP.

    As ``vocab_size_with_padding`` in megatron.core.tokenizers.utils.build_tokenizer.
    """
    multiple = divisible_by * tensor_parallel
    return math.ceil(vocab_size / multiple) * multiple


def divisor(vocab_size: int | None, rows: int, tensor_parallel: int = 1) -> int:
    """A ``--make-vocab-size-divisible-by`` with which Megatron-LM makes ``rows`` of ``vocab_size`` tokens.

    ``vocab_size`` None: not known, all rows are tokens'. ``rows`` must divide by ``tensor_parallel``. The
    largest power of two up to Megatron's default, 128, that does it; where none does, the smallest number.
    """
    tokens = min(vocab_size or rows, rows)
    for power in reversed(range(8)):
        if padded_rows(tokens, 1 << power, tensor_parallel) == rows:
            return 1 << power
    share = rows // tensor_parallel
    least = (rows - tokens) // tensor_parallel + 1
    return next(number for number in range(least, share + 1) if share % number == 0)


def fit_vocabulary(
    plan: list[PlannedTensor], vocab_size: int | None, multiple: int | None
) -> list[PlannedTensor]:
    """The plan with the vocabulary's rows of its target; all other weights as they are.

    ``multiple`` None: rows stay. 1: those of the ``vocab_size`` tokens alone, as Hugging Face has them. More:
    padded to it. ``vocab_size`` None: not known, no row is taken for padding. Raises UserError where there
    are fewer rows than tokens.
    """
    if multiple is None:
        return plan
    rows = rows_in(plan)
    if vocab_size is not None and vocab_size > rows:
        raise UserError(
            f"{EMBEDDING} has {rows} rows, and the vocab_size of its model is {vocab_size}; correct that"
        )
    wanted = padded_rows(vocab_size or rows, multiple)
    return [_of_rows(tensor, wanted) if tensor.name in VOCABULARY else tensor for tensor in plan]


def rows_in(plan: list[PlannedTensor]) -> int:
    """Rows of the planned embedding."""
    return next(tensor.info.shape[0] for tensor in plan if tensor.name == EMBEDDING)


def _of_rows(tensor: PlannedTensor, rows: int) -> PlannedTensor:
    there = tensor.info.shape[0]
    return pad_rows(tensor, rows) if rows > there else cut_rows(tensor, rows) if rows < there else tensor


def pad_rows(tensor: PlannedTensor, rows: int) -> PlannedTensor:
    """The weight [V, H] with rows of zeros behind it, ``rows`` in all; made in blocks as before."""
    there = tensor.info.shape[0]

    def padded(inner: Rows) -> Rows:
        def made(start: int, stop: int) -> Tensor:
            zeros = torch.zeros(
                (max(0, stop - max(start, there)), *tensor.info.shape[1:]), dtype=tensor.info.dtype
            )
            if start >= there:
                return zeros
            block = inner(start, min(stop, there))
            return torch.cat([block.to(tensor.info.dtype), zeros]) if len(zeros) else block

        return made

    return _changed(tensor, rows, "+padded", padded)


def cut_rows(tensor: PlannedTensor, rows: int) -> PlannedTensor:
    """The first ``rows`` rows of a weight [V, H]; made in blocks as before.

    The rest is made too, and dropped: what is read from its first to its last row need not be read again for
    its fingerprint.
    """
    there = tensor.info.shape[0]

    def cut(inner: Rows) -> Rows:
        def made(start: int, stop: int) -> Tensor:
            if tensor.whole:
                return inner(0, there)[start:stop]
            block = inner(start, stop)
            for at in range(stop, there, max(1, stop - start)) if stop == rows else ():
                inner(at, min(there, at + max(1, stop - start)))
            return block

        return made

    return _changed(tensor, rows, "+cut", cut)


def _changed(tensor: PlannedTensor, rows: int, how: str, change: Callable[[Rows], Rows]) -> PlannedTensor:
    def make(index: Index) -> Rows:
        return change(tensor.make(index))

    info = TensorInfo((rows, *tensor.info.shape[1:]), tensor.info.dtype)
    return replace(tensor, info=info, rule=tensor.rule + how, make=make)
