"""The manifest of a finished stage: what it was made from, by what, and what came out.

``manifest.json`` is the last file written into a stage's folder, so a folder that has one is whole. Its
fingerprint names the result: stages that read the folder note the fingerprint, and a change anywhere
upstream is seen by everything downstream.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import btx_megatron
from btx_megatron.errors import UserError

MANIFEST_FILE = "manifest.json"
CHECKPOINTS = "checkpoints"
"""Where a stage's folder has its model."""
EXPORTED = "model"
"""Where the export's folder has it."""


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` holds."""

    stage: str
    """``seed``, ``expert:DOMAIN``, ..."""
    created: str
    """When the stage was finished, UTC, ISO 8601."""
    duration_seconds: float
    """Wall time, summed over interrupted attempts."""
    inputs: dict[str, str]
    """Fingerprint of each stage that was read."""
    recipe: dict[str, Any]
    """The resolved recipe."""
    versions: dict[str, str]
    """Python, this package, torch and megatron_core (where installed)."""
    code_commit: str | None
    """Commit of this package's git checkout, with ``-dirty`` after it if files were changed; null
    outside git."""
    outputs: dict[str, Any]
    """What was made, as the stage reports it: hashes of tensors or files by name."""
    tokens: int | None
    """Tokens that the stage trained on; null where it does not train."""
    fingerprint: str = field(default="")
    """SHA-256 of stage, inputs and outputs as canonical JSON."""

    def __post_init__(self) -> None:
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", fingerprint(self.stage, self.inputs, self.outputs))


def make_manifest(
    stage: str,
    recipe: dict[str, Any],
    inputs: dict[str, str],
    outputs: dict[str, Any],
    tokens: int | None,
    duration_seconds: float,
    versions: dict[str, str] | None = None,
) -> Manifest:
    """The manifest of a stage that ends now; ``versions`` of where it ran, None: here."""
    return Manifest(
        stage=stage,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        duration_seconds=round(duration_seconds, 3),
        inputs=inputs,
        recipe=recipe,
        versions=versions or package_versions(),
        code_commit=code_commit(),
        outputs=outputs,
        tokens=tokens,
    )


def manifest_text(manifest: Manifest) -> str:
    """The file's content."""
    return json.dumps(asdict(manifest), indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a stage's folder, or None where there is none.

    Raises UserError if the file is not what a finished stage wrote.
    """
    path = folder / MANIFEST_FILE
    try:
        manifest = Manifest(**json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError):
        raise UserError(f"{path}: not a manifest; restore it, or delete {folder} to make it again") from None
    if manifest.fingerprint != fingerprint(manifest.stage, manifest.inputs, manifest.outputs):
        raise UserError(
            f"{path}: its fingerprint does not match its content, it was changed by hand; "
            f"restore it, or delete {folder} to make it again"
        )
    return manifest


def fingerprint(stage: str, inputs: dict[str, str], outputs: dict[str, Any]) -> str:
    """SHA-256, in hex, over canonical JSON: sorted keys, no spaces."""
    content = {"stage": stage, "inputs": inputs, "outputs": outputs}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def package_versions() -> dict[str, str]:
    """What a manifest says of this environment."""
    from importlib import metadata  # slow to import, and reading a manifest does not need it

    versions = {"python": platform.python_version(), "btx_megatron": btx_megatron.__version__}
    for package in ("torch", "megatron-core", "lm-eval"):
        try:
            versions[package.replace("-", "_")] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def code_commit() -> str | None:
    """Of this package's checkout, or of the one that it was copied from for a cluster's jobs."""
    frozen = Path(__file__).parents[1] / "COMMIT"
    if frozen.exists():
        return frozen.read_text(encoding="utf-8").strip()
    package = Path(__file__).parent
    tracked = ["git", "-C", str(package), "ls-files", "--error-unmatch", Path(__file__).name]
    describe = ["git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    try:
        # An installed package may lie inside somebody's checkout: that commit is not ours.
        subprocess.run(tracked, check=True, capture_output=True)
        return subprocess.run(describe, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
