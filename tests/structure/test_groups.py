"""What a channel's weights are, and how a group's root channels own them."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch_pruning as tp
from torch import nn
from toys import images, toy

import tp_amp
from tp_amp.structure.groups import GroupLayer, channel_weights, group_layers, root_weights


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_channel_weights_are_those_a_channel_depends_on(kind: Any, groups: int) -> None:
    """A channel's weights are those that have a gradient when it alone is read or fed."""
    layer = kind(4, 6, 3, groups=groups, bias=False)
    for side, channels in (("in", 4), ("out", 6)):
        rows = channel_weights(GroupLayer("layer", layer, side, [], []))  # type: ignore[arg-type]
        for channel in range(channels):
            layer.zero_grad()
            inputs = torch.rand(1, 4, 8, 8)
            if side == "in":
                inputs[:, [i for i in range(4) if i != channel]] = 0
            output = layer(inputs)
            (output if side == "in" else output[:, channel]).sum().backward()
            touched = layer.weight.detach()[layer.weight.grad != 0]
            assert torch.equal(rows[channel].sort().values, touched.sort().values)


def test_root_weights_pad_channels_that_own_fewer() -> None:
    linear = nn.Linear(2, 4, bias=False)
    layer = GroupLayer("layer", linear, "out", [3, 0, 2], [1, 0, 1])
    weight = linear.weight.detach()
    expected = torch.stack(
        [torch.cat([weight[0], torch.zeros(2)]), torch.cat([weight[3], weight[2]]), torch.zeros(4)]
    )
    assert torch.equal(root_weights(layer, 3), expected)


def group_of(graph: Any, layer: nn.Linear) -> Any:
    channels = list(range(layer.out_features))
    return graph.get_pruning_group(layer, tp.prune_linear_out_channels, channels)


def test_a_group_of_before_a_cut_is_refused() -> None:
    model = toy()
    graph = tp.DependencyGraph().build_dependency(model, images(1), verbose=False)
    first: Any = model.get_submodule("blocks.0.mlp.first")
    group = group_of(graph, first)
    graph.get_pruning_group(first, tp.prune_linear_out_channels, [0, 5]).prune()
    with pytest.raises(ValueError, match=r"channel 19 of blocks.0.mlp.first, which has 18; it was"):
        list(group_layers(group))
    assert [layer.name for layer in group_layers(group_of(graph, first))] == [
        "blocks.0.mlp.first",
        "blocks.0.mlp.second",
    ]


def packed() -> nn.Module:
    """MLPs whose gates are packed in one layer, whose halves Torch-Pruning does not map."""
    torch.manual_seed(0)
    sizes = {"img_size": 28, "embed_dim": 48, "num_heads": 3, "depth": 2}
    return timm.create_model("eva02_tiny_patch14_224", **sizes).eval()


@pytest.mark.parametrize("cut_before", [False, True])
def test_channels_that_torch_pruning_maps_wrongly_are_told(cut_before: bool) -> None:
    model, inputs = packed(), images(1, size=28, channels=3)
    if cut_before:  # of the other block, by this package
        tp_amp.apply_plan(model, inputs, tp_amp.PruningPlan({"blocks.0.mlp.fc2": list(range(50))}))
    mlps = tp_amp.find_mlps(model, inputs)
    ups = [model.get_submodule(mlp.up[0]) for mlp in mlps]
    layers = (m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    pruner = tp.pruner.MetaPruner(
        model,
        inputs,
        tp_amp.GramSchmidtImportance(),
        ignored_layers=[layer for layer in layers if layer not in ups],
    )
    with pytest.raises(
        ValueError,
        match=r"group of blocks.1.mlp.fc1 has channel 255 of blocks.1.mlp.fc2, which has 128: "
        r"Torch-Pruning maps .*AdaptiveMLPPruner.* blocks.1.mlp.fc1 into ignored_layers",
    ):
        pruner.step()
