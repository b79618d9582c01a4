"""Recipes of comparisons for the tests here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

DOMAINS = [
    {"name": "json", "sources": [{"name": "stdlib", "path": "stdlib:", "include": ["json/*.py"]}]},
    {"name": "mail", "sources": [{"name": "stdlib", "path": "stdlib:", "include": ["email/*.py"]}]},
]
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "data": {"held_out_max_tokens": 2000, "domains": DOMAINS},
    "tokenizer": {"vocab_size": 512},
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 2,
        "seq_length": 64,
    },
    "training": {
        "train_iters": 12,
        "micro_batch_size": 4,
        "global_batch_size": 4,
        "lr": 3e-3,
        "lr_warmup_iters": 2,
        "log_interval": 4,
    },
    "baselines": [],
    "launch": {"device": "cpu", "threads_per_rank": 1},  # numbers depend on it, in the last digits
}
VARIANTS = {
    "btx": [],
    "unbalanced": ["moe.moe_router_load_balancing_type=none"],
    "split": ["mix.experts=split", "mix.chunks=2"],
    "soft": ["moe.moe_router_type=soft"],
    "upcycled": ["method=sparse_upcycling"],
    "dense": ["method=dense"],
    "btm": ["method=btm"],
}


def write_recipe(folder: Path, **compare: Any) -> Path:
    """A recipe with a comparison in a folder; returns its path."""
    path = folder / "recipe.yaml"
    content = RECIPE | {"run_folder": str(folder / "runs"), "compare": {"variants": VARIANTS} | compare}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
