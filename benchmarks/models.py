"""Random Llama models in Hugging Face format, to measure with.

They look like experts of one branch: a common seed model and a small change of each one's own, so that a tool
that looks at distances finds what it would find in earnest. Weights are made and written one tensor at a time
(the safetensors format is a length, a JSON header and the bytes), so memory stays at a few copies of the
largest. The tokenizer knows single bytes and no merges: small, legal for every reader, shared by all.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARD_BYTES = 2 * 10**9
SEED_SCALE, OWN_SCALE = 0.02, 0.002


@dataclass(frozen=True)
class Size:
    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    vocab: int

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes in the order of the model."""
        hidden, key_value = self.hidden, self.hidden // self.heads * self.groups
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, hidden)}
        for layer in range(self.layers):
            of_layer: dict[str, tuple[int, ...]] = {
                "input_layernorm": (hidden,),
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.k_proj": (key_value, hidden),
                "self_attn.v_proj": (key_value, hidden),
                "self_attn.o_proj": (hidden, hidden),
                "post_attention_layernorm": (hidden,),
                "mlp.gate_proj": (self.ffn, hidden),
                "mlp.up_proj": (self.ffn, hidden),
                "mlp.down_proj": (hidden, self.ffn),
            }
            found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
        return found | {"model.norm.weight": (hidden,), "lm_head.weight": (self.vocab, hidden)}


SIZES = {
    "tiny": Size(layers=2, hidden=64, ffn=128, heads=4, groups=2, vocab=512),
    "25M": Size(layers=8, hidden=512, ffn=1408, heads=8, groups=4, vocab=4096),
    "0.3B": Size(layers=16, hidden=1024, ffn=3456, heads=16, groups=4, vocab=32000),  # 277 million
    "1.1B": Size(layers=22, hidden=2048, ffn=5632, heads=32, groups=4, vocab=32000),  # TinyLlama's shape
}


def make(folder: Path, experts: int, size: str) -> list[Path]:
    """Write `experts` models as subfolders of a new folder, and return them."""
    folder.mkdir(parents=True)
    paths = [folder / f"expert{number}" for number in range(experts)]
    for number, path in enumerate(paths):
        path.mkdir()
        _write_weights(path, SIZES[size].weights(), number)
        _write_json(path / "config.json", _config(SIZES[size]))
        for name, content in _tokenizer().items():
            _write_json(path / name, content)
    return paths


def _write_weights(folder: Path, weights: dict[str, tuple[int, ...]], expert: int) -> None:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in weights.items():
        size = 2 * math.prod(shape)
        if filled + size > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        total = sum(2 * math.prod(shape) for shape in weights.values())
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        _write_json(folder / "model.safetensors.index.json", index)
    for file, shard in zip(names, shards, strict=True):
        _write_shard(folder / file, shard, expert)


def _write_shard(path: Path, shard: dict[str, tuple[int, ...]], expert: int) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shard.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shard.items():
            file.write(_weight(name, shape, expert))


def _weight(name: str, shape: tuple[int, ...], expert: int) -> memoryview:
    """The bytes of one bf16 weight: around 1 for a norm, around 0 for a matrix."""
    import torch

    generator = torch.Generator()
    generator.manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(shape, generator=generator) * SEED_SCALE
    generator.manual_seed(zlib.crc32(f"{name} of {expert}".encode()))
    values += torch.randn(shape, generator=generator) * OWN_SCALE
    if len(shape) == 1:
        values += 1
    return memoryview(values.bfloat16().view(torch.uint8).numpy()).cast("B")


def _config(size: Size) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": size.hidden,
        "intermediate_size": size.ffn,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.groups,
        "head_dim": size.hidden // size.heads,
        "vocab_size": size.vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,  # transformers 4 reads this and torch_dtype, 5 the two below
        "torch_dtype": "bfloat16",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "dtype": "bfloat16",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": SEED_SCALE,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _tokenizer() -> dict[str, Any]:
    """Files of a byte-level tokenizer: <unk> <s> </s>, then the 256 letters that stand for bytes."""
    special = ["<unk>", "<s>", "</s>"]
    # GPT-2's letters for bytes: printable Latin-1 stands for itself, the others follow from 256 on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    letters = [chr(byte) for byte in sorted(printable)] + [chr(256 + n) for n in range(256 - len(printable))]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<unk>",
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": {token: number for number, token in enumerate(special + letters)},
        "merges": [],
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": n, "content": token} | flags for n, token in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048}
    names = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=True))
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings | names}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def find(folder: Path) -> list[Path]:
    """The models below a folder, by name."""
    return sorted(path.parent for path in folder.glob("*/config.json"))


def weight_files(experts: list[Path]) -> list[Path]:
    return [file for path in experts for file in sorted(path.glob("*.safetensors"))]


def total_bytes(experts: list[Path]) -> int:
    return sum(file.stat().st_size for file in weight_files(experts))


def mixture_bytes(experts: list[Path]) -> int:
    """Bytes of a mixture's bf16 weights: everyone's feed-forwards, everything else once, and the routers."""
    config = json.loads((experts[0] / "config.json").read_text(encoding="utf-8"))
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    layers, hidden, ffn = config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]
    numbers = 0
    for name, shape in Size(layers, hidden, ffn, heads, groups, config["vocab_size"]).weights().items():
        numbers += math.prod(shape) * (len(experts) if ".mlp." in name else 1)
    return 2 * (numbers + layers * len(experts) * hidden)
