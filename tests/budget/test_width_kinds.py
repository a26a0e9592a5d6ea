"""One price for MLPs, heads and the channels inside them, against models that are really cut."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import timm
import torch
from tiny_models import pictures, swin, vit
from torch import nn

import tp_amp
from tp_amp.budget.width_arguments import KINDS
from tp_amp.cli.help_texts import WIDTHS


def planned(
    model: nn.Module, widths: list[str], target: dict[str, float], **options: Any
) -> tuple[tp_amp.PruningPlan, tp_amp.ReconstructionImportance]:
    images = pictures()
    importance = tp_amp.ReconstructionImportance(data=images)
    plan = tp_amp.plan_for_target(
        model, images[0][:1], importance, target, widths=widths, **options
    )
    return plan, importance


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("widths", [["mlp", "qk", "vo"], ["heads", "mlp"], ["vo"]])
@pytest.mark.parametrize("kind", ["params", "macs"])
@pytest.mark.parametrize("build", [vit, swin])
def test_the_cut_model_has_the_size_that_was_asked_for(
    build: Any, kind: str, widths: list[str]
) -> None:
    model, target = build(), 0.95
    tp_amp.rotate_heads(model, pictures()[0][:1], pictures(), progress=False)
    plan, _ = planned(model, widths, {kind: target})
    cut = copy.deepcopy(model)
    tp_amp.apply_plan(cut, plan)
    sizes = [tp_amp.inspect(each, pictures()[0][:1]).shares["total"] for each in (cut, model)]
    cost, dense = (s.parameters if kind == "params" else s.macs for s in sizes)
    assert 0.98 * target * dense <= cost <= target * dense
    assert kind != "params" or cost == size(cut)
    assert {
        ("heads" if s.units == "heads" else getattr(s, "pair", "mlp")) for s in plan.sites.values()
    } == set(widths)


def test_no_other_widths_of_that_size_are_foreseen_to_lose_much_less() -> None:
    """By drawing ten thousand others; the price is optimal but for one step of one layer."""
    model, target = vit(), 0.85
    plan, importance = planned(model, ["mlp", "qk", "vo"], {"params": target})
    found = importance.foreseen(model, list(plan.sites.values()))
    costs = {  # of one channel of a site, counted by hand: rows, their biases, and columns
        site.down: {"qk": 2 * 3 * 25, "vo": 3 * (25 + 24)}.get(getattr(site, "pair", ""), 25 + 24)
        for site in plan.sites.values()
    }
    saved = (1 - target) * size(model)
    lost = sum(float(found[n].errors[width]) for n, width in plan.widths.items())
    generator, others = torch.Generator().manual_seed(0), []
    for _ in range(10000):
        shares = torch.rand(len(costs), generator=generator).pow(
            torch.rand(1, generator=generator) * 4
        )
        widths = {
            n: max(1, math.ceil(plan.dense_widths[n] * float(share)))
            for n, share in zip(costs, shares, strict=True)
        }
        less = sum(costs[n] * (plan.dense_widths[n] - width) for n, width in widths.items())
        if less >= saved:
            others.append(sum(float(found[n].errors[width]) for n, width in widths.items()))
    assert len(others) > 100
    assert lost <= 1.02 * min(others)


def test_what_may_be_cut_more_freely_is_foreseen_to_lose_less() -> None:
    model = vit()
    tp_amp.rotate_heads(model, pictures()[0][:1], pictures(), progress=False)
    lost = {}
    for widths in (("mlp",), ("mlp", "vo"), ("mlp", "qk", "vo")):
        plan, importance = planned(model, list(widths), {"params": 0.85})
        found = importance.foreseen(model, list(plan.sites.values()))
        lost[widths] = sum(float(found[n].errors[width]) for n, width in plan.widths.items())
    assert lost["mlp", "qk", "vo"] < lost["mlp", "vo"] < lost["mlp",]


def test_rotated_heads_are_foreseen_to_lose_less() -> None:
    """The price judges the coordinates that a model is in."""
    lost = []
    for rotated in (True, False):
        model = vit()
        if rotated:
            tp_amp.rotate_heads(model, pictures()[0][:1], pictures(), progress=False)
        plan, importance = planned(model, ["qk", "vo"], {"params": 0.9})
        found = importance.foreseen(model, list(plan.sites.values()))
        lost.append({name: float(each.errors[4]) for name, each in found.items()})
    assert all(lost[0][name] < lost[1][name] for name in lost[0])


def test_all_of_it_is_compensated_saved_and_applied_again() -> None:
    model, images = vit(), pictures()
    tp_amp.rotate_heads(model, images[0][:1], images, progress=False)
    plan, _ = planned(model, ["mlp", "qk", "vo"], {"params": 0.85})
    fitted, applied = copy.deepcopy(model), copy.deepcopy(model)
    tp_amp.compensate(fitted, plan, images, every_linear=True, progress=False)
    tp_amp.apply_plan(applied, tp_amp.PruningPlan.from_json(plan.to_json()))
    assert [p.shape for p in fitted.parameters()] == [p.shape for p in applied.parameters()]
    with torch.no_grad():
        dense = model(images[0])
        errors = [float((each(images[0]) - dense).norm()) for each in (fitted, applied)]
    assert errors[0] < errors[1]


def test_steps_of_each_kind() -> None:
    plan, _ = planned(vit(), ["mlp", "qk", "vo"], {"params": 0.85}, round_to={"mlp": 32, "qk": 4})
    for name, site in plan.sites.items():
        step = {"qk": 4, "vo": 1}.get(getattr(site, "pair", ""), 32)
        assert plan.widths[name] % step == 0
    plan, _ = planned(vit(), ["mlp", "heads"], {"params": 0.85}, round_to=32)
    assert all(w % 32 == 0 for n, w in plan.widths.items() if plan.sites[n].units != "heads")


def test_widths_that_no_step_fits_stay_whole_and_are_told(caplog: pytest.LogCaptureFixture) -> None:
    plan, _ = planned(vit(), ["mlp", "qk"], {"params": 0.85}, round_to=16)
    assert "so that 2 of 4 widths stay whole: blocks.0.attn.qkv (8)" in caplog.text
    assert plan.widths["blocks.0.attn.qkv"] == 8


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"widths": "mlp"}, TypeError, r"widths must be a list of kinds .* found 'mlp'"),
        ({"widths": []}, ValueError, r"some of \('mlp', 'heads', 'qk', 'vo', 'stream'\)"),
        ({"widths": ["mlp", "mlp"]}, ValueError, "widths must be some of"),
        ({"widths": ["mlp", "width"]}, ValueError, r"found \['mlp', 'width'\]"),
        ({"widths": ["heads", "vo"]}, ValueError, "no one plan cuts whole heads and the channels"),
        ({"round_to": {"qk": 8}}, ValueError, r"round_to names \['qk'\], the widths are \['mlp'\]"),
        ({"round_to": {"mlp": 0}}, ValueError, r"round_to\['mlp'\] must be an integer"),
    ],
)
def test_mistakes_are_told_before_an_image_is_read(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    importance = tp_amp.ReconstructionImportance(data=pictures())
    before = copy.deepcopy(vit().state_dict())
    model = vit()
    with pytest.raises(error, match=message):
        tp_amp.plan_for_target(model, pictures()[0][:1], importance, {"params": 0.8}, **options)
    assert not importance.errors
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


def test_queries_under_rotary_embeddings_are_told(caplog: pytest.LogCaptureFixture) -> None:
    model = timm.create_model(
        "vit_small_patch16_rope_224", img_size=32, embed_dim=24, num_heads=3, depth=1, num_classes=5
    ).eval()
    with pytest.raises(ValueError, match=r"can be cut in qk: blocks.0.attn: qk: .*rotary"):
        planned(model, ["qk"], {"params": 0.95})
    plan, _ = planned(model, ["mlp", "vo"], {"params": 0.95})
    assert plan.sites.keys() == {"blocks.0.mlp.fc2", "blocks.0.attn.proj"}


def test_the_command_line_has_the_same_kinds() -> None:
    assert tuple(WIDTHS) == KINDS
