from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from toys import PlainMLP, fingerprint, images, perturbed, relative, toy
from zoo import TIMM, open_clip_models
from zoo_checks import run

import tp_amp
from tp_amp.compensation import walk as refit
from tp_amp.importance.objectives import Objective
from tp_amp.importance.sensitivity import place_sensitivity
from tp_amp.running.inputs import prepare
from tp_amp.structure.chain import Step

DOWN = "blocks.0.mlp.second", "blocks.1.mlp.second"
Keep = dict[str, list[int]]
TINY = 1e-10


def plan_of(model: nn.Module, inputs: Any, heads: bool = False) -> tp_amp.PruningPlan:
    """Half of every MLP's channels at random, and of every attention's heads."""
    generator = torch.Generator().manual_seed(5)
    sites = list(tp_amp.find_mlps(model, inputs))
    sites += tp_amp.find_attentions(model, inputs) if heads else []
    return tp_amp.PruningPlan(
        {
            site.down: sorted(torch.randperm(site.width, generator=generator)[:half].tolist())
            for site in sites
            for half in [max(1, site.width // 2)]
        }
    )


def compensated(model: nn.Module, plan: tp_amp.PruningPlan | Keep, batches: Any, **options: Any):
    plan = plan if isinstance(plan, tp_amp.PruningPlan) else tp_amp.PruningPlan(plan)
    model = copy.deepcopy(model)
    fitted = tp_amp.compensate(model, plan, batches, progress=False, **options)
    return model, fitted


def stored(model: nn.Module, name: str, batch: Tensor) -> tuple[Tensor, Tensor]:
    """What goes into a Linear and comes out, `(tokens, channels)`."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda _m, args, out: seen.extend(v.flatten(0, -2).double() for v in (args[0], out))
    )
    with torch.no_grad():
        model(batch)
    handle.remove()
    return seen[0], seen[1]


def lstsq(x: Tensor, y: Tensor, intercept: bool) -> tuple[Tensor, Tensor]:
    rows = torch.cat([x, torch.ones(len(x), int(intercept))], 1).numpy()
    solution = torch.from_numpy(np.linalg.lstsq(rows, y.numpy(), rcond=None)[0])
    return solution[: x.shape[1]].T, solution[x.shape[1] :].flatten()


def hand_fitted(model: nn.Module, keep: Keep, batch: Tensor) -> nn.Module:
    """Cut and refit one Linear after another, the later ones on the corrected model."""
    dense, cut = model, copy.deepcopy(model)
    for name, units in keep.items():
        mlp, down = cut.get_submodule(name.rpartition(".")[0]), cut.get_submodule(name)
        for part in mlp.children():
            if isinstance(part, nn.Linear) and part is not down:
                part.weight = nn.Parameter(part.weight.detach()[units])
                part.bias = None if part.bias is None else nn.Parameter(part.bias.detach()[units])
        down.weight = nn.Parameter(down.weight.detach()[:, units])
        hidden, given = stored(cut, name, batch)
        target = stored(dense, name, batch)[1]
        biased = down.bias is not None
        weight, bias = lstsq(hidden, target - given, biased)
        with torch.no_grad():
            down.weight += weight
            if biased:
                down.bias += bias
    return cut


def same_weights(one: nn.Module, other: nn.Module, tolerance: float = 0.0) -> bool:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    if tolerance == 0:
        return all(torch.equal(a[name], b[name]) for name in a)
    return all(relative(a[name], b[name]) < tolerance for name in a if a[name].abs().sum())


KEEP = {DOWN[0]: [0, 3, 7, 8, 15, 19], DOWN[1]: [1, 2, 4, 9, 11]}


def kept(gated: bool) -> Keep:
    return {name.replace("second", "out") if gated else name: k for name, k in KEEP.items()}


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


@pytest.mark.parametrize("sizes", [[40], [13, 26, 1]])
@pytest.mark.parametrize(("gated", "bias"), [(False, True), (True, True), (True, False)])
def test_depth_is_fitted_on_the_corrected_prefix(gated: bool, bias: bool, sizes: list[int]) -> None:
    model, batch, keep = toy(gated=gated, bias=bias), images(40), kept(gated)
    cut, fitted = compensated(model, keep, batch.split(sizes), ridge=TINY)
    expected = hand_fitted(model, keep, batch)
    assert same_weights(cut, expected, 1e-4)
    assert list(fitted) == list(keep)
    for name, correction in fitted.items():
        error = (stored(cut, name, batch)[1] - stored(model, name, batch)[1]).square().sum(1)
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
    batch = images(40, size=6)[:, 0, 0]
    cut, fitted = compensated(model, {"2": [1, 4, 5]}, [batch], ridge=TINY)
    with torch.no_grad():
        hidden = model[:2](batch)[:, [1, 4, 5]].double()
        weight, bias = lstsq(hidden, model[:3](batch).double(), True)
    assert list(fitted) == ["2"]
    torch.testing.assert_close(cut[2].weight.double(), weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cut[2].bias.double(), bias, rtol=1e-4, atol=1e-4)


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


def timm_entry(name: str) -> Callable[[], tuple[nn.Module, Any]]:
    return lambda: (TIMM[name][0](), TIMM[name][1])


def open_clip_entry() -> tuple[nn.Module, Any]:
    make, inputs, _ = open_clip_models()["open_clip"]
    return make(), inputs


# Model, whether heads are cut, and how many layers are fitted.
FAMILIES = {
    "packed gated": (timm_entry("dinov2_giant"), False, 2),
    "inner norm": (timm_entry("beit3"), False, 2),
    "inner norm, gated": (timm_entry("eva02_clip"), False, 2),
    "convolutions": (timm_entry("convnext_conv_mlp"), False, 5),
    "global response norm": (timm_entry("convnextv2"), False, 5),
    "depthwise convolution inside": (timm_entry("pvt_v2"), False, 8),
    "fused parallel": (timm_entry("pwee_fused_out"), False, 2),
    "swin": (timm_entry("swin"), False, 8),
    "swin with heads": (timm_entry("swin"), True, 14),
    "rotary with heads": (timm_entry("eva02"), True, 4),
    "open_clip with heads": (open_clip_entry, True, 4),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_output_comes_nearer_to_the_dense_model(family: str) -> None:
    warnings.filterwarnings("ignore", category=UserWarning, module="(timm|open_clip)")
    make, heads, count = FAMILIES[family]
    torch.manual_seed(0)
    model, example = make()
    model = perturbed(model)
    batch = torch.randn(12, *example.shape[1:], generator=torch.Generator().manual_seed(2))
    plan = plan_of(model, example, heads)
    plain = copy.deepcopy(model)
    tp_amp.apply_plan(plain, example, plan)
    cut, fitted = compensated(model, plan, batch.split(7))
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
    batch = images(60, size=32, channels=3)
    cut, _ = compensated(model, {"blocks.1.attn.proj": [0, 2]}, batch.split(25), ridge=TINY)
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
    batch = torch.randn(8, *example.shape[1:], generator=torch.Generator().manual_seed(2))
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


def test_layer_without_a_bias_gets_one_only_when_asked(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = toy(bias=False), images(40)
    with caplog.at_level(logging.INFO):
        without, first = compensated(model, KEEP, [batch], ridge=TINY)
    assert f"{DOWN[0]} has no bias to correct; add_bias=True gives it one" in caplog.text
    caplog.clear()
    added, second = compensated(model, KEEP, [batch], ridge=TINY, add_bias=True)
    assert "has no bias" not in caplog.text
    for name in DOWN:
        assert without.get_submodule(name).bias is None
        assert added.get_submodule(name).bias.abs().sum() > 0
        assert first[name].bias is None
    assert second[DOWN[0]].error < first[DOWN[0]].error
    zero = copy.deepcopy(model)
    for name in DOWN:
        zero.get_submodule(name).bias = nn.Parameter(torch.zeros(12))
    assert same_weights(added, hand_fitted(zero, KEEP, batch), 1e-4)


def test_bfloat16_stays_bfloat16() -> None:
    model, batch = toy().bfloat16(), images(60)
    cut, fitted = compensated(model, KEEP, batch.split(20))
    assert {p.dtype for p in cut.parameters()} == {torch.bfloat16}
    plain, _ = compensated(model, KEEP, [batch], method="none")
    with torch.no_grad():
        dense, after, before = (m(batch.bfloat16()).float() for m in (model, cut, plain))
    assert (after - dense).square().mean() < 0.7 * (before - dense).square().mean()
    assert all(c.error < c.error_before for c in fitted.values())


class Tokenwise(nn.Module):
    """An MLP for each token on its own, `(images, tokens, 6)`."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([PlainMLP(6, 16), PlainMLP(6, 16)])
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return self.head(tokens).mean(1)


def tokenwise() -> tuple[nn.Module, Tensor, Keep]:
    torch.manual_seed(0)
    tokens = torch.randn(30, 8, 6, generator=torch.Generator().manual_seed(3))
    keep = {f"blocks.{i}.second": [0, 2, 5, 11] for i in (0, 1)}
    return perturbed(Tokenwise()), tokens, keep


def test_tokens_without_weight_do_not_matter() -> None:
    model, tokens, keep = tokenwise()

    def weights(tokens: Tensor) -> Tensor:
        return (torch.arange(8) < 5).double().expand(len(tokens), 8)

    padded = tokens.clone()
    padded[:, 5:] = 7
    first, _ = compensated(model, keep, tokens.split(11), token_weights=weights)
    second, _ = compensated(model, keep, padded.split(11), token_weights=weights)
    short, _ = compensated(model, keep, tokens[:, :5].split(11))
    whole, _ = compensated(model, keep, tokens.split(11))
    assert same_weights(first, second, 1e-5)
    assert same_weights(first, short, 1e-5)
    assert not same_weights(first, whole, 1e-3)


def test_token_weights_are_given_the_dict_of_arguments() -> None:
    model, tokens, keep = tokenwise()
    mask = torch.rand(30, 8, generator=torch.Generator().manual_seed(4)) < 0.6
    batches = [
        {"tokens": t, "mask": m, "labels": t}
        for t, m in zip(tokens.split(11), mask.split(11), strict=True)
    ]
    cut, _ = compensated(model, keep, batches, token_weights=lambda kwargs: kwargs["mask"])
    one, _ = compensated(model, keep, [tokens[mask][:, None]])
    assert same_weights(cut, one, 1e-5)


def test_tokens_weigh_what_their_places_cost() -> None:
    """As with the weights given by hand; others than all the same."""
    model, batches = toy(), list(images(40, seed=5).split(11))
    keep = {DOWN[0]: KEEP[DOWN[0]]}
    before = fingerprint(model)
    inputs = [prepare(batch, model) for batch in batches]
    weights = place_sensitivity(model, [DOWN[0]], inputs, Objective())[DOWN[0]]
    assert float(weights.max()) > 1.2 * float(weights.min())
    found, _ = compensated(model, keep, batches, token_weights="sensitivity")
    assert fingerprint(model) == before
    expected, _ = compensated(
        model, keep, batches, token_weights=lambda images: weights.expand(len(images), -1)
    )
    plain, _ = compensated(model, keep, batches)
    assert same_weights(found, expected, 1e-6)
    assert not same_weights(found, plain, 1e-4)


def test_tokens_that_weigh_the_same_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Images of two sizes have no places in common."""
    model, tokens, keep = tokenwise()
    batches = [tokens[:15], tokens[15:, :5]]
    with caplog.at_level(logging.WARNING):
        found, _ = compensated(model, keep, batches, token_weights="sensitivity")
    plain, _ = compensated(model, keep, batches)
    assert all(f"{name}" in caplog.text for name in keep)
    assert "weigh the same" in caplog.text
    assert same_weights(found, plain, 1e-9)


def test_wrong_token_weights_raise_and_leave_the_model() -> None:
    model, tokens, keep = tokenwise()
    before = fingerprint(model)
    for weights, message in (
        (torch.ones(30, 7), "blocks.0.second: found 210 weights for 240 tokens"),
        (torch.zeros(30, 8), "no tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            tp_amp.compensate(
                model, tp_amp.PruningPlan(keep), [tokens], token_weights=lambda _, w=weights: w
            )
        assert fingerprint(model) == before


@pytest.mark.parametrize(("count", "few"), [(14, True), (15, False)])
def test_few_tokens_are_warned_of(count: int, few: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        compensated(toy(), {DOWN[0]: KEEP[DOWN[0]]}, [images(count)])  # four tokens each
    message = f"{DOWN[0]}: 56 tokens for 6 kept channels are few; fit on more images"
    assert (message in caplog.text) is few


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


def test_labels_are_ignored_and_batches_read_once() -> None:
    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in images(40).split(9):
            yield batch, torch.full((len(batch),), -7)

    first, _ = compensated(toy(), KEEP, images(40).split(9))
    second, _ = compensated(toy(), KEEP, loader())
    assert same_weights(first, second)


def test_images_are_left_alone() -> None:
    batch = images(20)
    compensated(toy(), KEEP, [batch])
    assert torch.equal(batch, images(20))
    assert not batch.requires_grad


def whole_model(*_: Any) -> list[Step]:
    return [Step("")]


@pytest.mark.parametrize("name", ["vit", "swin", "eva02", "pwee_fused_out"])
def test_chain_and_whole_model_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, example = perturbed(TIMM[name][0]()), TIMM[name][1]
    batch = torch.randn(8, *example.shape[1:], generator=torch.Generator().manual_seed(2))
    plan = plan_of(model, example, heads=name in ("vit", "eva02"))
    chains: list[int] = []
    real = refit.find_chain
    monkeypatch.setattr(
        refit, "find_chain", lambda *a: [chains.append(len(found := real(*a))), found][1]
    )
    first, one = compensated(model, plan, batch.split(5))
    assert chains[0] > 1
    monkeypatch.setattr(refit, "find_chain", whole_model)
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
    assert same_weights(cut, hand_fitted(model, keep, batch), 1e-4)


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
    with pytest.raises(ValueError, match="each layer called once"):
        tp_amp.compensate(model, tp_amp.PruningPlan({"mlp.second": [0, 1]}), [torch.randn(30, 6)])
    assert fingerprint(model)["values"] == before["values"]


def by_hand(model: nn.Module, cut: nn.Module, keep: Keep, data: Tensor) -> nn.Module:
    """Every Linear between the two, each by least squares on the model fitted so far."""
    cut = copy.deepcopy(cut)
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    for name in names[names.index(DOWN[0]) : names.index(DOWN[1]) + 1]:
        x, _ = stored(cut, name, data)
        _, y = stored(model, name, data)
        rows = keep.get(name.replace("first", "second")) if name.endswith("first") else None
        weight, bias = lstsq(x, y if rows is None else y[:, rows], intercept=True)
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
    assert "mix is called 2 times and is not fitted" in caplog.text
    assert "mix" not in fitted
    torch.testing.assert_close(found.mix.weight, model.mix.weight)
