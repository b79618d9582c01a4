"""compare.json and its pages from runs on disk that were written by hand."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from recipes import write_recipe

from btx_megatron.comparison.page import (
    Heading,
    Picture,
    Table,
    Text,
    _least_of_a_layer,
    markdown,
    one_html,
    page_blocks,
    print_results,
)
from btx_megatron.comparison.pictures import load_figure
from btx_megatron.comparison.results import gather, keep, kept, write_results
from btx_megatron.comparison.variants import Variant, expand
from btx_megatron.errors import UserError
from btx_megatron.evaluation.page import machine_text
from btx_megatron.evaluation.rows import MOE_ROWS, all_rows, main_row
from btx_megatron.manifest import make_manifest
from btx_megatron.methods import main_stage
from btx_megatron.recipe_compare import LEAST_LOAD
from btx_megatron.recipe_file import load_recipe

SEEDS = (1, 2, 3)
# mean losses of a random seed in the order of SEEDS; btx is best by far, soft like unbalanced
MEANS = {
    "btx": (2.0, 2.2, 2.1),
    "unbalanced": (2.5, 2.71, 2.6),
    "soft": (2.5, 2.7, 2.601),
    "dense": (3.0, 2.0, 2.5),
}
SHARE = {"btx": (0.3, 0.3, 0.4), "unbalanced": (0.0, 0.5, 0.5), "soft": (0.2, 0.4, 0.4)}
PREDICTIONS = [
    {"claim": "one", "rows": ["btx", "soft"]},
    {"claim": "two", "rows": ["btx", "soft"], "expect": "higher", "measure": "json"},
    {"claim": "three", "rows": ["btx", "dense"]},
    {"claim": "four", "rows": ["soft", "unbalanced"], "expect": "equal", "within": 0.05},
    {"claim": "five", "rows": ["unbalanced", "btx"], "measure": "least_load"},
    {"claim": "six", "rows": ["btx", "dense"], "expect": "higher", "measure": "task:quiz"},
]


def write_run(variant: Variant) -> None:
    """What the stages evaluate, report and the last one leave."""
    recipe, run = variant.recipe, variant.run
    mean = MEANS[variant.name][SEEDS.index(variant.random_seed)]
    rows = dict.fromkeys(all_rows(recipe), 4.0) | {main_row(recipe): mean}
    losses = {row: {"json": value - 0.5, "mail": value + 0.5, "mean": value} for row, value in rows.items()}
    has_moe = main_row(recipe) in MOE_ROWS
    share = None
    if has_moe:
        least, *others, last = SHARE[variant.name]
        moved = 0.01 * SEEDS.index(variant.random_seed) if variant.name == "btx" else 0
        shares = [least + moved, *(other + moved for other in others), last - 2 * moved]
        share = [[shares] * 2] * 2  # [domains][layers][experts]
    routing = {"share": share, "domains": recipe.domain_names, "experts": recipe.expert_names}
    summary = {
        "held_out_loss": losses,
        "tokens": dict.fromkeys(rows, 1000),
        "flops": dict.fromkeys(rows, 1e9),
        "tasks": {row: {"quiz": 1 - value / 10} for row, value in rows.items()},
        "stage_seconds": {str(main_stage(recipe)): 7.0},
    }
    records = [
        {"step": 1},
        {"step": 2, "expert_load": {"min": [0.1, 0.2], "max": [0.6, 0.5], "dead": [0, 0]}},
    ]
    told = {"routing": routing if has_moe else None, "held_out_sha256": {"json": "1"}, "task_files": {}}
    files: dict[str, dict[str, Any]] = {
        "report": {"summary.json": summary},
        "evaluate": {"evaluation.json": told},
        str(main_stage(recipe)): {"losses.jsonl": records},
    }
    for stage, content in files.items():
        work = run.work(stage)
        work.mkdir(parents=True)
        for name, value in content.items():
            lines = value if isinstance(value, list) else [value]
            (work / name).write_text("\n".join(json.dumps(line) for line in lines))
        run.publish(make_manifest(stage, {}, {}, {}, None, 7.0))


def by_seed(variants: list[Variant]) -> list[dict[str, Any]]:
    """What each random seed tells, from the disk."""
    seeds = dict.fromkeys(variant.random_seed for variant in variants)
    return [gather([variant for variant in variants if variant.random_seed == seed]) for seed in seeds]


@pytest.fixture
def compared(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    overrides = {
        "btx": [],
        "unbalanced": ["moe.moe_router_load_balancing_type=none"],
        "soft": ["moe.moe_router_type=soft"],
        "dense": ["method=dense"],
    }
    tasks = [f"evaluate.tasks=[{{name: quiz, format: multiple_choice, path: {tmp_path}/quiz.jsonl}}]"]
    path = write_recipe(tmp_path, variants=overrides, random_seeds=list(SEEDS), predictions=PREDICTIONS)
    variants = expand(path, tasks)
    for variant in variants:
        write_run(variant)
    out = tmp_path / "compare"
    write_results(load_recipe(path, tasks), by_seed(variants), out)
    return out, json.loads((out / "compare.json").read_text())


def test_numbers(compared: tuple[Path, dict[str, Any]]) -> None:
    _, results = compared
    btx = results["rows"]["btx"]
    assert btx["held_out_loss"]["mean"] == {
        "mean": pytest.approx(2.1),
        "deviation": pytest.approx(0.1),
        "values": [2.0, 2.2, 2.1],
    }
    assert btx["held_out_loss"]["json"]["values"] == pytest.approx([1.5, 1.7, 1.6])
    assert btx["least_load"]["mean"] == pytest.approx(0.93)  # 0.3, 0.31 and 0.32 of three experts
    assert results["rows"]["unbalanced"]["least_load"]["mean"] == 0
    assert results["rows"]["dense"]["least_load"] is None
    assert set(results["differences"]) == {"unbalanced", "soft", "dense"}
    assert results["differences"]["dense"]["values"] == pytest.approx([1.0, -0.2, 0.4])
    assert results["variants"]["soft"]["load_by_step"][0] == [
        {"step": 2, "min": [0.1, 0.2], "max": [0.6, 0.5]}
    ]
    assert results["variants"]["dense"]["load_by_step"] == [[], [], []]


def test_predictions_as_they_fell(compared: tuple[Path, dict[str, Any]]) -> None:
    _, results = compared
    verdicts = [told["verdict"] for told in results["predictions"]]
    assert verdicts == ["seen", "not seen", "undecided", "seen", "seen", "undecided"]


def test_pages_tell_the_numbers(compared: tuple[Path, dict[str, Any]]) -> None:
    out, _ = compared
    page = (out / "report.md").read_text()
    assert (
        "| `btx` | **1.600 +- 0.100** | **2.600 +- 0.100** | **2.100 +- 0.100** | 0.93 +- 0.03 "
        "| 0.90, 0.93, 0.96 | 1,000 |" in page
    )
    assert "| two | `btx` > `soft`, json | **not seen** |" in page
    assert "| four | `soft` = (within 0.05) `unbalanced`, mean | **seen** |" in page
    assert "| `btx` | **0.790 +- 0.010** |" in page
    assert "| six | `btx` > `dense`, task:quiz | **undecided** |" in page
    html = (out / "report.html").read_text()
    assert html.count("data:image/png;base64,") == page.count(".png)") == 4
    assert "<td><code>btx</code></td>" in html
    assert not re.search(r"\*\*|`", re.sub(r"base64,[^\"]*", "", html))


def test_a_terminal_tells_them_too(
    compared: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    print_results(compared[1])
    told = capsys.readouterr().out
    assert re.search(r"btx\W+1.600 \+- 0.100\W+2.600 \+- 0.100\W+2.100 \+- 0.100\W+0.93", told)
    assert re.search(r"two\W+btx > soft, json\W+not seen", told)
    assert not re.search(r"\*\*|`|\[bold", told)


def test_one_random_seed_has_no_spread(tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path,
        variants={"btx": [], "dense": ["method=dense"]},
        random_seeds=[1],
        predictions=[{"claim": "c", "rows": ["btx", "dense"]}],
    )
    variants = expand(path, [])
    for variant in variants:
        write_run(variant)
    results = write_results(load_recipe(path), by_seed(variants), tmp_path / "compare")
    assert results["predictions"][0]["verdict"] == "undecided"
    assert json.loads((tmp_path / "compare" / "compare.json").read_text()) == results  # no Infinity
    assert "(one random seed)" in (tmp_path / "compare" / "report.md").read_text()


def test_what_is_kept_of_a_random_seed_is_enough(tmp_path: Path) -> None:
    """Its runs are gone, as on another machine; under another recipe it tells nothing."""
    path = write_recipe(tmp_path, variants={"btx": [], "dense": ["method=dense"]}, random_seeds=[1, 2])
    variants = expand(path, [])
    for variant in variants:
        write_run(variant)
    told, out = by_seed(variants), tmp_path / "compare"
    expected = write_results(load_recipe(path), told, out)
    for its in told:
        keep(its, out)
    shutil.rmtree(variants[0].run.path)
    first = [variant for variant in variants if variant.random_seed == 1]
    again = kept(first, out)
    assert again is not None
    assert write_results(load_recipe(path), [again, told[1]], out) == expected
    assert kept([v for v in expand(path, ["training.lr=0.5"]) if v.random_seed == 1], out) is None
    assert kept(expand(path, ["compare.random_seeds=[3]"]), out) is None
    assert kept([v for v in expand(path, ["launch.threads_per_rank=3"]) if v.random_seed == 1], out)
    assert kept([first[1], first[0], *first[2:]], out) is None  # names of rows depend on the order
    (out / "seed-1.json").write_text(json.dumps(told[0] | {"text": ""}))
    assert kept(first, out) is None
    (out / "seed-1.json").write_text("{")
    assert kept(first, out) is None


def test_what_was_kept_of_another_recipe_is_moved_aside(tmp_path: Path) -> None:
    told = {"random_seed": 3, "recipes": {"btx": "1"}, "text": "x"}
    keep(told, tmp_path)
    keep(told | {"more": 1}, tmp_path)  # measured again
    assert [path.name for path in tmp_path.iterdir()] == ["seed-3.json"]
    keep(told | {"recipes": {"btx": "2"}}, tmp_path)
    assert json.loads((tmp_path / "seed-3.json.before").read_text())["more"] == 1
    assert json.loads((tmp_path / "seed-3.json").read_text())["recipes"] == {"btx": "2"}
    for again, name in ((1, "before-2"), (2, "before-3")):  # nothing that was moved aside is lost
        old = json.loads((tmp_path / "seed-3.json").read_text())
        keep(told | {"recipes": {"btx": str(again)}}, tmp_path)
        assert json.loads((tmp_path / f"seed-3.json.{name}").read_text()) == old
    assert json.loads((tmp_path / "seed-3.json.before").read_text())["more"] == 1


def test_random_seeds_may_be_logged_at_other_steps() -> None:
    def log(*steps: int) -> list[dict[str, Any]]:
        return [{"step": step, "min": [0.01 * step, 0.01 * step], "max": [0.5, 0.5]} for step in steps]

    told = {"routing": [{"experts": ["a", "b"]}], "load_by_step": [log(10, 20, 30, 40), log(20, 40)]}
    line = load_figure({"btx": told}).axes[0].lines[0]
    assert list(line.get_xdata()) == [20, 40]
    assert list(line.get_ydata()) == pytest.approx([0.4, 0.8])


def test_an_expert_that_is_dead_in_one_layer_is_seen() -> None:
    """The load over all layers hides it. Shares: [domain][layer][expert]."""
    routing = {"share": [[[0.5, 0.5], [0.0, 1.0]], [[0.5, 0.5], [0.2, 0.8]]]}
    row = {"variant": "a", LEAST_LOAD: {"mean": 0.6}}
    assert _least_of_a_layer({"variants": {"a": {"routing": [routing, routing]}}}, row) == "0.20, 0.20"
    assert _least_of_a_layer({}, {LEAST_LOAD: None}) == ""


def test_seeds_of_different_text_are_not_told_together(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, variants={"btx": []}, random_seeds=[1, 2])
    variants = expand(path, [])
    for variant in variants:
        write_run(variant)
    first, second = by_seed(variants)
    assert first["text"] == second["text"]
    second["text"] = "other"
    with pytest.raises(UserError, match="random seeds 1 and 2 were measured on different text"):
        write_results(load_recipe(path), [first, second], tmp_path / "compare")


def test_brackets_in_a_claim_are_printed(
    compared: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    results = json.loads(json.dumps(compared[1]))
    results["predictions"][0]["claim"] = "b [/or not]"
    print_results(results)
    assert "[/or" in capsys.readouterr().out


def test_seeds_of_several_days_commits_and_machines_are_told(compared: tuple[Path, dict[str, Any]]) -> None:
    results = json.loads(json.dumps(compared[1]))
    results["made_with"][1] |= {"code_commit": "f" * 40, "created": "2031-01-02T03:04:05+00:00"}
    results["made_with"][2]["machine"] = "a toaster"
    page = markdown("x", list(page_blocks(results, {})))
    assert " to 2031-01-02 (UTC)" in page
    assert re.search(r"Random seeds 1: .*Random seeds 2: .*`f{40}`.*Random seeds 3: .* On a toaster\.", page)
    assert f"On {machine_text()}." in page


def test_a_router_is_needed_to_speak_of_its_load(tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path,
        variants={"btx": [], "dense": ["method=dense"]},
        random_seeds=[1],
        predictions=[{"claim": "c", "rows": ["btx", "dense"], "measure": "least_load"}],
    )
    with pytest.raises(
        UserError, match=r"compare.predictions\[0\].measure least_load: 'dense' has no router that is"
    ):
        expand_and_check(path)


def expand_and_check(path: Path) -> None:
    from btx_megatron.comparison.results import check_predictions

    check_predictions(load_recipe(path).compare.predictions, expand(path, []))


def test_both_pages_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    blocks = [
        Heading("A < B"),
        Text("`x < 1` & **bold `y`**"),
        Table(["name", "n"], [["`a`", "1"], ["b & c", "**2**"]]),
        Picture("A picture", "a.png"),
    ]
    text = markdown("T", blocks)
    assert text.startswith(
        "# T\n\n## A < B\n\n`x < 1` & **bold `y`**\n\n| name | n |\n| --- | ---: |\n| `a` | 1 |\n"
    )
    assert text.endswith("![A picture](a.png)\n")
    page = one_html("T", blocks, tmp_path)
    assert "<h2>A &lt; B</h2>" in page
    assert "<p><code>x &lt; 1</code> &amp; <b>bold <code>y</code></b></p>" in page
    assert '<tr><td>b &amp; c</td><td class="n"><b>2</b></td></tr>' in page
    assert 'src="data:image/png;base64,iVBORw=="' in page
