"""What a channel's weights are, and how a group's root channels own them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tp_amp.structure.groups import GroupLayer, channel_weights, root_weights


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
