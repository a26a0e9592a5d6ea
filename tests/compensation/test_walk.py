"""Layers fitted one after another, each on the model as cut and fitted before it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compensations import (
    DOWN,
    FAMILIES,
    KEEP,
    TINY,
    Keep,
    after,
    compensated,
    hand_fitted,
    kept,
    lstsq,
    plan_of,
    same_weights,
    stored,
)
from torch import Tensor, nn
from toys import PlainMLP, fingerprint, images, perturbed, relative, toy
from zoo import by_name

import tp_amp
from tp_amp.running.shelf import Shelf
from tp_amp.structure import model_structure
from tp_amp.structure.chain import Step


@pytest.mark.parametrize("sizes", [[40], [13, 26, 1]])
@pytest.mark.parametrize(("gated", "bias"), [(False, True), (True, True), (True, False)])
def test_depth_is_fitted_on_the_corrected_prefix(gated: bool, bias: bool, sizes: list[int]) -> None:
    model, batch, keep = toy(gated=gated, bias=bias), images(40), kept(gated)
    cut, fitted = compensated(model, keep, batch.split(sizes), ridge=TINY)
    expected = hand_fitted(model, keep, batch)
    assert same_weights(cut, expected, 1e-4)
    assert list(fitted) == list(keep)
    for name, correction in fitted.items():
        block, _ = after(name)
        error = (stored(cut, block, batch)[1] - stored(model, block, batch)[1]).square().sum(1)
        assert correction.error == pytest.approx(float(error.mean()), rel=1e-3)


def test_each_layer_alone_is_fitted_on_the_dense_prefix() -> None:
    model, batch = toy(), images(40)
    for name in DOWN:
        cut, fitted = compensated(model, {name: KEEP[name]}, [batch], ridge=TINY)
        assert same_weights(cut, hand_fitted(model, {name: KEEP[name]}, batch), 1e-4)
        assert list(fitted) == [name]


def test_layers_one_after_another_are_all_fitted() -> None:
    torch.manual_seed(0)
    model = perturbed(nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 6), nn.LayerNorm(6)))
    batch = images(400, size=6)[:, 0, 0]
    cut, fitted = compensated(model, {"2": [1, 4, 5]}, [batch], ridge=TINY)
    with torch.no_grad():
        hidden = model[:2](batch)[:, [1, 4, 5]].double()
        weight, bias = lstsq(hidden, model[:3](batch).double(), True)
    assert list(fitted) == ["2"]
    torch.testing.assert_close(cut[2].weight.double(), weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cut[2].bias.double(), bias, rtol=1e-4, atol=1e-4)


def test_labels_are_ignored_and_batches_read_once() -> None:
    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in images(40).split(9):
            yield batch, torch.full((len(batch),), -7)

    first, _ = compensated(toy(), KEEP, images(40).split(9))
    second, _ = compensated(toy(), KEEP, loader())
    assert same_weights(first, second)


def whole_model(*_: Any) -> list[Step]:
    return [Step("")]


@pytest.mark.parametrize("name", ["vit", "swin", "eva02", "pwee_fused_out"])
def test_chain_and_whole_model_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, example = by_name(name)
    model = perturbed(model)
    batch = torch.randn(8, *example.shape[1:], generator=torch.Generator().manual_seed(2))
    plan = plan_of(model, example, heads=name in ("vit", "eva02"))
    chains: list[int] = []
    real = model_structure.find_chain
    monkeypatch.setattr(
        model_structure, "find_chain", lambda *a: [chains.append(len(found := real(*a))), found][1]
    )
    first, one = compensated(model, plan, batch.split(5))
    assert chains[0] > 1
    monkeypatch.setattr(model_structure, "find_chain", whole_model)
    second, two = compensated(model, plan, batch.split(5))
    assert same_weights(first, second, 1e-6)
    assert list(one) == list(two)


def test_model_that_is_no_chain_is_fitted_all_the_same() -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.toy = toy()

        def forward(self, x: Tensor) -> Tensor:
            x = self.toy.embed(x).flatten(2).transpose(1, 2)
            for block in self.toy.blocks:
                x = x + block(x)
            return x.mean(1)

    model, batch = Skipping(), images(40)
    keep = {f"toy.{name}": units for name, units in KEEP.items()}
    cut, _ = compensated(model, keep, batch.split(9), ridge=TINY)

    def place(name: str) -> tuple[str, int]:
        """The stream is only seen by the next block; behind the last one it is averaged."""
        return ("toy.blocks.1", 0) if "blocks.0" in name else (name, 1)

    assert same_weights(cut, hand_fitted(model, keep, batch, place), 1e-4)


class Sized(nn.Module):
    """A block that is told the images' size."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, size: float) -> Tensor:
        return self.block(x * size)


class TellsSizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = toy().embed
        self.parts = nn.ModuleList([Sized(block) for block in toy().blocks])

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-1] / 10
        x = self.embed(x).flatten(2).transpose(1, 2)
        for part in self.parts:
            x = part(x, size)
        return x.mean(1)


