"""The loss of a checkpoint of any format on a text, before any training: ``btx verify --loss``.

Wrong weights load without a word: norms that stay at 1, gate and up rows swapped, an expert left at its
initial values. The loss on real text tells. It is computed through Megatron in one process and in fp32, from
a copy of the weights in a temporary folder.
"""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from btx_megatron.checkpoints.config import ModelConfig
from btx_megatron.checkpoints.formats import config_of, open_checkpoint, write_checkpoint
from btx_megatron.checkpoints.names import ROUTER
from btx_megatron.checkpoints.stream import PlannedTensor, copy_plan
from btx_megatron.errors import UserError
from btx_megatron.recipe import Layout, Model, Moe, Recipe, Stage, Training

_EMBEDDING = "embedding.word_embeddings.weight"
_WINDOWS_AT_ONCE = 4


def checkpoint_loss(
    path: Path, text: Path, tokenizer: Path | None = None, seq_length: int = 512
) -> dict[str, Any]:
    """Loss in nats a token over windows of ``seq_length``, each token of ``text`` counted once, without bos.

    The tokenizer is ``tokenizer`` (a ``tokenizer.json`` or a SentencePiece ``.model``), else the one beside
    the weights, else that of the run the checkpoint lies in. Raises UserError where text, tokenizer or
    Megatron is missing, or the model has a RoPE scaling.
    """
    if find_spec("megatron") is None:
        raise UserError("--loss needs Megatron, which is not installed here; install the extra 'train'")
    source = open_checkpoint(path)
    config = config_of(source)
    if config.rope_scaling is not None:
        raise UserError(f"{path}: --loss does not know rope_scaling {dict(config.rope_scaling)} yet")
    ids = _encode(_tokenizer_file(source.folder, tokenizer), text)
    rows = source.tensors[_EMBEDDING].shape[0]
    if max(ids) >= rows:
        raise UserError(f"{text}: token {max(ids)} is beyond the {rows} of the model; name its --tokenizer")
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights"
        write_checkpoint(weights, "megatron", [_in_fp32(tensor) for tensor in copy_plan(source)], config)
        experts = source.tensors[ROUTER].shape[1] if ROUTER in source.tensors else None
        loss = _loss(weights, config, rows, experts, ids, seq_length)
    return {"loss": loss, "perplexity": math.exp(loss), "tokens": len(ids) - 1}


def _in_fp32(tensor: PlannedTensor) -> PlannedTensor:
    import torch

    return replace(tensor, info=replace(tensor.info, dtype=torch.float32))


def _tokenizer_file(folder: Path, given: Path | None) -> Path:
    if given is not None:
        return given
    beside = [folder / "tokenizer.json", folder / "tokenizer.model"]
    of_run = [parent / "data" / "tokenizer" / "tokenizer.model" for parent in folder.absolute().parents]
    for path in (*beside, *of_run):
        if path.exists():
            return path
    raise UserError(f"{folder}: no tokenizer beside the weights; name one with --tokenizer PATH")


def _encode(tokenizer: Path, text: Path) -> list[int]:
    try:
        content = text.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{text}: cannot be read ({error.strerror}); name a text file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{text}: not UTF-8 (byte {error.start}); name a text file") from None
    if tokenizer.suffix == ".json":
        if find_spec("tokenizers") is None:
            raise UserError(f"{tokenizer}: needs the package tokenizers; install the extra 'hf'")
        import tokenizers

        ids = list(
            tokenizers.Tokenizer.from_file(str(tokenizer)).encode(content, add_special_tokens=False).ids
        )
    else:
        from btx_megatron.data.tokenizer import Tokenizer

        ids = Tokenizer(tokenizer).encode([content])[0]
    if len(ids) < 2:
        raise UserError(f"{text}: {len(ids)} tokens; a loss needs at least 2")
    return ids


def _loss(
    weights: Path, config: ModelConfig, rows: int, experts: int | None, ids: list[int], seq_length: int
) -> float:
    import numpy as np

    from btx_megatron.data.held_out import stream_windows
    from btx_megatron.runtime import ranks

    stage = Stage(training=Training(micro_batch_size=_WINDOWS_AT_ONCE), layout=Layout())
    recipe = _recipe(config, seq_length)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ranks.free_port())}
    with ranks.joined_ranks():
        ranks.set_layout(stage.layout, seed=1)
        from btx_megatron.evaluation.loss import held_out_loss
        from btx_megatron.model.build import build_model
        from btx_megatron.training.checkpoint import load_weights

        model = build_model(recipe, stage, rows, experts)
        load_weights(weights, model)
        windows = list(stream_windows(np.asarray(ids, dtype=np.int64), seq_length))
        return held_out_loss(model, windows, stage, seq_length)


def _recipe(config: ModelConfig, seq_length: int) -> Recipe:
    """A recipe that builds the model; what a model does not depend on is left as it is."""
    model = Model(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        seq_length=seq_length,
        rotary_base=config.rotary_base,
        norm_epsilon=config.norm_epsilon,
        untie_embeddings_and_output_weights=not config.tied,
    )
    moe = Moe(
        moe_router_topk=config.moe_router_topk,
        moe_router_pre_softmax=config.moe_router_pre_softmax,
        moe_router_load_balancing_type="none",
    )
    return Recipe(model=model, moe=moe)
