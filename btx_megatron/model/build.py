"""Recipe -> Megatron-Core GPTModel, dense or MoE: the same Llama-shaped layer with one or N experts.

Checkpoint keys follow Transformer Engine's naming whatever the build, so that a checkpoint written on a
laptop loads on an H100 and back. The local build keeps norms in modules of their own, where TE fuses
them into the linear layer that follows; ``sharded_state_dict_keys_map`` gives them TE's names on disk.
In a MoE layer TE has nothing to fuse the second norm into and calls it ``pre_mlp_layernorm``; Megatron's
own local spec renames it all the same, ours does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from btx_megatron.model.config import dispatched_capacity, transformer_config
from btx_megatron.model.freeze import freeze
from btx_megatron.model.implementation import LOCAL
from btx_megatron.model.layers import LlamaModel, LocalBackend, RotaryAttention
from btx_megatron.model.routers import Router, SampleTop1Router, replace_quietly
from btx_megatron.recipe import Recipe, Stage


def layer_spec(
    config: TransformerConfig, recipe: Recipe, layer: int = 0, groups: Sequence[int] | None = None
) -> ModuleSpec:
    """One transformer layer: attention, and a feed-forward that is dense or a mixture of experts.

    ``layer`` counts from 0 over the whole model.
    """
    backend = _backend(config)
    mlp = get_mlp_module_spec_for_backend(
        backend,
        config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        use_te_activation_func=config.use_te_activation_func,
    )
    norm = backend.layer_norm(rms_norm=True)
    if config.num_moe_experts is not None:
        mlp.keywords["submodules"].router, soft = _router(recipe, layer, groups)
        if soft:
            mlp = partial(_soft, mlp, dispatched_capacity(recipe, None, config.num_moe_experts))
    fused = backend.fuse_layernorm_and_linear()
    linear_qkv = backend.column_parallel_layer_norm_linear() if fused else backend.column_parallel_linear()
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if fused else norm,
            self_attention=ModuleSpec(
                module=SelfAttention if fused else RotaryAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linear_qkv,  # type: ignore[arg-type]
                    core_attention=backend.core_attention(),
                    linear_proj=backend.row_parallel_linear(),
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp if fused and config.num_moe_experts is None else norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={} if fused else _fused_names(moe=config.num_moe_experts is not None),
        ),
    )


def _backend(config: TransformerConfig) -> BackendSpecProvider:
    if config.transformer_impl == LOCAL:
        return LocalBackend()
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def _fused_names(moe: bool) -> dict[str, str]:
    """What the local build's norms are called on disk."""
    names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    return names if moe else names | {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def _router(recipe: Recipe, layer: int, groups: Sequence[int] | None) -> tuple[Any, bool]:
    """The layer's router, and whether it is soft where the others are not: the first of Sample Top-1."""
    moe = recipe.moe
    if moe.moe_router_type == "sample_top1" and layer == 0:
        return partial(Router, moe=moe, capacity_factor=None), True
    options: dict[str, Any] = {"moe": moe, "capacity_factor": moe.capacity_factor, "groups": groups}
    if moe.moe_router_type == "sample_top1":
        return partial(SampleTop1Router, seed=moe.moe_router_seed, **options), False
    return partial(Router, **options), False


def _soft(mlp: Any, capacity: float | None, config: TransformerConfig, **kwargs: Any) -> torch.nn.Module:
    """A MoE layer in which every token takes all experts.

    Megatron's dispatchers go by the config's number of experts a token: with another router alone they would
    cut or pad the routes, silently.
    """
    everything = {"moe_router_topk": config.num_moe_experts, "moe_expert_capacity_factor": capacity}
    return mlp(config=replace_quietly(config, **everything), **kwargs)  # type: ignore[no-any-return]


def build_model(
    recipe: Recipe, stage: Stage, padded_vocab_size: int, num_experts: int | None = None
) -> list[torch.nn.Module]:
    """This rank's part of the model, after ``runtime.ranks.set_layout``: one chunk, or several from different
    depths where the pipeline is interleaved; what the stage freezes takes no gradient.

    Layers are local or Transformer Engine's (``launch.transformer_impl``), with the same weights under the
    same names on disk. Under bf16 the modules compute in bfloat16; the router's logits and softmax stay in
    fp32, and so do the optimizer's master copies of all weights (the router's too).
    """
    config = transformer_config(recipe, stage, num_experts)
    chunks = config.virtual_pipeline_model_parallel_size
    # which stage is first and last, and which schedule runs, Megatron asks this global
    parallel_state.set_virtual_pipeline_model_parallel_world_size(chunks)
    numbers = [None] if chunks is None else range(chunks)
    model = [_build_chunk(recipe, config, padded_vocab_size, number) for number in numbers]
    for chunk in model:
        freeze(chunk, stage.training.freeze)
    return [Float16Module(config, chunk) for chunk in model] if config.bf16 else model


def _build_chunk(
    recipe: Recipe, config: TransformerConfig, padded_vocab_size: int, number: int | None
) -> torch.nn.Module:
    layers = get_num_layers_to_build(config, number)
    first = get_transformer_layer_offset(config, number)
    grouped = config.num_moe_experts is not None and recipe.moe.moe_router_one_per_group
    groups = recipe.expert_groups if grouped else None
    spec = TransformerBlockSubmodules(
        layer_specs=[layer_spec(config, recipe, first + local, groups) for local in range(layers)],
        layer_norm=_backend(config).layer_norm(rms_norm=True),
    )
    whole = {"ignore_virtual": number is None, "vp_stage": number}
    chunk: torch.nn.Module = LlamaModel(
        config,
        spec,  # type: ignore[arg-type]
        vocab_size=padded_vocab_size,
        max_sequence_length=recipe.model.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(**whole),
        post_process=parallel_state.is_pipeline_last_stage(**whole),
        share_embeddings_and_output_weights=not recipe.model.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=recipe.model.rotary_base,  # type: ignore[arg-type]
        rope_scaling=recipe.model.use_rope_scaling,
        rope_scaling_factor=recipe.model.rope_scaling_factor,
        vp_stage=number,
    )
    if torch.cuda.is_available():
        chunk.cuda(torch.cuda.current_device())
    _accumulate_gradients(chunk)
    return chunk


def _accumulate_gradients(chunk: torch.nn.Module) -> None:
    """Let Transformer Engine's products add to Megatron's fp32 gradient buffers themselves.

    Megatron's own flag for it, ``gradient_accumulation_fusion``, is for the output head as well, which has it
    from apex alone.
    """
    for module in chunk.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True  # type: ignore[assignment]


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The GPTModel inside DDP's and Float16Module's wrappers."""
    while isinstance(inner := getattr(model, "module", None), torch.nn.Module):
        model = inner
    return model
