"""Plans carried out, against the dense model masked."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from toys import PlainMLP, fingerprint, images, masked, perturbed, relative, toy

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
    "stream": (
        PruningPlan({"embed": [0]}),
        r"embed is neither .* streams, by rotate and stream_plan: \['embed'\]",
    ),
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


class Silent(nn.Module):
    """An attention that tells its number of heads nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, 8)).permute(2, 0, 3, 1, 4)
        return self.proj(((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2))


class SilentBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Silent(), PlainMLP(32, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x.tanh())
        return x + self.mlp(x.tanh())


HEADS = "attention.proj"


def silent() -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    return perturbed(SilentBlock()), torch.randn(60, 5, 32)


def heads_masked(model: nn.Module, keep: dict[str, list[int]]) -> nn.Module:
    """The dense model with all channels of the other heads, and the other neurons, at zero."""
    channels = [8 * head + i for head in keep[HEADS] for i in range(8)]
    return masked(model, {**keep, HEADS: channels})


@pytest.mark.parametrize("how", ["apply_plan", "compensate", "load_pruned"])
@pytest.mark.parametrize("source", ["importance", "pruner"])
def test_a_plan_knows_heads_that_were_found_by_their_number(
    how: str, source: str, tmp_path: Path
) -> None:
    """Nothing is told again, to a model of its own."""
    (model, x), (other, _) = silent(), silent()
    if source == "importance":
        importance = tp.importance.LAMPImportance()
        widths = {HEADS: 2, "mlp.second": 9}
        plan = tp_amp.plan_from_importance(
            model, x[:1], importance, widths, num_heads={model.attention: 4}
        )
    else:
        pruned = copy.deepcopy(model)
        pruner = tp_amp.AdaptiveMLPPruner(
            pruned,
            x[:1],
            tp.importance.LAMPImportance(),
            [x],
            max_increase=0.5,
            objective=lambda output: output.square().mean(),
            prune_num_heads=True,
            num_heads={pruned.attention: 4},
        )
        pruner.step()
        plan = pruner.plan
        assert 0 < len(plan.keep[HEADS]) < 4
    expected = heads_masked(model, plan.keep)(x)
    plan = PruningPlan.from_json(plan.to_json())
    if how == "compensate":
        tp_amp.compensate(other, plan, [x], method="none")
    else:
        tp_amp.apply_plan(other, plan)
    if how == "load_pruned":
        tp_amp.save_pruned(other, tmp_path, plan)
        other, _ = silent()
        tp_amp.load_pruned(other, tmp_path)
    assert other.attention.qkv.out_features == 3 * 8 * len(plan.keep[HEADS])
    assert relative(other(x), expected) < 1e-5


@pytest.mark.parametrize("how", ["apply_plan", "compensate"])
def test_a_plan_made_by_hand_may_know_some_of_its_layers(how: str) -> None:
    model, x = silent()
    [attention] = tp_amp.find_attentions(model, x[:1], num_heads={model.attention: 4})
    keep = {HEADS: [0, 2], "mlp.second": [1, 5, 8]}
    before = fingerprint(model)
    for call in (tp_amp.apply_plan, lambda m, p, x: tp_amp.compensate(m, p, [x])):
        with pytest.raises(ValueError, match=r"num_heads=\{module: n\} to what finds attentions"):
            call(model, PruningPlan(dict(keep)), x)
    assert fingerprint(model) == before
    plan = PruningPlan(dict(keep), sites={HEADS: attention})
    expected = heads_masked(model, keep)(x)
    if how == "apply_plan":
        with pytest.raises(ValueError, match="pass example inputs too"):
            tp_amp.apply_plan(model, plan)
        tp_amp.apply_plan(model, plan, x[:1])
    else:
        tp_amp.compensate(model, plan, [x], method="none")
    assert relative(model(x), expected) < 1e-5
    assert plan.sites.keys() == keep.keys()


def test_frozen_parameters_stay_frozen_and_others_trainable() -> None:
    model, x = silent()
    frozen = {"mlp.first.weight", "mlp.second.bias", "attention.qkv.weight"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    [attention] = tp_amp.find_attentions(model, x[:1], num_heads={model.attention: 4})
    plan = PruningPlan({HEADS: [0, 2], "mlp.second": [1, 5]}, sites={HEADS: attention})
    tp_amp.apply_plan(model, plan, x[:1])
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen
