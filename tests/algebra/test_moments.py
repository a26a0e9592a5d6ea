"""Moments of a stream of tokens, against the covariance of all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from token_data import data, filled, normal, output_error
from torch import Tensor

from tp_amp.algebra.closed_form import METHODS, correct
from tp_amp.algebra.moments import Moments


def assert_same(moments: Moments, x: Tensor, r: Tensor, rtol: float = 1e-11) -> None:
    """Against torch.cov of all tokens at once."""
    expected = torch.cov(torch.cat([x, r], 1).T, correction=0)
    inputs = x.shape[1]
    torch.testing.assert_close(moments.inputs, expected[:inputs, :inputs], rtol=rtol, atol=rtol)
    torch.testing.assert_close(moments.cross, expected[inputs:, :inputs], rtol=rtol, atol=rtol)
    torch.testing.assert_close(moments.mean_inputs, x.mean(0))
    torch.testing.assert_close(moments.mean_residuals, r.mean(0))
    assert moments.squares == pytest.approx(float(r.square().sum(1).mean()), rel=1e-12)
    assert moments.count == len(x)


def held_bytes(value: Any) -> int:
    """Of all tensors in it."""
    if isinstance(value, Tensor):
        return value.untyped_storage().nbytes()
    inside = value.values() if isinstance(value, dict) else value
    return sum(map(held_bytes, inside)) if isinstance(value, (dict, tuple)) else 0


@pytest.mark.parametrize("batch", [1, 2, 7, 60])
def test_streaming_moments_equal_the_covariance_of_all_tokens(batch: int) -> None:
    x, r = data()
    moments = filled(x, r, batch=batch)
    assert_same(moments, x, r)
    assert moments.tokens == 60


@pytest.mark.parametrize("batch", [1, 7, 60])
def test_weights_are_repeated_tokens(batch: int) -> None:
    x, r = data()
    weights = torch.arange(60) % 4
    moments = filled(x, r, weights, batch)
    assert_same(moments, x.repeat_interleave(weights, 0), r.repeat_interleave(weights, 0))
    assert moments.tokens == 45


def test_only_the_sums_are_held() -> None:
    """Of a wide layer one matrix, for as many batches as there are."""
    x, r = torch.randn(40, 200), torch.randn(40, 50)
    sizes = []
    for batch in (40, 4):
        sizes.append(held_bytes(vars(filled(x, r, batch=batch))))
    assert sizes[0] == sizes[1] <= 8 * (200 * 200 + 200 * 50 + 2 * (200 + 50))


def test_batch_without_weight_changes_nothing() -> None:
    x, r = data()
    moments = filled(x, r)
    moments.add(x * 100, r, torch.zeros(60))
    assert_same(moments, x, r)


def test_wrong_number_of_weights_raises() -> None:
    x, r = data()
    with pytest.raises(ValueError, match="head: found 59 weights for 60 tokens"):
        Moments("head").add(x, r, torch.ones(59))


@pytest.mark.parametrize("batch", [1, 7, 60])
def test_large_means_lose_no_digits(batch: int) -> None:
    # Whole sixteenths, which stay exact beside a million.
    x, r = ((16 * values).round() / 16 for values in data())
    expected = torch.cov(x.T, correction=0)
    moments = filled(x + 1e6, r - 1e6, batch=batch)
    torch.testing.assert_close(moments.inputs, expected, rtol=1e-8, atol=1e-8)
    expected = (r - r.mean(0)).T @ (x - x.mean(0)) / 60
    torch.testing.assert_close(moments.cross, expected, rtol=1e-8, atol=1e-8)


def test_float32_tokens_are_summed_in_double() -> None:
    x, r = (values.float() for values in data(tokens=4000))
    assert_same(filled(x, r, batch=3), x.double(), r.double())


def test_after_cut_equals_moments_gathered_from_the_kept() -> None:
    hidden, _ = data(tokens=90, inputs=8)
    weight, keep = normal(3, 8, seed=5), torch.tensor([6, 0, 3])
    dropped = torch.tensor([1, 2, 4, 5, 7])
    residuals = hidden[:, dropped] @ weight[:, dropped].T
    cut = filled(hidden, hidden[:, :0], batch=7).after_cut(weight, keep)
    assert_same(cut, hidden[:, keep], residuals)
    assert cut.tokens == 90
    for method in METHODS:
        correction = correct(cut, method)
        measured = output_error(hidden[:, keep], residuals, correction.weight, correction.bias)
        assert correction.error == pytest.approx(measured, rel=1e-10)
