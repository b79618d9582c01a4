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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

from measure import commit, versions

ROOT = Path(__file__).resolve().parents[1]
PEAK_TFLOPS = 989.0
WARM_UP = 3
BASE = "te"
FP8 = {
    "te-delayed": {"fp8": "hybrid", "fp8_recipe": "delayed"},
    "te-tensorwise": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "te-blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
}
CONTESTANTS = ["local", *FP8, "transformers"]


@dataclass(frozen=True)
class Case:
    """A model. ``experts`` 0: dense; a token takes two of them."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    experts: int = 0
    vocabulary: int = 32_000
    sequence: int = 4096
    lr: float = 3e-4


CASES = {
    "dense-1b": Case(16, 2048, 8192, 32, 8),  # Llama 3.2 1B with a smaller vocabulary
    "dense-7b-layers": Case(6, 4096, 11_008, 32, 32),  # Llama 2 7B, 6 of 32 layers
    "moe-4": Case(2, 4096, 11_008, 32, 32, experts=4),  # BTX of four Llama 2 7B, 2 of 32 layers
    "moe-8": Case(3, 2048, 8192, 32, 8, experts=8),
}
TINY = {
    "dense-tiny": Case(2, 64, 128, 4, 2, vocabulary=256, sequence=64, lr=3e-3),
    "moe-tiny": Case(2, 64, 128, 4, 2, experts=4, vocabulary=256, sequence=64, lr=3e-3),
}


@dataclass
class Contestant:
    """One that takes steps, and what it holds."""

    step: Callable[[list[Any]], float]
    """Takes micro-batches of tokens [1, S + 1], returns the mean loss."""
    owner: Any


def recipe_of(case: Case, name: str, micro_batches: int) -> Any:
    from btx_megatron.recipe import Launch, Model, Moe, Recipe, Stage, Training

    training = Training(
        train_iters=10_000,
        global_batch_size=micro_batches,
        lr=case.lr,
        lr_warmup_iters=WARM_UP,
        bf16=True,
        **FP8.get(name, {}),  # type: ignore[arg-type]
    )
    recipe = Recipe(
        model=Model(
            num_layers=case.layers,
            hidden_size=case.hidden,
            ffn_hidden_size=case.ffn,
            num_attention_heads=case.heads,
            num_query_groups=case.groups,
            seq_length=case.sequence,
        ),
        training=training,
        moe=Moe(moe_aux_loss_coeff=0.01),
        launch=Launch(transformer_impl="local" if name == "local" else "transformer_engine"),
    )
    recipe.stages.seed = Stage(training=training)
    return recipe


def ours(case: Case, name: str, micro_batches: int, tiny: bool) -> Contestant:
    import torch

    from btx_megatron.runtime.ranks import device
    from btx_megatron.training.trainer import Trainer

    recipe = recipe_of(case, name, micro_batches)
    if tiny:
        recipe.launch.transformer_impl = None
    # a billion weights from the CPU's generator would take longer than the steps; the GPU's follow below
    with mock.patch("torch.nn.init.normal_", lambda tensor, *_, **__: tensor):
        trainer = Trainer(
            recipe,
            recipe.stages.seed,
            padded_vocab_size=case.vocabulary,
            num_experts=case.experts or None,
        )
    generator = torch.Generator(device()).manual_seed(1)
    with torch.no_grad():
        for chunk in trainer.model:
            for parameter in chunk.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.02, generator=generator)
    trainer.optimizer.reload_model_params()

    def step(tokens: list[Any]) -> float:
        return trainer.step(iter([micro_batch(sample) for sample in tokens])).lm_loss

    return Contestant(step, trainer)


def micro_batch(tokens: Any) -> dict[str, Any]:
    import torch

    inputs = tokens[:, :-1].contiguous()
    return {
        "tokens": inputs,
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": torch.ones(inputs.shape, device=inputs.device),
        "position_ids": torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs),
        "sample_index": torch.arange(len(inputs)),
        "step": 1,
    }


def transformers_model(case: Case) -> Contestant:
    """Weights of its own: what is compared is time, and that its loss falls."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    from btx_megatron.runtime.ranks import device

    shape: dict[str, Any] = {
        "vocab_size": case.vocabulary,
        "hidden_size": case.hidden,
        "intermediate_size": case.ffn,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.groups,
        "max_position_embeddings": case.sequence,
        "attn_implementation": "sdpa",
    }
    with torch.device(device()):
        model: Any = (
            MixtralForCausalLM(
                MixtralConfig(
                    **shape,
                    num_local_experts=case.experts,
                    num_experts_per_tok=2,
                    output_router_logits=True,
                    sliding_window=None,
                )
            )
            if case.experts
            else LlamaForCausalLM(LlamaConfig(**shape))
        )
    model = model.to(torch.bfloat16).train()
    parameters = list(model.parameters())
    masters = [parameter.detach().float().requires_grad_() for parameter in parameters]
    groups = [
        {"params": [p for p in masters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in masters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=case.lr, betas=(0.9, 0.95), eps=1e-5, fused=True)

    def step(tokens: list[Any]) -> float:
        total = torch.zeros((), device=device())
        for master in masters:
            master.grad = torch.zeros_like(master) if master.grad is None else master.grad.zero_()
        for sample in tokens:
            output = model(sample[:, :-1], use_cache=False)
            logits = output.logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), sample[:, 1:].flatten())
            balancing = 0.01 * output.aux_loss if case.experts else 0.0
            ((loss + balancing) / len(tokens)).backward()
            torch._foreach_add_([master.grad for master in masters], [p.grad.float() for p in parameters])
            for parameter in parameters:
                parameter.grad = None
            total += loss.detach() / len(tokens)
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(parameters, masters)
        return total.item()

    return Contestant(step, model)


