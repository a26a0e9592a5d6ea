"""Graphs of models that Torch-Pruning knows in part, and modules of one entry a channel."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch_pruning as tp
from timm.layers import RmsNorm
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor
from toys import PlainMLP, images, toy

import tp_amp
from tp_amp.running.watching import all_tensors
from tp_amp.structure.tolerant_graph import (
    PerChannelPruner,
    TolerantGraph,
    channels_of,
    per_channel_pruners,
    untraced_graph,
)


def test_a_channel_dropped_is_an_entry_dropped_of_each_parameter() -> None:
    torch.manual_seed(0)
    for module in (RmsNorm(6), GlobalResponseNorm(6), nn.PReLU(6)):
        for parameter in module.parameters():
            nn.init.normal_(parameter)
        before = {name: value.clone() for name, value in module.state_dict().items()}
        PerChannelPruner().prune_out_channels(module, [1, 4])
        for name, value in module.state_dict().items():
            assert torch.equal(value.flatten(), before[name].flatten()[[0, 2, 3, 5]])
        assert channels_of(module) == 4
    x = torch.randn(2, 4)
    norm: Any = RmsNorm(6)
    PerChannelPruner().prune_out_channels(norm, [0, 5])
    assert torch.allclose(norm(x), x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt())


def test_only_modules_with_as_many_entries_of_each_have_channels() -> None:
    batch_norm = nn.BatchNorm1d(6)  # with buffers
    for module in (nn.Linear(6, 6), nn.Sequential(RmsNorm(6)), batch_norm, nn.GELU()):
        assert channels_of(module) == 0
    model = nn.Sequential(RmsNorm(6), nn.PReLU(), nn.Linear(6, 6))
    assert list(per_channel_pruners(model)) == [RmsNorm]


def test_a_graph_without_a_pass_cuts_a_layer_as_a_traced_one_does() -> None:
    model = toy()
    other = copy.deepcopy(model)
    traced = tp.DependencyGraph().build_dependency(other, images(1))
    for graph, cut in ((untraced_graph(model), model), (traced, other)):
        layer = cut.get_submodule("blocks.0.mlp.second")
        graph.get_pruner_of_module(layer).prune_in_channels(layer, [0, 3])
    weights = (m.get_submodule("blocks.0.mlp.second").weight for m in (model, other))
    assert torch.equal(*weights)


def test_what_fails_before_there_is_any_layer_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while indices are mapped leaves layers and couplings, an earlier one nothing."""

    def fail(*_: Any, **__: Any) -> None:
        raise IndexError("mapping")

    monkeypatch.setattr("torch_pruning.dependency.index_mapping.update_index_mapping", fail)
    with pytest.raises(IndexError, match="mapping"):
        tp.DependencyGraph().build_dependency(toy(), images(1), verbose=False)
    graph = TolerantGraph()
    graph.build_dependency(toy(), images(1), verbose=False)
    assert any(isinstance(node.module, nn.Linear) for node in graph.module2node.values())
    monkeypatch.setattr(tp.DependencyGraph, "build_dependency", fail)
    with pytest.raises(IndexError, match="mapping"):
        TolerantGraph().build_dependency(toy(), images(1))


class Scale(nn.Module):
    """One factor for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors


class ScaledMLP(Scale):
    """An MLP that is a scale by its class, as some blocks are."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.first, self.second = nn.Linear(width, 20), nn.Linear(20, width)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.second(self.first(x).relu()))


class Holder(nn.Module):
    """A parameter under a name, which is never called."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.linspace(0.5, 1.5, width))


class HeldScale(nn.Module):
    """Reads the parameter of a module that holds nothing else."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.held, self.plain = Holder(width), nn.Module()
        self.plain.register_parameter("bias", nn.Parameter(torch.ones(width)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.held.factors + self.plain.bias


def check_cut_as_masked(model: nn.Module, inputs: Tensor, count: int) -> None:
    """Cut every other neuron of each MLP; the model must give what it gives with these zeroed."""
    model.eval()
    mlps = tp_amp.find_mlps(model, inputs)
    assert len(mlps) == count
    keep = {mlp.down: list(range(0, mlp.width, 2)) for mlp in mlps}
    dense, cut = copy.deepcopy(model), copy.deepcopy(model)
    tp_amp.apply_plan(cut, inputs, tp_amp.PruningPlan(keep))
    for mlp in mlps:
        down = dense.get_submodule(mlp.down)
        kept = torch.arange(mlp.width) % 2 == 0
        kept = kept.view(-1, 1, 1) if isinstance(down, nn.Conv2d) else kept
        down.register_forward_pre_hook(lambda _m, args, kept=kept: args[0] * kept)
    with torch.no_grad():
        for one, other in zip(all_tensors(cut(inputs)), all_tensors(dense(inputs)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_block_that_inherits_from_a_scale_is_looked_into() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(ScaledMLP(8))
    check_cut_as_masked(nn.Sequential(Scale(8), block, nn.Linear(8, 3)), torch.randn(2, 4, 8), 1)
    assert list(per_channel_pruners(nn.Sequential(Scale(8), block))) == [Scale]


def test_modules_that_only_hold_parameters_are_no_layers() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(HeldScale(8), PlainMLP(8, 20), HeldScale(8))
    assert not per_channel_pruners(block)
    check_cut_as_masked(nn.Sequential(block, nn.Linear(8, 3)), torch.randn(2, 4, 8), 1)


def small_vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "embed_dim": 24, "num_heads": 3, "depth": 3, "init_values": 0.5}
    return timm.create_model("vit_tiny_patch16_224", **sizes, **options).eval()


@pytest.mark.parametrize("kind", ["torchvision", "symbolic", "timm"])
def test_vits_as_fx_graphs_are_pruned_as_they_are(kind: str) -> None:
    """Their parameters lie in modules of no class but `nn.Module`."""
    fx = {"features_only": True, "feature_cls": "fx", "out_indices": (0, 2)}
    make = {
        "torchvision": lambda: create_feature_extractor(
            small_vit(), ["blocks.0.add_1", "blocks.2.add_1"]
        ),
        "symbolic": lambda: torch.fx.symbolic_trace(small_vit()),
        "timm": lambda: small_vit(**fx),
    }
    check_cut_as_masked(make[kind](), images(2, size=32, channels=3), 3)


def test_a_convnext_as_an_fx_graph_is_pruned_as_it_is() -> None:
    torch.manual_seed(0)
    sizes = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
    model = timm.create_model("convnext_atto", features_only=True, feature_cls="fx", **sizes)
    check_cut_as_masked(model, torch.randn(1, 3, 64, 64), 4)


@dataclass
class Given:
    """What a model gives."""

    features: Tensor
    parts: list[Any]


class GivesObjects(nn.Module):
    """A toy whose output is a dataclass with an object in it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = toy()

    def forward(self, x: Tensor) -> Given:
        y = self.body(x)
        return Given(y, [SimpleNamespace(doubled=2 * y)])


def test_outputs_in_objects_are_traced() -> None:
    check_cut_as_masked(GivesObjects(), images(2), 2)
