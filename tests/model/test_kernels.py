"""Kernels written out by hand against the formulas in plain torch: values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from btx_megatron.model.kernels import rms_norm, rotate, rotation_table, swiglu

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def assert_like(ours: Callable[[Tensor], Tensor], reference: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Equal values, and equal gradients for a random gradient of the result; the reference in fp64."""
    exact = x.detach().double().requires_grad_()
    here, there = ours(x), reference(exact)
    grad = random(*here.shape, seed=1).detach()
    here.backward(grad.to(here.dtype))
    there.backward(grad.to(here.dtype).double())
    assert x.grad is not None
    tolerance = TOLERANCE[x.dtype]
    torch.testing.assert_close(here.double(), there, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(x.grad.double(), exact.grad, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_swiglu(dtype: torch.dtype) -> None:
    def reference(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    assert_like(swiglu, reference, random(5, 2, 12, dtype=dtype))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rotate(dtype: torch.dtype) -> None:
    """As a product of complex numbers: dimension i is the real part, i + D/2 the imaginary one."""
    angles = torch.outer(torch.arange(5.0), 100.0 ** (-torch.arange(4.0) / 4)).double()
    table = torch.cat((angles, angles), dim=-1)[:, None, None]

    def reference(x: Tensor) -> Tensor:
        turned = (
            torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)[:, None, None]
        )
        return torch.cat((turned.real, turned.imag), dim=-1)

    def ours(x: Tensor) -> Tensor:
        return rotate(x, *rotation_table(table, dtype))

    assert_like(ours, reference, random(5, 2, 3, 8, dtype=dtype))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rms_norm(dtype: torch.dtype) -> None:
    weight = random(8, dtype=dtype, seed=3)
    exact = weight.detach().double().requires_grad_()

    def reference(x: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 0.1).rsqrt() * exact

    assert_like(lambda x: rms_norm(x, weight, 0.1), reference, random(5, 2, 8, dtype=dtype))
    assert weight.grad is not None
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(weight.grad.double(), exact.grad, atol=tolerance, rtol=tolerance)


def test_rms_norm_of_zeros_and_of_large_numbers() -> None:
    x = torch.stack([torch.zeros(8), torch.full((8,), 1e8)]).requires_grad_()
    rms_norm(x, torch.ones(8), 1e-5).sum().backward()
    assert x.grad is not None
    assert x.grad[0].tolist() == pytest.approx([1e-5**-0.5] * 8)
    assert x.grad[1].abs().max() < 1e-12
