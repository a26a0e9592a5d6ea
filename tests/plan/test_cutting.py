from functools import partial

import pytest
import torch
import torch_pruning as tp
from torch import nn
from toys import fingerprint, images, masked, relative, toy

from tp_amp.plan.cutting import narrowed
from tp_amp.structure.graph import build_graph
from tp_amp.structure.mlp_cuts import MLP, mlp_group
from tp_amp.structure.mlps import read_mlps
from tp_amp.structure.tolerant_graph import TolerantGraph


def traced(model: nn.Module) -> list[tuple[object, MLP]]:
    # Torch-Pruning's own couplings too, which ours do without.
    build = partial(TolerantGraph().build_dependency, model, verbose=False)
    built = build_graph(model, images(1), build)
    return [(built.graph, mlp) for mlp in read_mlps(model, built)]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("channels", [list(range(20)), [0, 7, 19]])
def test_group_holds_the_same_layers_and_indices_as_torch_prunings(
    gated: bool, channels: list[int]
) -> None:
    model = toy(gated=gated)
    for graph, mlp in traced(model):
        up = model.get_submodule(mlp.up[0])
        theirs = graph.get_pruning_group(up, tp.prune_linear_out_channels, channels)
        ours = mlp_group(graph, mlp, channels)
        layers = {
            (item.dep.target.module, item.dep.handler): (item.idxs, item.root_idxs)
            for item in theirs.items
            if isinstance(item.dep.target.module, nn.Linear)
        }
        assert layers == {
            (item.dep.target.module, item.dep.handler): (item.idxs, item.root_idxs)
            for item in ours.items
        }
        assert ours[0].dep.target is theirs[0].dep.target


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_narrowed_equals_masked_dense_and_gives_the_parameters_back(
    gated: bool, bias: bool
) -> None:
    model = toy(gated=gated, bias=bias)
    graph, mlp = traced(model)[1]
    keep = [2, 3, 11]
    expected = masked(model, {mlp.down: keep})(images())
    before = fingerprint(model)
    with narrowed(graph, {mlp: keep}):
        assert relative(model(images()), expected) < 1e-5
        assert model.get_submodule(mlp.down).in_features == 3
        assert all(model.get_submodule(up).out_features == 3 for up in mlp.up)
    assert fingerprint(model) == before


def test_narrowed_gives_back_after_an_error() -> None:
    model = toy()
    graph, mlp = traced(model)[0]
    before = fingerprint(model)

    def fails() -> None:
        with narrowed(graph, {mlp: [0]}):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert fingerprint(model) == before


def test_optimizer_state_survives_a_probe() -> None:
    model = toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    graph, mlp = traced(model)[0]
    with narrowed(graph, {mlp: [0]}):
        pass
    assert optimizer.param_groups[0]["params"][0] is next(model.parameters())
