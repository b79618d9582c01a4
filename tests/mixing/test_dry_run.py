"""btx mix --dry-run: bytes against a mix that is watched and what lies on disk; the printed table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from llamas import run_btx, tree
from test_inspect import CONFIG, initial, write

from btx_megatron.checkpoints import pieces
from btx_megatron.checkpoints.formats import Parallel
from btx_megatron.checkpoints.stream import (
    OWN_COPIES,
    PART_BYTES,
    PROCESS_BYTES,
    Effort,
    job_bytes,
    peak_bytes,
)
from btx_megatron.errors import UserError
from btx_megatron.mixing.command import run_mix
from btx_megatron.mixing.dry_run import dry_run_text, read_bytes
from btx_megatron.mixing.mix import Output, drop, drop_job, grow, grow_job, mix, mix_job
from btx_megatron.mixing.plan import MixOptions

CASES = {
    "stack": MixOptions(),
    "split": MixOptions(experts="split", chunks=2),
    "blend": MixOptions(experts="blend"),
    "copies": MixOptions(experts="copies", copies=3),
    "virtual": MixOptions(experts="virtual", chunks=2, copies=2),
    "drop": MixOptions(drop_ratio=0.5),
    "base": MixOptions(average="base"),
    "ties": MixOptions(average="ties"),
}


@pytest.fixture
def three(tmp_path: Path) -> dict[str, Path]:
    return {f"e{i}": write(tmp_path / f"e{i}", initial(i)) for i in range(3)}


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of every read from now on."""
    counted: list[int] = []
    real = pieces._read_into

    def counting(files: Any, file: str, offset: int, block: torch.Tensor) -> None:
        counted.append(block.numel() * block.element_size())
        real(files, file, offset, block)

    monkeypatch.setattr(pieces, "_read_into", counting)
    return counted


