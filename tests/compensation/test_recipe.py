"""How cut layers are compensated: what a recipe refuses, weighs and tells."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from compensations import (
    DOWN,
    KEEP,
    TINY,
    compensated,
    hand_fitted,
    same_weights,
    tokenwise,
)
from sensitivities import place_sensitivity
from torch import Tensor, nn
from toys import fingerprint, images, toy

import tp_amp
from tp_amp.compensation.recipe import Recipe
from tp_amp.importance.objectives import Objective


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


def test_layer_without_a_bias_gets_one_only_when_asked(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = toy(bias=False), images(40)
    with caplog.at_level(logging.INFO):
        without, first = compensated(model, KEEP, [batch], ridge=TINY)
    assert f"{DOWN[0]} has no bias to correct; add_bias=True gives it one" in caplog.text
    caplog.clear()
    added, second = compensated(model, KEEP, [batch], ridge=TINY, add_bias=True)
    assert "has no bias" not in caplog.text
    for name in DOWN:
        assert without.get_submodule(name).bias is None
        assert added.get_submodule(name).bias.abs().sum() > 0
        assert first[name].bias is None
    assert second[DOWN[0]].error < first[DOWN[0]].error
    zero = copy.deepcopy(model)
    for name in DOWN:
        zero.get_submodule(name).bias = nn.Parameter(torch.zeros(12))
    assert same_weights(added, hand_fitted(zero, KEEP, batch), 1e-4)


def test_tokens_without_weight_do_not_matter() -> None:
    model, tokens, keep = tokenwise()

    def weights(tokens: Tensor) -> Tensor:
        return (torch.arange(8) < 5).double().expand(len(tokens), 8)

    padded = tokens.clone()
    padded[:, 5:] = 7
    first, _ = compensated(model, keep, tokens.split(11), token_weights=weights)
    second, _ = compensated(model, keep, padded.split(11), token_weights=weights)
    short, _ = compensated(model, keep, tokens[:, :5].split(11))
    whole, _ = compensated(model, keep, tokens.split(11))
    assert same_weights(first, second, 1e-5)
    assert same_weights(first, short, 1e-5)
    assert not same_weights(first, whole, 1e-3)


def test_token_weights_are_given_the_dict_of_arguments() -> None:
    model, tokens, keep = tokenwise()
    mask = torch.rand(30, 8, generator=torch.Generator().manual_seed(4)) < 0.6
    batches = [
        {"tokens": t, "mask": m, "labels": t}
        for t, m in zip(tokens.split(11), mask.split(11), strict=True)
    ]
    cut, _ = compensated(model, keep, batches, token_weights=lambda kwargs: kwargs["mask"])
    one, _ = compensated(model, keep, [tokens[mask][:, None]])
    assert same_weights(cut, one, 1e-5)


def test_tokens_weigh_what_their_places_cost() -> None:
    """As with the weights given by hand; others than all the same."""
    model, batches = toy(), list(images(40, seed=5).split(11))
    keep = {DOWN[0]: KEEP[DOWN[0]]}
    before = fingerprint(model)
    weights = place_sensitivity(model, [DOWN[0]], batches, Objective())[DOWN[0]]
    assert float(weights.max()) > 1.2 * float(weights.min())
    found, _ = compensated(model, keep, batches, token_weights="sensitivity")
    assert fingerprint(model) == before
    expected, _ = compensated(
        model, keep, batches, token_weights=lambda images: weights.expand(len(images), -1)
    )
    plain, _ = compensated(model, keep, batches)
    assert same_weights(found, expected, 1e-6)
    assert not same_weights(found, plain, 1e-4)


def test_tokens_that_weigh_the_same_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Images of two sizes have no places in common."""
    model, tokens, keep = tokenwise()
    batches = [tokens[:15], tokens[15:, :5]]
    with caplog.at_level(logging.WARNING):
        found, _ = compensated(model, keep, batches, token_weights="sensitivity")
    plain, _ = compensated(model, keep, batches)
    assert all(f"{name}" in caplog.text for name in keep)
    assert "weigh the same" in caplog.text
    assert same_weights(found, plain, 1e-9)


def test_wrong_token_weights_raise_and_leave_the_model() -> None:
    model, tokens, keep = tokenwise()
    before = fingerprint(model)
    for weights, message in (
        (torch.ones(30, 7), "blocks.0.second: found 210 weights for 240 tokens"),
        (torch.zeros(30, 8), "no tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            tp_amp.compensate(
                model, tp_amp.PruningPlan(keep), [tokens], token_weights=lambda _, w=weights: w
            )
        assert fingerprint(model) == before


@pytest.mark.parametrize(("count", "few"), [(14, True), (15, False)])
def test_few_tokens_are_warned_of(count: int, few: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        compensated(toy(), {DOWN[0]: KEEP[DOWN[0]]}, [images(count)])  # four tokens each
    message = f"the images are few: 1 layers ({DOWN[0]}) saw fewer than ten tokens for each kept"
    assert caplog.text.count(message) == few


def test_weights_are_asked_for_once_for_each_batch() -> None:
    """They may be slow to make, or drawn."""
    asked: list[int] = []

    def weights(batch: Tensor) -> Tensor:
        asked.append(len(batch))
        return torch.ones(len(batch), 4)

    compensated(toy(), KEEP, images(40).split(15), token_weights=weights, every_linear=True)
    assert asked == [15, 15, 10]


@pytest.mark.parametrize(
    ("found", "error", "message"),
    [
        (None, TypeError, "token_weights returned a NoneType; it must return a tensor"),
        ([1.0] * 32, TypeError, "token_weights returned a list"),
        (-torch.ones(8, 4), ValueError, "returned negative weights or such that are not finite"),
        (torch.full((8, 4), torch.nan), ValueError, "negative weights or such that are not finite"),
        (torch.full((8, 4), torch.inf), ValueError, "negative weights or such that are not finite"),
    ],
)
def test_weights_of_tokens_are_a_tensor_of_finite_ones(
    found: Any, error: type[Exception], message: str
) -> None:
    model, plan = toy(), tp_amp.PruningPlan({"blocks.0.mlp.second": [0, 1, 2]})
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        tp_amp.compensate(model, plan, [images(8)], token_weights=lambda _: found, progress=False)
    assert fingerprint(model) == before
