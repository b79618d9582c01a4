"""btx mix --dry-run: bytes against a mix that is watched and what lies on disk; the printed table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_inspect import CONFIG, initial, write

from btx_megatron.checkpoints import pieces
from btx_megatron.checkpoints.formats import Parallel
from btx_megatron.checkpoints.stream import Effort
from btx_megatron.errors import UserError
from btx_megatron.mixing.command import run_mix
from btx_megatron.mixing.dry_run import dry_run_text, peak_buffers, read_bytes
from btx_megatron.mixing.mix import Output, mix, open_sources
from btx_megatron.mixing.plan import MixOptions, plan_mix

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


@pytest.mark.parametrize("case", CASES)
def test_read_and_written_are_what_a_mix_reads_and_writes(
    case: str, three: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = CASES[case]
    base = three["e0"] if options.average in ("base", "ties") else None
    opened = open_sources(three, base)
    expected = read_bytes(opened, options)
    counted = 0
    real = pieces._read_into

    def counting(files: Any, file: str, offset: int, block: torch.Tensor) -> None:
        nonlocal counted
        counted += block.numel() * block.element_size()
        real(files, file, offset, block)

    monkeypatch.setattr(pieces, "_read_into", counting)
    mix(three, Output(tmp_path / "moe", effort=Effort(workers=1), manifest=True), options, base)
    assert counted == expected
    text = dry_run_text(opened, options, Effort())
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
    assert rows["buffers"][-2:] == ["2", "threads"]
    assert "estimate" in " ".join(rows["time"])


def test_buffers_are_of_blocks_or_of_whole_parts(three: dict[str, Path]) -> None:
    block = 1024
    mean, trimmed = MixOptions(), MixOptions(average="ties")
    opened = open_sources(three, three["e0"])
    of_mean = plan_mix(opened.sources, mean)
    # fp32: three copies in its own type, and the sum; of 1024 bytes in each of the two threads
    assert peak_buffers(of_mean, mean, 2, block) == 2 * block // 4 * (3 * 4 + 4)
    of_ties = plan_mix(opened.sources, trimmed, opened.base)
    qkv = CONFIG.hidden_size * (CONFIG.num_attention_heads + 2 * CONFIG.num_query_groups) * CONFIG.kv_channels
    assert peak_buffers(of_ties, trimmed, 1, block) == qkv * (3 * 4 + 28)
    both = peak_buffers(of_ties, trimmed, 2, block)
    assert qkv * 40 < both <= 2 * qkv * 40
    assert peak_buffers(of_ties, trimmed, 2, 2 * block) == both  # no block is made of those


def test_what_the_mix_would_refuse_is_refused(three: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="--router-init zero"):
        dry_run_text(open_sources(three, None), MixOptions(router_init="zero"), Effort())