def test_order_of_images_of_several_sizes_does_not_matter() -> None:
    model, batches = TellsSizes(), [images(30), images(30, size=16)]
    keep = {f"parts.{i}.block.mlp.second": KEEP[name] for i, name in enumerate(DOWN)}
    cut, _ = compensated(model, keep, batches)
    other, _ = compensated(model, keep, batches[::-1])
    assert same_weights(cut, other, 1e-4)


def test_layer_called_twice_raises() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = PlainMLP(6, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(x + self.mlp(x))

    model = Twice().eval()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="called once in a forward pass"):
        tp_amp.compensate(model, tp_amp.PruningPlan({"mlp.second": [0, 1]}), [torch.randn(30, 6)])
    assert fingerprint(model)["values"] == before["values"]


def by_hand(model: nn.Module, cut: nn.Module, keep: Keep, data: Tensor) -> nn.Module:
    """Every Linear between the two, each by least squares on the model fitted so far."""
    cut = copy.deepcopy(cut)
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    for name in names[names.index(DOWN[0]) : names.index(DOWN[1]) + 1]:
        x, given = stored(cut, name, data)
        place, side = after(name)
        wanted = stored(model, place, data)[side]
        if name.endswith("first"):
            wanted = wanted[:, keep[name.replace("first", "second")]]
        wanted = given + wanted - stored(cut, place, data)[side]
        weight, bias = lstsq(x, wanted, intercept=True)
        layer: Any = cut.get_submodule(name)
        layer.weight.data, layer.bias.data = weight.to(data), bias.to(data)
    return cut


def test_every_linear_is_fitted_on_the_model_fitted_before_it() -> None:
    model, data = toy().double(), images(64).double()
    keep = {DOWN[0]: [0, 3, 4, 9, 11], DOWN[1]: [1, 2, 8]}
    cut, _ = compensated(model, keep, [data], method="none")
    expected = by_hand(model, cut, keep, data)
    found, fitted = compensated(model, keep, data.split(16), ridge=TINY, every_linear=True)
    assert next(iter(fitted)) == DOWN[0]
    assert len(fitted) > len(keep)
    assert relative(found(data), expected(data)) < 1e-6


@pytest.mark.parametrize(
    "family", ["packed gated", "fused parallel", "swin with heads", "open_clip with heads"]
)
def test_every_linear_of_a_family_loses_error(family: str) -> None:
    make, heads, _ = FAMILIES[family]
    torch.manual_seed(0)
    model, example = make()
    model = perturbed(model)
    batch = torch.randn(12, *example.shape[1:], generator=torch.Generator().manual_seed(2))
    plan = plan_of(model, example, heads)
    plain = copy.deepcopy(model)
    tp_amp.apply_plan(plain, example, plan)
    cut, fitted = compensated(model, plan, batch.split(7), every_linear=True)
    assert fitted.keys() > plan.keep.keys()
    assert all(0 <= c.error <= c.error_before for c in fitted.values())
    touched = {n for n, p in cut.named_parameters() if not torch.equal(p, plain.get_parameter(n))}
    assert touched <= {f"{name}.{kind}" for name in fitted for kind in ("weight", "bias")}


class Twice(nn.Module):
    """A Linear between two MLPs that runs two times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = PlainMLP(6, 10), PlainMLP(6, 10)
        self.mix = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return self.second(self.mix(torch.relu(self.mix(x))))


def test_a_layer_that_runs_twice_is_named_and_left_as_it_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    model, data = Twice(), torch.randn(40, 6)
    keep = {"first.second": [0, 2, 5, 7], "second.second": [1, 4, 8]}
    with caplog.at_level(logging.WARNING):
        found, fitted = compensated(model, keep, [data], every_linear=True)
    assert "1 layers are called several times and are not fitted: mix" in caplog.text
    assert "mix" not in fitted
    torch.testing.assert_close(found.mix.weight, model.mix.weight)


@pytest.mark.parametrize("memory_bytes", [0, 5_000])
@pytest.mark.parametrize("name", ["vit", "swin", "no chain"])
def test_what_is_written_to_files_changes_no_bit(
    name: str, memory_bytes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    spilled: list[int] = []
    close = Shelf.close
    monkeypatch.setattr(Shelf, "close", lambda self: [spilled.append(self.spilled), close(self)][1])
    torch.manual_seed(0)
    if name == "no chain":
        model, batch, keep = toy(), images(40), KEEP
        monkeypatch.setattr(model_structure, "find_chain", whole_model)
    else:
        model, example = by_name(name)
        model = perturbed(model)
        batch = torch.randn(8, *example.shape[1:], generator=torch.Generator().manual_seed(2))
        keep = plan_of(model, example)
    options: dict[str, Any] = {"every_linear": True, "refine": 1}
    plain, one = compensated(model, keep, batch.split(5), **options)
    bounded, other = compensated(model, keep, batch.split(5), **options, memory_bytes=memory_bytes)
    assert same_weights(plain, bounded)
    assert {n: c.error for n, c in one.items()} == {n: c.error for n, c in other.items()}
    assert spilled[0] == 0
    assert spilled[1] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [-1, 0.5, "4 GB"])
def test_a_bound_that_is_no_number_of_bytes_is_refused(wrong: Any) -> None:
    model = toy()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="memory_bytes must be an integer of at least 0"):
        compensated(model, KEEP, [images(9)], memory_bytes=wrong)
    assert fingerprint(model) == before
