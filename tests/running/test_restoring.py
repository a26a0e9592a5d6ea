"""What is given back: flags, hooks, attributes, random state."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from toys import PlainMLP, ToyViT, fingerprint, images, toy

import tp_amp
from tp_amp.running.inputs import Inputs
from tp_amp.running.restoring import (
    evaluating,
    hooks,
    on_meta,
    replaced_forward,
    seeded,
    shapes_first,
)


def test_biases_cached_by_the_model_are_dropped() -> None:
    class Caching(PlainMLP):
        def __init__(self) -> None:
            super().__init__(4, 8)
            self.cache: dict[str, torch.Tensor] = {"before": torch.ones(1)}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.cache["bias"] = self.first.weight.sum() * 2
            return super().forward(x) + self.cache["bias"]

    model = Caching()
    tp_amp.find_mlps(model, torch.randn(1, 5, 4))
    assert list(model.cache) == ["before"]


class Erf(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.erf(x)


class Keeping(ToyViT):
    """Keeps its last tokens, and a table that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.ones(12)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        self.made = x.sum()
        return super().forward(x)


@pytest.mark.parametrize("with_values", [False, True])
def test_what_the_model_keeps_is_given_back(with_values: bool) -> None:
    model = Keeping()
    if with_values:
        model.blocks[0].mlp.act = Erf()  # gradients decide
    table, before = model.table, fingerprint(model)
    assert len(tp_amp.find_mlps(model, images(1))) == 2
    assert model.table is table
    assert model.last is None
    assert not hasattr(model, "made")
    assert fingerprint(model) == before


def test_modes_and_flags_come_back_after_an_error() -> None:
    model = toy()
    model.count = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)  # can't have a gradient
    model.train()
    model.blocks[0].eval()
    model.head.requires_grad_(False)
    before = fingerprint(model)

    def fails() -> None:
        assert not any(module.training for module in model.modules())
        required = {name: p.requires_grad for name, p in model.named_parameters()}
        assert not required.pop("count")
        assert all(required.values())
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), evaluating(model, trainable=True):
        fails()
    assert fingerprint(model) == before
    with evaluating(model, trainable=False):
        assert not any(p.requires_grad for p in model.parameters())
    assert fingerprint(model) == before


def test_on_the_meta_device_tied_parameters_stay_tied_and_all_comes_back() -> None:
    model = toy()
    model.head.weight = nn.Parameter(model.head.weight.detach())
    model.tied = model.head
    model.table, model.other = torch.ones(3), model.head.weight
    own = dict(model.named_parameters(remove_duplicate=False))
    before = fingerprint(model)
    with on_meta(model) as real:
        stand_ins = dict(model.named_parameters(remove_duplicate=False))
        assert all(p.is_meta and p.shape == own[name].shape for name, p in stand_ins.items())
        assert all(real[p] is own[name] for name, p in stand_ins.items())
        assert model.tied.weight is model.head.weight is model.other
        assert model.table.is_meta
        assert model(images(2).to("meta")).shape == (2, 5)
        model.made = torch.ones(2)
    assert not hasattr(model, "made")
    assert all(p is own[name] for name, p in model.named_parameters(remove_duplicate=False))
    assert not model.table.is_meta
    assert fingerprint(model) == before


def test_what_fails_without_values_is_run_with_them() -> None:
    model, devices = toy(), []

    def run(inputs: Inputs, real: Mapping[Any, Any]) -> float:
        devices.append(inputs.args[0].device.type)
        model.made = model(inputs.args[0])
        return float(model.made.sum().detach())  # a tensor on the meta device has none

    expected = float(model(images(2)).sum().detach())
    assert shapes_first(model, Inputs((images(2),)), run) == pytest.approx(expected)
    assert devices == ["meta", "cpu"]
    assert not hasattr(model, "made")
    assert shapes_first(model, Inputs((images(2),)), lambda x, real: len(real)) == len(
        list(model.parameters())
    )


def test_hooks_and_forwards_are_given_back_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].forward = lambda x: x  # of the user
    own, x, calls = model[1].forward, torch.ones(1, 2), []

    def twice(forward: Any) -> Any:
        return lambda x: 2 * forward(x)

    def fails() -> None:
        handles = [model[0].register_forward_hook(lambda *_: calls.append(1))]
        with hooks(handles), replaced_forward(model[0], twice), replaced_forward(model[1], twice):
            plain = nn.functional.linear(x, model[0].weight, model[0].bias)
            torch.testing.assert_close(model(x), 4 * plain)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fails()
    assert calls == [1]
    assert "forward" not in vars(model[0])
    assert model[1].forward is own
    model(x)
    assert calls == [1]


