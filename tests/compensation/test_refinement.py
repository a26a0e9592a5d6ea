from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from compensations import (
    DOWN,
    KEEP,
    Tokenwise,
    after,
    compensated,
    kept,
    same_weights,
    stored,
    tokenwise,
)
from sensitivities import output_sensitivity
from torch import Tensor, nn
from toys import fingerprint, images, perturbed, relative, toy

import tp_amp
from tp_amp.algebra.closed_form import Correction
from tp_amp.compensation import costs as costs_of
from tp_amp.compensation import refinement
from tp_amp.compensation.costs import spread
from tp_amp.compensation.refinement import refine
from tp_amp.importance.objectives import Objective
from tp_amp.importance.sensitivity import Sensitivity


def squares(layer: nn.Module, inputs: Tensor, targets: Tensor) -> Callable[[], Tensor]:
    return lambda: (layer(inputs) - targets).square().sum()


class Losses:
    """A sum of losses, a step for each."""

    def __init__(self, *losses: Callable[[], Tensor]) -> None:
        self.losses, self.steps = losses, len(losses)

    def loss(self, step: int, steps: int) -> Tensor:
        return steps * self.losses[step]()

    def total(self) -> float:
        return sum(float(loss()) for loss in self.losses)

    judged = total


def regression(seed: int = 0) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(seed)
    layer = nn.Linear(6, 3)
    inputs = torch.randn(64, 6)
    return layer, inputs, layer(inputs).detach() + 0.02 * torch.randn(64, 3) + 0.05 * inputs[:, :3]


def test_a_linear_layer_comes_to_least_squares() -> None:
    layer, inputs, targets = regression()
    before = {key: value.detach().clone() for key, value in layer.state_dict().items()}
    whole = spread([targets])
    losses = [
        squares(layer, x, y) for x, y in zip(inputs.split(16), targets.split(16), strict=True)
    ]
    added = refine({"layer": layer}, Losses(*losses), whole, passes=60)["layer"]
    assert all(torch.equal(layer.state_dict()[key], before[key]) for key in before)
    rows = np.concatenate([inputs.numpy(), np.ones((64, 1))], 1)
    best = np.linalg.lstsq(rows, targets.numpy(), rcond=None)[1].sum()
    with torch.no_grad():
        start = float((layer(inputs) - targets).square().sum())
        layer.weight += added["weight"]
        layer.bias += added["bias"]
        end = float((layer(inputs) - targets).square().sum())
    assert start > 2 * best
    assert best <= end * (1 + 1e-5) < 1.01 * best


@pytest.mark.parametrize("scale", [1e-12, 1e6])
def test_the_scale_of_the_losses_does_not_matter(scale: float) -> None:
    layer, inputs, targets = regression()
    plain = refine({"": layer}, Losses(squares(layer, inputs, targets)), 10, 5)
    other = refine(
        {"": layer}, Losses(lambda: scale * squares(layer, inputs, targets)()), 10 * scale, 5
    )
    assert relative(other[""]["weight"], plain[""]["weight"]) < 1e-4


def test_low_precision_loses_no_small_steps() -> None:
    """Steps of 1e-3 at most, where the next number of bfloat16 after 1 is 1.0078."""
    layer = nn.Linear(6, 3).bfloat16()
    nn.init.constant_(layer.weight, 0.01)
    nn.init.constant_(layer.bias, 1.0)

    def loss() -> Tensor:
        return (layer(torch.zeros(1, 6, dtype=torch.bfloat16)).float() - 1.1).square().sum()

    added = refine({"": layer}, Losses(loss), 0.0, 1000)[""]
    assert (layer.bias.double() + added["bias"]).tolist() == pytest.approx([1.1] * 3, abs=0.008)


def test_what_is_nearly_right_is_hardly_moved() -> None:
    layer, inputs, targets = regression()
    far, near = (
        refine({"": layer}, Losses(squares(layer, inputs, targets)), whole, 1)[""]["weight"]
        for whole in (1e2, 1e6)
    )
    assert far.abs().max() == pytest.approx(100 * float(near.abs().max()), rel=1e-3)


def test_corrections_add_up() -> None:
    weight = torch.arange(6.0).view(2, 3)
    added = {"weight": torch.ones(2, 3, 1, 1), "bias": torch.ones(2)}
    biased = Correction(weight, torch.arange(2.0), 3.0, 1.0).plus(added)
    assert biased.weight.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert biased.bias is not None
    assert biased.bias.tolist() == [1, 2]
    assert (biased.error_before, biased.error) == (3, 1)
    without = Correction(weight, None, 3.0, 1.0)
    assert without.plus(added).bias is added["bias"]
    assert without.plus({"weight": weight}).bias is None


