"""What single layers of a toy read and give, against its forward pass written out."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import fingerprint, images, toy

from tp_amp.running.inputs import Inputs
from tp_amp.running.watching import all_tensors, called_with, calls_in_order, first_tensor, watch

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


class Around(nn.Module):
    """The same norm before the layer and behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.layer(self.norm(x)))


@torch.no_grad()
def test_what_comes_later_is_not_what_came_before() -> None:
    model, x = Around(), torch.randn(3, 6)
    for stop in (True, False):
        seen, _ = watch(model, model, "layer", Inputs((x,)), stop=stop, later="norm")
        torch.testing.assert_close(seen.later, x + model.layer(model.norm(x)))


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


class Judging(nn.Module):
    """Needs the values of what it passes on."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


@pytest.mark.parametrize("judging", [False, True])
@torch.no_grad()
def test_calls_come_in_their_order(judging: bool) -> None:
    model, values = toy(), []
    if judging:
        model.blocks.append(Judging())
    model.embed.register_forward_pre_hook(lambda _, args: values.append(not args[0].is_meta))
    before = fingerprint(model)
    names = ["blocks.1.mlp.second", "head", NAME]
    assert calls_in_order(model, Inputs((images(2),)), names) == [NAME, names[0], "head"]
    assert fingerprint(model) == before
    # Once with values before it is run without, and with values where it must judge by them.
    assert values == ([True, False, True] if judging else [True, False])


def test_the_state_is_the_first_tensor() -> None:
    x = torch.zeros(2)
    assert first_tensor(x) is x
    assert first_tensor((x, 1)) is x
    assert first_tensor([x]) is x
    assert first_tensor({"x": x}) is None
    assert first_tensor(()) is None


@dataclass
class Depth:
    """Two maps."""

    depth: Tensor
    further: Any = None


class Slotted:
    """Attributes without a dict, one of them under a name of its own, one never set."""

    __slots__ = ("__own", "first", "unset")

    def __init__(self, first: Any, own: Tensor) -> None:
        self.first, self.__own = first, own


class Narrower(Slotted):
    """A dict beside the slots."""

    def __init__(self, first: Any, own: Tensor, more: Tensor) -> None:
        super().__init__(first, own)
        self.more = more


def test_tensors_are_read_out_of_containers_and_objects() -> None:
    a, b, c = torch.zeros(1), torch.ones(2), torch.ones(3)

    def found(value: Any) -> list[int]:
        return [len(tensor) for tensor in all_tensors(value)]

    assert found(a) == [1]
    assert found([a, None, (b, 3), {"x": c, "y": "text"}]) == [1, 2, 3]
    assert found(OrderedDict(one=b, two=[b])) == [2, 2]
    assert found(Depth(a, further={"all": [Depth(b), c]})) == [1, 2, 3]
    assert found({"deep": [SimpleNamespace(logits=c, name="x")]}) == [3]
    assert sorted(found(Slotted(Depth(a), b))) == [1, 2]
    assert sorted(found(Narrower(a, b, c))) == [1, 2, 3]
    assert found(torch.distributions.Normal(b, b, validate_args=False)) == [2, 2]


def test_what_is_no_output_is_not_looked_into() -> None:
    layer = nn.Linear(2, 2)
    holder = SimpleNamespace(model=layer, kind=Depth, library=torch, call=layer.forward)
    assert all_tensors([layer, nn.Linear, torch, layer.forward, holder, 1, "text"]) == []
    circle = SimpleNamespace(value=torch.ones(2))
    circle.itself = [circle]
    assert len(all_tensors(circle)) == 1
