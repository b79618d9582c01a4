"""Training steps on one GPU: tokens/s, TFLOP/s and MFU of our builds and precisions, beside transformers.

    python benchmarks/gpu_training.py --json gpu.json
    python benchmarks/gpu_training.py --cases dense-1b --contestants te te-tensorwise --rounds 20

A case is a model; its contestants take one step each in turn with Transformer Engine's bf16 build (``te``),
on the same tokens, another one first every time; two at once are held in memory. A step is forward and
backward of ``--micro-batches`` micro-batches of one sequence each, gradient clipping, and AdamW with fp32
masters, gradients and moments, for all. One GPU, so nothing is communicated, and the layers are as many as
fit twice.

- local: Megatron's modules with our kernels; te: Transformer Engine's; te-delayed, te-tensorwise and
  te-blockwise: FP8 by that recipe (the first two hybrid, blockwise E4M3);
- transformers: LlamaForCausalLM or MixtralForCausalLM as it comes, with SDPA, torch's fused AdamW and
  the same precision scheme.

FLOPs are the model's (btx_megatron/estimate_flops.py): of the S x S scores the causal half is counted, logits
are, recomputation is not, nor is anything that is no matrix product. MFU is against 989 TFLOP/s (H100 SXM,
bf16, dense) and against a bf16 matrix product that is measured between the cases, on the same GPU; FP8's are
against the bf16 figures too. ``--device cpu --tiny`` tries the program where there is no GPU: nothing that it
prints there means anything.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_contestants import (
    BASE,
    CASES,
    CONTESTANTS,
    TINY,
    WARM_UP,
    Case,
    Contestant,
    build,
    recipe_of,
    samples,
)
from measure import commit, versions

ROOT = Path(__file__).resolve().parents[1]
PEAK_TFLOPS = 989.0


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(contestant: Contestant, tokens: list[Any]) -> tuple[float, float]:
    """Seconds of a step, and its loss."""
    synchronize()
    started = time.perf_counter()
    loss = contestant.step(tokens)
    synchronize()
    return time.perf_counter() - started, loss


def duel(case: Case, pair: dict[str, Contestant], rounds: int, micro_batches: int) -> dict[str, Any]:
    """Seconds and losses of every step of two."""
    stream = samples(case, micro_batches)
    result: dict[str, Any] = {name: {"seconds": [], "losses": []} for name in pair}
    for number in range(WARM_UP + rounds):
        tokens = next(stream)
        order = list(pair) if number % 2 else list(pair)[::-1]
        for name in order:
            seconds, loss = timed(pair[name], tokens)
            result[name]["losses"].append(loss)
            if number >= WARM_UP:
                result[name]["seconds"].append(seconds)
    base, rival = pair
    for name, rise in ((base, 0.1), (rival, 0.0)):  # the base has learnt in the duels before
        losses = result[name]["losses"]
        result[name]["learns"] = losses[-1] < losses[0] + rise
    return result


def flops_of_a_step(case: Case, micro_batches: int) -> float:
    from btx_megatron.estimate_flops import forward_flops

    model = recipe_of(case, BASE, micro_batches).model
    forward = forward_flops(model, case.vocabulary, case.experts or None, topk=2)
    return forward.training() * micro_batches * case.sequence


def matrix_product_tflops(size: int) -> float:
    """TFLOP/s of a bf16 product of square matrices, the median of ten."""
    import torch

    from btx_megatron.runtime.ranks import device

    a, b = (torch.randn(size, size, device=device(), dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(12):
        synchronize()
        started = time.perf_counter()
        for _ in range(4):
            a @ b
        synchronize()
        seconds.append((time.perf_counter() - started) / 4)
    return 2 * size**3 / statistics.median(seconds[2:]) / 1e12


def profile(contestant: Contestant, tokens: list[Any]) -> dict[str, Any]:
    """Where the GPU's time of one step goes: milliseconds by kind of kernel, and the largest kernels."""
    import torch
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        seconds, _ = timed(contestant, tokens)
    kinds: dict[str, float] = {}
    kernels = []
    for event in profiler.key_averages():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        ms = event.self_device_time_total / 1000
        kinds[kind_of_kernel(event.key)] = kinds.get(kind_of_kernel(event.key), 0.0) + ms
        kernels.append((event.key[:100], round(ms, 2), event.count))
    kinds["idle"] = max(0.0, 1000 * seconds - sum(kinds.values()))
    largest = sorted(kernels, key=lambda kernel: -kernel[1])[:15]
    return {"step_ms": 1000 * seconds, "kinds": kinds, "kernels": largest}


_KINDS = {
    "attention": ("flash", "fmha", "sdpa", "attention", "fprop", "bprop"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "xmma", "matmul"),
    "optimizer": ("adam", "multi_tensor", "l2norm", "foreach"),
    "FP8 conversion": ("quantize", "cast", "amax", "scale", "transpose"),
    "permutation": ("permute", "sort", "index", "gather", "scatter", "topk", "pad"),
    "norms, activation, RoPE": ("norm", "silu", "swiglu", "rope", "rotary"),
    "loss": ("cross_entropy", "softmax", "nll"),
    "copies": ("memcpy", "memset", "copy"),
}


def kind_of_kernel(name: str) -> str:
    """By the kernel's name; what no rule knows is ``other``."""
    lower = name.lower()
    return next((kind for kind, words in _KINDS.items() if any(word in lower for word in words)), "other")


def peak_memory() -> float:
    """GB that tensors held at most since ``forget``."""
    import torch

    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0