@pytest.mark.parametrize("loss", [0.0, 1.0, float("nan"), float("inf")])
def test_nothing_is_added_where_nothing_gets_better(loss: float) -> None:
    layer, inputs, _ = regression()
    assert refine({"": layer}, Losses(lambda: 0 * layer(inputs).sum() + loss), 10.0, 3) == {}


@pytest.mark.parametrize(
    ("wanted", "share"),
    [(5.0, 1.0), (3.0, 0.5), (1.6, 0.125), (0.0, 0.0), (float("nan"), 0.0)],
)
def test_as_much_is_taken_as_is_best_on_what_judges(wanted: float, share: float) -> None:
    """What is learned goes from 1 to 5; what judges wants less of it, or nothing."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 1.0)
    losses = Losses(lambda: (layer.weight - 5).square().sum())
    losses.judged = lambda: float((layer.weight.detach() - wanted).square())
    found = refine({"": layer}, losses, 0.0, 400)
    assert layer.weight.item() == 1
    if not share:
        assert found == {}
    else:
        assert float(found[""]["weight"]) == pytest.approx(4 * share, rel=0.02)


def test_parameters_are_given_back_after_an_error() -> None:
    layer, inputs, targets = regression()
    own = dict(layer._parameters)
    calls: list[int] = []

    def loss() -> Tensor:
        calls.append(1)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return squares(layer, inputs, targets)()

    with pytest.raises(KeyboardInterrupt):
        refine({"": layer}, Losses(loss), 1.0, 10)
    assert all(layer._parameters[key] is own[key] for key in own)
    assert layer.weight.grad is None


def costs(model: nn.Module, cut: nn.Module, name: str, batch: Tensor) -> Tensor:
    """What the error of a layer's output costs by the Fisher information, but for a factor."""
    sensitivity = output_sensitivity(model, [name], [batch], Objective(), progress=False)[name]
    metric = sensitivity / sensitivity.diagonal().mean() + 0.1 * torch.eye(len(sensitivity))
    place, side = after(name)  # what the stream lacks counts
    errors = stored(cut, place, batch)[side] - stored(model, place, batch)[side]
    return ((errors @ metric) * errors).sum(1)


def cost(model: nn.Module, cut: nn.Module, name: str, batch: Tensor) -> float:
    return float(costs(model, cut, name, batch).sum())


@pytest.mark.parametrize("gated", [False, True])
def test_errors_cost_less_than_with_the_best_linear_layers(gated: bool) -> None:
    model, batch, keep = toy(gated=gated), images(64), kept(gated)
    options: dict[str, Any] = {"every_linear": True}
    closed, _ = compensated(model, keep, batch.split(16), **options)
    better, fitted = compensated(model, keep, batch.split(16), refine=20, **options)
    for name in keep:
        assert cost(model, better, name, batch) < 0.8 * cost(model, closed, name, batch)
    ups = ("gate", "value") if gated else ("first",)
    assert {f"{name.rpartition('.')[0]}.{up}" for name in keep for up in ups} <= fitted.keys()
    with torch.no_grad():
        errors = [(m(batch) - model(batch)).square().mean() for m in (better, closed)]
    assert errors[0] < errors[1]


def test_what_matters_is_fitted_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = toy(classes=2), images(64)
    options: dict[str, Any] = {"every_linear": True, "refine": 100}
    better, _ = compensated(model, KEEP, [batch], **options)
    monkeypatch.setattr(costs_of, "sensitivity", lambda *_, **__: Sensitivity({}, {}))
    plain, _ = compensated(model, KEEP, [batch], **options)
    assert cost(model, better, DOWN[1], batch) < 0.8 * cost(model, plain, DOWN[1], batch)


def test_what_is_told_is_what_was_added() -> None:
    model, batch = toy(), images(40)
    options: dict[str, Any] = {"every_linear": True, "refine": 3}
    plain, _ = compensated(model, KEEP, [batch], method="none")
    better, fitted = compensated(model, KEEP, batch.split(10), **options)
    for name, parameter in plain.named_parameters():
        layer, _, key = name.rpartition(".")
        expected = parameter.detach().double()
        if layer in fitted:
            expected = expected + getattr(fitted[layer], key)
        assert relative(better.get_parameter(name), expected) < 1e-6


