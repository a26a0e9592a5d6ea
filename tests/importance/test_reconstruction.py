import copy
import logging
from typing import Any

import pytest
import torch
import torch_pruning as tp
from greedy_orders import naive_order
from sensitivities import output_sensitivity
from torch import Tensor, nn
from toys import ToyViT, fingerprint, images, masked, relative, toy

import tp_amp
from tp_amp.importance.hidden_moments import hidden_moments
from tp_amp.importance.objectives import Objective

DOWN = "blocks.0.mlp.second", "blocks.1.mlp.second"


def activations(model: nn.Module, name: str, batch: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _m, args: seen.append(args[0].flatten(0, -2).double())
    )
    with torch.no_grad():
        model(batch)
    handle.remove()
    return seen[0]


def expected_order(model: nn.Module, name: str, batch: Tensor) -> list[int]:
    values = activations(model, name, batch)
    weight = model.get_submodule(name).weight.detach().double()
    return naive_order(torch.cov(values.T, correction=0), weight, values.shape[1] - 1)


def test_plan_keeps_the_first_picks() -> None:
    model, batch = toy(hidden=14), images(30)
    importance = tp_amp.ReconstructionImportance(None).collect(
        model, batch.split(7), progress=False
    )
    plan = tp_amp.plan_from_importance(model, images(1), importance, 0.5)
    for name in DOWN:
        assert plan.keep[name] == sorted(expected_order(model, name, batch)[:7])
        assert len(importance.errors[name]) == 15


def test_collect_leaves_the_model_as_it_was() -> None:
    model = toy().train()
    model.head.weight.requires_grad_(False)
    before = fingerprint(model)
    tp_amp.ReconstructionImportance(None).collect(model, [images()], progress=False)
    assert fingerprint(model) == before


def meta_pruner(model: ToyViT, importance: object) -> tp.pruner.MetaPruner:
    blocks = [layer for b in model.blocks for layer in (b.query, b.key, b.value, b.project)]
    return tp.pruner.MetaPruner(
        model,
        (images(1),),
        importance,
        pruning_ratio=0.5,
        ignored_layers=[model.embed, model.head, *blocks],
    )


def test_meta_pruner_keeps_the_first_picks() -> None:
    model, batch = toy(hidden=14), images(30)
    keep = {name: sorted(expected_order(model, name, batch)[:7]) for name in DOWN}
    dense = copy.deepcopy(model)
    meta_pruner(model, tp_amp.ReconstructionImportance(None, data=[batch])).step()
    with torch.no_grad():
        assert relative(model(batch), masked(dense, keep)(batch)) < 1e-5


def test_data_is_collected_again_when_a_weight_has_changed() -> None:
    model, batch = toy(hidden=14), images(30)
    importance = tp_amp.ReconstructionImportance(None, data=[batch])
    for _ in range(2):
        plan = tp_amp.plan_from_importance(model, images(1), importance, 0.5)
        assert plan.keep[DOWN[0]] == sorted(expected_order(model, DOWN[0], batch)[:7])
        first = plan.keep[DOWN[0]]
        with torch.no_grad():
            model.blocks[0].mlp.second.weight.mul_(torch.linspace(0, 30, 14).roll(5))
    assert plan.keep[DOWN[0]] == first
    again = tp_amp.plan_from_importance(model, images(1), importance, 0.5).keep[DOWN[0]]
    assert again == sorted(expected_order(model, DOWN[0], batch)[:7]) != first


def test_other_projections_are_collected_when_asked_about() -> None:
    model = toy(hidden=8)  # fewer than twelve, so no layer has more inputs than outputs
    importance = tp_amp.ReconstructionImportance(None, data=[images(30)])
    plan = tp_amp.plan_from_importance(model, images(1), importance, 0.5)
    assert plan.keep[DOWN[1]] == sorted(expected_order(model, DOWN[1], images(30))[:4])


