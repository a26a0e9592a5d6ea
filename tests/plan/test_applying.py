"""Plans carried out, against the dense model masked."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import fingerprint, images, masked, relative, toy

import tp_amp
from tp_amp import PruningPlan


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_applied_plan_equals_masked_dense(gated: bool, bias: bool) -> None:
    model = toy(gated=gated, bias=bias)
    last = "out" if gated else "second"
    keep = {f"blocks.{i}.mlp.{last}": kept for i, kept in ((0, [0, 3, 19]), (1, [7]))}
    expected = masked(model, keep)(images())
    tp_amp.apply_plan(model, images(1), PruningPlan(keep))
    assert relative(model(images()), expected) < 1e-5
    assert model.get_submodule(f"blocks.1.mlp.{last}").in_features == 1


def test_plan_of_one_layer_leaves_the_others() -> None:
    model = toy()
    tp_amp.apply_plan(model, images(1), PruningPlan({"blocks.1.mlp.second": [1, 2]}))
    assert model.blocks[0].mlp.first.out_features == 20


def test_keeping_everything_changes_nothing() -> None:
    model = toy()
    before = fingerprint(model)
    plan = PruningPlan({f"blocks.{i}.mlp.second": list(range(20)) for i in range(2)})
    tp_amp.apply_plan(model, images(1), plan)
    assert fingerprint(model) == before


BAD_PLANS = {
    "unknown": (
        PruningPlan({"blocks.7.mlp.second": [0]}),
        "blocks.7.mlp.second is neither an MLP of this model nor an attention",
    ),
    "attention": (
        PruningPlan({"blocks.0.project": [0]}),
        r"blocks.0.project is neither an MLP .* no heads: {.blocks.0.: .*number of heads",
    ),
    "empty": (PruningPlan({"blocks.0.mlp.second": []}), "must be distinct and within 0..19"),
    "repeated": (PruningPlan({"blocks.0.mlp.second": [1, 1]}), "must be distinct"),
    "negative": (PruningPlan({"blocks.0.mlp.second": [-1]}), "within 0..19"),
    "too large": (PruningPlan({"blocks.0.mlp.second": [20]}), "within 0..19"),
    "other width": (
        PruningPlan({"blocks.0.mlp.second": [0]}, {"blocks.0.mlp.second": 40}),
        "has 20 channels, the plan was made for 40",
    ),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_bad_plan_raises_before_anything_is_cut(case: str) -> None:
    plan, message = BAD_PLANS[case]
    good = {"blocks.1.mlp.second": [0, 1]}
    model = toy()
    before = fingerprint(model)
    plan = PruningPlan({**good, **plan.keep}, plan.dense_widths)
    with pytest.raises(ValueError, match=message):
        tp_amp.apply_plan(model, images(1), plan)
    assert fingerprint(model) == before


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
