"""Tiny Hugging Face Llama folders, written with plain safetensors, and what a test asks of a command line."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from btx_megatron.checkpoints.formats import open_checkpoint
from btx_megatron.checkpoints.pieces import indices_of, read_part
from btx_megatron.cli import main

LAYERS, HIDDEN, WIDTH, HEADS, GROUPS, VOCABULARY = 2, 16, 24, 4, 2, 32

Change = Callable[[dict[str, Tensor]], Any]


def random_weights(
    seed: int, dtype: torch.dtype = torch.bfloat16, tied: bool = False, **sizes: int
) -> dict[str, Tensor]:
    """A Llama by Hugging Face's names; ``sizes``: layers, hidden, width, vocabulary."""
    layers, hidden = sizes.get("layers", LAYERS), sizes.get("hidden", HIDDEN)
    width, vocabulary = sizes.get("width", WIDTH), sizes.get("vocabulary", VOCABULARY)
    keys = hidden // HEADS * GROUPS
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        **({} if tied else {"lm_head.weight": (vocabulary, hidden)}),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "self_attn.q_proj.weight": (hidden, hidden),
            prefix + "self_attn.k_proj.weight": (keys, hidden),
            prefix + "self_attn.v_proj.weight": (keys, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, hidden),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "mlp.gate_proj.weight": (width, hidden),
            prefix + "mlp.up_proj.weight": (width, hidden),
            prefix + "mlp.down_proj.weight": (hidden, width),
        }
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write_llama(
    folder: Path,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tied: bool = False,
    shards: int = 1,
    tokenizer: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    change: Change | None = None,
    **sizes: int,
) -> Path:
    """A folder of ``random_weights``; ``config`` goes over ``config.json``, ``change`` over the weights."""
    folder.mkdir(parents=True)
    weights = random_weights(seed, dtype, tied, **sizes)
    if change is not None:
        change(weights)
    content = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": sizes.get("vocabulary", VOCABULARY),
        "hidden_size": sizes.get("hidden", HIDDEN),
        "intermediate_size": sizes.get("width", WIDTH),
        "num_hidden_layers": sizes.get("layers", LAYERS),
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        **(config or {}),
    }
    (folder / "config.json").write_text(json.dumps(content))
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
    else:
        _write_shards(folder, weights, shards)
    return folder


def _write_shards(folder: Path, weights: dict[str, Tensor], shards: int) -> None:
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        names = sorted(weights)[number::shards]
        save_file({name: weights[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def read_hf(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, by safetensors' own reader."""
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def read_ours(folder: Path) -> dict[str, Tensor]:
    """Every weight of a checkpoint of any format, under our stacked names."""
    source = open_checkpoint(folder)
    return {
        name: torch.stack([read_part(source, name, index) for index in indices_of(name, info)]).reshape(
            info.shape
        )
        for name, info in source.tensors.items()
    }


def hashes(folder: Path) -> dict[str, str]:
    """Hash of every tensor, by the manifest."""
    table = json.loads((folder / "manifest.json").read_text())["outputs"]["tensors"]
    return {name: row["xxh3_128"] for name, row in table.items()}


def tree(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_btx(*arguments: object) -> tuple[int, str, str]:
    """A command line in this process: exit code, output, errors."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["btx", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = main()
    return code, out.getvalue(), err.getvalue()


def mix_arguments(sources: Mapping[str, Path] | Sequence[Path], output: Path, *more: object) -> list[object]:
    """``mix --expert a=PATH ... --output OUTPUT`` and what follows."""
    named = sources if isinstance(sources, Mapping) else dict(zip("abcdefgh", sources, strict=False))
    experts = [word for name, path in named.items() for word in ("--expert", f"{name}={path}")]
    return ["mix", *experts, "--output", output, *more]


def assert_refused(folder: Path, message: str, *arguments: object, code: int = 2) -> str:
    """The command line ends with one line that holds ``message``, and changes nothing in ``folder``."""
    before = tree(folder)
    names = {path.relative_to(folder) for path in folder.rglob("*")}
    found, out, err = run_btx(*arguments)
    assert (found, out) == (code, ""), err
    assert err.startswith("btx: ")
    assert err.count("\n") == 1, err
    assert message in err, err
    assert {path.relative_to(folder) for path in folder.rglob("*")} == names
    assert tree(folder) == before
    return err


def assert_mix_refused(good: Path, bad: Path, message: str, *more: object) -> str:
    return assert_refused(
        good.parent, message, *mix_arguments({"good": good, "bad": bad}, good.parent / "out", *more)
    )
