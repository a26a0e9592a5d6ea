"""Tokens that an MLP is refined on, against sums over all of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from toys import PlainMLP, perturbed

from tp_amp.compensation.token_steps import Batches, Example, Tokens, steps_on
from tp_amp.running.inputs import Inputs

IMAGES, TOKENS = (10, 7), 12


class Mixing(nn.Module):
    """Tokens that depend on the others of their image."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = PlainMLP(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x - x.mean(1, keepdim=True))


def examples(weighed: bool = False) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for count in IMAGES:
        x = torch.randn(count, TOKENS, 6, generator=generator)
        y = torch.randn(count * TOKENS, 6, generator=generator)
        weights = torch.rand(count * TOKENS, generator=generator) if weighed else None
        found.append(Example(Inputs((x,)), y, weights, count))
    return found


def made(model: nn.Module, given: list[Example]) -> Tokens | Batches:
    run = lambda inputs: inputs.call(model).flatten(0, -2)  # noqa: E731
    return steps_on(run, lambda errors: 2 * errors, given)


def by_hand(model: nn.Module, given: list[Example]) -> Tensor:
    """What each image costs."""
    costs = []
    for example in given:
        errors = model(*example.inputs.args).flatten(0, -2) - example.targets
        weights = torch.ones(len(errors)) if example.weights is None else example.weights
        each = weights * (2 * errors).square().sum(1)
        costs.append(each.view(example.images, TOKENS).sum(1))
    return torch.cat(costs).detach()


@pytest.mark.parametrize("weighed", [False, True])
def test_one_image_in_eight_judges(weighed: bool) -> None:
    model, given = perturbed(PlainMLP(6, 8)), examples(weighed)
    found = made(model, given)
    assert isinstance(found, Tokens)
    costs = by_hand(model, given)
    judging = torch.arange(sum(IMAGES)) % 8 == 1
    with torch.no_grad():
        assert found.judged() == pytest.approx(float(costs[judging].sum()), rel=1e-5)
        assert found.total() == pytest.approx(float(costs[~judging].sum()), rel=1e-5)


@pytest.mark.parametrize("weighed", [False, True])
def test_what_is_drawn_costs_as_much_as_all_in_the_mean(weighed: bool) -> None:
    found = made(perturbed(PlainMLP(6, 8)), examples(weighed))
    assert found.steps == 8
    with torch.no_grad():
        drawn = torch.stack([found.loss(0, 1) for _ in range(1000)])
        assert float(drawn.mean()) == pytest.approx(found.total(), rel=0.03)


def test_the_same_tokens_are_drawn_each_time() -> None:
    model = perturbed(PlainMLP(6, 8))
    with torch.no_grad():
        first, second = (
            [float(found.loss(step, 8)) for step in range(4)]
            for found in (made(model, examples()), made(model, examples()))
        )
    assert first == second
    assert len(set(first)) == 4


def test_images_that_judge_are_not_learned_from() -> None:
    model, given = perturbed(PlainMLP(6, 8)), examples()
    given[0].targets.view(10, TOKENS, 6)[[1, 9]] = float("nan")
    found = made(model, given)
    with torch.no_grad():
        assert all(bool(found.loss(0, 1).isfinite()) for _ in range(50))
        assert found.judged() != found.judged()  # NaN


def test_padding_is_neither_drawn_nor_counted() -> None:
    model, given = perturbed(PlainMLP(6, 8)), examples(weighed=True)
    plain = [replace(example, weights=example.weights.clone()) for example in given]
    for example in given:
        padding = example.inputs.args[0].view(-1, TOKENS, 6)[:, 8:]
        padding[:] = float("nan")
        example.weights.view(-1, TOKENS)[:, 8:] = 0
    expected = [e.inputs.args[0].nan_to_num() for e in given]
    for example, inputs in zip(plain, expected, strict=True):
        object.__setattr__(example, "inputs", Inputs((inputs,)))
        example.weights.view(-1, TOKENS)[:, 8:] = 0
    found, other = made(model, given), made(model, plain)
    assert isinstance(found, Tokens)
    with torch.no_grad():
        assert found.total() == pytest.approx(other.total())
        assert found.judged() == pytest.approx(other.judged())
        assert all(bool(found.loss(0, 1).isfinite()) for _ in range(50))


@pytest.mark.parametrize("weighed", [0, 1])
def test_batches_without_padding_count_whole_beside_one_with_some(weighed: int) -> None:
    model, given = perturbed(PlainMLP(6, 8)), examples()
    weights = torch.ones(IMAGES[weighed], TOKENS)
    weights[:, 8:] = 0
    given[weighed] = replace(given[weighed], weights=weights.flatten())
    found, costs = made(model, given), by_hand(model, given)
    judging = torch.arange(sum(IMAGES)) % 8 == 1
    with torch.no_grad():
        assert found.judged() == pytest.approx(float(costs[judging].sum()), rel=1e-5)
        assert found.total() == pytest.approx(float(costs[~judging].sum()), rel=1e-5)


def test_tokens_that_depend_on_others_stay_together() -> None:
    model, given = perturbed(Mixing()), examples(weighed=True)
    found = made(model, given)
    assert isinstance(found, Batches)
    assert found.steps == 2
    costs = by_hand(model, given)
    with torch.no_grad():
        assert found.total() == pytest.approx(float(costs.sum()), rel=1e-5)
        assert found.judged() == found.total()
        parts = [found.loss(step, 3) for step in range(3)]
    assert parts[2] is None  # another rank has a batch more
    assert float(parts[0] + parts[1]) / 3 == pytest.approx(float(costs.sum()), rel=1e-5)


def test_maps_with_channels_first_stay_whole() -> None:
    """As many rows as there are tokens, in a map as wide as it has channels."""
    convolution = nn.Conv2d(6, 6, 1)
    maps = torch.randn(5, 6, 4, 6)
    given = [Example(Inputs((maps,)), torch.randn(5 * 24, 6), None, 5)] * 2
    run = lambda inputs: inputs.call(convolution).movedim(1, -1).flatten(0, -2)  # noqa: E731
    found = steps_on(run, lambda errors: errors, given)
    assert isinstance(found, Batches)
    with torch.no_grad():
        assert found.loss(0, 2).isfinite()


def test_a_single_image_can_not_judge() -> None:
    example = examples()[0]
    single = Example(Inputs((example.inputs.args[0][:1],)), example.targets[:TOKENS], None, 1)
    assert isinstance(made(perturbed(PlainMLP(6, 8)), [single]), Batches)


def test_maps_keep_their_dimensions() -> None:
    """Swin's MLPs read `(images, rows, columns, channels)`."""

    class Rows(PlainMLP):
        def forward(self, x: Tensor) -> Tensor:
            assert x.dim() == 4
            return super().forward(x)

    given = [
        replace(example, inputs=Inputs((example.inputs.args[0].unflatten(1, (3, 4)),)))
        for example in examples()
    ]
    model = perturbed(Rows(6, 8))
    found = made(model, given)
    assert isinstance(found, Tokens)
    costs = by_hand(model, given)
    with torch.no_grad():
        assert found.total() + found.judged() == pytest.approx(float(costs.sum()), rel=1e-5)
