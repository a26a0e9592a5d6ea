"""A public call reads a model once, and what is known is not read again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import images, relative, toy

import tp_amp
from tp_amp.structure.graph import TolerantGraph
from tp_amp.structure.model_structure import ModelStructure

Traces = list[type]


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Traces:
    """One entry for each time that Torch-Pruning builds a graph."""
    made: Traces = []
    build = TolerantGraph.build_dependency

    def counted(graph: Any, *arguments: Any, **named: Any) -> Any:
        made.append(type(graph))
        return build(graph, *arguments, **named)

    monkeypatch.setattr(TolerantGraph, "build_dependency", counted)
    return made


def test_from_plan_to_folder_a_model_is_traced_once(traces: Traces, tmp_path: Path) -> None:
    """It was traced twice: `compensate` did not believe the plan."""
    model, batches = toy(), [images(8)]
    importance = tp_amp.ReconstructionImportance("prediction", data=batches)
    plan = tp_amp.plan_for_target(model, batches[0][:1], importance, {"params": 0.7})
    tp_amp.compensate(model, plan, batches, every_linear=True)
    tp_amp.save_pruned(model, tmp_path, plan)
    tp_amp.load_pruned(toy(), tmp_path)
    assert len(traces) == 1


def test_a_search_with_a_target_traces_once(traces: Traces) -> None:
    model = toy()
    importance = tp_amp.EntropyTaylorImportance(data=[images(8)])
    pruner = tp_amp.AdaptiveMLPPruner(
        model,
        images(1),
        importance,
        [images(8, seed=2)],
        target={"params": 0.7},
        compensation="affine",
    )
    pruner.step()
    assert len(traces) == 1


def test_comparing_traces_once_for_all_importances(traces: Traces) -> None:
    importances = [tp_amp.GramSchmidtImportance(), tp_amp.DIMAPImportance()]
    tp_amp.compare(toy(), images(1), importances, list(images(8).split(4)), fractions=[0.5, 0.25])
    assert len(traces) == 1


def test_a_plan_that_knows_its_layers_is_cut_without_example_inputs(traces: Traces) -> None:
    model = toy()
    plan = tp_amp.plan_from_importance(model, images(1), tp_amp.GramSchmidtImportance(), 0.5)
    before, told = copy.deepcopy(model), copy.deepcopy(model)
    traces.clear()
    tp_amp.apply_plan(before, plan)
    tp_amp.apply_plan(told, images(1), plan)
    assert not traces
    tp_amp.apply_plan(model, images(1), tp_amp.PruningPlan(plan.keep))
    assert len(traces) == 1
    for cut in (before, told):
        assert all(
            torch.equal(a, b) for a, b in zip(cut.parameters(), model.parameters(), strict=True)
        )


@pytest.mark.parametrize("how", ["applied", "compensated"])
def test_a_plan_made_by_hand_knows_its_layers_once_it_was_used(how: str, tmp_path: Path) -> None:
    model, dense = toy(), toy()
    down = tp_amp.find_mlps(model, images(1))[0].down
    plan = tp_amp.PruningPlan({down: [0, 2, 5]})
    if how == "applied":
        tp_amp.apply_plan(model, plan, images(1))
    else:
        tp_amp.compensate(model, plan, [images(8)])
    tp_amp.save_pruned(model, tmp_path, plan)
    found = tp_amp.load_pruned(dense, tmp_path)
    assert found == plan
    assert relative(dense(images(2)), model(images(2))) == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda model, example, plan: tp_amp.apply_plan(model, example, plan),
        lambda model, example, plan: tp_amp.apply_plan(model, plan, example),
        lambda model, example, plan: tp_amp.apply_plan(model, example, plan=plan),
        lambda model, example, plan: tp_amp.apply_plan(model, plan, example_inputs=example),
        lambda model, example, plan: tp_amp.apply_plan(model, example_inputs=example, plan=plan),
    ],
)
def test_plan_and_example_inputs_may_stand_in_either_order(call: Any) -> None:
    model = toy()
    down = tp_amp.find_mlps(model, images(1))[0].down
    call(model, images(1), tp_amp.PruningPlan({down: [1, 2]}))
    assert model.get_submodule(down).in_features == 2


def test_what_apply_plan_can_not_read_is_told() -> None:
    model = toy()
    before = copy.deepcopy(model.state_dict())
    plan = tp_amp.PruningPlan({tp_amp.find_mlps(model, images(1))[0].down: [0]})
    with pytest.raises(ValueError, match="pass example inputs too"):
        tp_amp.apply_plan(model, plan)
    with pytest.raises(TypeError, match=r"a PruningPlan .* found \['Tensor'\]"):
        tp_amp.apply_plan(model, images(1))  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"found .*'inputs'"):
        tp_amp.apply_plan(model, plan, inputs=images(1))  # type: ignore[call-overload]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_plan_of_a_pruned_model_is_refused_without_tracing(traces: Traces) -> None:
    model = toy()
    plan = tp_amp.plan_from_importance(model, images(1), tp_amp.GramSchmidtImportance(), 0.5)
    tp_amp.apply_plan(model, plan)
    traces.clear()
    widths = [p.shape for p in model.parameters()]
    with pytest.raises(ValueError, match="build the same dense model"):
        tp_amp.apply_plan(model, plan)
    assert [p.shape for p in model.parameters()] == widths
    assert not traces


def test_parts_are_read_when_they_are_asked_for(traces: Traces) -> None:
    structure = ModelStructure(toy(), images(1))
    assert not traces
    first = structure.mlps
    assert structure.mlps is first
    assert structure.graph is structure.traced.graph
    assert structure.sites([first[0].down])[first[0].down] == first[0]
    assert len(traces) == 1
    assert ModelStructure(toy(), ()).graph.module2node == {}
    assert len(traces) == 1
