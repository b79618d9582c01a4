"""Kernels written out by hand against the formulas in plain torch: values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from btx_megatron.model import kernels
from btx_megatron.model.kernels import rotate, swiglu, token_losses

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
        return rotate(x, table.cos().to(dtype), table.sin().to(dtype))

    assert_like(ours, reference, random(5, 2, 3, 8, dtype=dtype))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_token_losses_in_parts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_CACHE_NUMBERS", 3 * 11)  # three rows at a time, of ten
    labels = torch.randint(11, (5, 2), generator=torch.Generator().manual_seed(2))

    def reference(x: Tensor) -> Tensor:
        return F.cross_entropy(x.flatten(0, 1), labels.flatten(), reduction="none").view(5, 2)

    def ours(x: Tensor) -> Tensor:
        losses = token_losses(x, labels)
        assert losses.dtype == torch.float32
        return losses

    assert_like(ours, reference, random(5, 2, 11, dtype=dtype))


def test_token_losses_keep_nothing_without_gradient() -> None:
    logits, labels = random(5, 2, 11), torch.zeros(5, 2, dtype=torch.int64)
    with torch.no_grad():
        assert not token_losses(logits, labels).requires_grad


def test_extreme_logits() -> None:
    logits = torch.tensor([[[1e4, -1e4]], [[-1e4, 1e4]]]).requires_grad_()
    losses = token_losses(logits, torch.zeros(2, 1, dtype=torch.int64))
    losses.sum().backward()
    assert losses.tolist() == [[0.0], [2e4]]
    assert logits.grad is not None
    assert logits.grad.tolist() == [[[0.0, 0.0]], [[-1.0, 1.0]]]
