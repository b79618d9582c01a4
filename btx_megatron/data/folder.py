"""Where things lie in a prepared data folder (see prepare), for whoever reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from btx_megatron.errors import UserError

STATISTICS = "statistics.json"


def token_prefix(data_folder: Path, side: str, domain: str, source: str) -> Path:
    """Path of a source's token files without ``.bin`` and ``.idx``; ``side``: train or held_out."""
    return data_folder / side / domain / f"{source}_text_document"


def read_statistics(data_folder: Path) -> dict[str, Any]:
    """What ``prepare`` returned for this folder. Raises UserError if it is not a prepared one."""
    try:
        return json.loads((data_folder / STATISTICS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{data_folder / STATISTICS}: no prepared data here; run `btx prepare`") from None
