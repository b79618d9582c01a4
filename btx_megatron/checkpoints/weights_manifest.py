"""The manifest that speaks of a checkpoint's weights, found from where they lie."""

from __future__ import annotations

import json
from pathlib import Path

from btx_megatron.checkpoints.tracker import TRACKER
from btx_megatron.manifest import CHECKPOINTS, EXPORTED, MANIFEST_FILE, Manifest, read_manifest


def manifest_of_weights(weights: Path) -> Manifest | None:
    """The manifest that speaks of a checkpoint's weights; None where there is none.

    It lies beside them, or in the folder of the stage that they belong to: STAGE/checkpoints/iter_N,
    OUTPUT/iter_N with a tracker, export/model. Others may call a file of theirs ``manifest.json``, too.
    Raises UserError as read_manifest does.
    """
    folders = [weights]
    if (weights.parent / TRACKER).exists() or weights.name == EXPORTED:
        folders.append(weights.parent)
    if weights.parent.name == CHECKPOINTS:
        folders.append(weights.parent.parent)
    ours = (folder for folder in folders if _is_ours(folder / MANIFEST_FILE))
    folder = next(ours, None)
    return read_manifest(folder) if folder is not None else None


def _is_ours(path: Path) -> bool:
    """Whether a manifest is a stage's, or was: one that cannot be read may be."""
    try:
        told = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except ValueError:
        return True
    return isinstance(told, dict) and "fingerprint" in told
