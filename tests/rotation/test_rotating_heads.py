"""Rotated heads compute the same; cut ones what the rotated model gives with channels at zero."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import scipy.linalg
import timm
import torch
from torch import nn
from torch.nn import functional
from toys import fingerprint, perturbed, relative
from zoo import by_name
from zoo_checks import run

import tp_amp

BOTH = ("vit", "deit3", "dinov2", "dinov2_reg4", "siglip", "swin", "hf_vit", "hf_clip", "hf_dinov2")
BOTH += ("hf_siglip", "hf_swin")


def images(like: Any, count: int = 6) -> torch.Tensor:
    like = like["pixel_values"] if isinstance(like, dict) else like
    return torch.randn(count, *like.shape[1:], generator=torch.Generator().manual_seed(7))


def rotated(name: str) -> tuple[nn.Module, nn.Module, torch.Tensor, list[tp_amp.RotatedHeads]]:
    """The dense model, the rotated one, other images, and what can be cut."""
    warnings.filterwarnings("ignore", category=UserWarning, module="(timm|transformers|open_clip)")
    torch.manual_seed(0)
    model, example = by_name(name)
    model = perturbed(model).double().eval()
    x = images(example).double()
    dense = copy.deepcopy(model)
    return dense, model, images(x, 9)[6:].double(), tp_amp.rotate_heads(model, x[:1], x.split(4))


def zeroed(model: nn.Module, plan: tp_amp.PruningPlan) -> nn.Module:
    """The rotated model, by hooks, with the channels that are not kept at zero."""
    model = copy.deepcopy(model)
    for down, kept in plan.keep.items():
        site = plan.sites[down]
        assert isinstance(site, tp_amp.HeadRanks)
        layer = model.get_submodule(down)
        mask = torch.zeros(site.heads, site.width, dtype=layer.weight.dtype)
        mask[:, kept] = 1
        mask = mask.flatten()
        if site.pair == "vo":
            layer.register_forward_pre_hook(lambda _, args, m=mask: (args[0] * m,))
            continue
        parts = layer.out_features // len(mask)  # q alone, or q, k and v
        mask = torch.cat([mask, mask.new_ones((parts - 1) * len(mask))])
        layer.register_forward_hook(lambda _, args, out, m=mask: out * m)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", BOTH)
def test_the_same_function_and_cut_as_with_zeros(name: str) -> None:
    dense, model, x, heads = rotated(name)
    assert {found.site.pair for found in heads} == {"qk", "vo"}
    expected = run(dense, x)
    assert relative(run(model, x), expected) < 1e-10
    for kept in ({"qk": 0.5}, {"vo": 0.25}, {"qk": 0.3, "vo": 0.5}, {"vo": 0.5, "qk": 0.3}):
        plan = tp_amp.rank_plan(heads, kept)
        cut = copy.deepcopy(model)
        tp_amp.apply_plan(cut, plan)
        output = run(cut, x)
        assert relative(output, run(zeroed(model, plan), x)) < 1e-10
        assert relative(output, expected) > 1e-6
        assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "swin", "hf_vit"])
def test_single_precision(name: str) -> None:
    torch.manual_seed(0)
    model, example = by_name(name)
    model = perturbed(model).eval()
    x = images(example)
    before = run(model, x)
    tp_amp.rotate_heads(model, x[:1], [x])
    assert relative(run(model, x), before) < 1e-5


REFUSED = {
    "vit_qk_norm": {"qk": "norms of queries and keys"},
    "dinov3": {"qk": "rotary embeddings"},
    "swinv2": {"qk": "cosine attention", "vo": "biases apart"},
    "beit": {"qk": "biases apart", "vo": "biases apart"},
    "open_clip": {"qk": "in one tensor", "vo": "in one tensor"},
}


@torch.no_grad()
@pytest.mark.parametrize("name", REFUSED)
def test_what_stays_is_told_with_the_reason(name: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, example = by_name(name)
    model = perturbed(model).eval()
    x, before, output = images(example), fingerprint(model), run(model, images(example))
    if len(REFUSED[name]) == 2:
        with pytest.raises(ValueError, match=REFUSED[name]["vo"]):
            tp_amp.rotate_heads(model, x[:1], [x])
        assert fingerprint(model) == before
        return
    heads = tp_amp.rotate_heads(model, x[:1], [x])
    assert {found.site.pair for found in heads} == {"vo"}
    [told] = [r.getMessage() for r in caplog.records if "keep all channels" in r.getMessage()]
    assert "qk" in told
    assert REFUSED[name]["qk"] in told
    assert relative(run(model, x), output) < 1e-5


def vit(**further: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "embed_dim": 32, "num_heads": 2, "depth": 2, "num_classes": 5}
    return perturbed(timm.create_model("vit_tiny_patch16_224", **{**sizes, **further}))


def test_the_leading_channels_are_worth_more_than_others() -> None:
    """Than as many drawn ones, on other images, and as the errors say."""
    model = vit().eval()
    x, other = images(torch.zeros(1, 3, 32, 32), 64), torch.randn(32, 3, 32, 32)
    with torch.no_grad():
        dense = model(other)
        heads = tp_amp.rotate_heads(model, x[:1], x.split(16))
        for pair in ("qk", "vo"):
            plan = tp_amp.rank_plan(heads, {pair: 0.5})
            losses = []
            for order in (lambda n: list(range(n)), lambda n: list(range(16 - n, 16))):
                keep = {down: order(len(kept)) for down, kept in plan.keep.items()}
                cut = copy.deepcopy(model)
                tp_amp.apply_plan(cut, tp_amp.PruningPlan(keep, sites=plan.sites))
                losses.append(float((cut(other) - dense).square().mean()))
            assert losses[0] < 0.3 * losses[1]
    for found in heads:
        assert found.errors[0] == pytest.approx(1)
        assert found.errors[-1] == 0
        assert all(a >= b for a, b in zip(found.errors, found.errors[1:], strict=False))
        assert found.errors[found.width_for(0.1)] <= 0.1 < found.errors[found.width_for(0.1) - 1]


def test_errors_are_those_of_all_tokens() -> None:
    """By matrix roots of moments taken from outside; of the keys around their mean."""
    model, x = vit().double().eval(), images(torch.zeros(1, 3, 32, 32), 24).double()
    given: list[torch.Tensor] = []
    model.blocks[1].attn.qkv.register_forward_hook(lambda _, args, out: given.append(out))
    with torch.no_grad():
        model(x)
        [output] = [out.flatten(0, 1).view(-1, 3, 2, 16).numpy() for out in given[:1]]
        values = []
        for head in range(2):
            q, k = output[:, 0, head], output[:, 1, head]
            moments = q.T @ q / len(q), numpy.cov(k.T, bias=True)
            roots = [scipy.linalg.sqrtm(moment).real for moment in moments]
            values.append(numpy.linalg.svd(roots[0] @ roots[1], compute_uv=False) ** 2)
        lost = numpy.sum(values, 0)
        found = tp_amp.rotate_heads(model, x[:1], x.split(7))
    [queries] = [heads for heads in found if heads.site.down == "blocks.1.attn.qkv"]
    expected = [lost[kept:].sum() / lost.sum() for kept in range(17)]
    assert queries.errors == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_batches_do_not_matter_and_all_is_given_back() -> None:
    x = images(torch.zeros(1, 3, 32, 32), 24)
    results = []
    for size in (24, 5):
        model = vit().double().train()
        model.blocks[0].attn.qkv.weight.requires_grad_(False)
        state = torch.get_rng_state()
        tp_amp.rotate_heads(model, x[:1].double(), x.double().split(size))
        assert torch.equal(torch.get_rng_state(), state)
        assert all(module.training for module in model.modules())
        assert [n for n, p in model.named_parameters() if not p.requires_grad] == [
            "blocks.0.attn.qkv.weight"
        ]
        assert not any(module._forward_hooks for module in model.modules())
        assert not any(module._forward_pre_hooks for module in model.modules())
        results.append(
            [
                torch.tensor(found.errors)
                for found in tp_amp.rotate_heads(
                    vit().double(), x[:1].double(), x.double().split(size)
                )
            ]
        )
    for one, two in zip(*results, strict=True):
        assert torch.allclose(one, two, rtol=1e-9, atol=1e-12)


def cut_vit() -> tuple[nn.Module, tp_amp.PruningPlan, torch.Tensor]:
    model, x = vit().eval(), images(torch.zeros(1, 3, 32, 32), 64)
    heads = tp_amp.rotate_heads(model, x[:1], [x])
    return model, tp_amp.rank_plan(heads, {"qk": 0.5, "vo": 0.75}, round_to=4), x


def test_it_is_a_plan_like_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Saved, loaded, reported, copied, trained, with MLPs in the same plan; heads before."""
    model, plan, x = cut_vit()
    assert plan.widths["blocks.0.attn.qkv"] == 8
    assert plan.widths["blocks.0.attn.proj"] == 12
    assert tp_amp.PruningPlan.from_json(plan.to_json()) == plan
    mlps = {mlp.down: mlp for mlp in tp_amp.find_mlps(model, x[:1])}
    keep = plan.keep | {name: list(range(40)) for name in mlps}
    plan = tp_amp.PruningPlan(keep, sites=plan.sites | mlps)
    dense = copy.deepcopy(model)
    tp_amp.apply_plan(model, plan)
    assert "channels of each head" in str(plan.report())
    with torch.no_grad():
        output = model(x)
        assert torch.equal(copy.deepcopy(model)(x), output)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), output)
        assert relative(output, zeroed_mlps(dense, plan, mlps)(x)) < 1e-5
        tp_amp.save_pruned(model, tmp_path, plan)
        fresh = vit().eval()
        assert tp_amp.load_pruned(fresh, tmp_path) == plan
        assert torch.equal(fresh(x), output)
    with pytest.raises(ValueError, match=r"attn\.qkv|attn\.proj"):
        tp_amp.save_pruned(dense, tmp_path / "other", plan)
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    caplog.clear()
    assert not tp_amp.find_attentions(model, x[:1])
    assert "its heads have lost channels; cut whole heads before those" in caplog.text
    with pytest.raises(ValueError, match="blocks"):
        tp_amp.apply_plan(model, plan)


