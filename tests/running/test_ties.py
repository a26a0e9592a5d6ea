"""Parameters that layers share are known by object and by memory, and nothing else is."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toys import toy

from tp_amp.running.ties import shared_parameters, told_apart


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 6)


def test_nothing_is_shared() -> None:
    model = toy()
    model.again = model.blocks[0]  # one module under two names
    assert shared_parameters(model) == {}
    flat = torch.randn(48)  # one buffer that holds several parameters one after another
    pair = Pair()
    pair.one.weight = nn.Parameter(flat[:24].view(6, 4))
    pair.three.weight = nn.Parameter(flat[24:].view(6, 4))
    assert shared_parameters(pair) == {}
    assert shared_parameters(pair.to("meta")) == {}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_same_parameter(device: str) -> None:
    pair = Pair().to(device)
    pair.three.weight = pair.one.weight
    assert shared_parameters(pair) == {
        "one.weight": ["three.weight"],
        "three.weight": ["one.weight"],
    }
    assert told_apart(shared_parameters(pair), ["two"]) is None
    reason = told_apart(shared_parameters(pair), ["two", "three"])
    assert reason is not None
    assert reason.startswith("three.weight is also one.weight")


def test_the_same_memory() -> None:
    pair = Pair()
    pair.two.weight = nn.Parameter(pair.one.weight.detach().T)
    pair.three.weight = nn.Parameter(pair.one.weight.detach()[3:])
    shared = shared_parameters(pair)
    assert shared["two.weight"] == ["one.weight"] or shared["one.weight"] == ["two.weight"]
    assert shared.keys() == {"one.weight", "two.weight", "three.weight"}


def test_all_of_several_that_overlap_one() -> None:
    pair = Pair()
    flat = torch.randn(24)
    pair.one.weight = nn.Parameter(flat.view(6, 4))
    pair.two.weight = nn.Parameter(flat[:8].view(2, 4))
    pair.three.weight = nn.Parameter(flat[16:].view(2, 4))
    assert shared_parameters(pair)["one.weight"] == ["three.weight", "two.weight"]
