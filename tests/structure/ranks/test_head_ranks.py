"""Which channels of which layers one channel of each head is, against tables made by hand."""

from __future__ import annotations

import copy

import pytest
import torch
import torch_pruning as tp
from torch import nn

from tp_amp.plan.cutting import check_fits, cut_all
from tp_amp.structure.attention.rank_linear import RankLinear
from tp_amp.structure.groups import group_layers
from tp_amp.structure.ranks.head_ranks import HeadRanks, mix, rank_group

HEADS, WIDTH = 2, 3


class Holder(nn.Module):
    """q, k and v from one, two or three Linears, without an attention around them."""

    def __init__(self, linears: int) -> None:
        super().__init__()
        channels = HEADS * WIDTH
        names = {1: ("qkv",), 2: ("q", "kv"), 3: ("q", "k", "v")}[linears]
        self.made = tuple(f"made.{name}" for name in names)
        self.made_sizes = [channels * len(name) for name in names]
        sizes = zip(names, self.made_sizes, strict=True)
        self.made_ = nn.ModuleDict({name: nn.Linear(4, size) for name, size in sizes})
        self.proj = nn.Linear(channels, 4)

    def site(self, pair: str) -> HeadRanks:
        made = tuple(name.replace("made.", "made_.") for name in self.made)
        return HeadRanks(pair, "", made, "proj", HEADS, WIDTH)  # type: ignore[arg-type]


def graph_of(model: nn.Module) -> tp.DependencyGraph:
    graph = tp.DependencyGraph()
    graph.model, graph.module2node = model, {}
    graph._module2name = {module: name for name, module in model.named_modules()}
    return graph


@pytest.mark.parametrize("linears", [1, 2, 3])
@pytest.mark.parametrize("order", [("qk", "vo"), ("vo", "qk")])
def test_what_is_left_stands_where_it_stood(linears: int, order: tuple[str, str]) -> None:
    """Weights that say part, head and channel; cut in either order, and padded with zeros."""
    model = Holder(linears)
    table = torch.tensor(
        [[100 * p + 10 * h + c for h in range(HEADS) for c in range(WIDTH)] for p in range(3)]
    ).float()
    sizes = [len(name.rpartition(".")[2]) for name in model.made]
    with torch.no_grad():
        for linear, rows in zip(model.made_.values(), table.split(sizes), strict=True):
            linear.weight.copy_(rows.flatten()[:, None].expand(-1, 4))
            linear.bias.copy_(rows.flatten())
    keep = {"qk": [0, 1], "vo": [0]}
    sites = {pair: model.site(pair) for pair in order}
    cut_all(graph_of(model), sites, {pair: keep[pair] for pair in order})
    parts: list[torch.Tensor] = []
    for linear in model.made_.values():
        assert isinstance(linear, RankLinear)
        output = linear(torch.zeros(4))  # its bias, as wide as before
        parts += output.view(-1, HEADS, WIDTH).unbind(0)
    for rows, part, pair in zip(table, parts, ("qk", "qk", "vo"), strict=True):
        expected = rows.view(HEADS, WIDTH).clone()
        expected[:, len(keep[pair]) :] = 0
        assert torch.equal(part, expected)
    assert model.proj.weight.shape == (4, HEADS)
    with pytest.raises(ValueError, match="build the same dense model"):
        check_fits(model, sites["qk"])
    with pytest.raises(ValueError, match="build the same dense model"):
        check_fits(model, sites["vo"])


@pytest.mark.parametrize("linears", [1, 2, 3])
def test_the_projection_reads_the_first_channels_of_each_head(linears: int) -> None:
    model = Holder(linears)
    dense, site = copy.deepcopy(model), model.site("vo")
    cut_all(graph_of(model), {"vo": site}, {"vo": [0, 1]})
    x = torch.randn(5, HEADS * WIDTH)
    mask = torch.tensor([1.0, 1.0, 0.0]).repeat(HEADS)
    assert torch.allclose(model.proj(x), dense.proj(x * mask), atol=1e-6)


def test_a_group_names_layers_and_channels() -> None:
    model = Holder(1)
    group = rank_group(graph_of(model), model.site("qk"), [2])
    [part] = group_layers(group)
    assert (part.name, part.side, sorted(part.indices)) == ("made_.qkv", "out", [2, 5, 8, 11])
    group = rank_group(graph_of(model), model.site("vo"), [0, 2])
    parts = {part.name: (part.side, sorted(part.indices)) for part in group_layers(group)}
    assert parts == {"proj": ("in", [0, 2, 3, 5]), "made_.qkv": ("out", [12, 14, 15, 17])}


@pytest.mark.parametrize("linears", [1, 2, 3])
def test_mixing_multiplies_each_head(linears: int) -> None:
    model = Holder(linears)
    dense = copy.deepcopy(model)
    first, second = torch.randn(2, HEADS, WIDTH, WIDTH).double()
    mix(model, model.site("qk"), first, second)
    mix(model, model.site("vo"), first, second)
    x = torch.randn(4)
    given = [torch.cat([layer(x) for layer in m.made_.values()]) for m in (dense, model)]
    before, after = (values.view(3, HEADS, WIDTH) for values in given)
    for part, factor in enumerate((first, second, first)):
        for head in range(HEADS):
            expected = factor[head].float() @ before[part, head]
            assert torch.allclose(after[part, head], expected, atol=1e-5)
    for head in range(HEADS):
        columns = slice(head * WIDTH, (head + 1) * WIDTH)
        expected = dense.proj.weight[:, columns] @ second[head].float()
        assert torch.allclose(model.proj.weight[:, columns], expected, atol=1e-5)
