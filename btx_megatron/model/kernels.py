"""Parts of the layer written out by hand, forward and backward, for fewer passes over memory.

Megatron fuses these through Transformer Engine or torch.compile. Without either a kernel runs for each sign
of the formula, and more in the backward pass; on a CPU a small model feels it. The formulas are the same;
where a bfloat16 fallback rounds between the signs these round later. What was tried and did not help is told
in docs/log.md.

Shape legend: S sequence, B micro-batch, N heads, D head width, F feed-forward, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, in fp32 inside (Zhang & Sennrich 2019)."""
    if x.is_cuda:
        return F.rms_norm(x, weight_H.shape, weight_H, eps)  # one kernel there
    return _RMSNorm.apply(x, weight_H, eps)  # type: ignore[no-any-return, no-untyped-call]


def swiglu(gate_and_up: Tensor) -> Tensor:
    """[..., 2F], gate in front of up -> silu(gate) * up, [..., F] (Shazeer 2020)."""
    return _SwiGLU.apply(gate_and_up)  # type: ignore[no-any-return, no-untyped-call]


def rotation_table(angles_S11D: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What ``rotate`` takes for these angles (both halves of D hold the same ones): cos, and sin with the
    sign that the other half of x has in the sum."""
    first, second = angles_S11D.sin().chunk(2, dim=-1)
    return angles_S11D.cos().to(dtype), torch.cat((-first, second), dim=-1).to(dtype)


def rotate(x_SBND: Tensor, cos_S11D: Tensor, sin_S11D: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021) in Llama's convention: dimension i turns with i + D/2."""
    return _Rotate.apply(x_SBND, cos_S11D, sin_S11D)  # type: ignore[no-any-return, no-untyped-call]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        if x.dtype == torch.float32:
            return (x * inverse).mul_(weight)
        return x.float().mul_(inverse).mul_(weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        """With r = 1 / rms(x) and s = sum_h grad w x: r w grad - r^3 s x / H; for w the sum of r x grad."""
        x, weight, inverse = ctx.saved_tensors
        x_TH, grad_TH = (tensor.flatten(0, -2).float() for tensor in (x, grad))
        r_T1, w_H = inverse.flatten(0, -2), weight.float()
        product_TH = grad_TH * x_TH
        grad_weight = (r_T1.T @ product_TH).view(-1)
        pull_T1 = (product_TH @ w_H).unsqueeze(1).mul_(r_T1.pow(3)).div_(-len(w_H))
        grad_x = torch.mul(grad_TH, w_H, out=product_TH).mul_(r_T1).addcmul_(x_TH, pull_T1)
        return grad_x.view_as(x).to(x.dtype), grad_weight.to(weight.dtype), None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        gate, up = gate_and_up.chunk(2, dim=-1)
        silu = F.silu(gate)
        ctx.save_for_backward(gate_and_up, silu)
        return silu * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        gate_and_up, silu = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        both = torch.empty_like(gate_and_up)
        grad_gate, grad_up = both.chunk(2, dim=-1)
        torch.mul(grad, silu, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return both


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1), None, None  # the other way round


def _turned(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos).addcmul_(torch.cat((second, first), dim=-1), sin, value=direction)
