"""Floating-point operations of training, by closed formulas: what a stage costs, and what a step achieves.

Counted are the *model's* matrix products, an addition and a multiplication as two. A token's forward pass,
with L layers, h hidden, n heads and g key/value groups of width d, f feed-forward (of one expert), k of E
experts, sequence S, and a vocabulary V (padded: the rows that are computed with):

| part | FLOPs |
|---|---|
| projections (query, key, value, output) | L 2 h d (2 n + 2 g) |
| attention (scores, and values by scores) | L 4 n d S / 2 |
| feed-forward (gate, up, down) | L k 6 h f; dense: k = 1 |
| router | L 2 h E |
| logits | 2 h V |

The backward pass is twice the forward: every product has two operands, and each has its gradient. Of frozen
weights the gradient is left out.

Conventions, since the field has several: of the S x S scores the half below the diagonal is counted
(Megatron-LM's formula; PaLM's MFU and torch's counter count the square: ``causal=False``); recomputed
activations are not counted, nor what flash attention computes twice, so that a slower run does not look
better; what is not a matrix product (norms, RoPE, softmax, SwiGLU's gate, loss, optimizer) is left out.
Routes that a capacity drops are counted as if they were taken. k of Sample Top-1 is the mean over its layers,
of which the first takes all experts.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import astuple, dataclass

from btx_megatron.estimate import padded_vocab_size, stage_tokens, vocab_size
from btx_megatron.recipe import Model, Recipe

_PEAK_TFLOPS = {
    "A100": 312.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
}
"""Dense bfloat16 matrix products of NVIDIA's data sheets, by a part of torch's name of the device."""


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one token's forward pass, by part."""

    projections: float
    attention: float
    feed_forward: float
    router: float
    logits: float

    @property
    def total(self) -> float:
        """All parts."""
        return float(sum(astuple(self)))

    def training(self, freeze: Collection[str] = ()) -> float:
        """FLOPs of forward and backward; ``freeze`` as in the recipe (experts, router, shared)."""
        weights = {
            "experts": self.feed_forward,
            "router": self.router,
            "shared": self.projections + self.logits,
        }
        return 3 * self.total - sum(weights[part] for part in set(freeze))


def forward_flops(
    model: Model,
    vocab_rows: int,
    num_experts: int | None = None,
    topk: float = 1,
    causal: bool = True,
    expert_width: int | None = None,
) -> ForwardFlops:
    """FLOPs of a token of a sequence of ``model.seq_length``; ``num_experts`` None: a dense model.

    ``vocab_rows``: the padded vocabulary. ``causal``: half of the square of scores is counted.
    ``expert_width``: of an expert's feed-forward; None: the model's.
    """
    heads = model.num_attention_heads
    groups = model.num_query_groups or heads
    width = model.kv_channels or model.hidden_size // heads
    keys = model.seq_length / (2 if causal else 1)
    width_of_all: float = model.ffn_hidden_size
    if num_experts is not None:
        width_of_all = topk * (expert_width or model.ffn_hidden_size)
    return ForwardFlops(
        projections=model.num_layers * 2 * model.hidden_size * width * (2 * heads + 2 * groups),
        attention=model.num_layers * 4 * heads * width * keys,
        feed_forward=model.num_layers * 6 * model.hidden_size * width_of_all,
        router=model.num_layers * 2 * model.hidden_size * (num_experts or 0),
        logits=2 * model.hidden_size * vocab_rows,
    )


def training_flops_per_token(recipe: Recipe, stage: str, vocab_rows: int | None = None) -> float:
    """FLOPs that a training stage spends on a token.

    ``vocab_rows``: the padded vocabulary, where it is known; else as the recipe tells (see vocab_size).
    """
    if vocab_rows is None:
        vocab_rows = padded_vocab_size(vocab_size(recipe), recipe.model.make_vocab_size_divisible_by)
    experts = recipe.num_experts(stage)
    if experts is None:
        forward = forward_flops(recipe.model, vocab_rows)
    else:
        topk, width = recipe.moe.mean_topk(experts, recipe.model.num_layers), recipe.expert_ffn_hidden_size
        forward = forward_flops(recipe.model, vocab_rows, experts, topk, expert_width=width)
    return forward.training(recipe.stage(stage).training.freeze)


def stage_flops(recipe: Recipe, stage: str) -> float:
    """FLOPs of a whole training stage; 0 of an imported one. ``train_iters`` must be known."""
    return training_flops_per_token(recipe, stage) * stage_tokens(recipe, stage)


def flops_text(flops: float) -> str:
    """``3.54e+12``, or ``0``."""
    return f"{flops:.2e}" if flops else "0"


def known_peak_tflops(device_name: str) -> float | None:
    """TFLOP/s that a device can do at most in bfloat16, without sparsity; None where we do not know it."""
    matches = [name for name in _PEAK_TFLOPS if name.lower() in device_name.lower()]
    return _PEAK_TFLOPS[max(matches, key=len)] if matches else None
