"""Graphs of models that Torch-Pruning knows in part, and modules of one entry a channel."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch_pruning as tp
from timm.layers import RmsNorm
from timm.layers.grn import GlobalResponseNorm
from torch import nn
from toys import images, toy

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