@pytest.mark.parametrize("case", CASES)
def test_read_and_written_are_what_a_mix_reads_and_writes(
    case: str, three: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = CASES[case]
    base = three["e0"] if options.average in ("base", "ties") else None
    job = mix_job(three, options, base, look=True)
    counted = count_reads(monkeypatch)
    mix(three, Output(tmp_path / "moe", effort=Effort(workers=1), manifest=True), options, base)
    assert sum(counted) == read_bytes(job)
    text = dry_run_text(job, "hf", Parallel(), Effort())
    (line,) = [line for line in text.splitlines() if line.startswith("written")]
    on_disk = (tmp_path / "moe" / "model.safetensors").stat().st_size
    written = int(line.split()[1].replace(",", ""))
    assert written < on_disk < written + 16_384  # and the header


def test_the_table_names_rule_inputs_shape_and_bytes(
    three: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "moe"
    run_mix(three, None, output, None, Parallel(), MixOptions(), Effort(workers=2), dry_run=True)
    assert not output.exists()
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    fc2 = rows["decoder.layers.mlp.experts.experts.linear_fc2.weight"]
    assert fc2[1:] == ["expert", "e0,", "e1,", "e2", "2x3x32x48", "float32", f"{2 * 3 * 32 * 48 * 4:,}"]
    assert rows["decoder.layers.mlp.router.weight"][1:3] == ["router:normal", "-"]
    assert rows["decoder.final_layernorm.weight"][1] == "mean"
    assert rows["memory"][-2:] == ["2", "threads"]
    assert "estimate" in " ".join(rows["time"])


def test_memory_is_of_blocks_or_of_whole_parts(three: dict[str, Path]) -> None:
    block = 1024
    plan = mix_job(three, MixOptions()).plan
    parts = sum(len(pieces.indices_of(tensor.name, tensor.info)) for tensor in plan)
    own = PROCESS_BYTES + PART_BYTES * parts
    # fp32: so many copies of 1024 bytes in its own type, and two more, in each of the two threads
    assert peak_bytes(plan, 2, block) == own + 2 * block // 4 * (OWN_COPIES * 4 + 8)
    plan = mix_job(three, MixOptions(average="ties"), three["e0"]).plan
    qkv = CONFIG.hidden_size * (CONFIG.num_attention_heads + 2 * CONFIG.num_query_groups) * CONFIG.kv_channels
    one = peak_bytes(plan, 1, block)
    assert one == own + qkv * (OWN_COPIES * 4 + 34)
    both = peak_bytes(plan, 2, block)
    assert qkv < both - one <= one - own
    assert peak_bytes(plan, 2, 2 * block) == both  # no block is made of those


def test_a_split_experts_columns_take_all_columns_of_a_source(three: dict[str, Path]) -> None:
    fc2 = "decoder.layers.mlp.experts.experts.linear_fc2.weight"
    for chunks, copies in ((1, OWN_COPIES + 1), (4, OWN_COPIES + 4)):
        options = MixOptions(experts="split" if chunks > 1 else "stack", chunks=chunks)
        (tensor,) = [tensor for tensor in mix_job(three, options).plan if tensor.name == fc2]
        row = tensor.info.shape[-1] * 4
        assert job_bytes(tensor, 5 * row) == 5 * row * copies


def test_what_the_mix_would_refuse_is_refused(three: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="--router-init zero"):
        mix_job(three, MixOptions(router_init="zero"), look=True)
    job = mix_job(three, MixOptions(router_pre_softmax=True), look=True)
    for to, parallel, message in (
        ("hf", Parallel(), "moe_router_pre_softmax: Mixtral renormalises"),
        ("megatron", Parallel(expert=2), "must divide the number of experts 3"),
        ("megatron-legacy", Parallel(pipeline=3), "2 layers do not divide"),
    ):
        with pytest.raises(UserError, match=message):
            dry_run_text(job, to, parallel, Effort())
    assert "written" in dry_run_text(job, "hf", Parallel(), Effort(), approximate=True)


@pytest.mark.parametrize(
    ("output", "message"), [("taken", "exists; delete it"), ("e0/inside", "lies in a source")]
)
def test_an_output_that_the_mix_would_refuse_is_refused(
    three: dict[str, Path], tmp_path: Path, output: str, message: str
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(UserError, match=message):
        run_mix(three, None, tmp_path / output, None, Parallel(), MixOptions(), Effort(), dry_run=True)


def test_a_mixture_that_grows_or_shrinks_reads_and_writes_what_was_said(
    three: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = write(tmp_path / "more", initial(9))
    mix(three, Output(tmp_path / "moe", manifest=True), MixOptions())
    for share, untrained in ((None, True), (0.25, True), (None, False)):
        if not untrained:
            (tmp_path / "moe" / "manifest.json").unlink()
        output = tmp_path / f"grown{share}{untrained}"
        job = grow_job(tmp_path / "moe", "more", more, share=share, options=MixOptions(), look=True)
        with monkeypatch.context() as patch:
            counted = count_reads(patch)
            job_text = dry_run_text(job, "hf", Parallel(), Effort())
            assert sum(counted) <= 64 << 20
            counted.clear()
            grow(
                tmp_path / "moe", "more", more, Output(output, manifest=True, effort=Effort(1)),
                share=share, options=MixOptions(),
            )  # fmt: skip
            assert sum(counted) == read_bytes(job)
        assert_written(job_text, output)
    job = drop_job(tmp_path / "moe", 1)
    with monkeypatch.context() as patch:
        counted = count_reads(patch)
        drop(tmp_path / "moe", 1, Output(tmp_path / "less", manifest=True, effort=Effort(1)))
        assert sum(counted) == read_bytes(job)
    assert_written(dry_run_text(job, "hf", Parallel(), Effort()), tmp_path / "less")


def assert_written(text: str, output: Path) -> None:
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line}
    written, on_disk = (
        int(lines["written"][1].replace(",", "")), (output / "model.safetensors").stat().st_size
    )  # fmt: skip
    assert written < on_disk < written + 16_384
    table = json.loads((output / "manifest.json").read_text())["outputs"]["tensors"]
    assert {name: lines[name][1] for name in table} == {
        name: row["rule"].split()[0] for name, row in table.items()
    }


def test_the_command_line_looks_at_a_mixture(three: dict[str, Path], tmp_path: Path) -> None:
    mix(three, Output(tmp_path / "moe", manifest=True), MixOptions())
    more, before = write(tmp_path / "more", initial(9)), tree(tmp_path)
    for options in (["--add-expert", f"more={more}"], ["--drop-expert", 0]):
        code, out, err = run_btx(
            "mix", "--moe", tmp_path / "moe", *options, "--output", tmp_path / "x", "--dry-run"
        )
        assert (code, err) == (0, "")
        assert "memory" in out
        assert tree(tmp_path) == before
