"""A Linear without inputs, against PyTorch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tp_amp.structure.constant_linear import ConstantLinear


def constant(bias: bool = True) -> tuple[ConstantLinear, nn.Linear]:
    torch.manual_seed(0)
    own = nn.Linear(4, 3, bias=bias)
    own.weight, own.in_features = nn.Parameter(own.weight[:, :0].detach()), 0
    other = copy.deepcopy(own)
    other.__class__ = ConstantLinear
    return other, own  # type: ignore[return-value]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_it_gives_what_a_linear_of_no_inputs_gives(bias: bool, training: bool) -> None:
    layer, own = constant(bias)
    values = torch.empty(2, 5, 0)
    found = layer.train(training)(values)
    assert torch.equal(found, own(values))
    assert torch.equal(found, torch.zeros(2, 5, 3) + (own.bias if bias else 0))


def test_what_it_gives_may_be_changed_in_place() -> None:
    layer, _ = constant()
    output = layer.eval()(torch.empty(2, 0))
    bias = layer.bias.detach().clone()
    with torch.no_grad():
        output.mul_(2)
    assert torch.equal(layer.bias, bias)
    assert torch.equal(output, torch.stack([2 * bias, 2 * bias]))


def test_in_training_all_parameters_before_it_have_gradients() -> None:
    """As distributed training expects, where no image may leave a parameter out."""
    layer, _ = constant()
    before = nn.Linear(6, 2)
    before.weight = nn.Parameter(before.weight[:0].detach())
    before.bias = nn.Parameter(before.bias[:0].detach())
    norm = nn.LayerNorm(6)
    layer(before(norm(torch.randn(2, 6)))).sum().backward()
    assert all(p.grad is not None for p in (*norm.parameters(), *before.parameters()))
    assert torch.equal(layer.bias.grad, torch.full((3,), 2.0))
