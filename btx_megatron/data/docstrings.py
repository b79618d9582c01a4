"""The docstrings of a Python module, read from its source without importing it."""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Iterator
from pathlib import Path


def module_docstrings(source: bytes) -> str:
    """Docstrings of a module, its classes and functions, in source order, one blank line apart.

    Empty if there are none. Raises ValueError where the source is not Python that this interpreter
    can parse.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in somebody else's strings
            tree = ast.parse(source)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
    # A string literal may spell a lone surrogate ("\ud800"), which no UTF-8 text can hold.
    text = "\n\n".join(_docstrings(tree)).encode("utf-8", "backslashreplace").decode("utf-8")
    return text + "\n" if text else ""


def module_name(root: Path, path: Path) -> str:
    """Dotted name of the module at ``path`` in the package at ``root``."""
    parts = [root.name, *path.relative_to(root).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = _own_docstring(node)
        if docstring:
            yield docstring
    # Only statements can hold definitions; expressions, most of a tree, are not walked.
    for branch in ("body", "handlers", "orelse", "finalbody", "cases"):
        statements = getattr(node, branch, None)
        for statement in statements if isinstance(statements, list) else []:
            yield from _docstrings(statement)


def _own_docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    docstring = ast.get_docstring(node, clean=False)
    return inspect.cleandoc(docstring).strip() if docstring else ""
