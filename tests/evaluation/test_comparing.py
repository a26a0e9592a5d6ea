"""Importances side by side: the numbers are those of masked models, and the sizes are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_pruning as tp
from comparisons import LastFirst, batches, compare
from torch import Tensor, nn
from toys import fingerprint, images, masked, toy

import tp_amp
from tp_amp.evaluation import comparing

DOWNS = ("blocks.0.mlp.second", "blocks.1.mlp.second")


class Broken(tp.importance.Importance):
    def __call__(self, group: Any) -> Tensor:
        raise RuntimeError("no scores\ntoday")


@pytest.mark.parametrize(("fraction", "kept"), [(0.5, range(10, 20)), (0.2, range(16, 20))])
def test_agreement_is_the_cosine_of_the_masked_model(fraction: float, kept: range) -> None:
    found = compare([LastFirst()])
    reference, model = masked(toy(), {name: list(kept) for name in DOWNS}), toy()
    with torch.no_grad():
        outputs = [torch.cat([m(b) for b in batches(2)]) for m in (reference, model)]
    cosine = (nn.functional.normalize(outputs[0]) * nn.functional.normalize(outputs[1])).sum(1)
    row = next(row for row in found.rows if row.kept == fraction)
    assert row.value == pytest.approx(float(cosine.mean()), abs=1e-5)
    assert row.value < 0.9999
    dense = sum(p.numel() for p in model.parameters())
    assert found.dense == type(row)("dense", 1.0, dense, pytest.approx(1.0))
    assert row.parameters == dense - 2 * (20 - len(kept)) * (12 + 1 + 12)
    assert found.metric == "cosine to the dense model"


def test_accuracy_where_there_are_labels() -> None:
    judging = batches(2, labels=True)
    found = compare([LastFirst()], evaluation=judging, fractions=[0.2])
    reference = masked(toy(), {name: list(range(16, 20)) for name in DOWNS})
    for row, model in ((found.rows[0], reference), (found.dense, toy())):
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in judging)
        assert row.value == pytest.approx(right / 12)
    assert found.metric == "accuracy"


def test_features_are_compared_where_there_is_no_classifier() -> None:
    model = toy(classes=0)
    found = tp_amp.compare(
        model, images(1), [LastFirst()], batches(), fractions=[0.5, 0.1], progress=False
    )
    assert found.dense.value == pytest.approx(1)
    assert 1 > found.rows[0].value > found.rows[1].value


def test_own_metric_and_names() -> None:
    def widths(model: nn.Module) -> float:
        assert not model.training
        return model.blocks[0].mlp.second.in_features

    found = compare({"mine": LastFirst(), "lamp": tp.importance.LAMPImportance()}, metric=widths)
    assert [(row.importance, row.value) for row in found.rows] == [
        ("mine", 10), ("mine", 4), ("lamp", 10), ("lamp", 4)
    ]  # fmt: skip
    assert found.metric == "widths"
    assert found.dense.value == 20


def test_the_model_and_the_importances_are_as_before() -> None:
    model = toy().train()
    importances = {
        "entropy": tp_amp.EntropyTaylorImportance(),
        "reconstruction": tp_amp.ReconstructionImportance(),
        "taylor": tp.importance.TaylorImportance(),
        "hessian": tp.importance.HessianImportance(),
        "activation": tp.pruner.importance.ActivationImportance(),
        "random": tp.importance.RandomImportance(),
    }
    before = fingerprint(model)
    data = batches(labels=True)
    runs = [
        tp_amp.compare(model, images(1), importances, data, fractions=[0.3], progress=False)
        for _ in range(2)
    ]
    assert not runs[0].failures
    assert runs[0] == runs[1]
    assert len({row.value for row in runs[0].rows}) > 1
    assert fingerprint(model) == before
    for importance in importances.values():
        assert not any(value for value in vars(importance).values() if isinstance(value, dict))


def test_compensation_brings_the_outputs_back() -> None:
    plain, affine = (compare([LastFirst()], compensation=method) for method in ("none", "affine"))
    assert affine.rows[0].value > plain.rows[0].value
    assert [row.parameters for row in affine.rows] == [row.parameters for row in plain.rows]


def test_an_importance_that_fails_is_named(caplog: pytest.LogCaptureFixture) -> None:
    importances = {"broken": Broken(), "taylor": tp.importance.TaylorImportance()}
    found = compare({**importances, "good": LastFirst()})
    assert {row.importance for row in found.rows} == {"good"}
    assert found.failures["broken"] == "no scores today"
    assert "needs labels" in found.failures["taylor"]
    assert "not measured: broken: no scores today" in str(found)
    assert "broken is not measured: no scores today" in caplog.text
    with pytest.raises(ValueError, match=r"no importance could be measured.*no scores today"):
        compare(importances)


def test_other_sizes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def lazy(model: nn.Module, plan: tp_amp.PruningPlan, *args: Any, **kwargs: Any) -> None:
        calls.append(plan)
        if len(calls) != 2:
            tp_amp.apply_plan(model, images(1), plan)

    monkeypatch.setattr(comparing, "compensate", lazy)
    found = compare({"good": LastFirst(), "lazy": LastFirst()}, fractions=[0.5])
    assert "those before it left" in found.failures["lazy"]
    assert [row.importance for row in found.rows] == ["good"]


@pytest.mark.parametrize(
    ("importances", "further", "message"),
    [
        ([LastFirst(), LastFirst()], {}, "stand twice"),
        ([LastFirst()], {"fractions": [1.5]}, "fractions must be above 0"),
        ([], {}, "nothing to compare"),
    ],
)
def test_wrong_arguments_are_refused(importances: Any, further: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(importances, **further)


def test_a_model_without_mlps_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(ValueError, match="no MLP was found in Sequential"):
        tp_amp.compare(model, images(1), [LastFirst()], batches())