def build(case: Case, name: str, micro_batches: int, tiny: bool) -> Contestant:
    if name == "transformers":
        return transformers_model(case)
    return ours(case, name, micro_batches, tiny)


def samples(case: Case, micro_batches: int) -> Iterator[list[Any]]:
    """Tokens with something to learn (an eighth of the vocabulary: few of them would load few experts)."""
    import torch

    from btx_megatron.runtime.ranks import device

    generator = torch.Generator().manual_seed(1)
    while True:
        tokens = torch.randint(
            0, case.vocabulary // 8, (micro_batches, 1, case.sequence + 1), generator=generator
        )
        yield list(tokens.to(device()))


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
        if not losses[-1] < losses[0] + rise:
            raise AssertionError(f"{name} does not learn: losses {losses}")
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


def measure_case(name: str, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Everyone beside the base; what fails (a recipe that the GPU has not, too little memory) is told."""
    base_name = "local" if options.tiny else BASE
    base = build(case, base_name, options.micro_batches, options.tiny)
    result: dict[str, Any] = {"flops": flops_of_a_step(case, options.micro_batches), "duels": {}}
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
        print(f"{name}: {rival_name} done", file=sys.stderr, flush=True)
    del base
    forget()
    return result


def forget() -> None:
    import torch

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
            found.append(
                f"| {name} | {1000 * seconds:.1f} | {tokens:,.0f} | {tflops:.0f} | "
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
            result = measure_case(name, case, options) | {"matrix_product_tflops": product}
            report["cases"][name] = result
            print(f"\n{name}: {case}; a bf16 matrix product: {product:.0f} TFLOP/s\n")
            print("| | ms a step | tokens/s | TFLOP/s | MFU % of 989 | % of the product | GB | x te |")
            print("|---|---|---|---|---|---|---|---|")
            print("\n".join(rows(result, case, options.micro_batches, product)), flush=True)
            for one, its in result.get("profile", {}).items():
                share = sorted(its["kinds"].items(), key=lambda kind: -kind[1])
                print(f"\n{one}, ms: " + ", ".join(f"{kind} {ms:.1f}" for kind, ms in share), flush=True)
            if options.json:  # after each case: the minutes may end
                options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
