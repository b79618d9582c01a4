"""The benchmark's own instruments: what they tell must be so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from benchmarks import models
from benchmarks.measure import CommandFailed, Cost, cached_share, evict, file_system, measure, warm

ROOT = Path(__file__).parents[1]
MB = 10**6


def benchmark(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "mix.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def python(code: str, folder: Path) -> Cost:
    return measure([sys.executable, "-c", code], folder / "log")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    done = benchmark("make", folder, "--experts", 3, "--size", "tiny")
    assert done.returncode == 0, done.stderr
    return models.find(folder)


def test_models_are_read_by_transformers(experts: list[Path]) -> None:
    assert [path.name for path in experts] == ["expert0", "expert1", "expert2"]
    config = AutoConfig.from_pretrained(experts[0])
    assert (config.model_type, config.num_hidden_layers, config.vocab_size) == ("llama", 2, 512)
    assert config.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(experts[0])
    text = "Bytes, ünd more."
    assert len(tokenizer(text)["input_ids"]) == len(text.encode())
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_models_are_near_but_not_equal(experts: list[Path]) -> None:
    first, second = (load_file(path / "model.safetensors") for path in experts[:2])
    assert {name: tuple(weight.shape) for name, weight in first.items()} == models.SIZES["tiny"].weights()
    name = "model.layers.1.mlp.up_proj.weight"
    assert first[name].float().std().item() == pytest.approx(models.SEED_SCALE, rel=0.1)
    change = (first[name].float() - second[name].float()).std().item()
    assert change == pytest.approx(2**0.5 * models.OWN_SCALE, rel=0.1)
    assert first["model.norm.weight"].float().mean().item() == pytest.approx(1, abs=0.02)


def test_sizes_are_what_their_names_say() -> None:
    def numbers(size: str) -> int:
        return sum(torch.Size(shape).numel() for shape in models.SIZES[size].weights().values())

    assert numbers("0.3B") == 277_382_144
    assert numbers("1.1B") == 1_100_048_384  # as TinyLlama


def test_large_models_come_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "SHARD_BYTES", 100_000)
    [path] = models.make(tmp_path / "m", 1, "tiny")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    found = {}
    for file in path.glob("*.safetensors"):
        assert file.stat().st_size < 110_000
        with safe_open(file, "pt") as opened:
            found |= dict.fromkeys(opened.keys(), file.name)
    assert len(set(found.values())) > 1
    assert found == index["weight_map"]


def test_memory_of_a_grandchild_is_seen(tmp_path: Path) -> None:
    hold = "import time; block = bytearray(b'x') * 200_000_000; time.sleep(1)"
    cost = python(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])", tmp_path)
    assert 200 * MB < cost.anonymous < 300 * MB
    assert cost.peak >= cost.anonymous
    assert cost.seconds > 0.3


def test_shared_memory_is_seen_and_told_apart(tmp_path: Path) -> None:
    fill = "import mmap, time; shared = mmap.mmap(-1, 100_000_000); shared.write(bytes(100_000_000))"
    cost = python(f"{fill}; time.sleep(1)", tmp_path)
    assert 100 * MB <= cost.peak < 150 * MB
    assert cost.anonymous < 50 * MB


def test_bytes_of_a_child_are_counted(tmp_path: Path) -> None:
    write = f"open({str(tmp_path / 'file')!r}, 'wb').write(bytes(50_000_000))"
    cost = python(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {write!r}])", tmp_path)
    assert 50 * MB <= cost.write_calls < 51 * MB
    cost = python(f"open({str(tmp_path / 'file')!r}, 'rb').read()", tmp_path)
    assert 50 * MB <= cost.read_calls < 55 * MB
    assert cost.write_calls < MB


def test_a_failure_is_told_with_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match=r"ended with 3 .*: no disk"):
        python("print('no disk'); raise SystemExit(3)", tmp_path)


def test_costs_of_steps_add_up_but_for_memory() -> None:
    first = Cost(seconds=1, cpu_seconds=2, peak=30, anonymous=20, read_calls=5)
    both = first.then(Cost(seconds=2, cpu_seconds=1, peak=10, anonymous=25, read_calls=6))
    assert both == Cost(seconds=3, cpu_seconds=3, peak=30, anonymous=25, read_calls=11)


def test_cold_means_cold(tmp_path: Path) -> None:
    if file_system(tmp_path) not in ("ext4", "xfs", "btrfs"):
        pytest.skip("this file system keeps its pages")
    path = tmp_path / "file"
    path.write_bytes(os.urandom(8 * MB))
    assert cached_share(path) == 1.0
    evict([path])
    assert cached_share(path) == 0.0
    warm([path])
    assert cached_share(path) == 1.0


def test_memory_file_systems_cannot_be_cold() -> None:
    if not os.access("/dev/shm", os.W_OK) or file_system(Path("/dev/shm")) != "tmpfs":
        pytest.skip("no memory file system")
    path = Path("/dev/shm") / f"btx-test-{os.getpid()}"
    path.write_bytes(bytes(MB))
    try:
        with pytest.raises(RuntimeError, match="stays in memory"):
            evict([path])
    finally:
        path.unlink()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_copy_reads_all_and_writes_a_mixture(experts: list[Path], tmp_path: Path, threads: int) -> None:
    size = models.mixture_bytes(experts)
    files = [str(file) for file in models.weight_files(experts)]
    copy = [sys.executable, str(ROOT / "benchmarks" / "copy_bytes.py"), str(tmp_path / "out")]
    cost = measure([*copy, str(size), str(threads), *files], tmp_path / "log")
    written = [path.stat().st_size for path in (tmp_path / "out").iterdir()]
    assert sum(written) == size
    assert len(written) == min(threads, len(experts))
    assert cost.write_calls >= size
    assert cost.read_calls >= models.total_bytes(experts)
    # All numbers once, two layers of 3 x 64 x 128 twice more, and 2 x 3 x 64 for the routers.
    once = sum(torch.Size(shape).numel() for shape in models.SIZES["tiny"].weights().values())
    assert size == 2 * (once + 2 * (2 * 3 * 64 * 128) + 2 * 3 * 64)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    for arguments in (
        ("make", tmp_path),
        ("run", tmp_path, "--output", tmp_path / "out"),
        ("run", tmp_path, "--output", tmp_path / "out", "--peer", "mergekit=/nowhere"),
    ):
        failed = benchmark(*arguments)
        assert failed.returncode != 0
        assert "Traceback" not in failed.stderr


@pytest.mark.slow
def test_the_gpu_benchmark_runs_where_there_is_none(tmp_path: Path) -> None:
    """All of it but Transformer Engine; what it prints of a CPU means nothing."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_training.py"), "--device", "cpu", "--tiny"]
    command += ["--rounds", "3", "--json", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cases = json.loads((tmp_path / "gpu.json").read_text())["cases"]
    assert list(cases) == ["dense-tiny", "moe-tiny"]
    for case in cases.values():
        (duel,) = case["duels"].values()
        assert {name: len(told["seconds"]) for name, told in duel.items()} == {"local": 3, "transformers": 3}
        assert all(told["learns"] for told in duel.values())
    # 3 x (projections, half the square of scores, feed-forward, router, logits) by hand, 4 x 64 tokens
    width = {"dense-tiny": 128, "moe-tiny": 2 * 128}
    for name, case in cases.items():
        router = 2 * 2 * 64 * 4 if name == "moe-tiny" else 0
        token = 2 * (2 * 64 * 16 * (2 * 4 + 2 * 2) + 4 * 4 * 16 * 32 + 6 * 64 * width[name])
        assert case["flops"] == 3 * (token + router + 2 * 64 * 256) * 4 * 64


def test_the_gpu_benchmark_says_that_there_is_no_gpu() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_training.py")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "no GPU here; --device cpu --tiny tries the program without one\n"


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x128x64", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_f16_knob_7_64x128x128", "attention"),
        ("void transformer_engine::multi_tensor_apply_kernel<AdamFunctorMaster>", "optimizer"),
        ("void transformer_engine::rmsnorm_fwd_tuned_kernel", "norms, activation, RoPE"),
        ("_permute_kernel", "permutation"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("something_else", "other"),
    ],
)
def test_kernels_are_told_apart(kernel: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from benchmarks.gpu_training import kind_of_kernel

    assert kind_of_kernel(kernel) == kind
