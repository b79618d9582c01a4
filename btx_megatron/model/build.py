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
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttentionSubmodules
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

from btx_megatron.expert_masks import masks_experts
from btx_megatron.model.freeze import freeze
from btx_megatron.model.layers import LlamaModel, LocalBackend, RotaryAttention
from btx_megatron.model.routers import Router, SampleTop1Router, replace_quietly
from btx_megatron.recipe import Layout, Recipe, Stage

# what a build without Transformer Engine and apex cannot fuse
_NO_FUSION: dict[str, Any] = {
    "gradient_accumulation_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
    "apply_rope_fusion": False,
    "cross_entropy_loss_fusion": False,
}


def transformer_config(recipe: Recipe, stage: Stage, num_experts: int | None) -> TransformerConfig:
    """Megatron's configuration of the model of one stage; ``num_experts`` None gives a dense model."""
    model, training = recipe.model, stage.training
    dtype = torch.bfloat16 if training.bf16 else torch.float32
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        attention_dropout=model.attention_dropout,
        hidden_dropout=model.hidden_dropout,
        layernorm_epsilon=model.norm_epsilon,
        init_method_std=model.init_method_std,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        use_te_activation_func=True,  # the backend's: ours
        add_bias_linear=False,
        bf16=training.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        use_cpu_initialization=True,
        calculate_per_token_loss=True,
        **_parallelism(stage.layout, moe=num_experts is not None),
        **_pipeline(stage.layout, model.num_layers),
        **_recompute(stage.layout),
        **_moe(recipe, num_experts),
        moe_ffn_hidden_size=None if num_experts is None else recipe.expert_ffn_hidden_size,
        **_NO_FUSION,
    )


def _parallelism(layout: Layout, moe: bool) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": layout.tensor_model_parallel_size,
        "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
        # a dense model in a layout with EP (the evaluation's) has no experts to share out
        "expert_model_parallel_size": layout.expert_model_parallel_size if moe else 1,
        "expert_tensor_parallel_size": layout.expert_tensor_parallel_size if moe else None,
        "context_parallel_size": layout.context_parallel_size,
        "sequence_parallel": layout.sequence_parallel,
    }


def _pipeline(layout: Layout, num_layers: int) -> dict[str, Any]:
    chunk = layout.num_layers_per_virtual_pipeline_stage
    return {
        "virtual_pipeline_model_parallel_size": (
            None if chunk is None else layout.pipeline_layers(num_layers)[0] // chunk
        ),
        "num_layers_in_first_pipeline_stage": layout.decoder_first_pipeline_num_layers,
        "num_layers_in_last_pipeline_stage": layout.decoder_last_pipeline_num_layers,
        "batch_p2p_comm": False,
        # gloo and NCCL alike: without it ranks of an interleaved pipeline that both send first would wait
        "overlap_p2p_comm": chunk is not None,
    }


def _recompute(layout: Layout) -> dict[str, Any]:
    names = ("granularity", "method", "num_layers", "modules")
    return {f"recompute_{name}": getattr(layout, f"recompute_{name}") for name in names}


def _moe(recipe: Recipe, num_experts: int | None) -> dict[str, Any]:
    if num_experts is None:
        return {}
    moe = recipe.moe
    balancing = moe.moe_router_load_balancing_type
    # the paper's own loss is attached by our router, which Megatron need not know
    megatrons = balancing != "btx"
    return {
        "num_moe_experts": num_experts,
        "moe_router_topk": moe.topk(num_experts),
        "moe_router_pre_softmax": moe.moe_router_pre_softmax or moe.topk(num_experts) == 1,
        "moe_expert_capacity_factor": _dispatched_capacity(recipe, moe.capacity_factor, num_experts),
        "moe_router_load_balancing_type": balancing if megatrons else "none",
        "moe_aux_loss_coeff": moe.moe_aux_loss_coeff if megatrons else 0.0,
        "moe_z_loss_coeff": moe.moe_z_loss_coeff,
        "moe_router_dtype": moe.moe_router_dtype,
        "moe_token_dispatcher_type": moe.moe_token_dispatcher_type,
    }


def _dispatched_capacity(recipe: Recipe, capacity_factor: float | None, num_experts: int) -> float | None:
    """What Megatron's dispatchers are told.

    Without a capacity they count on top-k routes of every token; where experts are masked there may be fewer,
    so they get one that drops nothing.
    """
    return capacity_factor or (num_experts if masks_experts(recipe) else None)


def layer_spec(
    config: TransformerConfig, recipe: Recipe, layer: int = 0, groups: Sequence[int] | None = None
) -> ModuleSpec:
    """One transformer layer: attention, and a feed-forward that is dense or a mixture of experts.

    ``layer`` counts from 0 over the whole model.
    """
    backend = LocalBackend()
    mlp = get_mlp_module_spec_for_backend(
        backend, config.num_moe_experts, moe_grouped_gemm=False, use_te_activation_func=True
    )
    keys_map = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if config.num_moe_experts is None:
        keys_map["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    else:
        mlp.keywords["submodules"].router, soft = _router(recipe, layer, groups)
        if soft:
            mlp = partial(_soft, mlp, _dispatched_capacity(recipe, None, config.num_moe_experts))
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backend.layer_norm(rms_norm=True),
            self_attention=ModuleSpec(
                module=RotaryAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=backend.column_parallel_linear(),
                    core_attention=backend.core_attention(),
                    linear_proj=backend.row_parallel_linear(),
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=backend.layer_norm(rms_norm=True),
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=keys_map,
        ),
    )


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

    Under bf16 the modules compute in bfloat16; the router's logits and softmax stay in fp32, and so do
    the optimizer's master copies of all weights (the router's too).
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
    groups = recipe.expert_groups if recipe.moe.moe_router_one_per_group else None
    spec = TransformerBlockSubmodules(
        layer_specs=[layer_spec(config, recipe, first + local, groups) for local in range(layers)],
        layer_norm=LocalBackend().layer_norm(rms_norm=True),
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
    return chunk


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The GPTModel inside DDP's and Float16Module's wrappers."""
    while isinstance(inner := getattr(model, "module", None), torch.nn.Module):
        model = inner
    return model
