import logging

import numpy as np
import pytest
import torch
from torch import Tensor

from tp_amp.compensation.closed_form import METHODS, correct
from tp_amp.compensation.recipe import Recipe
from tp_amp.importance.moments import Moments

TINY = 1e-13


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def data(tokens: int = 60, inputs: int = 5, outputs: int = 3, seed: int = 0) -> tuple[Tensor, ...]:
    """Correlated inputs with means, and residuals that depend on them in part."""
    x = normal(tokens, inputs, seed=seed) @ normal(inputs, inputs, seed=seed + 1) + 2
    r = x @ normal(inputs, outputs, seed=seed + 2) + normal(tokens, outputs, seed=seed + 3) + 1
    return x, r


def filled(x: Tensor, r: Tensor, weights: Tensor | None = None, batch: int = 1000) -> Moments:
    moments = Moments()
    for start in range(0, len(x), batch):
        part = slice(start, start + batch)
        moments.add(x[part], r[part], None if weights is None else weights[part])
    return moments


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


def test_batch_without_weight_changes_nothing() -> None:
    x, r = data()
    moments = filled(x, r)
    moments.add(x * 100, r, torch.zeros(60))
    assert_same(moments, x, r)


def test_wrong_number_of_weights_raises() -> None:
    x, r = data()
    with pytest.raises(ValueError, match="head: found 59 weights for 60 tokens"):
        Moments("head").add(x, r, torch.ones(59))


@pytest.mark.parametrize("method", METHODS)
def test_no_tokens_raises(method: str) -> None:
    x, r = data()
    with pytest.raises(ValueError, match="no tokens"):
        correct(Moments().add(x, r, torch.zeros(60)), method)


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


def lstsq(x: Tensor, r: Tensor, intercept: bool) -> tuple[Tensor, Tensor]:
    rows = np.hstack([x, np.ones((len(x), 1))]) if intercept else x.numpy()
    solution = torch.from_numpy(np.linalg.lstsq(rows, r.numpy(), rcond=None)[0])
    return (solution[:-1].T, solution[-1]) if intercept else (solution.T, torch.zeros(r.shape[1]))


def output_error(x: Tensor, r: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    left = r - x @ weight.T - (0 if bias is None else bias)
    return float(left.square().sum(1).mean())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_affine_is_numpys_least_squares(bias: bool, seed: int) -> None:
    x, r = data(seed=10 * seed)
    correction = correct(filled(x, r, batch=7), "affine", bias=bias, ridge=TINY)
    weight, intercept = lstsq(x, r, bias)
    torch.testing.assert_close(correction.weight, weight, rtol=1e-8, atol=1e-8)
    if bias:
        torch.testing.assert_close(correction.bias, intercept, rtol=1e-8, atol=1e-8)
    else:
        assert correction.bias is None
    assert correction.error == pytest.approx(output_error(x, r, weight, intercept), rel=1e-8)


def test_weighted_affine_is_least_squares_of_scaled_rows() -> None:
    x, r = data()
    weights = normal(60, seed=9).square()
    correction = correct(filled(x, r, weights, 7), "affine", ridge=TINY)
    scale = weights.sqrt()[:, None].numpy()
    rows = np.hstack([x, np.ones((60, 1))]) * scale
    solution = torch.from_numpy(np.linalg.lstsq(rows, r.numpy() * scale, rcond=None)[0])
    torch.testing.assert_close(correction.weight, solution[:-1].T, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(correction.bias, solution[-1], rtol=1e-8, atol=1e-8)


def test_mean_adds_the_mean_residual_alone() -> None:
    x, r = data()
    correction = correct(filled(x, r), "mean")
    assert not correction.weight.any()
    torch.testing.assert_close(correction.bias, r.mean(0))
    variance = float((r - r.mean(0)).square().sum(1).mean())
    assert correction.error == pytest.approx(variance, rel=1e-12)
    assert correction.error_before == pytest.approx(float(r.square().sum(1).mean()), rel=1e-12)


@pytest.mark.parametrize(("method", "bias"), [("none", True), ("none", False), ("mean", False)])
def test_nothing_to_add(method: str, bias: bool) -> None:
    x, r = data()
    correction = correct(filled(x, r), method, bias=bias)
    assert not correction.weight.any()
    assert correction.bias is None
    assert correction.error == correction.error_before > 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ridge", [1e-4, 1e-1, 3.0])
def test_ridge_is_least_squares_with_extra_rows(bias: bool, ridge: float) -> None:
    x, r = data()
    correction = correct(filled(x, r), "affine", bias=bias, ridge=ridge)
    mean_x, mean_r = (x.mean(0), r.mean(0)) if bias else (torch.zeros(5), torch.zeros(3))
    centred = x - mean_x
    strength = ridge * float(centred.square().mean())  # the mean diagonal of the moment
    extra = (60 * strength) ** 0.5 * np.eye(5)
    rows = np.vstack([centred, extra]), np.vstack([r - mean_r, np.zeros((5, 3))])
    weight = torch.from_numpy(np.linalg.lstsq(*rows, rcond=None)[0]).T
    torch.testing.assert_close(correction.weight, weight, rtol=1e-9, atol=1e-9)
    assert correction.ridge == ridge
    if bias:
        torch.testing.assert_close(correction.bias, mean_r - weight @ mean_x)
    measured = output_error(x, r, correction.weight, correction.bias)
    assert correction.error == pytest.approx(measured, rel=1e-10)


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


def test_error_is_the_trace_of_the_schur_complement() -> None:
    hidden, _ = data(tokens=90, inputs=8)
    weight, keep, dropped = normal(3, 8, seed=5), [0, 3, 6], [1, 2, 4, 5, 7]
    cut = filled(hidden, hidden[:, :0]).after_cut(weight, torch.tensor(keep))
    c, w = torch.cov(hidden.T, correction=0).numpy(), weight.numpy()[:, dropped]
    inverse = np.linalg.inv(c[np.ix_(keep, keep)])
    across = c[np.ix_(dropped, keep)]
    schur = c[np.ix_(dropped, dropped)] - across @ inverse @ across.T
    error = correct(cut, "affine", ridge=TINY).error
    assert error == pytest.approx(np.trace(w @ schur @ w.T), rel=1e-9)


def awkward(kind: str, seed: int) -> tuple[Tensor, Tensor]:
    x, r = data(seed=100 * seed)
    if kind == "copies":
        x = torch.cat([x, x[:, :2], 3 * x[:, 2:]], 1)
    elif kind == "few tokens":
        x, r = data(tokens=4, inputs=9, seed=100 * seed)
    elif kind == "one constant":
        x[:, 1] = 0.1
    elif kind == "all constant":  # whose means are not exact
        x = (3 * normal(1, 5, seed=seed)).repeat(60, 1)
    elif kind == "zero":
        x = torch.zeros_like(x)
    return x, r


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 1e-4, 1.0])
@pytest.mark.parametrize(
    "kind", ["plain", "copies", "few tokens", "one constant", "all constant", "zero"]
)
def test_affine_is_no_worse_than_mean_than_none(kind: str, ridge: float, bias: bool) -> None:
    for seed in range(5):
        x, r = awkward(kind, seed)
        moments = filled(x, r, batch=7)
        fits = [correct(moments, method, bias=bias, ridge=ridge) for method in METHODS]
        measured = [output_error(x, r, fit.weight, fit.bias) for fit in fits]
        scale = measured[0]
        for fit, error in zip(fits, measured, strict=True):
            assert fit.error == pytest.approx(error, rel=1e-6, abs=1e-6 * scale)
        assert measured[1] <= measured[0] * (1 + 1e-9)
        assert measured[2] <= measured[1] + 1e-9 * scale
        assert measured[2] < 0.9 * measured[0] or (kind == "zero" and not bias)