def test_one_by_one_convolution_is_ordered_as_the_same_linear() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 7, 3), nn.ReLU(), nn.Conv2d(7, 3, 1))
    importance = tp_amp.ReconstructionImportance(None)
    importance.collect(model, [images(30)], layers=["2"], progress=False)
    values = model[:2](images(30)).detach().double().movedim(1, -1).flatten(0, -2)
    covariance = torch.cov(values.T, correction=0)
    weight = model[2].weight.detach().double().flatten(1)
    assert importance.orders["2"][:6].tolist() == naive_order(covariance, weight, 6)


@pytest.mark.parametrize("name", ["blocks.7", "blocks.0.norm1", "embed"])
def test_layer_that_is_no_projection_raises(name: str) -> None:
    model = toy()
    with pytest.raises(ValueError, match=name):
        tp_amp.ReconstructionImportance(None).collect(model, [images()], layers=[name])


@pytest.mark.parametrize("objective", [None, "auto"])
def test_layer_that_is_not_called_raises(objective: Any) -> None:
    model = toy()
    model.unused = nn.Linear(9, 3)
    importance = tp_amp.ReconstructionImportance(objective)
    with pytest.raises(ValueError, match=r"unused.* not called on"):
        importance.collect(model, [images()], layers=["unused", DOWN[0]])


def test_nan_images_raise() -> None:
    bad = images()
    bad[3, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.second are not finite.*NaN"):
        tp_amp.ReconstructionImportance(None).collect(toy(), [images(), bad], layers=[DOWN[1]])


def test_pruned_layer_raises_without_data() -> None:
    model = toy()
    importance = tp_amp.ReconstructionImportance(None).collect(model, [images()], progress=False)
    tp_amp.apply_plan(model, images(1), tp_amp.PruningPlan({DOWN[0]: list(range(10))}))
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.second has 10 input .* 20 scores"):
        tp_amp.plan_from_importance(model, images(1), importance, 0.5)


def test_group_without_collected_layer_gives_none(caplog: pytest.LogCaptureFixture) -> None:
    model = toy()
    importance = tp_amp.ReconstructionImportance(None)
    importance.collect(model, [images()], layers=[DOWN[0]], progress=False)
    graph = tp.DependencyGraph().build_dependency(model, images(1))
    group = graph.get_pruning_group(
        model.blocks[1].mlp.first, tp.prune_linear_out_channels, list(range(20))
    )
    with caplog.at_level(logging.WARNING):
        assert importance(group) is None
    assert "no layer that reads the group of blocks.1.mlp.first" in caplog.text


def test_group_of_a_wide_convolution_gives_none() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 1), nn.ReLU(), nn.Conv2d(6, 3, 3))
    graph = tp.DependencyGraph().build_dependency(model, images(1))
    group = graph.get_pruning_group(model[0], tp.prune_conv_out_channels, list(range(6)))
    assert tp_amp.ReconstructionImportance(None, data=[images()])(group) is None


def test_errors_count_by_what_they_cost_the_predictions() -> None:
    """Half the trace of the Fisher information times the error, in nats."""
    model, name = toy(), "blocks.1.mlp.second"
    batches = images(60).split(10)
    found = tp_amp.ReconstructionImportance("prediction").collect(model, batches, layers=[name])
    fisher = output_sensitivity(model, [name], batches, Objective("prediction"))[name]
    weight = model.get_submodule(name).weight.detach().double()
    covariance = hidden_moments(model, [name], batches, progress=False)[name].whole.inputs
    for count in (0, 5, 12):
        kept = found.orders[name][:count]
        left = (
            covariance
            - covariance[:, kept]
            @ torch.linalg.pinv(covariance[kept][:, kept], hermitian=True)
            @ covariance[kept]
        )
        nats = 0.5 * torch.trace(fisher @ weight @ left @ weight.T)
        assert float(found.errors[name][count]) == pytest.approx(float(nats), rel=1e-4, abs=1e-9)


def test_layers_that_are_not_called_are_passed_over_by_default() -> None:
    model = toy()
    model.unused = torch.nn.Linear(9, 2)
    found = tp_amp.ReconstructionImportance("prediction").collect(model, [images()])
    assert "unused" not in found.orders
    assert "blocks.0.mlp.second" in found.orders
