"""The loss of a checkpoint of any format on a text, before any training: ``btx verify --loss``.

Wrong weights load without a word: norms that stay at 1, gate and up rows swapped, an expert left at its
initial values. The loss on real text tells.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from btx_megatron.checkpoints.formats import config_of, open_checkpoint
from btx_megatron.checkpoints.stream import copy_plan
from btx_megatron.errors import UserError
from btx_megatron.evaluation.alone import EMBEDDING, loaded_model, need_megatron
from btx_megatron.evaluation.text import encode_file, tokenizer_file

_SEQ_LENGTH = 512


def checkpoint_loss(
    path: Path, text: Path, tokenizer: Path | None = None, seq_length: int | None = None
) -> dict[str, Any]:
    """Loss in nats a token over windows of ``seq_length``, each token of ``text`` counted once, without bos.

    ``seq_length``: by default 512, or what the model reads where that is less.
    The tokenizer is ``tokenizer`` (a ``tokenizer.json`` or a SentencePiece ``.model``), else the one beside
    the weights, else that of the run the checkpoint lies in. Raises UserError where text, tokenizer or
    Megatron is missing, or the model has a RoPE scaling.
    """
    need_megatron("--loss")
    source = open_checkpoint(path)
    config = config_of(source)
    seq_length = seq_length or min(_SEQ_LENGTH, config.seq_length)
    ids = encode_file(tokenizer_file(source.folder, tokenizer), text)
    rows = source.tensors[EMBEDDING].shape[0]
    if max(ids) >= rows:
        raise UserError(f"{text}: token {max(ids)} is beyond the {rows} of the model; name its --tokenizer")
    import numpy as np

    from btx_megatron.data.held_out import stream_windows

    windows = list(stream_windows(np.asarray(ids, dtype=np.int64), seq_length))
    with loaded_model(copy_plan(source), config, seq_length) as loaded:
        from btx_megatron.evaluation.loss import held_out_loss

        loss = held_out_loss(loaded.model, windows, loaded.stage, seq_length)
    return {"loss": loss, "perplexity": math.exp(loss), "tokens": len(ids) - 1}
