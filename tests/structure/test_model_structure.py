"""A public call reads a model once, and what is known is not read again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import images, toy

import tp_amp
from tp_amp.structure.model_structure import ModelStructure
from tp_amp.structure.tolerant_graph import TolerantGraph

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
