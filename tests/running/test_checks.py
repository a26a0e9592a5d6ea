"""Models that can't be worked on are refused in one sentence, at every door; others are handled."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from toys import fingerprint, images, masked, relative, toy

import tp_amp
from tp_amp.running.checks import check_heads, check_model, remade

DOWN = "blocks.1.mlp.second"


class Packed(nn.Linear):
    """A Linear as libraries of quantised weights have it: integers, and a scale."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features)
        self.scale = float(layer.weight.detach().abs().max()) / 127
        whole = (layer.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


def packed() -> nn.Module:
    model = toy()
    for block in model.blocks:
        block.mlp.second = Packed(block.mlp.second)
    return model


def dynamic() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(toy(), {nn.Linear}, torch.qint8)


def by_torchao() -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    model = toy(width=32, hidden=64)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def eight_bits() -> nn.Module:
    model = toy()
    model.head.weight = nn.Parameter(model.head.weight.detach().to(torch.float8_e4m3fn))
    return model


def inside_scripted() -> nn.Module:
    model = toy()
    model.blocks[0].mlp = torch.jit.script(model.blocks[0].mlp)
    return model


def lazy() -> nn.Module:
    model = toy()
    model.head = nn.LazyLinear(5)
    return model


class FullyShardedDataParallel(nn.Module):
    """Named as torch's wrapper is, which needs a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def partitioned() -> nn.Module:
    """As DeepSpeed leaves a model: empty parameters that know where their parts are."""
    model = toy()
    model.head.weight = nn.Parameter(torch.empty(0))
    model.head.weight.ds_id = 3  # type: ignore[attr-defined]
    return model


def exported() -> nn.Module:
    return torch.export.export(toy(), (images(2),)).module()


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "integers": (packed, r"blocks\.0\.mlp\.second is quantised \(Packed\); prune the model first"),
    "quantize_dynamic": (dynamic, r"quantised .*prune the model first, and quantise"),
    "torchao": (by_torchao, r"quantised .*prune the model first"),
    "eight bits": (eight_bits, r"head is quantised"),
    "scripted": (lambda: torch.jit.script(toy()), r"the model is scripted by torch\.jit"),
    "traced": (lambda: torch.jit.trace(toy(), images(1)), r"the model is scripted by torch\.jit"),
    "a scripted part": (inside_scripted, r"blocks\.0\.mlp is scripted by torch\.jit"),
    "exported": (exported, r"made by torch\.export"),
    "lazy": (lazy, r"head has no weights yet; call the model once"),
    "FSDP": (lambda: FullyShardedDataParallel(toy()), r"sharded over processes; prune first"),
    "partitioned": (partitioned, r"head has its weights sharded"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_a_model_that_cant_be_cut_is_refused_before_an_image_is_read(
    make: Callable[[], Any], message: str
) -> None:
    model, read = make(), []

    def batches() -> Any:
        read.append(True)
        yield images(4)

    class Loader:
        __iter__ = staticmethod(batches)

    loader, x = Loader(), images(1)
    importance = tp_amp.ReconstructionImportance(data=loader)
    plan = tp_amp.PruningPlan({DOWN: [0]})
    for call in (
        lambda: tp_amp.find_mlps(model, x),
        lambda: tp_amp.find_attentions(model, x),
        lambda: tp_amp.inspect(model, x),
        lambda: tp_amp.plan_for_target(model, x, importance, {"params": 0.8}),
        lambda: tp_amp.plan_from_importance(model, x, tp_amp.DIMAPImportance(), 0.5),
        lambda: tp_amp.compensate(model, plan, loader),
        lambda: tp_amp.apply_plan(model, plan, x),
        lambda: tp_amp.EntropyTaylorImportance().collect(model, loader),
        lambda: importance.collect(model, loader),
        lambda: tp_amp.AdaptiveMLPPruner(model, x, tp_amp.DIMAPImportance(), loader),
        lambda: tp_amp.compare(model, x, [tp_amp.DIMAPImportance()], loader),
        lambda: tp_amp.distill(model, toy(), [x]),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert read == []


NO_MODULES = {
    "tuple": ((toy(), None), r"a tuple, no torch\.nn\.Module; pass the model in it, item 0"),
    "state dict": (toy().state_dict(), r"OrderedDict.*load the state dict into it"),
    "class": (nn.Linear, r"the class Linear; make one of it first"),
    "name": ("vit_tiny_patch16_224", r"a str.*; build the model of that name first"),
    "nothing": (None, r"a NoneType, no torch\.nn\.Module"),
    "pipeline": (type("Pipeline", (), {"model": toy()})(), r"a Pipeline.*; pass its \.model"),
}


@pytest.mark.parametrize(("model", "message"), NO_MODULES.values(), ids=NO_MODULES)
def test_what_is_no_model_is_told_with_what_to_pass(model: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        tp_amp.inspect(model, images(1))


def test_a_model_on_the_meta_device_is_inspected_and_refused_where_values_count() -> None:
    model, x = toy().to("meta"), images(4)
    found = tp_amp.inspect(model, x[:1])
    assert [mlp.down for mlp in found.mlps] == ["blocks.0.mlp.second", DOWN]
    assert found.shares["total"].macs == tp_amp.inspect(toy(), x[:1]).shares["total"].macs
    importance = tp_amp.ReconstructionImportance(data=[x])
    for call in (
        lambda: tp_amp.plan_for_target(model, x[:1], importance, {"params": 0.8}),
        lambda: tp_amp.compensate(model, tp_amp.PruningPlan({DOWN: [0]}), [x]),
        lambda: tp_amp.EntropyTaylorImportance().collect(model, [x]),
        lambda: tp_amp.compare(model, x[:1], [tp_amp.DIMAPImportance()], [x, x]),
    ):
        with pytest.raises(ValueError, match="on the meta device, without values; load the weigh"):
            call()


def weight_norm(layer: nn.Module) -> None:
    nn.utils.weight_norm(layer)


def masked_out(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", amount=0.3)


REMADE: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "weight norm": (parametrizations.weight_norm, r'WeightNorm; .*\(layer, "weight"\)'),
    "spectral norm": (parametrizations.spectral_norm, r"SpectralNorm; .*remove_parametrizations"),
    "old weight norm": (weight_norm, r"first torch\.nn\.utils\.remove_weight_norm\(layer\)"),
    "old spectral norm": (nn.utils.spectral_norm, r"remove_spectral_norm\(layer\)"),
    "masked": (masked_out, r'torch\.nn\.utils\.prune\.remove\(layer, "weight"\)'),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("change", "message"), REMADE.values(), ids=REMADE)
def test_layers_whose_weights_are_made_anew_stay_whole_and_the_rest_is_cut(
    change: Callable[[nn.Module], Any], message: str
) -> None:
    model, x = toy(), images(8)
    for layer in (model.blocks[0].mlp.first, model.blocks[1].query, model.head):
        change(layer)
    found = tp_amp.inspect(model, x[:1])
    assert [mlp.down for mlp in found.mlps] == [DOWN]
    assert re.search(message, found.kept_layers["blocks.0.mlp.first"])
    with torch.no_grad():
        model(x)  # a weight with a graph can't be copied
    dense = copy.deepcopy(model)
    plan = tp_amp.plan_from_importance(model, x[:1], tp_amp.GramSchmidtImportance(), 0.5)
    tp_amp.apply_plan(model, plan)
    assert relative(model(x), masked(dense, plan.keep)(x)) < 1e-5
    other = toy()
    change(other.blocks[1].mlp.second)
    before = fingerprint(other)
    with pytest.raises(ValueError, match=f"{DOWN} can't be cut: .*{message}"):
        tp_amp.apply_plan(other, plan)
    assert fingerprint(other) == before
    fitted = tp_amp.compensate(dense, plan, [x], every_linear=True, progress=False)
    assert DOWN in fitted
    assert "blocks.1.query" not in fitted


def test_sound_models_pass() -> None:
    for model in (toy(), nn.DataParallel(toy()), torch.fx.symbolic_trace(toy())):
        check_model(model, values=True)
        assert all(remade(module) is None for module in model.modules())


def test_values_that_are_not_finite_are_named() -> None:
    model = toy()
    with torch.no_grad():
        model.head.bias[0] = torch.inf
    check_model(model)
    with pytest.raises(ValueError, match=r"parameter head\.bias holds NaN or infinite values"):
        check_model(model, values=True)


class Experts(nn.Module):
    """Experts as mixtures hold them whose weights are one tensor each."""

    def __init__(self, experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, width, hidden) / 4)
        self.down = nn.Parameter(torch.randn(experts, hidden, width) / 4)
        self.router = nn.Linear(width, experts)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("btc,ech->beth", x, self.up).relu()
        given = torch.einsum("beth,ehc->betc", hidden, self.down)
        return (self.router(x).softmax(-1).transpose(1, 2)[..., None] * given).sum(1)


def test_experts_in_one_tensor_are_told_and_stay_whole() -> None:
    model, x = toy(), images(4)
    model.blocks[0].mlp = Experts(3, 12, 20)
    found = tp_amp.inspect(model, x[:1])
    assert "holds the weights of 3 experts" in found.kept_layers["blocks.0.mlp"]
    assert [mlp.down for mlp in found.mlps] == [DOWN]


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(24, 36), nn.Linear(12, 24)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 12, 8, 9])
def test_what_divides_the_channels_of_any_layer_may_be(count: int) -> None:
    """Which of them are those of the heads, the attention alone knows."""
    model = nn.Sequential(Heads())
    check_heads(model, {model[0]: count})


def test_a_module_without_linears_tells_no_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    check_heads(model, {model[0]: 5})
    check_heads(model, {})
    check_heads(model, None)


@pytest.mark.parametrize("count", [5, 7, 10, True, torch.tensor(2)])
def test_what_divides_none_or_is_no_number_is_refused(count: Any) -> None:
    model = nn.Sequential(Heads())
    with pytest.raises(ValueError, match=r"num_heads\[0\] (is \d+, which divides|must be a pos)"):
        check_heads(model, {model[0]: count})
