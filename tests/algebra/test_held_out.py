"""Held-out errors against tokens that are really left out; and few tokens promise nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tp_amp.algebra.closed_form import correct
from tp_amp.algebra.held_out import (
    best_correction,
    expected_error,
    foreseen_errors,
    held_out_error,
    solvers,
)
from tp_amp.algebra.moments import Halves, Moments
from tp_amp.algebra.pivoting import reconstruction_order


def tokens(count: int, inputs: int = 6, outputs: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, inputs, generator=generator, dtype=torch.float64) + 2
    noise = torch.randn(count, outputs, generator=generator, dtype=torch.float64)
    slope = torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(99))
    return x, x @ slope.double() * 0.1 + noise + 3


@pytest.mark.parametrize("method", ["none", "mean", "affine"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_error_on_other_tokens_is_that_of_the_layer_run_on_them(
    method: str, bias: bool
) -> None:
    found = correct(Moments().add(*tokens(50)), method, bias=bias)
    x, r = tokens(33, seed=1)
    left = r - x @ found.weight.T - (0 if found.bias is None else found.bias)
    expected = left.square().sum(1).mean()
    assert expected_error(found, Moments().add(x, r)) == pytest.approx(float(expected), rel=1e-10)


def test_on_its_own_tokens_it_is_the_error_that_was_solved_for() -> None:
    moments = Moments().add(*tokens(50))
    found = correct(moments, "affine")
    assert expected_error(found, moments) == pytest.approx(found.error, rel=1e-9)


def dealt(images: int) -> Tensor:
    """Every other image to the second half."""
    return torch.arange(images) % 2 == 1


def test_halves_are_of_whole_images_and_together_the_whole() -> None:
    halves, whole, halved = Halves(), Moments(), (Moments(), Moments())
    for seed, second in enumerate(([False, True, True], [True], [False, False])):
        x, r = tokens(4 * len(second), seed=seed)
        halves.add(x, r, second=torch.tensor(second))
        whole.add(x, r)
        for image, place in enumerate(second):
            own = slice(4 * image, 4 * image + 4)
            halved[place].add(x[own], r[own])
    for found, expected in zip(halves.each, halved, strict=True):
        assert found.tokens == expected.tokens == 12
        torch.testing.assert_close(found.inputs, expected.inputs)
        torch.testing.assert_close(found.cross, expected.cross)
    torch.testing.assert_close(halves.whole.inputs, whole.inputs)
    torch.testing.assert_close(halves.whole.cross, whole.cross)
    assert halves.whole.tokens == whole.tokens == 24


def test_weights_go_with_their_tokens() -> None:
    x, r = tokens(8)
    weights = torch.rand(8, dtype=torch.float64)
    second = torch.tensor([False, True])
    halves = Halves().add(x, r, weights, second=second)
    for half, own in zip(halves.each, (slice(4), slice(4, None)), strict=True):
        torch.testing.assert_close(half.inputs, Moments().add(x[own], r[own], weights[own]).inputs)


def test_tokens_that_are_no_images_are_not_torn_apart() -> None:
    halves = Halves().add(*tokens(7), second=dealt(2)).add(*tokens(7), second=~dealt(2))
    assert [half.tokens for half in halves.each] == [7, 7]


def test_cut_halves_are_the_halves_of_the_cut_layer() -> None:
    x, _ = tokens(40)
    weight, keep = torch.randn(3, 6, dtype=torch.float64), [0, 2, 5]
    halves = Halves().add(x, x[:, :0], second=dealt(10)).after_cut(weight, keep)
    lost = x[:, [1, 3, 4]] @ weight[:, [1, 3, 4]].T
    direct = Halves().add(x[:, keep], lost, second=dealt(10))
    for one, other in zip(halves.each, direct.each, strict=True):
        torch.testing.assert_close(one.cross, other.cross)
        assert one.squares == pytest.approx(other.squares)
    torch.testing.assert_close(halves.whole.cross, direct.whole.cross)


@pytest.mark.parametrize("count", [4, 8, 12, 40])
def test_few_tokens_are_never_worse_than_the_mean_or_nothing_on_images_held_out(
    count: int,
) -> None:
    """Twelve channels rebuild twelve tokens exactly, and others not at all."""
    halves = Halves().add(*tokens(count, inputs=12), second=dealt(count))
    assert halves.few
    affine, *others = solvers("affine", bias=True, ridge=1e-4, name="")
    chosen = best_correction(halves, "affine")
    other = Moments().add(*tokens(4000, inputs=12, seed=7))
    plain = expected_error(correct(halves.whole, "affine"), other)
    mean = expected_error(correct(halves.whole, "mean"), other)
    assert expected_error(chosen, other) <= min(plain, mean) * 1.1
    assert min(held_out_error(s, halves) for s in others) <= held_out_error(affine, halves)


def test_many_tokens_are_solved_as_asked_for() -> None:
    halves = Halves().add(*tokens(400), second=dealt(10))
    assert not halves.few
    plain, chosen = correct(halves.whole, "affine"), best_correction(halves, "affine")
    assert torch.equal(plain.weight, chosen.weight)


def test_a_single_image_corrects_the_mean_alone() -> None:
    halves = Halves().add(*tokens(9), second=dealt(1))
    found = best_correction(halves, "affine")
    assert not found.weight.any()
    assert found.bias is not None
    torch.testing.assert_close(found.bias, tokens(9)[1].mean(0))


def test_what_few_tokens_foresee_is_what_others_show() -> None:
    """Errors foreseen from 20 tokens were 0 from 19 channels on."""
    generator = torch.Generator().manual_seed(3)
    factors = torch.randn(10, 32, generator=generator, dtype=torch.float64)

    def hidden(count: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(count, 42, generator=generator, dtype=torch.float64)
        return (drawn[:, :10] @ factors + 2 * drawn[:, 10:]).relu()

    weight = torch.randn(8, 32, generator=generator, dtype=torch.float64)
    x = hidden(20, 0)
    halves = Halves().add(x, x[:, :0], second=dealt(20))
    order, errors = reconstruction_order(halves.whole.inputs, weight)
    found = foreseen_errors(errors, order, halves, weight)
    other = hidden(4000, 1)
    kept = order[:24]
    fitted = best_correction(halves.after_cut(weight, kept.tolist()), "affine")
    cut = Moments().add(other, other[:, :0]).after_cut(weight, kept.tolist())
    true = expected_error(fitted, cut)
    assert float(errors[24]) < 0.01 * true
    assert 0.5 * true < float(found[24]) < 2 * true
    assert bool((found[1:] <= found[:-1] + 1e-12).all())
    assert float(found[-1]) == pytest.approx(0, abs=1e-9)


def test_a_wider_layer_is_never_foreseen_worse() -> None:
    """Half as many channels as tokens of a half fit worst; more of them don't make it worse."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 64, generator=generator, dtype=torch.float64)
    for count in (6, 10, 16, 24, 40, 80):
        x = torch.randn(count, 64, generator=generator, dtype=torch.float64).relu()
        halves = Halves().add(x, x[:, :0], second=dealt(count))
        order, errors = reconstruction_order(halves.whole.inputs, weight)
        found = foreseen_errors(errors, order, halves, weight)
        assert bool((found[1:] <= found[:-1]).all())
        assert bool((found >= errors - 1e-9).all())


def test_foreseen_errors_of_many_tokens_stay() -> None:
    x = torch.randn(500, 6, dtype=torch.float64)
    halves = Halves().add(x, x[:, :0], second=dealt(10))
    weight = torch.randn(3, 6, dtype=torch.float64)
    order, errors = reconstruction_order(halves.whole.inputs, weight)
    assert foreseen_errors(errors, order, halves, weight) is errors
