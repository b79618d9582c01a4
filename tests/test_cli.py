"""The command line: quick answers, one line a mistake, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from btx_megatron import __version__
from btx_megatron.cli import main
from btx_megatron.estimate_flops import stage_flops
from btx_megatron.recipe_file import load_recipe
from btx_megatron.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
QUICKSTART = str(ROOT / "examples" / "quickstart.yaml")


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    source = {"name": "s", "path": str(tmp_path / "text")}
    recipe = {
        "run_folder": str(tmp_path / "run"),
        "data": {"domains": [{"name": name, "sources": [source]} for name in ("a", "b")]},
        "training": {"train_iters": 2, "lr_warmup_iters": 0},
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture
def btx(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Runs a command line in this process: exit code, output, errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["btx", *map(str, arguments)])
        code = main()
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["plan", QUICKSTART], ["status", QUICKSTART]]
)
def test_quick_answers_load_no_torch_and_take_less_than_a_second(arguments: list[str]) -> None:
    """CPU seconds, and the best of a few: what else runs on this machine is not ours to time. On a quiet one
    `btx plan` takes half a second, of which Typer's and OmegaConf's imports are the half."""
    code = (
        "import sys, time; from btx_megatron.cli import main; code = main(); "
        "loaded = [m for m in ('torch', 'numpy', 'matplotlib', 'rich.progress') if m in sys.modules]; "
        "print(code, loaded, time.process_time(), file=sys.stderr)"
    )
    for _ in range(6):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        exit_code, loaded, spent = done.stderr.split()
        assert (exit_code, loaded) == ("0", "[]")
        if float(spent) < 1.0:
            return
    raise AssertionError(f"took {spent} s of CPU time")


def test_version_and_help(btx) -> None:  # type: ignore[no-untyped-def]
    assert btx("--version") == (0, f"btx {__version__}\n", "")
    code, out, _ = btx("--help")
    assert code == 0
    for command in (
        "run",
        "plan",
        "status",
        "verify",
        "report",
        "prepare",
        "seed",
        "train",
        "mix",
        "finetune",
    ):
        assert f"  {command} " in out


def test_plan_of_the_quickstart(btx) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = btx("plan", QUICKSTART)
    assert code == 0
    _, stages, models, parameters, *_ = out.split("\n\n")
    rows = {line.split()[0]: line.split() for line in stages.splitlines()}
    assert rows["expert:prose"][-6:] == ["TP2", "SP", "2", *rows["expert:prose"][-3:]]
    recipe = load_recipe(QUICKSTART)
    iters = recipe.stages.dense.training.train_iters
    assert iters is not None
    tokens, flops = f"{iters * 8 * 256:,}", f"{stage_flops(recipe, 'dense'):.2e}"
    assert rows["dense"][-3:] == [f"{iters:,}", tokens, flops]
    spent = {line.split()[0]: line.split()[1:] for line in models.splitlines()}
    assert spent["seed"] == ["0", "0"]
    assert spent["dense"] == [tokens, flops]
    stages_of_btx = ["expert:prose", "expert:code", "expert:math", "finetune"]
    assert spent["btx"] == [tokens, f"{sum(stage_flops(recipe, stage) for stage in stages_of_btx):.2e}"]
    assert "causal half of attention" in models
    assert "MoE, total" in parameters
    assert btx("plan", QUICKSTART, "model.num_layers=8")[1] != out


def test_plan_tells_memory_disk_network_and_time(btx) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = btx("plan", QUICKSTART, "--mfu", "0.5", "--gpu-type", "a100")
    assert code == 0
    memory, rest = (text.splitlines() for text in out.split("\n\n")[4:6])
    assert memory[0].split() == [
        *("memory", "of", "the", "fullest", "rank,", "GB"),
        *("weights", "gradients", "optimizer", "activations", "working", "sum"),
    ]
    stages = ["seed", "expert:prose", "expert:code", "expert:math", "finetune", "dense"]
    assert [line.split()[0] for line in memory[1:-1]] == stages == [line.split()[0] for line in rest[1:-1]]
    for line in memory[1:-1]:
        *parts, total = map(float, line.split()[1:])
        assert sum(parts) == pytest.approx(total, rel=0.1)
    hours = stage_flops(load_recipe(QUICKSTART), "seed") / (0.5 * 312e12) / 3600
    assert float(rest[1].split()[-1]) == pytest.approx(hours, rel=0.05)
    assert "A100 at an MFU of 0.5" in rest[-1]


def test_plan_refuses_what_cannot_fit(btx) -> None:  # type: ignore[no-untyped-def]
    code, out, err = btx("plan", QUICKSTART, "--fit", "0.08")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "stages.seed.layout DP2 needs 0.12 GB a GPU (weights 0.0073, " in err
    assert "and there are 0.08; these fit: " in err
    large = ("model.hidden_size=16384", "model.ffn_hidden_size=65536", "model.num_layers=64")
    assert "and there are 80.0; " in btx("plan", QUICKSTART, *large, "launch.device=auto")[2]
    assert btx("plan", QUICKSTART, *large)[0] == 0  # it is for the CPU, and nobody said what memory that has
    assert btx("plan", QUICKSTART, *large, "launch.device=auto", "--fit", "1e5")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml: no such recipe file"),
        (["run", QUICKSTART, "modle.x=1"], "unknown key 'modle'; did you mean 'model'?"),
        (["run", QUICKSTART, "model.num_layers=many"], "key 'model.num_layers'"),
        (
            ["run", QUICKSTART, "moe.moe_router_topk=1"],
            "moe.moe_router_topk 1 with moe.moe_router_pre_softmax",
        ),
        (["seed", QUICKSTART, "oops"], "override 'oops': write it as key.sub=value"),
        (
            ["train", QUICKSTART, "--domain", "maths"],
            "--domain maths: no expert of that name; the recipe has prose",
        ),
        (["dense", QUICKSTART, "baselines=[]"], "baselines does not name 'dense'"),
        (["status", "nowhere"], "nowhere: no such run folder or recipe"),
        (["status", str(ROOT / "examples")], "not a run folder, it has no recipe.yaml"),
        (["report", str(ROOT / "examples")], "not a run folder, it has no recipe.yaml"),
        (
            ["plan", QUICKSTART, "--simulate", "--mfu", "0.3"],
            "--mfu and --fit are not for --simulate; give it",
        ),
        (["plan", QUICKSTART, "--simulate", "--assume", "mfu={"], "--assume: while parsing a flow node"),
        (["plan", QUICKSTART, "--mfu", "40"], "--mfu 40: a share, above 0 and at most 1"),
        (["plan", QUICKSTART, "--gpu-type", "v100"], "--gpu-type 'v100': not known; one of A100, H100"),
        (["plan", QUICKSTART, "tokenizer.tokenizer_model=nowhere"], "missing, or not a SentencePiece model"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(  # type: ignore[no-untyped-def]
    btx, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = btx(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("btx: ")
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []  # nothing half done


@pytest.mark.parametrize(
    "arguments", [["rum"], ["run"], ["run", "--frobnicate"], ["train", QUICKSTART, "--domain"]]
)
def test_usage_errors_are_exit_2(btx, arguments: list[str]) -> None:  # type: ignore[no-untyped-def]
    code, _, err = btx(*arguments)
    assert code == 2
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("command", "needs", "make"),
    [
        ("seed", "stage seed needs the stage prepare", "`btx prepare RECIPE`"),
        ("train", "stage expert:a needs the stage prepare", "`btx prepare RECIPE`"),
        ("mix", "stage mix needs the stage expert:a", "`btx train RECIPE --domain a`"),
        ("finetune", "stage finetune needs the stage prepare", "`btx prepare RECIPE`"),
        ("dense", "stage dense needs the stage prepare", "`btx prepare RECIPE`"),
        ("evaluate", "stage evaluate needs the stage prepare", "`btx prepare RECIPE`"),
    ],
)
def test_a_stage_alone_says_which_command_makes_its_input(  # type: ignore[no-untyped-def]
    btx, recipe_file: Path, command: str, needs: str, make: str
) -> None:
    code, _, err = btx(command, recipe_file)
    assert code == 2
    assert needs in err
    assert make in err
    assert err.count("\n") == 1


def test_another_recipes_run_folder_is_refused(btx, recipe_file: Path) -> None:  # type: ignore[no-untyped-def]
    RunFolder(recipe_file.parent / "run").claim(load_recipe(recipe_file))
    (recipe_file.parent / "run" / "data").mkdir()
    (recipe_file.parent / "run" / "data" / "manifest.json").touch()
    code, _, err = btx("run", recipe_file, "model.num_layers=8")
    assert code == 2
    assert "was made by another recipe: model.num_layers is 4 there and 8 here; set it back, or" in err


def test_a_missing_corpus_ends_in_one_line(btx, recipe_file: Path) -> None:  # type: ignore[no-untyped-def]
    code, _, err = btx("run", recipe_file)
    assert code == 2
    assert err.count("\n") == 1
    assert str(recipe_file.parent / "text") in err


def test_status_tells_done_running_unfinished_and_missing(btx, recipe_file: Path) -> None:  # type: ignore[no-untyped-def]
    from btx_megatron.manifest import make_manifest
    from btx_megatron.runtime.progress import Progress

    run = RunFolder(recipe_file.parent / "run")
    run.claim(load_recipe(recipe_file))
    with run.lock("seed"):
        run.work("prepare").mkdir(parents=True)
        run.publish(make_manifest("prepare", {}, {}, {}, None, 65))
        run.work("seed").mkdir(parents=True)
        (run.work("seed") / "duration.json").write_text(json.dumps(7.0))
        progress = Progress(run.work("seed"))
        progress.update("training", 1, 9, "loss 3.3")
        time.sleep(0.25)  # sooner it is not written
        progress.update("training", 2, 9, "loss 3.1, 99 tokens/s")
        running = btx("status", recipe_file)[1]
    stopped = btx("status", run.path)[1]
    rows = {line.split()[0]: line.split() for line in running.splitlines()[3:]}
    assert rows["prepare"] == ["prepare", "done", "1:05"]
    assert rows["seed"][:5] == ["seed", "running", "0:07", "training", "2/9,"]
    rate, left, unit, *rest = rows["seed"][5:]
    assert (unit, *rest) == ("left,", "loss", "3.1,", "99", "tokens/s")
    assert rate.endswith("/s,")
    assert left.startswith("0:")
    assert rows["mix"] == ["mix", "missing", "-"]
    rows = {line.split()[0]: line.split() for line in stopped.splitlines()[3:]}
    assert " ".join(rows["seed"]) == "seed unfinished 0:07 training 2/9, loss 3.1, 99 tokens/s"


def test_as_a_module() -> None:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "btx_megatron", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"btx {__version__}\n"
    assert time.monotonic() - started < 20
