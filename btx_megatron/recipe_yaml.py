"""YAML as a recipe has it: by the rules of YAML 1.2, and nothing in it is interpolated.

YAML 1.1, which PyYAML reads, takes ``24:00:00`` for the number 86,400, ``no`` for false and ``010`` for 8: a
time limit, a domain and an account would silently become something else.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_RESOLVED = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_INTERPOLATION = re.compile(r"(\\*)\$\{")


class _Loader(yaml.SafeLoader):
    """Plain values only; a key that is given twice is an error."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own, copied when one is added)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                where, what = "while constructing a mapping", f"found duplicate key {key}"
                raise yaml.constructor.ConstructorError(where, node.start_mark, what, node.start_mark)
        self.flatten_mapping(node)
        for key, _ in node.value:
            if key.tag in _NUMBERS:
                key.tag = "tag:yaml.org,2002:str"  # the name of an expert, as it is written
        return super().construct_mapping(node, deep=deep)


for _tag, (_pattern, _first) in _RESOLVED.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def read_yaml(text: str) -> Any:
    """Plain values, as OmegaConf must be given them; numbers that are keys are texts.

    Raises yaml.YAMLError for what is none, has a key twice, or holds itself.
    """
    try:
        return literal(yaml.load(text, _Loader))
    except RecursionError:
        raise yaml.YAMLError("an anchor holds itself") from None


def literal(value: Any) -> Any:
    """Plain values as OmegaConf must be given them, so that ``${HOME}`` in a text stays what it is."""
    if isinstance(value, dict):
        return {key: literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [literal(item) for item in value]
    return _INTERPOLATION.sub(r"\1\1\\${", value) if isinstance(value, str) else value