def zeroed_mlps(model: nn.Module, plan: tp_amp.PruningPlan, mlps: Any) -> nn.Module:
    ranks = {down: site for down, site in plan.sites.items() if down not in mlps}
    keep = {down: plan.keep[down] for down in ranks}
    model = zeroed(model, tp_amp.PruningPlan(keep, sites=ranks))
    for name in mlps:
        with torch.no_grad():
            model.get_submodule(name).weight[:, 40:] = 0
    return model


@pytest.mark.parametrize("every_linear", [False, True])
@pytest.mark.parametrize("kept", [{"vo": 0.5}, {"qk": 0.1}, {"qk": 0.1, "vo": 0.5}])
@torch.no_grad()
def test_compensation_takes_errors_out(kept: dict[str, float], every_linear: bool) -> None:
    torch.manual_seed(0)
    model = vit(img_size=64).eval()
    for block in model.blocks:  # so that attention matters
        block.attn.qkv.weight.mul_(4)
    x, other = torch.randn(400, 3, 64, 64), torch.randn(64, 3, 64, 64)
    dense = model(other)
    plan = tp_amp.rank_plan(tp_amp.rotate_heads(model, x[:1], x.split(32)), kept)
    cut, fitted = copy.deepcopy(model), copy.deepcopy(model)
    tp_amp.apply_plan(cut, plan)
    found = tp_amp.compensate(fitted, plan, x.split(32), every_linear=every_linear, progress=False)
    assert {"blocks.0.attn.proj", "blocks.1.attn.proj"} <= found.keys()
    assert ("blocks.1.attn.qkv" in found) == every_linear
    assert all(correction.error <= correction.error_before for correction in found.values())
    before, after = ((m(other) - dense).square().mean() for m in (cut, fitted))
    assert after < before
    assert [p.shape for p in cut.parameters()] == [p.shape for p in fitted.parameters()]


