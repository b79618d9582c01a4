"""Parts of the layer written out by hand, forward and backward, for fewer passes over memory.

Megatron fuses these through Transformer Engine or torch.compile. Without either its fallbacks, a kernel for
each sign of the formula, cost a third of a small model's step on a CPU. The formulas are the same; where a
bfloat16 fallback rounds between the signs these round once, at the end.

Shape legend: S sequence, B micro-batch, N heads, D head width, F feed-forward, V vocabulary, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CACHE_NUMBERS = 2**20
"""Logits at a time on a CPU: 4 MB in fp32 stay in its caches. A GPU takes 64 times as many."""


def swiglu(gate_and_up: Tensor) -> Tensor:
    """[..., 2F], gate in front of up -> silu(gate) * up, [..., F] (Shazeer 2020)."""
    return _SwiGLU.apply(gate_and_up)  # type: ignore[no-any-return, no-untyped-call]


def rotate(x_SBND: Tensor, cos_S11D: Tensor, sin_S11D: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021) in Llama's convention: dimension i turns with i + D/2."""
    return _Rotate.apply(x_SBND, cos_S11D, sin_S11D)  # type: ignore[no-any-return, no-untyped-call]


def token_losses(logits_SBV: Tensor, labels_SB: Tensor) -> Tensor:
    """[S, B] -log softmax(logits)[label], in fp32 whatever the logits are.

    The gradient is made on the way, while the logits are at hand, and takes the logits' place in memory.
    """
    return _TokenLosses.apply(logits_SBV, labels_SB)  # type: ignore[no-any-return, no-untyped-call]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (gate_and_up,) = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_and_up)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1), None, None  # the other way round


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    out = x * cos
    half = out.shape[-1] // 2
    out[..., :half].addcmul_(second, sin[..., :half], value=-sign)
    out[..., half:].addcmul_(first, sin[..., half:], value=sign)
    return out


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_SBV: Tensor, labels_SB: Tensor) -> Tensor:
        logits_TV, labels_T1 = logits_SBV.flatten(0, 1), labels_SB.reshape(-1, 1)
        losses_T1 = torch.empty(labels_T1.shape, dtype=torch.float32, device=logits_SBV.device)
        grad_TV = torch.empty_like(logits_TV) if ctx.needs_input_grad[0] else None
        numbers = _CACHE_NUMBERS * (64 if logits_SBV.is_cuda else 1)
        rows = max(1, numbers // logits_TV.shape[1])
        for start in range(0, len(logits_TV), rows):
            part = slice(start, start + rows)
            log_p = torch.log_softmax(logits_TV[part], dim=-1, dtype=torch.float32)
            torch.neg(log_p.gather(1, labels_T1[part]), out=losses_T1[part])
            if grad_TV is not None:  # softmax - 1 at the label
                p = log_p.exp_()
                p.scatter_add_(1, labels_T1[part], p.new_full((), -1.0).expand(len(p), 1))
                grad_TV[part] = p
        if grad_TV is not None:
            ctx.save_for_backward(grad_TV)
        return losses_T1.view(labels_SB.shape)

    @staticmethod
    def backward(ctx: Any, grad_SB: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (grad_TV,) = ctx.saved_tensors
        grad = grad_TV * grad_SB.reshape(-1, 1).to(grad_TV.dtype)
        return grad.view(*grad_SB.shape, -1), None