def held_memory() -> float:
    """GB that tensors hold now."""
    import torch

    return torch.cuda.memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0


def measure_case(
    name: str, case: Case, options: argparse.Namespace, result: dict[str, Any], tell: Callable[[], None]
) -> None:
    """Everyone beside the base; what fails (a recipe that the GPU has not, too little memory) is told.

    ``result`` is filled, and ``tell`` called after each duel: the minutes may end.
    """
    base_name = "local" if options.tiny else BASE
    base = build(case, base_name, options.micro_batches, options.tiny)
    result |= {"flops": flops_of_a_step(case, options.micro_batches), "duels": {}}
    tokens = next(samples(case, options.micro_batches))
    for _ in range(WARM_UP):
        timed(base, tokens)
    forget()  # what building it took
    timed(base, tokens)
    result["memory"] = {base_name: peak_memory()}
    if options.profile:
        result["profile"] = {base_name: profile(base, tokens)}
    for rival_name in options.contestants:
        if rival_name == base_name:
            continue
        rival, beside = None, held_memory()
        try:
            rival = build(case, rival_name, options.micro_batches, options.tiny)
            result["duels"][rival_name] = duel(
                case, {base_name: base, rival_name: rival}, options.rounds, options.micro_batches
            )
            forget()
            timed(rival, tokens)
            result["memory"][rival_name] = peak_memory() - beside
            if options.profile:
                result["profile"][rival_name] = profile(rival, tokens)
        except Exception as error:  # the others are worth their minutes
            result["duels"][rival_name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
        del rival
        forget()
        tell()
        print(f"{name}: {rival_name} done", file=sys.stderr, flush=True)
    del base
    forget()


def forget() -> None:
    """Let go of what nobody holds; Transformer Engine would go on with the scales of a model that is gone."""
    import torch

    if find_spec("transformer_engine"):
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        FP8GlobalStateManager.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def rows(result: dict[str, Any], case: Case, micro_batches: int, product: float) -> list[str]:
    """One line a contestant: its step, its share of the peak, and how it compares with the base."""
    found, shown = [], set()
    for rival, told in result["duels"].items():
        if "failed" in told:
            found.append(f"| {rival} | {told['failed'].splitlines()[0][:80]} | | | | | | |")
            continue
        base = next(iter(told))
        ratio = [b / r for b, r in zip(told[base]["seconds"], told[rival]["seconds"], strict=True)]
        for name in (base, rival):
            if name in shown:
                continue
            shown.add(name)
            seconds = statistics.median(told[name]["seconds"])
            tflops = result["flops"] / seconds / 1e12
            tokens = micro_batches * case.sequence / seconds
            low, _, high = statistics.quantiles(ratio, n=4)
            beside = "1" if name == base else f"{statistics.median(ratio):.2f} ({low:.2f}-{high:.2f})"
            memory = result["memory"].get(name, math.nan)
            mark = "" if told[name]["learns"] else " (does not learn)"
            found.append(
                f"| {name}{mark} | {1000 * seconds:.1f} | {tokens:,.0f} | {tflops:.0f} | "
                f"{100 * tflops / PEAK_TFLOPS:.1f} | {100 * tflops / product:.1f} | {memory:.1f} | {beside} |"
            )
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=[*CASES, *TINY])
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--no-profile", dest="profile", action="store_false")
    parser.add_argument("--tiny", action="store_true", help="models that a CPU can train")
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    options.cases = options.cases or list(TINY if options.tiny else CASES)
    if options.tiny:
        options.contestants = [name for name in options.contestants if not name.startswith("te")]
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    if options.device == "gpu" and not torch.cuda.is_available():
        print("no GPU here; --device cpu --tiny tries the program without one", file=sys.stderr)
        return 2
    if not options.tiny and find_spec("transformer_engine") is None:
        print("Transformer Engine is not installed; every case is measured beside it", file=sys.stderr)
        return 2
    from btx_megatron.runtime import ranks

    packages = ["torch", "megatron-core", "transformer-engine", "transformers"]
    told = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(ROOT),
        "versions": versions(sys.executable, packages),
        "step": f"{options.micro_batches} micro-batches of one sequence, {options.rounds} rounds",
    }
    print("\n".join(f"- {key}: {value}" for key, value in told.items()), flush=True)
    report: dict[str, Any] = {"told": told, "cases": {}}
    with ranks.joined_ranks():
        from btx_megatron.recipe import Layout

        for name in options.cases:
            ranks.set_layout(Layout(), seed=1)
            case = (CASES | TINY)[name]
            product = matrix_product_tflops(256 if options.tiny else 8192)
            result: dict[str, Any] = {"matrix_product_tflops": product}
            report["cases"][name] = result
            measure_case(name, case, options, result, lambda: write(report, options.json))
            print(f"\n{name}: {case}; a bf16 matrix product: {product:.0f} TFLOP/s\n")
            print("| | ms a step | tokens/s | TFLOP/s | MFU % of 989 | % of the product | GB | x te |")
            print("|---|---|---|---|---|---|---|---|")
            print("\n".join(rows(result, case, options.micro_batches, product)), flush=True)
            for one, its in result.get("profile", {}).items():
                share = sorted(its["kinds"].items(), key=lambda kind: -kind[1])
                print(f"\n{one}, ms: " + ", ".join(f"{kind} {ms:.1f}" for kind, ms in share), flush=True)
    write(report, options.json)
    return 0


def write(report: dict[str, Any], path: Path | None) -> None:
    """So far."""
    if path:
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
