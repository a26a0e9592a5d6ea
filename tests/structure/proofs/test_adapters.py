"""Low-rank adapters are no MLPs, whatever library makes them; MLPs beside a shortcut are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from toys import PlainMLP, fingerprint, images, put, toy

import tp_amp


class Adapted(nn.Module):
    """A layer with a bypass of low rank, as adapter libraries write it."""

    def __init__(self, base: nn.Linear, rank: int = 3, kind: str = "lora") -> None:
        super().__init__()
        self.base, self.kind = base, kind
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)
        self.magnitude = nn.Parameter(torch.rand(base.out_features) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        made = self.a(x)
        if self.kind == "bottleneck":
            made = torch.relu(made)
        if self.kind == "magnitude":
            norm = (self.base.weight + self.b.weight @ self.a.weight).norm(dim=1).detach()
            scale = self.magnitude / norm
            base = self.base(x) - self.base.bias
            return base * scale + self.b(made) * scale * 0.5 + self.base.bias
        return self.base(x) + self.b(made) * 0.5


KINDS = ("lora", "magnitude", "bottleneck")


def adapted(*names: str, kind: str = "lora", rank: int = 3) -> nn.Module:
    torch.manual_seed(0)
    model = toy()
    for name in names:
        base: nn.Linear = model.get_submodule(name)  # type: ignore[assignment]
        put(model, name, Adapted(base, rank, kind))
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["first", "second"])
def test_an_adapted_mlp_is_refused_and_nothing_changed(kind: str, part: str) -> None:
    model = adapted(f"blocks.1.mlp.{part}", kind=kind)
    before = fingerprint(model)
    message = (
        rf"adapters .* on layers of MLPs: \['blocks\.1\.mlp\.{part}\.base'\].*merge_and_unload"
    )
    with pytest.raises(ValueError, match=message):
        tp_amp.find_mlps(model, images(1))
    with pytest.raises(ValueError, match=message):
        tp_amp.plan_from_importance(model, images(1), tp_amp.GramSchmidtImportance(), 0.5)
    assert fingerprint(model) == before


@pytest.mark.parametrize("rank", [1, 3, 40])
def test_adapters_of_attentions_leave_the_mlps_prunable(rank: int) -> None:
    """Their ranks are never cut, and the cut model is the dense one with neurons masked."""
    names = ("blocks.0.query", "blocks.0.value", "blocks.1.project")
    model = adapted(*names, rank=rank)
    found = tp_amp.find_mlps(model, images(1))
    assert [mlp.down for mlp in found] == ["blocks.0.mlp.second", "blocks.1.mlp.second"]
    keep = {mlp.down: list(range(0, 20, 2)) for mlp in found}
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for down in keep:
            reference.get_submodule(down).weight[:, 1::2] = 0  # type: ignore[index]
        tp_amp.apply_plan(model, images(1), tp_amp.PruningPlan(keep))
        torch.testing.assert_close(model(images(4)), reference(images(4)))
    shapes = {name: p.shape for name, p in reference.named_parameters() if "mlp" not in name}
    assert shapes == {name: p.shape for name, p in model.named_parameters() if "mlp" not in name}


def test_inspection_names_the_adapted_layer() -> None:
    found = tp_amp.inspect(adapted("blocks.0.query"), images(1))
    assert found.kept_layers["blocks.0.query.a"] == (
        "it is part of a low-rank adapter of blocks.0.query.base"
    )


class Shortcut(nn.Module):
    """The residual block of dense networks: an MLP beside a Linear of its sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.shortcut = PlainMLP(4, 16), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) + self.shortcut(x)


def test_an_mlp_beside_a_linear_shortcut_is_one() -> None:
    [mlp] = tp_amp.find_mlps(Shortcut(), torch.randn(2, 4))
    assert mlp.down == "mlp.second"


class BottleneckAdapter(nn.Module):
    """As AdapterHub writes it: down, an activation, up, with a shortcut."""

    def __init__(self, width: int, narrow: int) -> None:
        super().__init__()
        self.adapter_down = nn.Sequential(nn.Linear(width, narrow), nn.ReLU())
        self.adapter_up = nn.Linear(narrow, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.adapter_up(self.adapter_down(x))


class AdapterLayer(nn.Sequential):
    """All in a row."""


class Beside(nn.Module):
    """An MLP and an adapter in a row, on the same tokens."""

    def __init__(self, mlp: nn.Module, narrow: int) -> None:
        super().__init__()
        self.mlp = mlp
        self.adapter = AdapterLayer()
        self.adapter.inner = nn.Sequential(nn.Linear(12, narrow), nn.GELU(), nn.Linear(narrow, 12))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) + self.adapter(x)


def bottlenecked(narrow: int = 4) -> nn.Module:
    """One behind the MLP of the first block, one beside that of the second."""
    torch.manual_seed(0)
    model = toy()
    first, second = model.blocks
    first.mlp = nn.Sequential(first.mlp, BottleneckAdapter(12, narrow))
    second.mlp = Beside(second.mlp, narrow)
    return model


ADAPTERS = ["blocks.0.mlp.1.adapter_up", "blocks.1.mlp.adapter.inner.2"]


def cut_by_target(model: nn.Module, **layers: object) -> tp_amp.PruningPlan:
    importance = tp_amp.ReconstructionImportance(objective=None, data=[images(4)])
    return tp_amp.plan_for_target(model, images(1), importance, {"params": 0.95}, **layers)  # type: ignore[arg-type]