def test_no_passes_are_the_closed_form_bit_for_bit() -> None:
    model, batch = toy(), images(40)
    closed, _ = compensated(model, KEEP, [batch], every_linear=True)
    none, _ = compensated(model, KEEP, [batch], every_linear=True, refine=0)
    assert same_weights(closed, none)


def test_two_runs_are_the_same_and_leave_no_trace() -> None:
    model = toy().train()
    model.embed.requires_grad_(False)
    batches = images(40).split(9)
    before = fingerprint(model)
    first, _ = compensated(model, KEEP, batches, every_linear=True, refine=2)
    assert fingerprint(model) == before
    second, _ = compensated(model, KEEP, batches, every_linear=True, refine=2)
    assert same_weights(first, second)
    assert first.training
    assert not first.embed.weight.requires_grad
    assert first.get_submodule(DOWN[0]).weight.requires_grad
    assert all(parameter.grad is None for parameter in first.parameters())


class Masked(Tokenwise):
    """Reads the first five tokens of each image alone."""

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return self.head(tokens[:, :5]).mean(1)


def test_what_padding_holds_does_not_matter() -> None:
    _, tokens, keep = tokenwise()
    torch.manual_seed(0)
    model = perturbed(Masked())
    weights = torch.ones(30, 8)
    weights[:, 5:] = 0
    options: dict[str, Any] = {"every_linear": True, "refine": 2}
    padded = tokens.clone()
    padded[:, 5:] = 1e3
    weighed = {**options, "token_weights": lambda _: weights}
    one, other = (compensated(model, keep, [batch], **weighed)[0] for batch in (tokens, padded))
    assert same_weights(one, other, 1e-5)
    plain, _ = compensated(model, keep, [padded], **options)
    assert not same_weights(one, plain, 1e-2)


@pytest.mark.parametrize("weighed", [False, True])
def test_the_loss_is_the_weighed_cost_of_the_errors(
    weighed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens, keep = tokenwise()
    weights = torch.rand(30, 8, generator=torch.Generator().manual_seed(1)).double()
    found: list[float] = []

    def see(_: Any, examples: Any, *rest: Any) -> dict[str, Any]:
        found.append(examples.total() + examples.judged())
        return {}

    monkeypatch.setattr(refinement, "refine", see)
    cut, _ = compensated(
        model,
        keep,
        [tokens],
        every_linear=True,
        refine=1,
        token_weights=(lambda _: weights) if weighed else None,
    )
    for name, value in zip(keep, found, strict=True):
        per_token = costs(model, cut, name, tokens)
        expected = per_token @ weights.flatten() if weighed else per_token.sum()
        assert value == pytest.approx(float(expected), rel=1e-4)


def test_gradients_that_are_not_finite_raise_and_leave_the_model() -> None:
    _, tokens, keep = tokenwise()
    model = perturbed(Masked())
    tokens[20:, 5:] = float("nan")
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"gradients at .*blocks.0.second.* are not finite"):
        compensated(model, keep, tokens.split(20), every_linear=True, refine=2)
    assert fingerprint(model) == before


