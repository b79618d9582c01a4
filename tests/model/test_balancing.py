"""The paper's balancing loss against its equation, value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from btx_megatron.model.balancing import soft_balancing_loss


def gates(logits: Tensor, k: int) -> Tensor:
    top = logits.topk(k, dim=-1)
    return torch.zeros_like(logits).scatter(-1, top.indices, top.values.softmax(-1))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_value_and_gradient_are_the_equations(k: int) -> None:
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(k)) * 2
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value = soft_balancing_loss(gates(ours, k), ours.softmax(-1))
    u, p = gates(plain, k).mean(0), plain.softmax(-1).mean(0)
    equation = 4 * sum(u[i] * p[i] for i in range(4))
    assert value.item() == pytest.approx(equation.item(), rel=1e-6)
    value.backward()
    equation.backward()
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, plain.grad)


def test_even_routing_gives_one_and_a_dead_router_gives_the_number_of_experts() -> None:
    even = torch.full((8, 4), 0.25)
    assert soft_balancing_loss(even, even).item() == pytest.approx(1.0)
    one = torch.eye(4)[torch.zeros(8, dtype=torch.long)]
    assert soft_balancing_loss(one, one).item() == pytest.approx(4.0)


def test_u_carries_a_gradient_as_switchs_does_not() -> None:
    logits = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    frozen = logits.detach().softmax(-1)
    soft_balancing_loss(gates(logits, 2), frozen).backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() > 0
