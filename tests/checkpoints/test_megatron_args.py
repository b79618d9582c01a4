"""What Megatron-LM's saved arguments say of a model, by its own parser."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest

from btx_megatron.checkpoints.config import ModelConfig
from btx_megatron.checkpoints.formats import ONE_RANK, approximations
from btx_megatron.checkpoints.hf_config import to_hf
from btx_megatron.checkpoints.megatron_args import SaysNothing, from_args, to_args
from btx_megatron.errors import UserError
from btx_megatron.mixing.flags import megatron_flags
from btx_megatron.runtime import cpu_backend

LLAMA = (
    "--num-layers 2 --hidden-size 16 --ffn-hidden-size 24 --num-attention-heads 4 --kv-channels 4 "
    "--group-query-attention --num-query-groups 2 --seq-length 64 --max-position-embeddings 64 "
    "--position-embedding-type rope --rotary-base 500000 --normalization RMSNorm --swiglu "
    "--disable-bias-linear --untie-embeddings-and-output-weights"
)
MIXTRAL = f"{LLAMA} --num-experts 4 --moe-router-topk 2"


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    cpu_backend.install()
    from megatron.training.arguments import add_megatron_arguments

    made = add_megatron_arguments(ArgumentParser(allow_abbrev=False))
    assert isinstance(made, ArgumentParser)
    return made


def model_of(parser: ArgumentParser, *flags: str) -> ModelConfig:
    return from_args(parser.parse_args(" ".join(flags).split()), "here")


def test_what_its_parser_saves_is_read(parser: ArgumentParser) -> None:
    found = model_of(parser, LLAMA, "--norm-epsilon 1e-6")
    assert found == ModelConfig(
        num_layers=2,
        hidden_size=16,
        ffn_hidden_size=24,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=4,
        seq_length=64,
        rotary_base=500_000.0,
        norm_epsilon=1e-6,
        tied=False,
    )
    assert to_hf(found, 32, "float32")["rms_norm_eps"] == 1e-6
    assert from_args(to_args(found, 32), "here") == found


def test_older_arguments_have_another_name_for_epsilon(parser: ArgumentParser) -> None:
    args = vars(parser.parse_args(LLAMA.split()))
    del args["layernorm_epsilon"]
    assert from_args(Namespace(**args, norm_epsilon=1e-6), "here").norm_epsilon == 1e-6
    with pytest.raises(SaysNothing, match="lack 'norm_epsilon'"):
        from_args(Namespace(**args), "here")


def test_the_experts_width_is_the_experts(parser: ArgumentParser) -> None:
    assert model_of(parser, MIXTRAL, "--moe-ffn-hidden-size 8").ffn_hidden_size == 8
    assert model_of(parser, MIXTRAL).ffn_hidden_size == 24
    assert model_of(parser, LLAMA, "--moe-ffn-hidden-size 8").ffn_hidden_size == 24


@pytest.mark.parametrize(
    "flags",
    [
        "--apply-layernorm-1p", "--rotary-percent 0.5", "--rotary-interleaved",
        "--position-embedding-type none", "--rotary-seq-len-interpolation-factor 2", "--no-rope-freq 4",
        "--window-size 64,0", "--quick-geglu", "--qk-layernorm", "--add-qkv-bias", "--mtp-num-layers 1",
        "--normalization LayerNorm", "--attention-output-gate", "--softmax-type learnable",
        "--multi-latent-attention", "--glu-linear-offset 1.0",
    ],
)  # fmt: skip
def test_another_model_of_such_weights_is_refused(parser: ArgumentParser, flags: str) -> None:
    for model in (LLAMA, MIXTRAL):
        with pytest.raises(UserError, match=r"here: its saved arguments say \w+ .*supported, with"):
            model_of(parser, model, flags)


@pytest.mark.parametrize("gone", ["--swiglu", "--disable-bias-linear"])
def test_a_gate_and_no_biases_are_needed(parser: ArgumentParser, gone: str) -> None:
    with pytest.raises(UserError, match="here: its saved arguments say "):
        model_of(parser, LLAMA.replace(gone, ""))


@pytest.mark.parametrize(
    "flags",
    [
        "--moe-router-score-function sigmoid", "--moe-router-topk-scaling-factor 2.5",
        "--moe-router-num-groups 2 --moe-router-group-topk 1", "--moe-router-enable-expert-bias",
        "--moe-shared-expert-intermediate-size 8", "--moe-router-load-balancing-type sinkhorn",
        "--moe-mlp-glu-interleave-size 8",
    ],
)  # fmt: skip
def test_another_router_or_other_experts_are_refused(parser: ArgumentParser, flags: str) -> None:
    with pytest.raises(UserError, match="here: its saved arguments say "):
        model_of(parser, MIXTRAL, flags)
    model_of(parser, LLAMA, flags)  # a dense model has none


def test_a_capacity_is_told_where_mixtral_has_none(parser: ArgumentParser) -> None:
    found = model_of(parser, MIXTRAL, "--moe-expert-capacity-factor 1.25")
    assert approximations(found)[0].startswith("moe_expert_capacity_factor 1.25")
    assert from_args(to_args(found, 32), "here") == found


def test_a_base_that_is_no_whole_number_cannot_leave_hugging_face(parser: ArgumentParser) -> None:
    args = vars(parser.parse_args(LLAMA.split())) | {"rotary_base": 10_000.5}
    found = from_args(Namespace(**args), "here")
    with pytest.raises(UserError, match=r"rope_theta 10000.5: .* whole number"):
        to_args(found, 32)


def test_the_flags_that_are_printed_give_the_model_again(parser: ArgumentParser, tmp_path: Path) -> None:
    found = model_of(parser, MIXTRAL, "--norm-epsilon 1e-6")
    flags = megatron_flags(found, 32, tmp_path, "megatron", ONE_RANK)
    assert from_args(parser.parse_args(" ".join(flags).split()), "here") == found
