"""Which entries of which parameters some channels of a stream are, by indexing by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from test_turning import STREAM, WIDTH, Toy, toy
from torch import nn

from tp_amp.structure.streams.stream_cuts import around, held, leading, stream_group
from tp_amp.structure.tolerant_graph import untraced_graph


@pytest.mark.parametrize("dropped", [[4, 5], [0, 3]])
def test_every_entry_of_a_channel_goes(dropped: list[int]) -> None:
    model, _, _ = toy()
    for norm in (model.norm, model.other):
        nn.init.ones_(norm.weight)
    dense = copy.deepcopy(model)
    stream_group(untraced_graph(model), STREAM, dropped).prune(record_history=False)
    kept = [c for c in range(WIDTH) if c not in dropped]
    pairs = [*kept, *(WIDTH + c for c in kept)]
    scale = (WIDTH / len(kept)) ** 0.5
    expected = {
        "embed.weight": dense.embed.weight[kept],
        "embed.bias": dense.embed.bias[kept],
        "table.weight": dense.table.weight[:, kept],
        "gamma": dense.gamma[kept],
        "tau": dense.tau[kept],
        "norm.weight": torch.full((len(kept),), scale).double(),
        "norm.bias": dense.norm.bias[kept],
        "other.weight": torch.full((2 * len(kept),), scale).double(),
        "other.bias": dense.other.bias[pairs],
        "linear.weight": dense.linear.weight[:, kept],
        "plain.weight": dense.plain.weight[:, kept],
        "pair.weight": dense.pair.weight[:, pairs],
        "wide.weight": dense.wide.weight[:, pairs],
        "conv.weight": dense.conv.weight[:, kept],
        "raw.weight": dense.raw.weight[:, kept],
    }
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, expected.get(name, dense.get_parameter(name)))
    assert (model.embed.out_features, model.pair.in_features) == (4, 8)
    assert (model.conv.in_channels, model.table.embedding_dim) == (4, 4)
    assert (model.norm.normalized_shape, model.other.normalized_shape) == ((4,), (8,))
    assert [output.shape for output in model(torch.randn(3, 4, 5).double())] == [
        output.shape for output in dense(torch.randn(3, 4, 5).double())
    ]


def test_what_is_held_and_around() -> None:
    parts = held(STREAM)
    assert parts["embed"] == [("weight", 0), ("bias", 0)]
    assert parts[""] == [("gamma", -1), ("tau", -1)]
    assert parts["norm"] == [("weight", -1), ("bias", -1)]
    assert around(STREAM) == [""]  # the norms lie in the model itself


def test_modules_around_say_the_width_that_is_left() -> None:
    class Named(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.embed_dim, self.num_heads, self.hidden_dim = WIDTH, WIDTH, 2 * WIDTH

    model = Named()
    stream_group(untraced_graph(model), STREAM, [5]).prune(record_history=False)
    assert (model.embed_dim, model.num_heads, model.hidden_dim) == (5, 6, 12)


def test_leading_channels_of_places_side_by_side() -> None:
    values = torch.tensor([1.0, 3.0, 9.0, 2.0, 6.0, 9.0])
    expected = torch.tensor([-2.0, 0.0, 0.0, -1.0, 3.0, 0.0])
    assert torch.equal(leading(values, 3, 2, centred=True), expected)
    plain = torch.tensor([1.0, 3.0, 0.0, 2.0, 6.0, 0.0])
    assert torch.equal(leading(values, 3, 2, centred=False), plain)
