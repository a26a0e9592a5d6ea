"""The widths that a search may try, against all that there are."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from toys import images, toy

import tp_amp
from tp_amp.search.tried_widths import TriedWidths


@pytest.fixture(scope="module")
def mlp() -> tp_amp.MLP:
    return tp_amp.find_mlps(toy(), images(1))[0]


def test_the_smallest_width_is_a_multiple_within_all_bounds(mlp: tp_amp.MLP) -> None:
    for least, step, ratio in itertools.product((1, 5, 20), (1, 3, 8), (1.0, 0.5, 0.0)):
        tried = TriedWidths(6, least, step, ratio, {})
        fit = [
            width
            for width in range(1, mlp.width + 1)
            if width >= least and mlp.width - width <= ratio * mlp.width and width % step == 0
        ]
        assert tried.smallest([mlp]) == {mlp.down: min(fit, default=mlp.width)}


def test_it_begins_with_the_first_width_that_is_foreseen_to_be_allowed(mlp: tp_amp.MLP) -> None:
    errors = torch.linspace(1, 0, mlp.width + 1, dtype=torch.float64).square()
    tried = TriedWidths(6, 1, 1, 1.0, {mlp.down: errors})
    for increase in (0.5, 0.1, 1e-3, float(errors[7])):
        first = next(width for width, error in enumerate(errors) if error <= increase)
        assert tried.first(mlp, increase) == first
    assert tried.first(mlp, math.inf) == 0
    assert TriedWidths(6, 1, 1, 1.0, {}).first(mlp, 0.1) is None
    # Of a layer that was cut since.
    assert TriedWidths(6, 1, 1, 1.0, {mlp.down: errors[:-1]}).first(mlp, 0.1) is None