def test_bfloat16_is_refined_in_float32() -> None:
    model, batch = toy().bfloat16(), images(60)
    options: dict[str, Any] = {"every_linear": True}
    closed, _ = compensated(model, KEEP, batch.split(20), **options)
    better, _ = compensated(model, KEEP, batch.split(20), refine=20, **options)
    assert {p.dtype for p in better.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        dense, after, before = (m(batch.bfloat16()).float() for m in (model, better, closed))
    assert (after - dense).square().mean() < (before - dense).square().mean()


def test_a_search_refines_what_it_found() -> None:
    model, batch = toy(), images(32)
    recipe = tp_amp.Recipe(every_linear=True, refine=5)
    importance = tp_amp.ReconstructionImportance(data=[batch])
    pruner = tp_amp.AdaptiveMLPPruner(
        model, images(1), importance, [batch], target={"params": 0.8}, compensation=recipe
    )
    dense = copy.deepcopy(model)
    pruner.step()
    again, _ = compensated(dense, pruner.plan, [batch], every_linear=True, refine=5)
    assert same_weights(model, again, 1e-5)


def test_nothing_gained_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, batch = toy(), images(40)
    monkeypatch.setattr(refinement, "refine", lambda *_: {})
    with caplog.at_level(logging.WARNING):
        same, _ = compensated(model, KEEP, [batch], every_linear=True, refine=1)
    closed, _ = compensated(model, KEEP, [batch], every_linear=True)
    assert same_weights(same, closed, 1e-4)
    [told] = [m for m in caplog.messages if m.startswith("refining found nothing better")]
    assert f"for {len(KEEP)} of {len(KEEP)} MLPs" in told
    assert all(name in told for name in KEEP)


class Loose(nn.Module):
    """An MLP whose layers are called one by one: what holds them never is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 6)])
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = tokens
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(tokens + hidden).mean(1)


def test_layers_in_a_list_are_refined() -> None:
    torch.manual_seed(0)
    model, keep = perturbed(Loose()), {"layers.2": [0, 2, 5, 11]}
    tokens = torch.randn(40, 8, 6, generator=torch.Generator().manual_seed(3))
    closed, _ = compensated(model, keep, tokens.split(10), every_linear=True)
    better, _ = compensated(model, keep, tokens.split(10), every_linear=True, refine=20)
    assert cost(model, better, "layers.2", tokens) < 0.9 * cost(model, closed, "layers.2", tokens)


class Scaled(nn.Module):
    """Channels of what it holds count unlike where they are added (LayerScale)."""

    def __init__(self, inner: nn.Module, scale: Tensor) -> None:
        super().__init__()
        self.inner, self.gamma = inner, nn.Parameter(scale)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(tokens) * self.gamma


def test_errors_behind_a_layer_scale_cost_what_is_seen_of_them() -> None:
    model, batch = toy(), images(64)
    for block in model.blocks:
        scale = torch.linspace(0.1, 3.0, 12)
        block.mlp = Scaled(block.mlp, scale[torch.randperm(12)])
    keep = {f"blocks.{i}.mlp.inner.second": KEEP[name] for i, name in enumerate(DOWN)}
    closed, _ = compensated(model, keep, batch.split(16), every_linear=True)
    better, _ = compensated(model, keep, batch.split(16), every_linear=True, refine=20)
    for name in ("blocks.0", "blocks.1"):  # give the stream
        assert cost(model, better, name, batch) < 0.8 * cost(model, closed, name, batch)


def test_a_layer_between_two_mlps_is_refined_where_it_stays() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 16), nn.GELU(), nn.Linear(16, 4)]
    model = perturbed(nn.Sequential(*layers))
    batch = images(400, size=6)[:, 0, 0]
    keep = {"2": [0, 3, 5, 8, 9, 14], "4": [1, 2, 5, 7, 11, 12, 15]}
    closed, _ = compensated(model, keep, batch.split(50), every_linear=True)
    better, _ = compensated(model, keep, batch.split(50), every_linear=True, refine=20)
    with torch.no_grad():
        errors = [(m(batch) - model(batch)).square().mean() for m in (better, closed)]
    assert errors[0] < 0.9 * errors[1]


def test_parallel_blocks_are_named_and_not_refined(caplog: pytest.LogCaptureFixture) -> None:
    model = timm.create_model(
        "vit_dpwee_patch16_reg1_gap_256", depth=2, embed_dim=32, num_heads=2, num_classes=5
    )
    model, batch = perturbed(model), torch.randn(6, 3, 256, 256)
    keep = {mlp.down: list(range(8)) for mlp in tp_amp.find_mlps(model, batch[:1])}
    with caplog.at_level(logging.WARNING):
        better, _ = compensated(model, keep, [batch], every_linear=True, refine=2)
    assert "not refined" in caplog.text
    closed, _ = compensated(model, keep, [batch], every_linear=True)
    assert same_weights(better, closed)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"refine": 2}, "every_linear=True"),
        ({"refine": 2, "every_linear": True, "method": "mean"}, '"affine"'),
        ({"refine": -1, "every_linear": True}, "refine must be an integer of at least 0"),
        ({"refine": 0.5, "every_linear": True}, "refine must be an integer of at least 0"),
        ({"activation_checkpointing": True}, "leave activation_checkpointing out"),
    ],
)
def test_bad_passes_leave_the_model_as_it_was(options: dict[str, Any], told: str) -> None:
    model = toy()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=told):
        tp_amp.compensate(model, tp_amp.PruningPlan(KEEP), [images()], **options)
    assert fingerprint(model) == before
