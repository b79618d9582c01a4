"""A tiny dense checkpoint on disk, without Megatron."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch_dist import save_torch_dist

from btx_megatron.checkpoints.tracker import RELEASE, write_tracker

LAYERS, HIDDEN, WIDTH, VOCABULARY = 2, 8, 12, 16

SHAPES = {
    "embedding.word_embeddings.weight": (VOCABULARY, HIDDEN),
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (LAYERS, HIDDEN),
    "decoder.layers.self_attention.linear_qkv.weight": (LAYERS, 2 * HIDDEN, HIDDEN),
    "decoder.layers.self_attention.linear_proj.weight": (LAYERS, HIDDEN, HIDDEN),
    "decoder.layers.mlp.linear_fc1.layer_norm_weight": (LAYERS, HIDDEN),
    "decoder.layers.mlp.linear_fc1.weight": (LAYERS, 2 * WIDTH, HIDDEN),
    "decoder.layers.mlp.linear_fc2.weight": (LAYERS, HIDDEN, WIDTH),
    "decoder.final_layernorm.weight": (HIDDEN,),
    "output_layer.weight": (VOCABULARY, HIDDEN),
}


def random_weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def write_dense(folder: Path, weights: dict[str, Tensor], stacked: bool = True) -> Path:
    """A checkpoint of ``weights``, by torch's own writer: one key with a layer axis, or one key a layer."""
    state: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if stacked or not name.startswith("decoder.layers."):
            state[name] = tensor
            continue
        for layer in range(len(tensor)):
            state[name.replace("decoder.layers.", f"decoder.layers.{layer}.")] = tensor[layer].clone()
    save_torch_dist(folder / RELEASE, state)
    write_tracker(folder, RELEASE)
    return folder
