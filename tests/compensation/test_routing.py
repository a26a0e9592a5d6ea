"""Layers that a router feeds, against where their rows come from, image by image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mixtures import DENSE, EXPERTS, mixture
from torch import Tensor, nn
from toys import fingerprint, images, perturbed, toy

from tp_amp.compensation import routing
from tp_amp.compensation.routing import routed_layers
from tp_amp.running.inputs import Inputs

NAME = "blocks.0.mlp.second"


class Routed(nn.Module):
    """A layer that reads some of the tokens, chosen in one of the ways that there are."""

    def __init__(self, choose: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.choose, self.router, self.layer = choose, nn.Linear(12, 1), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.choose(self.layer, x, self.router(x)[..., 0])


def by_mask(layer: nn.Module, x: Tensor, score: Tensor) -> Tensor:
    picked = score > 0
    return x.masked_scatter(picked[..., None], layer(x[picked]))


def by_sorting(layer: nn.Module, x: Tensor, score: Tensor) -> Tensor:
    tokens, order = x.flatten(0, 1), score.flatten().argsort()
    few, rest = tokens[order].tensor_split([int((score > 0).sum())])
    return torch.cat([layer(few), rest])[order.argsort()].view_as(x)


def whole_images(layer: nn.Module, x: Tensor, score: Tensor) -> Tensor:
    return layer(x) if score.mean() > 0 else x


def in_windows(layer: nn.Module, x: Tensor, score: Tensor) -> Tensor:
    """Not by a router, though images are no dimension of what the layer reads."""
    return layer(x.reshape(-1, 12)).view_as(x) * score[..., None]


def the_best(layer: nn.Module, x: Tensor, score: Tensor) -> Tensor:
    """As many of each image."""
    picked = score.topk(2).indices[..., None].expand(-1, -1, 12)
    return x.scatter(1, picked, layer(x.gather(1, picked)))


def the_best_added(layer: nn.Module, x: Tensor, score: Tensor) -> Tensor:
    tokens = x.flatten(0, 1)
    gates, picked = score.sigmoid().flatten().topk(len(tokens) // 2)
    return tokens.index_add(0, picked, layer(tokens[picked]) * gates[:, None]).view_as(x)


def the_best_by_products(layer: nn.Module, x: Tensor, score: Tensor) -> Tensor:
    """Picked and put back by a matrix of zeros and ones, as where experts choose tokens."""
    gates, picked = score.sigmoid().topk(2)
    chosen = nn.functional.one_hot(picked, x.shape[1]).to(x)
    given = layer(torch.einsum("bkt,btd->bkd", chosen, x))
    return x + torch.einsum("bkt,bk,bkd->btd", chosen, gates, given)


def the_best_by_a_scattered_matrix(layer: nn.Module, x: Tensor, score: Tensor) -> Tensor:
    picked = score.topk(2).indices
    chosen = torch.zeros_like(x @ x.transpose(1, 2))[:, :2].scatter(2, picked[..., None], 1.0)
    return x + chosen.transpose(1, 2) @ layer(chosen @ x)


def sorted_and_back(layer: nn.Module, x: Tensor, score: Tensor) -> Tensor:
    order = score.argsort(1)[..., None].expand_as(x)
    return layer(x.gather(1, order)).gather(1, order.argsort(1))


def sorted_and_put_back(layer: nn.Module, x: Tensor, score: Tensor) -> Tensor:
    order = score.flatten().argsort()
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return layer(x.flatten(0, 1)[order])[back].view_as(x)


def at_fixed_places(layer: nn.Module, x: Tensor, score: Tensor) -> Tensor:
    """No values choose here, neither the rows nor who is weighed by a gate."""
    order = torch.arange(x.shape[1] - 1, -1, -1, device=x.device)
    hidden = torch.where(x > 0, x, 0 * x) * (score > 0)[..., None].to(x)
    weights = (hidden @ hidden.transpose(1, 2)).masked_fill(score[:, None] > 0, -9.0)
    weights = weights + torch.zeros_like(score).masked_fill(score < 0, -9.0)[:, None]
    x = x + layer.weight[(score > 0).long()]  # a table
    return layer((weights.softmax(-1) @ x)[:, order]) * score[..., None]


COUNTED = [by_mask, by_sorting, whole_images]
CHOSEN = [
    *(the_best, the_best_added, the_best_by_products, the_best_by_a_scattered_matrix),
    *(sorted_and_back, sorted_and_put_back),
]


@pytest.mark.parametrize("choose", [*COUNTED, *CHOSEN, in_windows, at_fixed_places])
@torch.no_grad()
def test_a_layer_is_routed_where_values_choose_what_it_reads(choose: Any) -> None:
    """The reference runs the images one by one, and asks where the rows come from by their values.

    What the block reads is made to be a row of its own for each place of each image.
    """
    model, x = toy(), images(8)
    model.blocks[0].mlp = perturbed(Routed(choose))
    names = ["blocks.0.mlp.layer", "blocks.0.mlp.router", DENSE, "head"]
    reads: list[Any] = []
    layer = model.get_submodule(names[0])
    handles = [
        layer.register_forward_pre_hook(lambda _, args: reads.append(args[0].reshape(-1, 12))),
        model.blocks[0].mlp.register_forward_pre_hook(lambda _, args: tokens.append(args[0][0])),
    ]
    places = []
    for image in x:
        reads.clear()
        tokens: list[Tensor] = []
        model(image[None])
        read = reads[0] if reads else torch.zeros(0, 12)
        places.append([(row - tokens[0]).abs().sum(-1).argmin().item() for row in read])
    for handle in handles:
        handle.remove()
    expected = set(names[:1]) if choose in (*COUNTED, *CHOSEN) else set()
    if choose is not at_fixed_places:  # whose layer reads sums of rows
        assert bool(expected) == any(place != places[0] for place in places)
    values = []
    model.embed.register_forward_pre_hook(lambda _, args: values.append(not args[0].is_meta))
    before = fingerprint(model)
    assert routed_layers(model, Inputs((x,)), names) == expected
    assert fingerprint(model) == before
    # No values but in a first call, unless the number of rows depends on them; then by image.
    assert sum(values) == (1 + 8 if choose in COUNTED else 1)


class Shuffled(nn.Module):
    """Its tokens stand in the order of the brightness of their patches, which no cut changes."""

    def __init__(self) -> None:
        super().__init__()
        self.model = toy()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.model.embed(x).flatten(2).transpose(1, 2)
        order = nn.functional.avg_pool2d(x, 4).flatten(1).argsort(1)
        tokens = tokens.gather(1, order[..., None].expand_as(tokens))
        return self.model.head(self.model.blocks(tokens).mean(1))


@torch.no_grad()
def test_an_order_that_the_images_give_is_no_routers() -> None:
    names = [f"model.{NAME}", "model.head"]
    assert routed_layers(Shuffled(), Inputs((images(8),)), names) == set()


class Pruning(nn.Module):
    """Only the best tokens go on, as where a model drops tokens on its way."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times, self.router = times, nn.Linear(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            picked = self.router(x)[..., 0].topk(x.shape[1] - 1).indices
            x = x.gather(1, picked[..., None].expand(-1, -1, 12))
        return x


@pytest.mark.parametrize("times", [1, 2])
@torch.no_grad()
def test_all_that_follows_reads_chosen_tokens(times: int) -> None:
    model = toy(depth=3)
    model.blocks.insert(1, perturbed(Pruning(times)))
    names = [f"blocks.{i}.mlp.second" for i in (0, 2, 3)]
    assert routed_layers(model, Inputs((images(8),)), names) == set(names[1:])


def test_layers_that_a_router_feeds_are_known() -> None:
    model, x = mixture(), images(8)
    names = [*EXPERTS, "blocks.0.mlp.router", DENSE, "head"]
    with torch.no_grad():
        assert routed_layers(model, Inputs((x,)), names) == set(EXPERTS)


def test_a_layer_is_routed_if_it_is_on_any_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "of_each", lambda _, found: [{"head"}, found])
    names = [NAME, "head"]
    assert routed_layers(toy(), Inputs((images(8),)), names) == {"head"}