def test_draws_are_the_same_and_the_generators_go_on() -> None:
    def draws() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(numpy.random.rand())

    torch.manual_seed(1)
    random.seed(1)
    numpy.random.seed(1)
    expected = [draws(), draws()]
    torch.manual_seed(1)
    random.seed(1)
    numpy.random.seed(1)
    found = [draws()]
    inside = []
    for _ in range(2):
        with seeded(7):
            inside.append(draws())
    with pytest.raises(RuntimeError, match="stop"), seeded(7):
        raise RuntimeError("stop")
    found.append(draws())
    assert found == expected
    assert inside[0] == inside[1] != expected[1]


def test_on_meta_takes_back_modules_made_meanwhile() -> None:
    """A layer that is built in the first forward pass would hold no values."""
    model = toy()
    before = [name for name, _ in model.named_modules()]
    with on_meta(model):
        model.late = torch.nn.Linear(2, 2, device="meta")
    assert [name for name, _ in model.named_modules()] == before


TABLES: dict[int, Tensor] = {}


@functools.cache
def counted_up(count: int, like: Any) -> Tensor:
    return like.bias.new_ones(count, 1) * torch.arange(count, device=like.bias.device)[:, None]


class Placed(nn.Module):
    """Adds a table of places to its tokens, which is kept outside of the model once it is there."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.mlp, self.head = nn.Linear(4, 12), PlainMLP(12, 24), nn.Linear(12, 3)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "cached function":
            places = counted_up(x.shape[1], self.stem)
        else:
            places = TABLES.setdefault(
                x.shape[1], torch.arange(x.shape[1], device=x.device, dtype=x.dtype)[:, None]
            )
        x = self.stem(x) + places
        return self.head((x + self.mlp(x)).mean(1))


@pytest.mark.parametrize("kind", ["global dict", "cached function"])
def test_what_is_kept_outside_of_a_model_holds_values(kind: str) -> None:
    """A pass without values would leave a table of shapes there, and no way back."""
    TABLES.clear()
    model = Placed(kind)
    for count in (5, 7):
        x = torch.randn(2, count, 4)
        plan = tp_amp.plan_for_target(
            model, x, tp_amp.ReconstructionImportance(data=[x]), {"params": 0.8}
        )
        assert tp_amp.inspect(model, x).mlps
        cut = copy.deepcopy(model)
        tp_amp.apply_plan(cut, x, plan)
        assert torch.isfinite(cut(x)).all()
        assert torch.isfinite(model(x)).all()


def test_models_are_called_with_values_once_for_each_size() -> None:
    model, calls = toy(), []
    model.register_forward_pre_hook(lambda _, args: calls.append(args[0].device.type))
    for _ in range(3):
        shapes_first(model, Inputs((images(2),)), lambda given, _: given.call(model))
    assert calls == ["cpu", "meta", "meta", "meta"]
    shapes_first(model, Inputs((images(3),)), lambda given, _: given.call(model))
    assert calls[4:] == ["cpu", "meta"]


def test_a_model_keeps_no_keys_and_values_meanwhile() -> None:
    """Of transformers; each layer would be given those of the passes before."""
    model = toy()
    model.config = SimpleNamespace(use_cache=True)
    with evaluating(model, trainable=False):
        assert model.config.use_cache is False
    assert model.config.use_cache is True


KEEP = tp_amp.PruningPlan({"blocks.0.mlp.second": [0, 2, 3, 5, 8]})
READS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "collect": lambda model, loader: tp_amp.ReconstructionImportance().collect(
        model, loader, progress=False
    ),
    "compensate": lambda model, loader: tp_amp.compensate(model, KEEP, loader, progress=False),
    "compensate, mean": lambda model, loader: tp_amp.compensate(
        model, KEEP, loader, method="mean", progress=False
    ),
    "compare": lambda model, loader: tp_amp.compare(
        model, images(1), [tp_amp.DIMAPImportance()], loader, fractions=[0.5], progress=False
    ),
    "compare, judged on others": lambda model, loader: tp_amp.compare(
        model, images(1), [tp_amp.DIMAPImportance()], [images(4)], evaluation=loader, progress=False
    ),
    "measure": lambda model, loader: tp_amp.measure(model, loader, repeats=1, progress=False),
    "split_batches": lambda model, loader: tp_amp.split_batches(loader),
}


@pytest.mark.parametrize("call", READS)
@pytest.mark.parametrize("shuffle", [True, False])
def test_what_a_loader_draws_is_given_back(call: str, shuffle: bool) -> None:
    """Loaders draw a seed for their workers even where they don't shuffle."""
    loader, model = DataLoader(TensorDataset(images(8)), batch_size=4, shuffle=shuffle), toy()
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    READS[call](model, loader)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == before[1:]
