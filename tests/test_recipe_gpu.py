"""What a recipe may ask of a GPU (FP8, Transformer Engine, grouped products, CUDA graphs), and what not."""

from __future__ import annotations

from typing import Any

import pytest

from btx_megatron.errors import UserError
from btx_megatron.launch.machine import Machine
from btx_megatron.pipeline import stages_of
from btx_megatron.recipe import Recipe
from btx_megatron.recipe_checks import check_recipe
from btx_megatron.recipe_file import parse_recipe

MODEL = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "seq_length": 64,
}


def recipe_of(finetune: dict[str, Any], **values: Any) -> Recipe:
    tree: dict[str, Any] = {
        "data": {"domains": [{"name": name, "sources": [{"path": "x"}]} for name in "ab"]},
        "training": {"train_iters": 20, "lr_warmup_iters": 2, "bf16": True},
        "model": MODEL | values.pop("model", {}),
        "baselines": [],
        "stages": {"finetune": finetune},
    }
    recipe = parse_recipe(tree | values)
    check_recipe(recipe, "recipe.yaml")
    return recipe


GRAPHS = {"train_iters": 20, "lr_warmup_iters": 2, "bf16": True, "cuda_graph_impl": "local"}


def training(**values: Any) -> dict[str, Any]:
    return {"training": {"fp8": "hybrid"} | values}


def test_fp8_for_one_stage() -> None:
    recipe = recipe_of(training(fp8_recipe="blockwise", num_layers_at_end_in_bf16=1))
    assert recipe.stage("finetune").training.fp8 == "hybrid"
    assert recipe.stage("expert:a").training.fp8 is None


@pytest.mark.parametrize(
    ("finetune", "values", "message"),
    [
        (
            training(bf16=False),
            {"training": {"train_iters": 20, "lr_warmup_iters": 2}},
            "stages.finetune.training.fp8 hybrid needs bf16: true",
        ),
        (
            training(),
            {"launch": {"device": "cpu"}},
            "training.fp8 hybrid (compute capability 8.9: Ada, Hopper or later) needs a GPU, and launch",
        ),
        (
            training(fp8_recipe="blockwise"),
            {"launch": {"device": "cpu"}},
            "fp8 hybrid (compute capability 9.0: Hopper or later) needs a GPU",
        ),
        (
            training(),
            {"launch": {"transformer_impl": "local"}},
            "needs Transformer Engine, but launch.transformer_impl is local",
        ),
        ({"training": {"fp8_param_gather": True}}, {}, "fp8_param_gather needs fp8"),
        (training(fp8_param_gather=True), {}, "needs layout.use_distributed_optimizer: true"),
        ({"training": {"num_layers_at_start_in_bf16": 1}}, {}, "num_layers_at_start_in_bf16 1 needs fp8"),
        (
            training(fp8_recipe="delayed", num_layers_at_start_in_bf16=1),
            {},
            "num_layers_at_start_in_bf16 1 does not go with fp8_recipe delayed",
        ),
        (training(num_layers_at_end_in_bf16=5), {}, "num_layers_at_end_in_bf16 5: at most the 4 layers"),
        (training(fp8_amax_history_len=0), {}, "fp8_amax_history_len 0: must be at least 1"),
        (
            training(fp8_recipe="delayed")
            | {"layout": {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}},
            {},
            "recompute_modules layernorm does not go with fp8_recipe delayed",
        ),
        (training(), {"model": {"ffn_hidden_size": 120}}, "120 is not a multiple of 16, which FP8 needs"),
        (training(), {"model": {"hidden_size": 72}}, "model.hidden_size 72 is not a multiple of 16"),
        (
            training() | {"layout": {"tensor_model_parallel_size": 4, "sequence_parallel": True}},
            {"model": {"ffn_hidden_size": 96}},
            "96 / 4 ranks is not a multiple of 16",
        ),
        (training(), {"model": {"seq_length": 40}}, "tokens of a micro-batch 40 is not a multiple of 16"),
        (
            {
                "training": {"cuda_graph_impl": "local"},
                "layout": {
                    "recompute_granularity": "full",
                    "recompute_method": "uniform",
                    "recompute_num_layers": 1,
                },
            },
            {},
            "a graph cannot hold layers that are recomputed in full",
        ),
        ({"training": {"cuda_graph_impl": "local"}}, {}, "a graph cannot hold a mixture"),
        (
            {},
            {"moe": {"moe_grouped_gemm": True}, "launch": {"device": "cpu"}},
            "moe.moe_grouped_gemm true needs Transformer Engine's layers on a GPU",
        ),
        (
            {},
            {"launch": {"device": "cpu", "transformer_impl": "transformer_engine"}},
            "launch.transformer_impl transformer_engine needs GPUs, and launch.device is cpu",
        ),
    ],
)
def test_refusals(finetune: dict[str, Any], values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        recipe_of(finetune, **values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"finetune": training()}, "stage finetune: training.fp8 hybrid (compute capability 8.9"),
        (
            {"finetune": {}, "method": "dense", "training": GRAPHS},
            "stage seed: training.cuda_graph_impl local",
        ),
        (
            {
                "finetune": {
                    "layout": {"recompute_granularity": "selective", "recompute_modules": ["layernorm"]}
                }
            },
            "stage finetune: layout.recompute_modules layernorm",
        ),
        ({"finetune": {}, "moe": {"moe_grouped_gemm": True}}, "moe.moe_grouped_gemm true"),
        (
            {"finetune": {}, "launch": {"transformer_impl": "transformer_engine"}},
            "launch.transformer_impl transformer_engine",
        ),
    ],
)
def test_nothing_starts_without_what_a_later_stage_needs(
    values: dict[str, Any], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(values.pop("finetune"), **values)
    stages = stages_of(recipe)
    with pytest.raises(UserError) as error:
        Machine(cores=2).check_accelerator(recipe, stages)
    assert str(error.value).startswith(key)
    assert "needs a GPU, and none is visible here" in str(error.value)
    # stages that train nothing may run anywhere
    Machine(cores=2).check_accelerator(recipe, [stage for stage in stages if stage.task != "train"])
    monkeypatch.setattr("btx_megatron.launch.machine.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package transformer_engine, which is not installed"):
        Machine(cores=2, gpus=("0",)).check_accelerator(recipe, stages)
    monkeypatch.setattr("btx_megatron.launch.machine.find_spec", lambda name: name)
    Machine(cores=2, gpus=("0",)).check_accelerator(recipe, stages)


def test_a_rank_on_a_gpu_that_is_too_old_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from btx_megatron.model.implementation import check_stage

    monkeypatch.setattr("btx_megatron.model.implementation.have_cuda", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 0))
    asked = recipe_of(training()).stage("finetune")
    with pytest.raises(UserError) as error:
        check_stage(asked, "transformer_engine")
    assert "needs compute capability 8.9" in str(error.value)
    assert "this is NVIDIA A100-SXM4-80GB, 8.0" in str(error.value)
    with pytest.raises(UserError, match="this rank builds local ones, on NVIDIA A100"):
        check_stage(asked, "local")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 9))
    check_stage(asked, "transformer_engine")
    asked.training.fp8_recipe = "blockwise"
    with pytest.raises(UserError, match=r"needs compute capability 9\.0"):
        check_stage(asked, "transformer_engine")
