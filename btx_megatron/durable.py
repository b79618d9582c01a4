"""Files that survive a crash: whole, or the one before."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(path: Path, content: str) -> None:
    """Write a file so that a reader sees it whole, or the one before; a crash of the machine may lose it."""
    temporary = temporary_of(path)
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, path)


def write_durably(path: Path, content: str | bytes) -> None:
    """Write a file so that after a crash it is whole or the one before; text as UTF-8."""
    temporary = temporary_of(path)
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def temporary_of(path: Path) -> Path:
    """Where a file lies until it is whole."""
    return path.with_name(f".{path.name}.tmp")


def sync(path: Path) -> None:
    """Bring a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Bring everything below a folder to disk."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(root, name))
        sync(Path(root))
