"""Llama 3's RoPE scaling as Megatron computes it, against transformers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from btx_megatron.runtime import cpu_backend

WORDS = [f"w{number}" for number in range(20)]
SEQUENCE = 1536  # beyond a quarter of the longest wavelength that stays as it is


def llama_config(factor: float | None, head_width: int = 16, theta: float = 10_000.0) -> LlamaConfig:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=2 * head_width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=131072,
        initializer_range=0.4,
        rope_parameters={"rope_theta": theta} | (scaling if factor else {"rope_type": "default"}),
    )


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize(("head_width", "theta"), [(16, 1e4), (64, 5e5), (128, 5e5)])
def test_frequencies_are_transformers(factor: float, head_width: int, theta: float) -> None:
    cpu_backend.install()
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    theirs = LlamaRotaryEmbedding(llama_config(factor, head_width, theta)).inv_freq
    megatron = RotaryEmbedding(
        head_width, 1.0, rotary_base=theta, rope_scaling=True, rope_scaling_factor=factor,
        use_cpu_initialization=True,
    )  # fmt: skip
    torch.testing.assert_close(megatron.inv_freq, theirs, rtol=1e-6, atol=0)
    plain = LlamaRotaryEmbedding(llama_config(None, head_width, theta)).inv_freq
    assert (plain / theirs).max() == pytest.approx(factor)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_loss_over_a_long_window_is_transformers(tmp_path: Path, factor: float) -> None:
    torch.manual_seed(5)
    model = LlamaForCausalLM(llama_config(factor)).eval()
    model.save_pretrained(tmp_path / "llama")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(dict(zip(WORDS, range(20), strict=True))))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "llama" / "tokenizer.json"))
    ids = torch.randint(len(WORDS), (SEQUENCE + 1,))
    text = tmp_path / "text.txt"
    text.write_text(" ".join(WORDS[number] for number in ids))
    expected = loss(model, ids)
    plain = LlamaForCausalLM(llama_config(None)).eval()
    plain.load_state_dict(model.state_dict())
    assert abs(loss(plain, ids) - expected) > 1e-3  # the scaling matters here
    assert our_loss(tmp_path / "llama", text) == pytest.approx(expected, abs=1e-5)


def loss(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(ids[None, :-1]).logits[0]
    return torch.nn.functional.cross_entropy(logits, ids[1:]).item()


def our_loss(folder: Path, text: Path) -> float:
    command = [sys.executable, "-m", "btx_megatron", "verify", folder, "--loss", text, "--seq-length"]
    done = subprocess.run(
        [*map(str, command), str(SEQUENCE)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"^loss: (\S+)$", done.stdout, re.MULTILINE)
    assert found, done.stdout
    return float(found[1])
