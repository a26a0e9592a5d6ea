"""Errors of nested widths, against least squares on the samples themselves."""

from __future__ import annotations

import pytest
import torch
from compensations import left_over
from torch import Tensor

from tp_amp.algebra.nested_widths import block_order, nested_errors


def samples(count: int, inputs: int, outputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs that depend on each other, and what reads them."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(inputs, inputs, generator=generator, dtype=torch.double)
    hidden = torch.randn(count, inputs, generator=generator, dtype=torch.double) @ mixed + 1
    return hidden, torch.randn(outputs, inputs, generator=generator, dtype=torch.double)


def covariance(hidden: Tensor) -> Tensor:
    centred = hidden - hidden.mean(0)
    return centred.T @ centred / len(hidden)


def test_errors_are_those_of_least_squares() -> None:
    hidden, weight = samples(200, 6, 4)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    errors = nested_errors(covariance(hidden), weight, order)
    expected = [left_over(hidden, weight, order[:kept].tolist()) for kept in range(7)]
    assert errors.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6 * expected[0])


def test_inputs_of_fewer_samples_than_inputs_have_errors_too() -> None:
    hidden, weight = samples(4, 6, 2)
    errors = nested_errors(covariance(hidden), weight, torch.arange(6))
    expected = [left_over(hidden, weight, list(range(kept))) for kept in range(7)]
    assert errors.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4 * expected[0])
    still = nested_errors(torch.zeros(3, 3), torch.ones(1, 3), torch.arange(3))
    assert still.tolist() == pytest.approx([0.0] * 4, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_each_next_block_leaves_the_smallest_error(seed: int) -> None:
    hidden, weight = samples(300, 8, 5, seed)
    kept: list[int] = []
    for found in block_order(covariance(hidden), weight, 2).tolist():
        left = [block for block in range(4) if 2 * block not in kept]
        errors = {b: left_over(hidden, weight, [*kept, 2 * b, 2 * b + 1]) for b in left}
        assert found == min(errors, key=errors.__getitem__)
        kept += [2 * found, 2 * found + 1]
    assert len(kept) == 8
