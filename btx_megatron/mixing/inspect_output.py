"""What ``btx inspect`` says: plain text in columns for people, JSON with every number for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

from btx_megatron.checkpoints.config import ModelConfig
from btx_megatron.columns import columns
from btx_megatron.errors import UserError
from btx_megatron.mixing.facts import Facts
from btx_megatron.mixing.inspect import Difference, Inspection, Movement, inspect
from btx_megatron.mixing.task_vectors import KINDS, MATRICES, Moments, total


def run_inspect(paths: list[Path], base: Path | None, share: float | None, json_file: Path | None) -> None:
    """Inspect, and print it. Raises UserError also where ``json_file`` cannot be written."""
    inspection = inspect(paths, base, share)
    print(as_text(inspection))
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(as_json(inspection), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json {json_file}: cannot be written ({error.strerror})") from None


# text


def as_text(inspection: Inspection) -> str:
    """Facts, differences, movement and warnings; one blank line between them."""
    blocks = _facts(inspection.checkpoints)
    if len(inspection.checkpoints) > 1:
        blocks.append(_differences(inspection.differences, list(inspection.checkpoints)))
        blocks += _movement(inspection)
    if inspection.warnings:
        blocks.append("\n".join(f"warning: {line}" for line in inspection.warnings))
    elif inspection.movement is not None:
        blocks.append("no warnings")
    return "\n\n".join(blocks)


def _facts(checkpoints: dict[str, Facts]) -> list[str]:
    """One column a property; the models apart, each once."""
    if len(checkpoints) == 1:
        (facts,) = checkpoints.values()
        rows = [["checkpoint", facts.path], *_model_rows(facts.model), *_row_of(facts).items()]
        return [columns([list(row) for row in rows])]
    rows = [["checkpoint", *next(_row_of(facts) for facts in checkpoints.values())]]
    rows += [[label, *_row_of(facts).values()] for label, facts in checkpoints.items()]
    models: dict[ModelConfig | None, list[str]] = {}
    for label, facts in checkpoints.items():
        models.setdefault(facts.model, []).append(label)
    lines = [
        f"model{'' if len(models) == 1 else ' of ' + ', '.join(labels)}: {_model_line(model)}"
        for model, labels in models.items()
    ]
    return [columns(rows, right=(3, 4)), "\n".join(lines)]


def _row_of(facts: Facts) -> dict[str, str]:
    parameters = f"{facts.parameters:,}"
    if facts.active_parameters != facts.parameters:
        parameters += f" ({facts.active_parameters:,} active)"
    tokenizer = ", ".join(f"{name} {digest[:12]}" for name, digest in facts.tokenizer.items())
    came_from = ", ".join(f"{key} {value}" for key, value in facts.came_from.items())
    return {
        "format": facts.format,
        "dtype": facts.dtype,
        "parameters": parameters,
        "bytes": f"{facts.bytes:,}",
        "tokenizer": tokenizer or "-",
        "came from": came_from or "-",
    }


def _model_rows(model: ModelConfig | None) -> list[list[str]]:
    if model is None:
        return [["model", "not said: no configuration, arguments or recipe in it"]]
    rope = f"{model.rotary_base:,.0f}"
    if model.rope_scaling is not None:
        rope += f", {dict(model.rope_scaling).get('rope_type', 'scaled')}"
    experts = "none, dense"
    if model.num_experts:
        experts = f"{model.num_experts}, top-{model.moe_router_topk}"
    return [
        ["layers", str(model.num_layers)],
        ["hidden", str(model.hidden_size)],
        ["ffn", str(model.ffn_hidden_size)],
        ["heads", f"{model.num_attention_heads} of {model.kv_channels}"],
        ["groups", str(model.num_query_groups)],
        ["vocabulary", str(model.vocab_size or "not said")],
        ["rope", rope],
        ["tied", "yes" if model.tied else "no"],
        ["experts", experts],
    ]


def _model_line(model: ModelConfig | None) -> str:
    return ", ".join(" ".join(row) for row in _model_rows(model))


def _differences(found: list[Difference], labels: list[str]) -> str:
    if not found:
        return "differences: none"
    rows = [["differs", *labels, ""]]
    for difference in found:
        values = [difference.values.get(label, "-") for label in labels]
        rows.append([difference.what, *values, "stops a mix" if difference.stops_mix else "mix allows it"])
    return columns(rows)


def _movement(inspection: Inspection) -> list[str]:
    movement = inspection.movement
    if movement is None:
        return ["movement: not measured, no weight has the same shape in all of them"]
    everything = total(movement.places)
    assert everything is not None
    why = ""
    if not inspection.base_named:
        why = (
            " (the first; --base names another. If it is a branch itself, its own way is in all numbers:"
            " cosines of 0.5 then mean independent)"
        )
    share = everything.read / everything.entries
    sample = "all entries" if share == 1 else f"a fixed sample, {share:.1%} of the entries (--sample 1: all)"
    lines = [
        f"base: {movement.base}{why}",
        f"read: {sample}, {movement.read_bytes:,} bytes in {movement.seconds:.1f} s",
    ]
    if movement.not_compared:
        lines.append(f"not compared, shapes differ: {', '.join(movement.not_compared)}")
    matrices = total(movement.places, MATRICES)
    blocks = ["\n".join(lines), *([_experts_table(movement, matrices)] if matrices is not None else [])]
    return [*blocks, _places_table(movement)]


def _experts_table(movement: Movement, matrices: Moments) -> str:
    """A row an expert: how far, how alike the base, and the cosines of the task vectors."""
    names = movement.experts
    rows = [["expert", "distance", "cosine", "moved", *(f"~{name}" for name in names if len(names) > 1)]]
    for number, name in enumerate(names):
        row = [
            name,
            _short(matrices.distance(number)),
            f"{matrices.cosine_with_base(number):.4f}",
            f"{matrices.moved_share(number):.1%}",
        ]
        if len(names) > 1:
            row += [f"{matrices.cosine(number, other):.3f}" for other in range(len(names))]
        rows.append(row)
    legend = (
        "of all matrices: distance ||A - base|| / ||base||, cosine of A and base, share of entries that moved"
    )
    if len(names) > 1:
        legend += "; ~NAME: cosine of the task vectors"
    return legend + "\n" + columns(rows, right=range(1, len(rows[0])))


def _places_table(movement: Movement) -> str:
    """A row for each kind, over all layers and then layer by layer: distances and sign conflicts."""
    places = [
        ("all", kind, moments) for kind in KINDS if (moments := total(movement.places, (kind,))) is not None
    ]
    places += [
        (str(layer), kind, moments) for (kind, layer), moments in movement.places.items() if layer is not None
    ]
    several = len(movement.experts) > 1
    rows = [["layer", "kind", *movement.experts, *(["conflicts", "by chance"] if several else [])]]
    for layer, kind, moments in places:
        row = [layer, kind, *(_short(moments.distance(n)) for n in range(len(movement.experts)))]
        if several:
            row += [_percent(moments.conflict_share), _percent(moments.chance)]
        rows.append(row)
    legend = "distance from the base by layer and kind"
    if several:
        legend += (
            ";\nconflicts: opposite signs among the entries that two or more experts moved (nothing trimmed);"
            "\nby chance: what that share is where every sign is a coin's toss"
        )
    return legend + "\n" + columns(rows, right=range(2, len(rows[0])))


def _short(value: float) -> str:
    return f"{value:.4f}" if value == 0 or value >= 0.001 else f"{value:.1e}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1%}"


# JSON


def as_json(inspection: Inspection) -> dict[str, Any]:
    """Every number, for ``json.dumps``; what is no number (NaN, infinite) is null."""
    movement = inspection.movement
    return {
        "checkpoints": {label: asdict(facts) for label, facts in inspection.checkpoints.items()},
        "differences": [asdict(difference) for difference in inspection.differences],
        "movement": _movement_json(movement) if movement is not None else None,
        "warnings": inspection.warnings,
    }


def _movement_json(movement: Movement) -> dict[str, Any]:
    totals = {kind: moments for kind in KINDS if (moments := total(movement.places, (kind,))) is not None}
    matrices = total(movement.places, MATRICES)
    return {
        "base": movement.base,
        "experts": movement.experts,
        "sample": movement.share,
        "read_bytes": movement.read_bytes,
        "seconds": round(movement.seconds, 3),
        "not_compared": movement.not_compared,
        "matrices": _moments_json(matrices, movement.experts) if matrices is not None else None,
        "kinds": {kind: _moments_json(moments, movement.experts) for kind, moments in totals.items()},
        "places": [
            {"kind": kind, "layer": layer, **_moments_json(moments, movement.experts)}
            for (kind, layer), moments in movement.places.items()
        ],
    }


def _moments_json(moments: Moments, experts: Sequence[str]) -> dict[str, Any]:
    return {
        "entries": int(moments.entries),
        "entries_read": int(moments.read),
        "base_norm": _number(math.sqrt(max(0.0, float(moments.gram[0, 0])))),
        "experts": {
            name: {
                "distance": _number(moments.distance(number)),
                "cosine_with_base": _number(moments.cosine_with_base(number)),
                "norm_ratio": _number(moments.scale(number)),
                "moved_share": _number(moments.moved_share(number)),
            }
            for number, name in enumerate(experts)
        },
        "task_vector_cosines": [
            [experts[first], experts[second], _number(moments.cosine(first, second))]
            for first, second in combinations(range(len(experts)), 2)
        ],
        "moved_by_two_or_more": _number(moments.shared),
        "sign_conflicts": _number(moments.conflict_share),
        "sign_conflicts_by_chance": _number(moments.chance),
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
