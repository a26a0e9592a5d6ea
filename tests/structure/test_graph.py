"""The graph traced without values: the same as with them, in less time, and nothing left behind."""

import copy
import gc
import time
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch_pruning as tp
from torch import Tensor, nn
from toys import ToyViT, images, toy
from zoo import SWIN_HEADS, TINY

import tp_amp
from tp_amp.structure.graph import build_graph

MODELS = {
    "vit": ("vit_tiny_patch16_224", {**TINY, "img_size": 32}, 32),
    "swin": ("swin_tiny_patch4_window7_224", SWIN_HEADS, 64),
}


def all_groups(model: nn.Module, graph: Any) -> list[list[tuple[str, str, list[int], list[int]]]]:
    """Every group that Torch-Pruning lists, as names and indices."""
    names = {
        **{m: n for n, m in model.named_modules()},
        **{p: n for n, p in model.named_parameters()},
    }
    return [
        sorted(
            (names[target.module], item.dep.handler.__name__, item.idxs, item.root_idxs)
            for item in group.items
            if (target := item.dep.target).module in names
        )
        for group in graph.get_all_groups(root_module_types=[nn.Linear, nn.Conv2d])
    ]


@pytest.mark.parametrize("name", MODELS)
def test_groups_are_those_of_a_graph_with_values(name: str) -> None:
    family, arguments, size = MODELS[name]
    model = timm.create_model(family, **arguments)
    inputs = images(1, size=size, channels=3)
    without = build_graph(model, inputs)
    with_values = build_graph(model, inputs, on_meta_device=False)
    assert next(iter(without.calls.values())).input.is_meta
    assert not next(iter(with_values.calls.values())).input.is_meta
    groups = all_groups(model, without.graph)
    assert len(groups) > 4
    assert groups == all_groups(model, with_values.graph)
    parameters = set(map(id, model.parameters()))
    assert {id(p) for p, _ in without.graph.unwrapped_parameters} <= parameters


class ReadsValues(ToyViT):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.sum()) > -1e9 else -x)


def test_a_model_that_reads_values_is_traced_with_them() -> None:
    model = ReadsValues()
    traced = build_graph(model, images(1))
    assert not next(iter(traced.calls.values())).input.is_meta
    assert len(tp_amp.find_mlps(model, images(1))) == 2


def seconds(function: Callable[[], object]) -> float:
    """CPU time of one run, without the collection of what other tests have left."""
    gc.collect()
    gc.disable()
    try:
        start = time.process_time()
        function()
        return time.process_time() - start
    finally:
        gc.enable()


def half(model: nn.Module, inputs: Tensor) -> tp_amp.PruningPlan:
    mlps = tp_amp.find_mlps(model, inputs)
    return tp_amp.PruningPlan({mlp.down: list(range(mlp.width // 2)) for mlp in mlps})


@pytest.mark.timing
@pytest.mark.parametrize("name", ["vit_large_patch16_224", "swin_base_patch4_window7_224"])
def test_finding_and_cutting_takes_a_third_of_constructing_metapruner(name: str) -> None:
    """The two take turns, since a neighbour slows the caches down for a while."""
    model, inputs = timm.create_model(name).eval(), torch.randn(1, 3, 224, 224)
    importance = tp.importance.MagnitudeImportance()
    plan, ratios = half(model, inputs), []
    while len(ratios) < 12 and min(ratios, default=1) >= 1 / 3:
        cut = copy.deepcopy(model)
        ours = seconds(lambda cut=cut: tp_amp.apply_plan(cut, inputs, plan))
        ratios.append(ours / seconds(lambda: tp.pruner.MetaPruner(model, inputs, importance)))
    assert min(ratios) < 1 / 3


@pytest.mark.timing
def test_time_grows_with_depth_no_faster_than_linearly() -> None:
    inputs = torch.randn(1, 3, 224, 224)
    models = {
        depth: timm.create_model("vit_tiny_patch16_224", **{**TINY, "depth": depth})
        for depth in (12, 24, 48, 96)
    }
    best = dict.fromkeys(models, float("inf"))
    for _ in range(6):
        for depth, model in models.items():
            taken = seconds(lambda model=model: tp_amp.find_mlps(model, inputs))
            best[depth] = min(best[depth], taken / depth)
    assert max(best.values()) < 1.2 * best[12]


def test_graph_of_a_toy_has_real_modules() -> None:
    model = toy()
    graph = build_graph(model, images(1)).graph
    assert {m for m in graph.module2node if isinstance(m, nn.Linear)} == {
        m for m in model.modules() if isinstance(m, nn.Linear)
    }
