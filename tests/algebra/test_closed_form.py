import logging

import numpy as np
import pytest
import torch
from token_data import data, filled, normal, output_error
from torch import Tensor

from tp_amp.algebra.closed_form import METHODS, correct
from tp_amp.algebra.moments import Moments

TINY = 1e-13


@pytest.mark.parametrize("method", METHODS)
def test_no_tokens_raises(method: str) -> None:
    x, r = data()
    with pytest.raises(ValueError, match="no tokens"):
        correct(Moments().add(x, r, torch.zeros(60)), method)


def lstsq(x: Tensor, r: Tensor, intercept: bool) -> tuple[Tensor, Tensor]:
    rows = np.hstack([x, np.ones((len(x), 1))]) if intercept else x.numpy()
    solution = torch.from_numpy(np.linalg.lstsq(rows, r.numpy(), rcond=None)[0])
    return (solution[:-1].T, solution[-1]) if intercept else (solution.T, torch.zeros(r.shape[1]))


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


def test_others_are_fitted_as_if_what_hardly_varies_were_not_there() -> None:
    x, r = data()
    still = 1e6 + 0.5 * normal(60, 1, seed=5)  # float32 knows of it to one sixteenth
    found = correct(filled(torch.cat([x, still], 1), r + still), "affine", ridge=TINY)
    alone, _ = lstsq(x, r + still, True)
    torch.testing.assert_close(found.weight[:, :-1], alone, rtol=1e-6, atol=1e-6)
    assert not found.weight[:, -1].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["inputs", "residuals"])
def test_what_is_not_finite_is_told(bad: float, place: str) -> None:
    """The ridge was raised without end."""
    given = {"inputs": torch.randn(20, 3), "residuals": torch.randn(20, 2)}
    given[place][4, 1] = bad
    moments = Moments().add(given["inputs"], given["residuals"])
    with pytest.raises(ValueError, match="what fc2 reads, or should give, is not finite"):
        correct(moments, "affine", name="fc2")
