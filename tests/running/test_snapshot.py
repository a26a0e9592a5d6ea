"""All that a model holds comes back, whatever was done to it meanwhile."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from types import SimpleNamespace
from typing import ClassVar

import numpy
import pytest
import torch
from lazy_models import TOYS, contents, lazy_toy
from torch import nn
from toys import ToyViT, images, toy

from tp_amp.running.snapshot import given_back


@pytest.mark.parametrize("kind", TOYS)
def test_what_a_first_pass_installs_is_taken_off_as_a_whole(kind: type[ToyViT]) -> None:
    model, other = lazy_toy(kind), lazy_toy(kind)
    before = contents(model)
    with given_back(model):
        first = model(images())
        assert contents(model) != before
        torch.testing.assert_close(model(images()), first)
    assert contents(model) == before
    torch.testing.assert_close(model(images()), other(images()))


def test_containers_objects_and_values() -> None:
    model = toy()
    model.register_buffer("count", torch.zeros(2))
    model.table, model.queue, model.names = torch.ones(3), deque([1, 2], maxlen=4), {"a"}
    model.nested = {"list": [[1], (SimpleNamespace(inner=SimpleNamespace(value=1)),)]}
    model.order = OrderedDict(a=1, b=2)
    model.unregistered = [nn.Linear(2, 2)]
    table, weight = model.table, model.unregistered[0].weight
    with given_back(model):
        model.count.add_(1)
        model.table.fill_(float("nan"))
        model.queue.append(3)
        model.names.add("b")
        model.nested["list"][0].append(2)
        model.nested["list"][1][0].inner.value = 2
        model.order.move_to_end("a")
        model.unregistered[0].weight = nn.Parameter(torch.zeros(1, 2))
        model.made = model.nested.pop("list")
        del model.head
    assert model.count.tolist() == [0, 0]
    assert model.table is table
    assert table.tolist() == [1, 1, 1]
    assert (list(model.queue), model.queue.maxlen, model.names) == ([1, 2], 4, {"a"})
    assert model.nested["list"][0] == [1]
    assert model.nested["list"][1][0].inner.value == 1
    assert list(model.order) == ["a", "b"]
    assert model.unregistered[0].weight is weight
    assert not hasattr(model, "made")
    assert isinstance(model.head, nn.Linear)


class Slots:
    __slots__ = ("inner", "value")


class MoreSlots(Slots):
    """With a dict of attributes too."""


def test_slots() -> None:
    model = toy()
    model.note, inner = Slots(), MoreSlots()
    model.note.inner, inner.value, inner.other, inner.inner = inner, 1, 2, [3]
    with given_back(model):
        model.note.value = 1
        model.note.inner = None
        inner.value, inner.other = 5, 6
        inner.inner.append(4)
    assert not hasattr(model.note, "value")
    assert model.note.inner is inner
    assert (inner.value, inner.other, inner.inner) == (1, 2, [3])


def test_what_stands_on_classes() -> None:
    class Base(ToyViT):
        notes: ClassVar[dict[str, list[int]]] = {"seen": []}

        @staticmethod
        def size() -> int:
            return 1

    class Derived(Base):
        """Has what its base has."""

    model, size = Derived(), Base.size
    with given_back(model):
        Base.notes["seen"].append(1)
        Base.notes["more"] = []
        Base.size = Derived.size = lambda: 2  # type: ignore[assignment,method-assign]
        Derived.notes = {}
    assert Base.notes == Derived.notes == {"seen": []}
    assert Base.size is Derived.size is size
    assert model.size() == 1
    assert "size" not in vars(Derived)


def test_a_graph_made_before_can_still_be_run_back() -> None:
    """Values are put back without a new version of the tensor."""
    model = nn.Linear(2, 2)
    model.register_buffer("scale", torch.ones(2))
    with given_back(model):
        loss = (model(torch.ones(1, 2)) * model.scale).sum()
        model.scale.data.fill_(2)
    loss.backward()
    assert model.scale.tolist() == [1, 1]


def test_after_an_error() -> None:
    model = lazy_toy(TOYS[0])
    before = contents(model)

    def fails() -> None:
        with given_back(model):
            model(images())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert contents(model) == before


class Drawing(nn.Module):
    """Draws from generators of its own, and counts in an array."""

    def __init__(self) -> None:
        super().__init__()
        self.torch, self.random = torch.Generator().manual_seed(1), random.Random(2)
        self.numpy, self.old = numpy.random.default_rng(3), numpy.random.RandomState(4)
        self.calls = numpy.zeros(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        drawn = self.random.random() + self.numpy.random() + self.old.rand() + self.calls[0]
        return x + torch.rand((), generator=self.torch) + float(drawn)


def test_generators_and_arrays_of_a_model_are_set_back() -> None:
    model, x = Drawing(), torch.zeros(1)
    with given_back(model):
        given = [float(model(x)) for _ in range(3)]
    assert len(set(given)) == 3
    assert [float(model(x)) for _ in range(3)] == given
