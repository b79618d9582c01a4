"""Small corpora for the tests of this room."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from btx_megatron.recipe import Recipe
from btx_megatron.recipe_file import parse_recipe


def small_recipe(**data: Any) -> Recipe:
    """Two domains of the standard library's packages, one of them with two sources."""

    def source(name: str, **more: Any) -> dict[str, Any]:
        return {"name": name, "path": f"package:{name}", "include": ["*.py"], **more}

    domains = [
        {"name": "formats", "sources": [source("json"), source("email", weight=3.0)]},
        {"name": "loops", "sources": [source("asyncio")]},
    ]
    return parse_recipe(
        {
            "data": {"domains": domains, "held_out_fraction": 0.1, "num_workers": 1, **data},
            "tokenizer": {"vocab_size": 600, "training_bytes": 100_000},
            "model": {"make_vocab_size_divisible_by": 128},
        }
    )


def write_files(folder: Path, files: dict[str, str | bytes]) -> Path:
    """Write ``files`` (relative path: content) below ``folder``."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def random_words(seed: int, count: int) -> str:
    """Deterministic text of pronounceable words."""
    draw = random.Random(seed)
    syllables = [a + b for a in "bdfklmnprstv" for b in "aeiou"]
    return " ".join("".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(count))


def json_lines(texts: list[str], key: str = "text") -> str:
    """JSON lines, one a text, as a web corpus has them."""
    lines = [json.dumps({"id": i, key: text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    return "".join(f"{line}\n" for line in lines)
