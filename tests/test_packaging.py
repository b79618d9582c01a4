"""What is asked of a machine: the right packages, one fit Python, documentation that is up to date."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FORBIDDEN = {"apex", "nvidia-dali", "nvidia-apex"}  # other things than NVIDIA's, or stubs that only warn


def asked_for() -> dict[str, Requirement]:
    """Every requirement of pyproject.toml but the project's own extras, by canonical name."""
    extras = PROJECT["optional-dependencies"].values()
    lines = PROJECT["dependencies"] + [line for extra in extras for line in extra]
    requirements = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name): r for r in requirements if r.name != PROJECT["name"]}


def pinned() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): r for r in requirements}


def base_names() -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}


def test_impostors_are_never_asked_for() -> None:
    assert not FORBIDDEN & (asked_for().keys() | pinned().keys())


def test_ranges_are_what_was_tried() -> None:
    assert PROJECT["requires-python"] == ">=3.12,<3.14"
    assert str(asked_for()["torch"].specifier) == ">=2.11"
    assert set(str(asked_for()["megatron-core"].specifier).split(",")) == {">=0.19.2", "<0.20"}
    assert str(pinned()["torch"].specifier) == "==2.11.0"


def test_base_install_has_no_megatron() -> None:
    assert not {"megatron-core", "transformers", "matplotlib", "tensorboard"} & base_names()


def test_train_brings_the_undeclared_need_of_megatron() -> None:
    train = {Requirement(line).name for line in PROJECT["optional-dependencies"]["train"]}
    assert {"megatron-core", "psutil"} <= train


def test_pins_lie_within_the_ranges() -> None:
    for name, pin in pinned().items():
        (version,) = (specifier.version for specifier in pin.specifier)
        assert str(pin.specifier) == f"=={version}", f"{name} is not pinned to one version"
        if name in asked_for():
            assert asked_for()[name].specifier.contains(version), f"{pin} is outside pyproject.toml"


def test_whatever_the_make_commands_install_is_pinned() -> None:
    extras = PROJECT["optional-dependencies"]
    lines = [
        line
        for name in ("train", "quickstart", "hf", "dali", "parquet", "test", "dev")
        for line in extras[name]
    ]
    names = base_names() | {canonicalize_name(Requirement(line).name) for line in lines}
    assert names - {PROJECT["name"]} <= pinned().keys()


def test_no_package_index_is_named() -> None:
    for name in ("pyproject.toml", "constraints.txt", "Makefile", ".ci/run"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"index-url|find-links|trusted-host|https?://", text), name


def test_recipe_documentation_is_up_to_date() -> None:
    check = [sys.executable, str(ROOT / "tools" / "recipe_docs.py"), "--check"]
    result = subprocess.run(check, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


# --- tools/find_python.sh, on machines made of fake interpreters -------------------------------------

SHIM = "#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n"


class Machine:
    """A PATH and a home of its own; nothing of the real machine's Pythons can be seen from it."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.home = folder / "home"
        self.bin.mkdir()
        self.home.mkdir()

    def add(self, name: str, script: str) -> Path:
        """``name`` is a command, or a pyenv version such as 3.12.1."""
        pyenv = self.home / ".pyenv" / "versions" / name / "bin" / "python"
        path = pyenv if name[0].isdigit() else self.bin / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script, encoding="utf-8")
        path.chmod(0o755)
        return path

    def find(self, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["/bin/sh", str(ROOT / "tools" / "find_python.sh")],
            env={"PATH": str(self.bin), "HOME": str(self.home), **environment},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )


def answers(version: str, fitness: str = "fit") -> str:
    """A stand-in that answers find_python.sh's question as that interpreter would."""
    return f"#!/bin/sh\necho '{version} {fitness}'\n"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_this_interpreter_answers_the_question(machine: Machine) -> None:
    """The question itself, asked of a real Python."""
    found = machine.find(PYTHON=sys.executable)
    assert (found.returncode, found.stdout.strip()) == (0, sys.executable)


def test_a_shim_that_fails_and_an_old_python3_are_passed_over(machine: Machine) -> None:
    machine.add("python3.12", SHIM)
    machine.add("python3", answers("3.11.2", "unfit"))
    wanted = machine.add("3.12.1", answers("3.12.1"))
    machine.add("3.13.0", answers("3.13.0"))
    found = machine.find()
    assert (found.returncode, found.stdout.strip()) == (0, str(wanted))


@pytest.mark.parametrize(
    ("names", "first"),
    [
        (["python3", "python3.13", "python3.12"], "python3.12"),
        (["python3", "python3.13"], "python3.13"),
        (["3.13.0", "python3"], "python3"),
    ],
)
def test_order(machine: Machine, names: list[str], first: str) -> None:
    for name in names:
        machine.add(name, answers("3.13.0"))
    assert machine.find().stdout.strip() == str(machine.bin / first)


def test_pyenv_root_is_honoured(machine: Machine) -> None:
    wanted = machine.add("3.13.2", answers("3.13.2"))
    elsewhere = machine.home.rename(machine.home.with_name("elsewhere"))
    assert machine.find().returncode == 2
    found = machine.find(PYENV_ROOT=str(elsewhere / ".pyenv"))
    assert found.stdout.strip() == str(elsewhere / wanted.relative_to(machine.home))


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (answers("3.11.7", "unfit"), "is Python 3.11.7"),
        (answers("3.14.0", "unfit"), "is Python 3.14.0"),
        (SHIM, "does not run"),
        (answers("3.12.3", "venv"), "apt install python3.12-venv"),
        (None, "no such program"),
    ],
)
def test_an_unfit_choice_is_an_error_and_nothing_else_is_taken(
    machine: Machine, script: str | None, said: str
) -> None:
    machine.add("python3.12", answers("3.12.1"))
    if script is not None:
        machine.add("chosen", script)
    found = machine.find(PYTHON=str(machine.bin / "chosen"))
    assert (found.returncode, found.stdout) == (2, "")
    assert said in found.stderr
    assert len(found.stderr.splitlines()) == 1


def test_none_at_all_says_what_to_do(machine: Machine) -> None:
    machine.add("python3", answers("3.11.2", "unfit"))
    found = machine.find()
    assert (found.returncode, found.stdout) == (2, "")
    for hint in ("3.11.2", "apt install", "pyenv", "PYTHON="):
        assert hint in found.stderr


def test_a_missing_venv_module_is_named(machine: Machine) -> None:
    machine.add("python3.12", answers("3.12.3", "venv"))
    found = machine.find()
    assert found.returncode == 2
    assert "apt install python3.12-venv" in found.stderr


def test_every_script_is_executable() -> None:
    for name in ("tools/find_python.sh", ".ci/run"):
        assert os.access(ROOT / name, os.X_OK), name