@torch.no_grad()
def test_layers_without_some_channels_are_fitted_too() -> None:
    """MLPs cut in a second round: q, k, v and projections make up for what is lost before them."""
    torch.manual_seed(0)
    model = vit(img_size=64).eval()
    x, other = torch.randn(400, 3, 64, 64), torch.randn(64, 3, 64, 64)
    dense = model(other)
    plan = tp_amp.rank_plan(tp_amp.rotate_heads(model, x[:1], x.split(100)), {"qk": 0.5, "vo": 0.7})
    tp_amp.apply_plan(model, plan)
    mlps = tp_amp.PruningPlan({f"blocks.{i}.mlp.fc2": list(range(40)) for i in range(2)})
    cut, fitted = copy.deepcopy(model), copy.deepcopy(model)
    tp_amp.apply_plan(cut, mlps, x[:1])
    found = tp_amp.compensate(fitted, mlps, x.split(100), every_linear=True, progress=False)
    assert {"blocks.1.attn.qkv", "blocks.1.attn.proj"} <= found.keys()
    before, after = ((m(other) - dense).square().mean() for m in (cut, fitted))
    assert after < 0.5 * before
    for name in ("blocks.1.attn.qkv", "blocks.1.attn.proj"):
        layer = fitted.get_submodule(name)
        assert layer.weight.shape == model.get_submodule(name).weight.shape
        assert found[name].error < found[name].error_before


