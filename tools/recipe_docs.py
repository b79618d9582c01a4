"""Writes docs/recipe.md from the dataclasses of recipe and manifest, so that it cannot fall behind them.

Python keeps the docstring of a class but not the text under a field, so that is read from the source
(ast); defaults come from the class itself. What is written by hand stands in recipe_header.md beside
this file, with a mark where each table goes.

    python tools/recipe_docs.py            write docs/recipe.md
    python tools/recipe_docs.py --check    exit code 1 if docs/recipe.md is not what would be written
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "recipe.md"
HEADER = ROOT / "tools" / "recipe_header.md"
RECIPE_MARK = "<!-- the fields -->"
MANIFEST_MARK = "<!-- the manifest -->"


class Field(NamedTuple):
    """One key of the recipe, as the page tells it."""

    name: str
    type: str
    default: str
    text: str


class Section(NamedTuple):
    """One dataclass and the first key where it stands."""

    key: str
    text: str
    fields: list[Field]


def main(arguments: list[str]) -> int:
    """Write or check the page; returns the exit code."""
    sys.path.insert(0, str(ROOT))
    page = render_page(HEADER.read_text(encoding="utf-8"))
    if arguments == ["--check"]:
        if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page:
            return 0
        print(f"{PAGE.name} is out of date: run python tools/recipe_docs.py", file=sys.stderr)
        return 1
    PAGE.write_text(page, encoding="utf-8")
    return 0


def render_page(header: str) -> str:
    """The header with the tables in the places of its marks."""
    from btx_megatron.manifest import Manifest
    from btx_megatron.recipe import Recipe

    sections = "\n".join(render_section(section) for section in collect_sections(Recipe, "", {}))
    page = header.replace(RECIPE_MARK, sections.rstrip())
    return page.replace(MANIFEST_MARK, render_manifest(Manifest))


def collect_sections(cls: type[Any], key: str, seen: dict[type[Any], str]) -> list[Section]:
    """``cls`` and the dataclasses below it, in the order of the fields; each once, where it is met first."""
    seen[cls] = key
    texts = field_texts(cls)
    hints = get_type_hints(cls)
    defaults = cls()
    fields: list[Field] = []
    below: list[Section] = []
    for field in dataclasses.fields(cls):
        child = _dataclass_in(hints[field.name])
        path = _child_key(key, field.name, hints[field.name])
        if child and child not in seen:
            below += collect_sections(child, path, seen)
        shown = _default(getattr(defaults, field.name))
        fields.append(Field(field.name, _type(str(field.type), child, seen), shown, texts[field.name]))
    return [Section(key, inspect.cleandoc(cls.__doc__ or ""), fields), *below]


def field_texts(cls: type[Any]) -> dict[str, str]:
    """Field -> the string literal under it in the source, inherited ones too.

    Raises ValueError for a field without one.
    """
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts: dict[str, str] = {}
    for base in filter(dataclasses.is_dataclass, cls.__bases__):
        texts |= field_texts(base)
    for statement, following in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            if not (isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)):
                raise ValueError(f"{cls.__name__}.{statement.target.id} has no text under it")
            texts[statement.target.id] = " ".join(str(following.value.value).split())
    return texts


def render_section(section: Section) -> str:
    """A heading, the class's text, and a table."""
    depth = section.key.count(".") + 2
    title = f"`{section.key}`" if section.key else "Top level"
    text = section.text.replace("``", "`")
    lines = [f"{'#' * depth} {title}", "", text, "", "| key | type | default | |", "|---|---|---|---|"]
    for field in section.fields:
        cells = (f"`{field.name}`", field.type, field.default, field.text.replace("``", "`"))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def render_manifest(cls: type[Any]) -> str:
    """A table of the manifest's keys."""
    texts = field_texts(cls)
    rows = [f"| `{name}` | {text.replace('``', '`')} |" for name, text in texts.items()]
    return "\n".join(["| key | |", "|---|---|", *rows])


def _dataclass_in(hint: Any) -> type[Any] | None:
    """The dataclass that a type is, or holds in a list or a mapping."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint
    inner = [found for argument in get_args(hint) if (found := _dataclass_in(argument))]
    return inner[0] if inner else None


def _child_key(key: str, name: str, hint: Any) -> str:
    suffix = "[]" if get_origin(hint) is list else ".NAME" if get_origin(hint) is dict else ""
    return f"{key}.{name}{suffix}" if key else f"{name}{suffix}"


def _type(annotation: str, child: type[Any] | None, seen: dict[type[Any], str]) -> str:
    """An annotation in YAML's words; a dataclass becomes a link to its section."""
    if child:
        key = seen[child]
        link = f"[`{key}`](#{''.join(c for c in key.lower() if c.isalnum() or c in '-_')})"
        many = {"list": "list of ", "dict": "mapping of name to "}.get(annotation.split("[")[0], "")
        return many + link
    tree = ast.parse(annotation, mode="eval").body
    return _words(tree)


def _words(node: ast.expr) -> str:
    names = {"str": "text", "int": "integer", "float": "number", "bool": "true or false", "None": "null"}
    match node:
        case ast.BinOp(left, ast.BitOr(), right):
            return f"{_words(left)} or {_words(right)}"
        case ast.Subscript(ast.Name("Literal"), choices):
            options = choices.elts if isinstance(choices, ast.Tuple) else [choices]
            return " or ".join(f"`{ast.literal_eval(option)}`" for option in options)
        case ast.Subscript(ast.Name("list"), inner):
            return f"list of {_words(inner)}"
        case ast.Subscript(ast.Name("dict"), ast.Tuple([_, inner])):
            return f"mapping of name to {_words(inner)}"
        case _:
            return names[ast.unparse(node)]


def _default(value: Any) -> str:
    """As YAML would have it; a section has no default of its own."""
    if dataclasses.is_dataclass(value):
        return ""
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{json.dumps(value, ensure_ascii=False)}`"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
