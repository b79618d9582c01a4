"""Legacy shards of a random model, cut and saved by a few independent lines of torch."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from btx_megatron.checkpoints.megatron_legacy import LegacyCheckpoint
from btx_megatron.checkpoints.pieces import TensorInfo, check_cover, read_rows

LAYERS, HIDDEN, WIDTH, VOCABULARY, HEADS, GROUPS, EXPERTS = 8, 16, 24, 32, 4, 2, 4
Q = (HEADS + 2 * GROUPS) * HIDDEN // HEADS
LAYER = "decoder.layers."
EXPERT = "mlp.experts.experts."

SHARED = {
    "embedding.word_embeddings.weight": (VOCABULARY, HIDDEN),
    f"{LAYER}self_attention.linear_qkv.layer_norm_weight": (LAYERS, HIDDEN),
    f"{LAYER}self_attention.linear_qkv.weight": (LAYERS, Q, HIDDEN),
    f"{LAYER}self_attention.linear_proj.weight": (LAYERS, HIDDEN, HIDDEN),
    "decoder.final_layernorm.weight": (HIDDEN,),
    "output_layer.weight": (VOCABULARY, HIDDEN),
}
DENSE = SHARED | {
    f"{LAYER}mlp.linear_fc1.layer_norm_weight": (LAYERS, HIDDEN),
    f"{LAYER}mlp.linear_fc1.weight": (LAYERS, 2 * WIDTH, HIDDEN),
    f"{LAYER}mlp.linear_fc2.weight": (LAYERS, HIDDEN, WIDTH),
}
MOE = SHARED | {
    f"{LAYER}pre_mlp_layernorm.weight": (LAYERS, HIDDEN),
    f"{LAYER}mlp.router.weight": (LAYERS, EXPERTS, HIDDEN),
    f"{LAYER}{EXPERT}linear_fc1.weight": (LAYERS, EXPERTS, 2 * WIDTH, HIDDEN),
    f"{LAYER}{EXPERT}linear_fc2.weight": (LAYERS, EXPERTS, HIDDEN, WIDTH),
}
LOCAL = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def random_model(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def cut(key: str, weight: Tensor, rank: int, of: int) -> Tensor:
    """A tensor-parallel rank's slice, by torch alone."""
    if "norm" in key or "router" in key:
        return weight
    if "linear_proj" in key or "linear_fc2" in key:
        return weight.chunk(of, dim=1)[rank].clone()
    if "linear_fc1" in key:
        gate, up = weight.chunk(2)
        return torch.cat([gate.chunk(of)[rank], up.chunk(of)[rank]])
    return weight.chunk(of)[rank].clone()


def shard(
    model: dict[str, Tensor],
    layers: range,
    first: bool,
    last: bool,
    tensor: tuple[int, int] = (0, 1),
    experts: range = range(EXPERTS),
    expert_tensor: tuple[int, int] | None = None,
    style: str = "te",
) -> dict[str, Any]:
    """One model chunk as a plain state dict."""
    state: dict[str, Any] = {}
    for name, weight in model.items():
        if not name.startswith(LAYER):
            if first if "embedding" in name else last:
                state[name] = cut(name, weight, *tensor)
            continue
        rest = name.removeprefix(LAYER)
        for local, layer in enumerate(layers):
            prefix = f"{LAYER}{local}."
            if EXPERT not in rest:
                key = LOCAL.get(rest, rest) if style == "local" else rest
                state[prefix + key] = cut(rest, weight[layer], *tensor)
                state[f"{prefix}mlp.linear_fc1._extra_state"] = None
                continue
            for number, expert in enumerate(experts):
                matrix = rest.removeprefix(EXPERT)
                one = f"{matrix}{number}" if style == "grouped" else f"local_experts.{number}.{matrix}"
                state[f"{prefix}mlp.experts.{one}"] = cut(
                    rest, weight[layer, expert], *(expert_tensor or tensor)
                )
    if last and "output_layer.weight" not in model and not first:  # tied: the last stage keeps a copy
        state["output_layer.weight"] = cut("embedding", model["embedding.word_embeddings.weight"], *tensor)
    return state


def arguments(model: dict[str, Tensor], **sizes: Any) -> argparse.Namespace:
    moe = {"num_experts": EXPERTS} if f"{LAYER}mlp.router.weight" in model else {"num_experts": None}
    defaults = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "padded_vocab_size": VOCABULARY,
        "num_attention_heads": HEADS,
        "num_query_groups": GROUPS,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "params_dtype": torch.float32,
        "untie_embeddings_and_output_weights": "output_layer.weight" in model,
    }
    return argparse.Namespace(**(defaults | moe | sizes))


def save(folder: Path, name: str, args: argparse.Namespace, **models: dict[str, Any]) -> None:
    path = folder / "iter_0000007" / name / "model_optim_rng.pt"
    path.parent.mkdir(parents=True)
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}}
    torch.save(
        {"args": args, "checkpoint_version": 3.0, "iteration": 7, "optimizer": optimizer} | models, path
    )
    (folder / "latest_checkpointed_iteration.txt").write_text("7")


def read_all(checkpoint: LegacyCheckpoint) -> dict[str, Tensor]:
    """The whole model, put together part by part; every part's pieces cover it once."""
    model = {}
    for name, info in checkpoint.tensors.items():
        axes = name.startswith(LAYER) + (EXPERT in name)
        part = TensorInfo(info.shape[axes:], info.dtype)
        whole = torch.empty(info.shape, dtype=info.dtype)
        for index in itertools.product(*map(range, info.shape[:axes])):
            pieces = checkpoint.pieces(name, index)
            check_cover(pieces, part.shape, name)
            whole[index] = read_rows(checkpoint.files, pieces, part, 0, part.shape[0])
        model[name] = whole
    return model


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert found[name].dtype == weight.dtype
        assert torch.equal(found[name], weight), name


def save_dense(folder: Path, tensor: int, pipeline: int, model: dict[str, Tensor], style: str = "te") -> None:
    args = arguments(
        model,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        transformer_impl=style,
    )
    size = LAYERS // pipeline
    for t, p in itertools.product(range(tensor), range(pipeline)):
        name = f"mp_rank_{t:02d}_{p:03d}" if pipeline > 1 else f"mp_rank_{t:02d}"
        layers = range(p * size, (p + 1) * size)
        state = shard(model, layers, p == 0, p == pipeline - 1, (t, tensor), style=style)
        save(folder, name, args, model=state)


def save_moe(
    folder: Path, model: dict[str, Tensor], sizes: tuple[int, int, int, int], style: str = "te"
) -> None:
    tensor, pipeline, expert, expert_tensor = sizes
    args = arguments(
        model,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
        moe_grouped_gemm=style == "grouped",
    )
    layers, local = LAYERS // pipeline, EXPERTS // expert
    # ranks of a stage as Megatron numbers them: tensor ranks side by side, and so are slices of experts
    for p, r in itertools.product(range(pipeline), range(tensor * expert)):
        t, e, slice_ = r % tensor, r // expert_tensor % expert, r % expert_tensor
        name = f"mp_rank_{t:02d}" + (f"_{p:03d}" if pipeline > 1 else "")
        name += f"_{e:03d}" if expert > 1 else ""
        if (folder / "iter_0000007" / name).exists():
            continue
        state = shard(
            model,
            range(p * layers, (p + 1) * layers),
            p == 0,
            p == pipeline - 1,
            (t, tensor),
            range(e * local, (e + 1) * local),
            (slice_, expert_tensor),
            style,
        )
        save(folder, name, args, model=state)
