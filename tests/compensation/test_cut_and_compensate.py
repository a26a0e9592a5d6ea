from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import timm
import torch
from compensations import (
    DOWN,
    FAMILIES,
    KEEP,
    TINY,
    compensated,
    kept,
    lstsq,
    plan_of,
    same_weights,
    stored,
)
from toys import fingerprint, images, perturbed, relative, toy
from zoo import TIMM
from zoo_checks import run

import tp_amp


@pytest.mark.parametrize("gated", [False, True])
def test_none_is_apply_plan_bit_for_bit(gated: bool) -> None:
    model = toy(gated=gated)
    cut, fitted = compensated(model, kept(gated), [images(9)], method="none")
    tp_amp.apply_plan(model, images(1), tp_amp.PruningPlan(kept(gated)))
    assert same_weights(cut, model)
    assert fitted == {}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [False, True])
def test_copies_of_kept_neurons_are_rebuilt_exactly(gated: bool, bias: bool) -> None:
    model = toy(gated=gated, bias=bias)
    with torch.no_grad():
        for block in model.blocks:
            for layer in list(block.mlp.children())[: 2 if gated else 1]:
                layer.weight[10:] = layer.weight[:10]
                if bias:
                    layer.bias[10:] = layer.bias[:10]
    keep = {name: [*range(7), 17, 18, 19] for name in kept(gated)}  # one of each pair
    others = images(7, seed=8)
    cut, fitted = compensated(model, keep, images(60).split(20), ridge=TINY)
    plain, _ = compensated(model, keep, [images(9)], method="none")
    with torch.no_grad():
        assert relative(cut(others), model(others)) < 1e-4
        assert relative(plain(others), model(others)) > 1e-2
    for correction in fitted.values():
        assert correction.error < 1e-6 * correction.error_before


def test_mean_moves_the_bias_alone() -> None:
    model, batch = toy(depth=1), images(40)
    cut, _ = compensated(model, {DOWN[0]: KEEP[DOWN[0]]}, batch.split(9), method="mean")
    hidden, _ = stored(model, DOWN[0], batch)
    dropped = [j for j in range(20) if j not in KEEP[DOWN[0]]]
    down, dense = cut.get_submodule(DOWN[0]), model.get_submodule(DOWN[0])
    weight = dense.weight.detach()
    assert torch.equal(down.weight, weight[:, KEEP[DOWN[0]]])
    expected = dense.bias.double() + weight.double()[:, dropped] @ hidden.mean(0)[dropped]
    torch.testing.assert_close(down.bias.double(), expected, rtol=1e-5, atol=1e-5)


def test_plan_of_all_channels_changes_nothing() -> None:
    model = toy()
    cut, fitted = compensated(model, {name: list(range(20)) for name in DOWN}, [images(9)])
    assert same_weights(cut, model)
    assert fitted == {}


# Models some of whose layers see one to four tokens of an image.
FEW_TOKENS = (
    "inner norm, gated",
    "rotary with heads",
    "swin with heads",
    "fused parallel",
    "depthwise convolution inside",
)


@pytest.mark.parametrize("family", FAMILIES)
def test_output_comes_nearer_to_the_dense_model(family: str) -> None:
    warnings.filterwarnings("ignore", category=UserWarning, module="(timm|open_clip)")
    make, heads, count = FAMILIES[family]
    torch.manual_seed(0)
    model, example = make()
    model = perturbed(model)
    count_of_images = 800 if family in FEW_TOKENS else 60  # ten tokens for each channel
    batch = torch.randn(
        count_of_images, *example.shape[1:], generator=torch.Generator().manual_seed(2)
    )
    plan = plan_of(model, example, heads)
    plain = copy.deepcopy(model)
    tp_amp.apply_plan(plain, example, plan)
    cut, fitted = compensated(model, plan, batch.split(170))
    with torch.no_grad():
        dense = run(model, batch)
        error, before = ((run(m, batch) - dense).square().mean() for m in (cut, plain))
    assert error < 0.7 * before
    assert fitted.keys() == plan.keep.keys()
    assert len(fitted) == count
    assert all(0 <= c.error <= c.error_before for c in fitted.values())
    assert {n: p.shape for n, p in cut.named_parameters()} == {
        n: p.shape for n, p in plain.named_parameters()
    }
    touched = {n for n, p in cut.named_parameters() if not torch.equal(p, plain.get_parameter(n))}
    allowed = {f"{name}.{kind}" for name in plan.keep for kind in ("weight", "bias")}
    assert {f"{name}.weight" for name in plan.keep} <= touched <= allowed


