"""The sequential test: its error rate on known populations, and the search that uses it."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from toys import images, toy

import tp_amp
from tp_amp.objectives import Objective
from tp_amp.sampling import estimate_mean, looks, t_quantile
from tp_amp.sequential import SequentialTest

BATCHES = 32


@pytest.mark.parametrize("freedom", [8, 9, 15, 40, 1000])
@pytest.mark.parametrize("probability", [0.2, 0.05, 0.005, 0.001])
def test_quantiles_are_those_of_scipy(probability: float, freedom: int) -> None:
    expected = scipy.stats.t.isf(probability, freedom)
    assert t_quantile(probability, freedom) == pytest.approx(expected, rel=0.02)


def test_bound_is_that_of_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    known = torch.randn(50, generator=generator, dtype=torch.float64)
    values = 3 * known[:20] + 0.1 * torch.randn(20, generator=generator, dtype=torch.float64)
    columns = torch.stack([torch.ones(20), known[:20] - known.mean()], 1)
    fit = torch.linalg.lstsq(columns, values[:, None])
    residuals = values - (columns @ fit.solution)[:, 0]
    scale = torch.linalg.inv(columns.T @ columns)[0, 0] - 1 / 50
    deviation = float((residuals @ residuals) / 18 * scale) ** 0.5
    found = estimate_mean(values, 50, known)
    assert found.mean == pytest.approx(float(fit.solution[0]))
    assert found.error == pytest.approx(deviation, rel=1e-6)
    skewness = float((residuals / residuals.square().sum().div(18).sqrt()).pow(3).mean())
    assert found.skewness == pytest.approx(skewness, abs=1e-6)


def test_distance_without_skewness_is_students_t() -> None:
    values = torch.linspace(-1, 1, 15, dtype=torch.float64)
    expected = scipy.stats.ttest_1samp(values.numpy(), 0.25).statistic
    assert estimate_mean(values, 10**9).distance(0.25) == pytest.approx(expected, rel=1e-6)


def test_of_the_whole_population_the_mean_is_known() -> None:
    values = torch.arange(20.0)
    found = estimate_mean(values, 20)
    assert found.mean == pytest.approx(9.5)
    assert found.error == 0


def test_looks_grow_geometrically_and_never_come_after_the_last_batch() -> None:
    assert looks([3] * 40) == [8, 12, 18, 27]
    assert looks([64, 64]) == [1]
    assert looks([16, 8]) == []


def made(differences: dict[str, Tensor], error: float, batch: int = 16) -> SequentialTest:
    """A test that has measured everything, of a dense model with entropies of zero."""
    count = len(next(iter(differences.values())))
    states = {"": torch.zeros(count), **differences}
    stored = {f"sequential values {state}": values for state, values in states.items()}
    stored["sequential images"] = torch.tensor([batch] * (count // batch))
    return SequentialTest(nn.Identity(), [], Objective("prediction"), error, stored)


@pytest.mark.parametrize("regression", [False, True])
@pytest.mark.parametrize("off", [-0.15, -0.03, 0.03, 0.15])
@pytest.mark.parametrize("error", [0.05, 0.2])
def test_error_rate_is_at_most_the_bound(error: float, off: float, regression: bool) -> None:
    """Skewed differences, as a few images lose most; their mean is `off` the tolerance."""
    wrong, stopped, seeds = 0, 0, 300
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        skewed = torch.randn(256, generator=generator).square()
        near = skewed + 0.3 * torch.randn(256, generator=generator)
        values = skewed - skewed.mean() + 1 + off
        test = made({"new": values, "near": near}, error)
        entropy, exact = test.verdict("new", "", 1.0, "near" if regression else None)
        wrong += (entropy <= 1.0) != (off <= 0)
        stopped += not exact
        assert not exact or entropy == test.mean("new")
    # Three standard errors of the rate above the bound would be more than chance.
    assert wrong / seeds <= error + 3 * (error * (1 - error) / seeds) ** 0.5
    assert stopped > 0.1 * seeds


def pruner_of(model: nn.Module, error: float | None, **options: Any) -> Any:
    importance = tp_amp.EntropyTaylorImportance(data=images(8, seed=3).split(4))
    batches = options.pop("batches", images(4 * BATCHES, seed=4).split(4))
    return tp_amp.AdaptiveMLPPruner(
        model, images(1), importance, batches, error_probability=error, progress=False, **options
    )


def searched(model: nn.Module, error: float | None, **options: Any) -> tuple[Any, int]:
    """The pruner after its search, and the images that the model was called on."""
    model = copy.deepcopy(model)
    pruner = pruner_of(model, error, **options)
    called: list[int] = []
    model.register_forward_pre_hook(lambda _, args: called.append(len(args[0])))
    pruner.step()
    return pruner, sum(called)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rescore": {"rescore": True},
    "target": {"target": {"params": 0.8}},
    "compensation": {"compensation": "affine"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_next_to_no_error_is_the_plain_search_bit_for_bit(options: dict[str, Any]) -> None:
    model = toy(depth=2)
    plain, _ = searched(model, None, **options)
    exact, _ = searched(model, 1e-300, **options)
    assert exact.plan.to_json() == plain.plan.to_json()
    assert exact.forwards.used == exact.forwards.plain


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_prefix_and_a_second_run_find_the_same(options: dict[str, Any]) -> None:
    model = toy(depth=2)
    first, _ = searched(model, 0.1, cache_bytes=0, **options)
    for limit in (0, 2**30):
        again, _ = searched(model, 0.1, cache_bytes=limit, **options)
        assert again.plan.to_json() == first.plan.to_json()
        assert again.forwards == first.forwards


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_plan_within_one_step_with_fewer_images(seed: int) -> None:
    model = toy(seed, hidden=64, depth=3)
    options = {"max_increase": 0.02, "cache_bytes": 0}
    plain, every = searched(model, None, **options)
    found, fewer = searched(model, 0.05, **options)
    widths = found.plan.widths
    steps = {
        name: abs(len(kept) - len(plain.plan.keep[name])) for name, kept in found.plan.keep.items()
    }
    assert max(steps.values()) <= 1, (widths, steps)
    assert fewer < 0.9 * every
    # Besides the search: scoring, and the first batch to see what the model ends in.
    assert fewer - found.forwards.used == every - found.forwards.plain


def test_what_is_kept_is_within_tolerance_on_all_images() -> None:
    found, _ = searched(toy(depth=3), 0.4, max_increase=0.02)
    plain = found.plan
    reference = plain.dense_entropy
    for name in reversed(list(plain.keep)):
        best = tp_amp.search.accepted(plain.probes[name])
        if best:
            assert best.entropy - reference <= 0.02
            reference = best.entropy


def test_a_run_goes_on_where_it_was_killed(tmp_path: Any) -> None:
    model = toy(depth=2)
    whole, needed = searched(model, 0.1)
    killed, called = copy.deepcopy(model), []

    def kill(module: nn.Module, args: Any) -> None:
        called.append(1)
        if len(called) == 150:
            raise KeyboardInterrupt

    killed.register_forward_pre_hook(kill)
    with pytest.raises(KeyboardInterrupt):
        pruner_of(killed, 0.1, checkpoint=tmp_path).step()
    again, rest = searched(model, 0.1, checkpoint=tmp_path)
    assert again.plan.to_json() == whole.plan.to_json()
    assert again.forwards == whole.forwards
    assert rest < needed
    with pytest.raises(ValueError, match=r"error_probability was 0\.1, now 0\.2"):
        pruner_of(copy.deepcopy(model), 0.2, checkpoint=tmp_path).step()


def test_batches_are_the_units_of_other_objectives() -> None:
    model = toy(depth=2)
    plain, _ = searched(model, None, objective="similarity")
    exact, _ = searched(model, 1e-300, objective="similarity")
    found, _ = searched(model, 0.1, objective="similarity")
    assert exact.plan.to_json() == plain.plan.to_json()
    assert found.forwards.used < found.forwards.plain


class Reversed:
    """Batches in another order each time."""

    def __init__(self) -> None:
        self.turn = 0

    def __iter__(self) -> Any:
        self.turn += 1
        return iter(images(64).split(4)[:: 1 if self.turn % 2 else -1])


def test_other_batches_each_time_are_refused() -> None:
    with pytest.raises(ValueError, match="another one than before"):
        pruner_of(toy(), 0.1, batches=Reversed()).step()


def test_sorted_images_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Each batch one image, four times over."""
    batches = [image.expand(4, -1, -1, -1) + 0.01 * images(4) for image in images(20).split(1)]
    with caplog.at_level(logging.WARNING):
        pruner_of(toy(), 0.1, batches=batches).step()
    assert "shuffle them once" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        pruner_of(toy(), 0.1).step()
    assert "shuffle them once" not in caplog.text


@pytest.mark.parametrize("error", [0, 0.5, 1.0, -0.1])
def test_probability_out_of_range(error: float) -> None:
    with pytest.raises(ValueError, match="error_probability must lie between 0 and 0"):
        pruner_of(toy(), error)