def test_bottleneck_adapters_are_cut_where_they_are_named_alone() -> None:
    model = bottlenecked()
    mlps = ["blocks.0.mlp.0.second", "blocks.1.mlp.mlp.second"]
    assert [mlp.down for mlp in tp_amp.find_mlps(model, images(1))] == mlps
    found = tp_amp.inspect(model, images(1))
    assert [mlp.down for mlp in found.mlps] == mlps
    told = (
        "it is of an adapter (AdapterLayer), 4 channels wide, which is small as it is; "
        "only_layers=['blocks.1.mlp.adapter'] cuts it"
    )
    assert (
        found.kept_layers[ADAPTERS[1]] == found.kept_layers["blocks.1.mlp.adapter.inner.0"] == told
    )
    assert "blocks.0.mlp.1.adapter_down.0" in found.kept_layers
    assert list(cut_by_target(model).keep) == mlps
    assert list(cut_by_target(model, only_layers=["blocks.1"]).keep) == mlps[1:]
    both = cut_by_target(model, only_layers=["blocks.*.mlp.mlp", "blocks.1.mlp.adapter"])
    assert list(both.keep) == [mlps[1], ADAPTERS[1]]
    pruner = tp_amp.AdaptiveMLPPruner(
        model, images(1), tp_amp.DIMAPImportance(), [images(2)], only_layers=["blocks.0.mlp.*"]
    )
    assert [mlp.down for mlp in pruner.mlps] == [mlps[0], ADAPTERS[0]]


def test_a_plan_may_name_an_adapter() -> None:
    model = bottlenecked()
    reference = copy.deepcopy(model)
    keep = {name: [0, 2] for name in ADAPTERS}
    tp_amp.apply_plan(model, images(1), tp_amp.PruningPlan(keep))
    with torch.no_grad():
        for name in keep:
            reference.get_submodule(name).weight[:, 1::2] = 0  # type: ignore[index]
        torch.testing.assert_close(model(images(4)), reference(images(4)))
    assert [model.get_submodule(name).in_features for name in ADAPTERS] == [2, 2]


def test_narrow_mlps_are_no_adapters() -> None:
    """Pruned to a fifth, whatever is around them; and what is called an adapter and is wide."""
    model = toy()
    keep = {mlp.down: list(range(4)) for mlp in tp_amp.find_mlps(model, images(1))}
    tp_amp.apply_plan(model, images(1), tp_amp.PruningPlan(keep))
    found = tp_amp.find_mlps(model, images(1))
    assert [mlp.width for mlp in found] == [4, 4]
    assert len(cut_by_target(model).keep) == 2
    assert len(tp_amp.find_mlps(bottlenecked(12), images(1))) == 4


class Merging(nn.Linear):
    """Keeps its adapter as parameters of its own, as the first library of that kind did."""

    def __init__(self, wide: int, narrow: int) -> None:
        super().__init__(wide, narrow)
        self.lora_a = nn.Parameter(torch.randn(2, wide))
        self.lora_b = nn.Parameter(torch.randn(narrow, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.lora_a.T @ self.lora_b.T


@pytest.mark.parametrize("place", [0, 2])
def test_layers_with_an_adapter_inside_are_left_whole_with_the_reason(place: int) -> None:
    layers = [nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)]
    layers[place] = Merging(layers[place].in_features, layers[place].out_features)  # type: ignore[arg-type]
    found = tp_amp.inspect(nn.Sequential(*layers), torch.randn(2, 4))
    assert found.mlps == []
    assert "['lora_a', 'lora_b'] beside its weight; merge them first" in found.kept_layers["0"]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", [["fc1", "fc2"], "all-linear"])
def test_peft(targets: list[str] | str, dora: bool) -> None:
    peft = pytest.importorskip("peft")
    import timm

    sizes = {"img_size": 32, "embed_dim": 32, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", depth=1, **sizes)
    config = peft.LoraConfig(target_modules=targets, r=4, use_dora=dora, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    pictures = torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match="merge_and_unload"):
        tp_amp.find_mlps(wrapped, pictures)
    assert len(tp_amp.find_mlps(wrapped.merge_and_unload(), pictures)) == 1


@pytest.mark.parametrize("kind", ["LoHaConfig", "IA3Config", "OFTConfig"])
def test_adapters_that_are_no_layers_are_told(kind: str) -> None:
    peft = pytest.importorskip("peft")
    import timm

    sizes = {"img_size": 32, "embed_dim": 32, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", depth=1, **sizes)
    options = {"feedforward_modules": ["fc2"]} if kind == "IA3Config" else {}
    config = getattr(peft, kind)(target_modules=["fc1", "fc2"], **options)
    wrapped = peft.get_peft_model(model, config)
    pictures = torch.randn(1, 3, 32, 32)
    found = tp_amp.inspect(wrapped, pictures)
    assert not found.mlps
    [reason] = [why for name, why in found.kept_layers.items() if "mlp.fc1" in name]
    assert "it has adapters (" in reason
    assert "merge_and_unload()" in reason
    assert len(tp_amp.find_mlps(wrapped.merge_and_unload(), pictures)) == 1


class Held(nn.Module):
    """As PEFT holds a layer whose adapter is merged in place, or switched off."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.hada_a = nn.Parameter(torch.zeros(layer.out_features, 2))

    def merge(self) -> None:
        """Nothing is left to add."""

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x)


@pytest.mark.parametrize("part", ["first", "second"])
def test_an_adapter_that_is_merged_in_place_is_as_large_as_the_layer(part: str) -> None:
    model = toy()
    put(model, f"blocks.1.mlp.{part}", Held(model.get_submodule(f"blocks.1.mlp.{part}")))
    found = tp_amp.inspect(model, images(1))
    assert [mlp.down for mlp in found.mlps] == ["blocks.0.mlp.second"]
    reason = found.kept_layers[f"blocks.1.mlp.{part}.base_layer"]
    assert reason == "it has adapters (Held); merge them first (PEFT: merge_and_unload())"