def test_heads_alone_equal_least_squares_on_the_kept_channels() -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "embed_dim": 32, "num_heads": 4, "depth": 2, "num_classes": 5}
    model = perturbed(timm.create_model("vit_tiny_patch16_224", **sizes))
    batch = images(400, size=32, channels=3)
    cut, _ = compensated(model, {"blocks.1.attn.proj": [0, 2]}, batch.split(150), ridge=TINY)
    hidden, target = stored(model, "blocks.1.attn.proj", batch)
    channels = [*range(8), *range(16, 24)]
    weight, bias = lstsq(hidden[:, channels], target, True)
    proj = cut.blocks[1].attn.proj
    torch.testing.assert_close(proj.weight.double(), weight, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(proj.bias.double(), bias, rtol=1e-3, atol=1e-3)


def test_heads_columns_of_a_fused_layer_are_left_alone() -> None:
    torch.manual_seed(0)
    make, example, _ = TIMM["pwee_fused_out"]
    model = perturbed(make())
    batch = torch.randn(96, *example.shape[1:], generator=torch.Generator().manual_seed(2))
    mlp = tp_amp.find_mlps(model, example)[0]
    units = list(range(0, mlp.width, 40))
    cut, _ = compensated(model, {mlp.down: units}, [batch], ridge=TINY)
    plain, _ = compensated(model, {mlp.down: units}, [batch], method="none")
    moved = cut.get_parameter(f"{mlp.down}.weight") - plain.get_parameter(f"{mlp.down}.weight")
    assert bool(
        (moved.abs().sum(0) > 0)
        .nonzero()
        .flatten()
        .equal(torch.arange(mlp.first, mlp.first + len(units)))
    )
    hidden, target = stored(model, mlp.down, batch)
    _, given = stored(plain, mlp.down, batch)
    channels = [mlp.first + unit for unit in units]
    weight, _ = lstsq(hidden[:, channels], target - given, True)
    added = moved[:, mlp.first : mlp.first + len(units)].detach().double()
    assert relative(added, weight) < 1e-3


def test_bfloat16_stays_bfloat16() -> None:
    model, batch = toy().bfloat16(), images(60)
    cut, fitted = compensated(model, KEEP, batch.split(20))
    assert {p.dtype for p in cut.parameters()} == {torch.bfloat16}
    plain, _ = compensated(model, KEEP, [batch], method="none")
    with torch.no_grad():
        dense, after, before = (m(batch.bfloat16()).float() for m in (model, cut, plain))
    assert (after - dense).square().mean() < 0.7 * (before - dense).square().mean()
    assert all(c.error < c.error_before for c in fitted.values())


@pytest.mark.parametrize(
    "batches",
    [[images(4), images(4, channels=3)], [images(4), "text"], [], images(4), [images(0)]],
    ids=["channels", "type", "none", "tensor", "empty"],
)
def test_bad_batches_leave_the_model_as_it_was(batches: Any) -> None:
    model = toy().train()
    before = fingerprint(model)
    with pytest.raises((ValueError, TypeError)):
        tp_amp.compensate(model, tp_amp.PruningPlan(KEEP), batches, progress=False)
    assert fingerprint(model) == before


@pytest.mark.parametrize("options", [{"method": "best"}, {"ridge": -1.0}])
def test_bad_options_leave_the_model_as_it_was(options: dict[str, Any]) -> None:
    model = toy()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="must be"):
        tp_amp.compensate(model, tp_amp.PruningPlan(KEEP), [images()], **options)
    assert fingerprint(model) == before


def test_bad_plan_leaves_the_model_as_it_was() -> None:
    model = toy()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="must be distinct"):
        tp_amp.compensate(model, tp_amp.PruningPlan({DOWN[0]: [20]}), [images()])
    assert fingerprint(model) == before


def test_flags_hooks_and_random_state_are_as_before() -> None:
    model = toy(bias=False)
    model.train()
    model.blocks[0].eval()
    model.blocks[0].mlp.second.weight.requires_grad_(False)
    model.embed.requires_grad_(False)
    before = fingerprint(model)
    tp_amp.compensate(model, tp_amp.PruningPlan(KEEP), [images(20)], add_bias=True)
    after = fingerprint(model)
    assert all(before[key] == after[key] for key in ("training", "hooks", "random"))
    required = after["required"]
    assert isinstance(required, dict)
    assert required.pop(f"{DOWN[0]}.bias") is False
    assert required.pop(f"{DOWN[1]}.bias") is True
    assert required == before["required"]
    model(images()).sum().backward()
    assert model.get_submodule(DOWN[1]).weight.grad.shape == (12, 5)


def test_dense_weights_of_other_layers_are_untouched() -> None:
    model = toy()
    cut, _ = compensated(model, KEEP, [images(20)])
    mlps = ("blocks.0.mlp", "blocks.1.mlp")
    for name, value in model.state_dict().items():
        if not name.startswith(mlps):
            assert torch.equal(cut.state_dict()[name], value)


def test_two_runs_are_the_same() -> None:
    first, one = compensated(toy(), KEEP, images(40).split(9))
    second, two = compensated(toy().train(), KEEP, images(40).split(9))
    assert same_weights(first, second)
    assert one[DOWN[1]].error == two[DOWN[1]].error


def test_images_are_left_alone() -> None:
    batch = images(20)
    compensated(toy(), KEEP, [batch])
    assert torch.equal(batch, images(20))
    assert not batch.requires_grad
