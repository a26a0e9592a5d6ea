"""What single layers of a toy read and give, against its forward pass written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mixtures import DENSE, EXPERTS, mixture
from torch import Tensor, nn
from toys import fingerprint, images, perturbed, toy

from tp_amp.running import watching
from tp_amp.running.inputs import Inputs
from tp_amp.running.watching import called_with, calls_in_order, first_tensor, routed_layers, watch

NAME = "blocks.0.mlp.second"


@pytest.mark.parametrize("stop", [True, False])
@torch.no_grad()
def test_inputs_outputs_and_what_comes_later(stop: bool) -> None:
    model, batch = toy(), images(4)
    before = fingerprint(model)
    seen, output = watch(model, model, NAME, Inputs((batch,)), stop=stop, later="blocks.1")
    assert fingerprint(model) == before
    x = model.embed(batch).flatten(2).transpose(1, 2)
    block = model.blocks[0]
    y = block.norm1(x)
    attention = (block.query(y) @ block.key(y).transpose(1, 2)).softmax(-1)
    x = x + block.project(attention @ block.value(y))
    hidden = block.mlp.act(block.mlp.first(block.norm2(x)))
    given = block.mlp.second(hidden)
    torch.testing.assert_close(seen.inputs, hidden.flatten(0, 1))
    torch.testing.assert_close(seen.outputs, given.flatten(0, 1))
    torch.testing.assert_close(seen.later, (x + given).flatten(0, 1))
    if stop:
        assert output is None
    else:
        torch.testing.assert_close(output, model(batch))


@torch.no_grad()
def test_the_output_of_what_is_run_comes_later_too() -> None:
    model = toy()
    state = torch.randn(3, 4, 12)
    block = model.blocks[0]
    for stop in (True, False):
        seen, output = watch(block, model, NAME, Inputs((state,)), stop=stop, later="")
        torch.testing.assert_close(seen.later, block(state).flatten(0, 1))
        assert (output is None) == stop
    seen, _ = watch(block, model, NAME, Inputs((state,)), stop=True)
    assert seen.later is None


def test_a_layer_that_is_not_called_is_named() -> None:
    model = toy()
    with pytest.raises(ValueError, match="second was not called on a batch"):
        watch(
            model.blocks[0],
            model,
            "blocks.1.mlp.second",
            Inputs((torch.randn(1, 4, 12),)),
            stop=True,
        )


@torch.no_grad()
def test_what_a_part_is_called_with() -> None:
    model, batch = toy(), images(4)
    called = called_with(model, model.blocks[1], Inputs((batch,)))
    assert called is not None
    torch.testing.assert_close(
        called.args[0], model.blocks[0](model.embed(batch).flatten(2).transpose(1, 2))
    )
    assert called_with(model, nn.Linear(2, 2), Inputs((batch,))) is None


@torch.no_grad()
def test_calls_come_in_their_order() -> None:
    model = toy()
    names = ["blocks.1.mlp.second", "head", NAME]
    assert calls_in_order(model, Inputs((images(2),)), names) == [NAME, names[0], "head"]


def test_the_state_is_the_first_tensor() -> None:
    x = torch.zeros(2)
    assert first_tensor(x) is x
    assert first_tensor((x, 1)) is x
    assert first_tensor([x]) is x
    assert first_tensor({"x": x}) is None
    assert first_tensor(()) is None


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


@pytest.mark.parametrize("choose", [by_mask, by_sorting, whole_images, in_windows, the_best])
@torch.no_grad()
def test_a_layer_is_routed_where_images_differ_in_what_it_reads(choose: Any) -> None:
    """The reference runs the images one by one."""
    model, x = toy(), images(8)
    model.blocks[0].mlp = perturbed(Routed(choose))
    names = ["blocks.0.mlp.layer", "blocks.0.mlp.router", DENSE, "head"]
    read: dict[str, list[int]] = {name: [0] * 8 for name in names}
    values = []
    for place, image in enumerate(x):
        for name in names:
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, rows=read[name], place=place: rows.__setitem__(
                    place, rows[place] + args[0].shape[:-1].numel()
                )
            )
        model(image[None])
        for name in names:
            model.get_submodule(name)._forward_pre_hooks.clear()
    expected = {name for name, rows in read.items() if len(set(rows)) > 1}
    assert expected <= {"blocks.0.mlp.layer"}
    assert bool(expected) == (choose not in (in_windows, the_best))
    model.embed.register_forward_pre_hook(lambda _, args: values.append(not args[0].is_meta))
    before = fingerprint(model)
    assert routed_layers(model, Inputs((x,)), names) == expected
    assert fingerprint(model) == before
    # Without values unless rows depend on them, and then image by image.
    assert sum(values) == (8 if expected else 0)


def test_layers_that_a_router_feeds_are_known() -> None:
    model, x = mixture(), images(8)
    names = [*EXPERTS, "blocks.0.mlp.router", DENSE, "head"]
    with torch.no_grad():
        assert routed_layers(model, Inputs((x,)), names) == set(EXPERTS)


def test_a_layer_is_routed_if_it_is_on_any_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "of_each", lambda _, found: [{"head"}, found])
    names = [NAME, "head"]
    assert routed_layers(toy(), Inputs((images(8),)), names) == {"head"}