@torch.no_grad()
@pytest.mark.parametrize("kept", [[0, 1, 2, 3, 4], [1, 2, 6, 11, 14]], ids=["leading", "others"])
def test_what_is_fitted_is_told_rightly(kept: list[int]) -> None:
    """Errors as measured from outside, on the rows of q, k and v that are left."""
    torch.manual_seed(0)
    model, x = vit(img_size=64).eval(), torch.randn(200, 3, 64, 64)
    found = tp_amp.rotate_heads(model, x[:1], x.split(50))
    sites = {heads.site.down: heads.site for heads in found}
    plan = tp_amp.PruningPlan(dict.fromkeys(sites, kept), sites=sites)
    cut = copy.deepcopy(model)
    fitted = tp_amp.compensate(cut, plan, x.split(50), every_linear=True, progress=False)
    read = {name: hidden(m, "blocks.1.attn.qkv", x) for name, m in (("dense", model), ("cut", cut))}
    rows = [(part * 2 + head) * 16 + i for part in range(3) for head in range(2) for i in kept]
    dense, narrow = (m.blocks[1].attn.qkv for m in (model, cut))
    wanted = functional.linear(read["dense"], dense.weight, dense.bias)[:, rows]
    given = functional.linear(read["cut"], narrow.weight, narrow.bias)
    error = float((wanted - given).square().sum(1).mean())
    assert fitted["blocks.1.attn.qkv"].error == pytest.approx(error, rel=1e-3)
    # Nothing is lost before the first projection: least squares on the channels that it reads.
    dense, narrow = (m.blocks[0].attn.proj for m in (model, cut))
    values, left = (hidden(m, "blocks.0.attn.proj", x) for m in (model, cut))
    picked = torch.cat([left[:, :5], left[:, 16:21]], 1)
    target = functional.linear(values, dense.weight, dense.bias)
    output = functional.linear(picked, narrow.weight, narrow.bias)
    error = float((target - output).square().sum(1).mean())
    design = torch.cat([picked, picked.new_ones(len(picked), 1)], 1).double()
    best = target.double() - design @ torch.linalg.lstsq(design, target.double()).solution
    assert error == pytest.approx(float(best.square().sum(1).mean()), rel=0.02)
    assert fitted["blocks.0.attn.proj"].error == pytest.approx(error, rel=1e-3)


def hidden(model: nn.Module, name: str, x: torch.Tensor) -> torch.Tensor:
    """What a layer is called with, a row for each token."""
    seen: list[torch.Tensor] = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    model(x)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"q": 0.5}, "qk or vo"),
        ({"qk": 0.0}, "above 0"),
        ({"qk": True}, "above 0"),
        ({"vo": 2}, "most 1"),
    ],
)
def test_shares_are_checked(kept: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tp_amp.rank_plan([made_up()], kept)


def made_up() -> tp_amp.RotatedHeads:
    site = tp_amp.HeadRanks("vo", "attn", ("attn.qkv",), "attn.proj", heads=2, width=8)
    return tp_amp.RotatedHeads(site, (*(1.0 - i / 8 for i in range(8)), 0.0))


def test_nothing_is_left_whole_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="no attention can be cut in qk"):
        tp_amp.rank_plan([made_up()], {"qk": 0.5})
    assert tp_amp.rank_plan([made_up()], {"vo": 1}).widths == {"attn.proj": 8}
    assert not caplog.records
    assert tp_amp.rank_plan([made_up()], {"vo": 0.5}, round_to=16).widths == {"attn.proj": 8}
    [record] = caplog.records
    assert "keep all channels, since round_to=16" in record.getMessage()
    assert "attn.proj" in record.getMessage()
    with pytest.raises(ValueError, match="at least 0"):
        made_up().width_for(-0.1)


def test_without_batches_the_model_is_as_it_was() -> None:
    model = vit()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="no batch"):
        tp_amp.rotate_heads(model, torch.zeros(1, 3, 32, 32), [])
    assert fingerprint(model) == before


def test_what_rank_plan_does_not_take_is_told() -> None:
    site = tp_amp.HeadRanks("vo", "attn", ("attn.qkv",), "attn.proj", heads=2, width=8)
    handle = tp_amp.RotatedHeads(site, (0.0,) * 9)
    wrong: list[tuple[Any, Any, str]] = [
        ([handle], 0.5, r"a dict of shares, \{'qk': 0.5, 'vo': 0.5\} or one .* found 0.5"),
        (handle, {"vo": 0.5}, r"the list that rotate_heads gives, found one of it; pass \[it\]"),
        ([site], {"vo": 0.5}, "the list that rotate_heads gives, found HeadRanks in it"),
    ]
    for rotated, kept, message in wrong:
        with pytest.raises(TypeError, match=message):
            tp_amp.rank_plan(rotated, kept)