def test_constant_channels_are_not_fitted_to_rounding() -> None:
    x, r = awkward("all constant", 0)
    x, r = x.repeat(20, 1), r.repeat(20, 1)
    moments = filled(x, r, batch=77)
    assert bool((moments.inputs.diagonal() > 0).any())
    correction = correct(moments, "affine")
    assert float(correction.weight.abs().max()) == 0
    torch.testing.assert_close(correction.bias, r.mean(0))


def test_ridge_is_raised_and_logged_where_there_is_no_solution(
    caplog: pytest.LogCaptureFixture,
) -> None:
    x, r = data()
    x[:, 4] = 0
    with caplog.at_level(logging.WARNING):
        correction = correct(filled(x, r), "affine", ridge=0, name="blocks.3.fc2")
    assert 0 < correction.ridge < 1e-9
    [record] = caplog.records
    assert "blocks.3.fc2: the ridge was raised from 0 to" in record.getMessage()
    expected = lstsq(x[:, :4], r, True)[0]
    torch.testing.assert_close(correction.weight[:, :4], expected, rtol=1e-8, atol=1e-8)
    assert not correction.weight[:, 4].any()


def test_sound_ridge_is_kept_and_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert correct(filled(*data()), "affine", ridge=0).ridge == 0
    assert not caplog.records


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "best"}, "compensation must be one of .* found 'best'"),
        ({"method": None}, "compensation must be one of"),
        ({"ridge": -1e-9}, "ridge must be zero or more, found -1e-09"),
        ({"ridge": float("nan")}, "ridge must be zero or more, found nan"),
        ({"token_weights": "cls"}, "token_weights must be .*, found 'cls'"),
    ],
)
def test_bad_recipe_raises(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**arguments)


def test_what_hardly_varies_is_not_fitted() -> None:
    """A norm of one channel gives a constant but for its epsilon: weights of 1e10 would fit it."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(60, 1, generator=generator, dtype=torch.float64)
    residuals = 3 + noise @ torch.ones(1, 2, dtype=torch.float64)
    found = correct(Moments().add(1 + 1e-10 * noise, residuals), "affine")
    assert found.bias is not None
    assert float(found.weight.abs().max()) == 0
    assert torch.allclose(found.bias, residuals.mean(0))
    varied = correct(Moments().add(1 + 1e-3 * noise, residuals), "affine", ridge=0)
    assert torch.allclose(varied.weight, torch.full((2, 1), 1e3, dtype=torch.float64))
