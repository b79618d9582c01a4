"""Recipe -> Megatron's TransformerConfig: what a stage's model is, and how its layers compute."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from btx_megatron.errors import UserError
from btx_megatron.expert_masks import masks_experts
from btx_megatron.model.implementation import LOCAL, TRANSFORMER_ENGINE, check_stage, transformer_impl
from btx_megatron.recipe import Layout, Recipe, Stage, Training

# off: what needs apex, or Transformer Engine. TE's own layers add up gradients by themselves (model.build)
_LOCAL: dict[str, Any] = {
    "gradient_accumulation_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
    "apply_rope_fusion": False,
    "cross_entropy_loss_fusion": False,
    "transformer_impl": LOCAL,
    "use_te_activation_func": True,  # the backend's: ours
}
_TRANSFORMER_ENGINE: dict[str, Any] = {
    "gradient_accumulation_fusion": False,
    "bias_activation_fusion": True,  # SwiGLU, with the gates of a MoE
    "bias_dropout_fusion": True,
    "apply_rope_fusion": True,
    "cross_entropy_loss_fusion": True,
    "cross_entropy_fusion_impl": "te",
    "transformer_impl": TRANSFORMER_ENGINE,
}


def transformer_config(recipe: Recipe, stage: Stage, num_experts: int | None) -> TransformerConfig:
    """Megatron's configuration of the model of one stage; ``num_experts`` None gives a dense model."""
    model, training = recipe.model, stage.training
    dtype = torch.bfloat16 if training.bf16 else torch.float32
    impl = transformer_impl(recipe.launch, training)
    check_stage(stage, impl)
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
        add_bias_linear=False,
        bf16=training.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        # the same weights wherever they are drawn; but weights in FP8 are made where they lie
        use_cpu_initialization=not training.fp8_param_gather,
        calculate_per_token_loss=True,
        **_parallelism(stage.layout, moe=num_experts is not None),
        **_pipeline(stage.layout, model.num_layers),
        **_recompute(stage.layout),
        **_moe(recipe, num_experts, impl == TRANSFORMER_ENGINE),
        moe_ffn_hidden_size=None if num_experts is None else recipe.expert_ffn_hidden_size,
        **(_TRANSFORMER_ENGINE if impl == TRANSFORMER_ENGINE else _LOCAL),
        **_fp8(recipe, training, num_experts),
        cuda_graph_impl=training.cuda_graph_impl,
        cuda_graph_modules=[],  # layers as a whole
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


def _moe(recipe: Recipe, num_experts: int | None, fused: bool) -> dict[str, Any]:
    """``fused``: the build has grouped matrix products and a fused permutation."""
    if num_experts is None:
        return {}
    moe = recipe.moe
    if moe.moe_grouped_gemm and not fused:
        raise UserError(
            "moe.moe_grouped_gemm true: this rank builds local layers, which have no grouped products; "
            "leave it out"
        )
    balancing = moe.moe_router_load_balancing_type
    # the paper's own loss is attached by our router, which Megatron need not know
    megatrons = balancing != "btx"
    return {
        "num_moe_experts": num_experts,
        "moe_router_topk": moe.topk(num_experts),
        "moe_router_pre_softmax": moe.moe_router_pre_softmax or moe.topk(num_experts) == 1,
        "moe_expert_capacity_factor": dispatched_capacity(recipe, moe.capacity_factor, num_experts),
        "moe_router_load_balancing_type": balancing if megatrons else "none",
        "moe_aux_loss_coeff": moe.moe_aux_loss_coeff if megatrons else 0.0,
        "moe_z_loss_coeff": moe.moe_z_loss_coeff,
        "moe_router_dtype": moe.moe_router_dtype,
        "moe_token_dispatcher_type": moe.moe_token_dispatcher_type,
        "moe_grouped_gemm": fused and moe.moe_grouped_gemm is not False,
        "moe_permute_fusion": fused,
    }


def dispatched_capacity(recipe: Recipe, capacity_factor: float | None, num_experts: int) -> float | None:
    """What Megatron's dispatchers are told.

    Without a capacity they count on top-k routes of every token; where experts are masked there may be fewer,
    so they get one that drops nothing.
    """
    return capacity_factor or (num_experts if masks_experts(recipe) else None)


def _fp8(recipe: Recipe, training: Training, num_experts: int | None) -> dict[str, Any]:
    if training.fp8 is None:
        return {}
    start, end = training.num_layers_at_start_in_bf16, training.num_layers_at_end_in_bf16
    # an expert's tokens come in multiples of 16: by more routes of weight 0 before they are dispatched, which
    # is faster than copying after it. Not where experts are masked: a masked one must see nobody
    padded = (
        num_experts is not None
        and recipe.moe.moe_token_dispatcher_type == "alltoall"
        and not masks_experts(recipe)
    )
    return {
        "fp8": training.fp8,
        "fp8_recipe": training.fp8_recipe,
        "fp8_param": training.fp8_param_gather,
        "fp8_amax_history_len": training.fp8_amax_history_len,
        "fp8_amax_compute_algo": training.fp8_amax_compute_algo,
        "first_last_layers_bf16": start + end > 0,
        "num_layers_at_start_in_bf16": start,
        "num_layers_at_end_in_bf16": end,
        "moe_router_padding_for_quantization": padded,
    }
