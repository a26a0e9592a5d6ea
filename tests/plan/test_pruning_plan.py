import copy
import json
from dataclasses import replace

import pytest
import torch
import torch_pruning as tp
from toys import fingerprint, images, toy

import tp_amp
from tp_amp import PruningPlan
from tp_amp.reports.numbers import Probe

PLAN = PruningPlan(
    keep={"blocks.0.mlp.second": [0, 3, 19], "blocks.1.mlp.second": [5]},
    dense_widths={"blocks.0.mlp.second": 20, "blocks.1.mlp.second": 20},
    probes={"blocks.1.mlp.second": [Probe(10, 0.12345678901234567, True)]},
    dense_entropy=1.5,
)


def test_json_round_trip_is_exact() -> None:
    assert PruningPlan.from_json(PLAN.to_json()) == PLAN
    assert json.loads(PLAN.to_json())["keep"] == PLAN.keep


def test_json_is_readable_one_line_a_layer() -> None:
    assert '    "blocks.0.mlp.second": [0, 3, 19],' in PLAN.to_json().splitlines()


BAD_JSON = {
    "not json": ("{", "plan is not JSON"),
    "a list": ("[]", "not a pruning plan"),
    "no keep": ('{"format": 1}', "not a pruning plan"),
    "newer": (
        PLAN.to_json().replace('"format": 1', '"format": 2'),
        "format 2, this tp_amp reads 1",
    ),
    "text index": (PLAN.to_json().replace("[5]", '["5"]'), "damaged"),
    "float index": (PLAN.to_json().replace("[5]", "[5.0]"), "damaged"),
    "no probes": ('{"format": 1, "keep": {}, "dense_widths": {}}', "damaged"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_json_raises(case: str) -> None:
    text, message = BAD_JSON[case]
    with pytest.raises(ValueError, match=message):
        PruningPlan.from_json(text)


def test_plan_from_importance_keeps_the_largest_scores() -> None:
    model = toy()
    dense = copy.deepcopy(model)
    importance = tp.importance.MagnitudeImportance(p=2, normalizer=None, group_reduction="sum")
    plan = tp_amp.plan_from_importance(model, images(1), importance, 0.3)
    for block in range(2):
        mlp = dense.blocks[block].mlp
        norms = mlp.first.weight.square().sum(1) + mlp.second.weight.square().sum(0)
        expected = sorted(norms.topk(6).indices.tolist())
        assert plan.keep[f"blocks.{block}.mlp.second"] == expected
    assert fingerprint(model)["values"] == fingerprint(dense)["values"]


def test_plan_from_importance_takes_widths_by_name() -> None:
    widths = {"blocks.1.mlp.second": 4}
    plan = tp_amp.plan_from_importance(toy(), images(1), tp.importance.LAMPImportance(), widths)
    assert plan.widths == widths
    assert plan.dense_widths == {"blocks.1.mlp.second": 20}


@pytest.mark.parametrize(
    "widths", [{"blocks.1.mlp.second": -1}, {"blocks.1.mlp.second": 21}, 0.0, -0.5, 1.5]
)
def test_widths_out_of_range_raise(widths: object) -> None:
    with pytest.raises(ValueError, match=r"can't keep|must be a fraction above 0"):
        tp_amp.plan_from_importance(toy(), images(1), tp.importance.LAMPImportance(), widths)


def test_widths_of_another_layer_raise() -> None:
    with pytest.raises(ValueError, match="head is neither an MLP of this model nor an attention"):
        tp_amp.plan_from_importance(toy(), images(1), tp.importance.LAMPImportance(), {"head": 3})


def test_ties_keep_the_first_channels() -> None:
    plan = tp_amp.plan_from_importance(toy(), images(1), lambda group: torch.ones(20), 0.2)
    assert plan.keep["blocks.0.mlp.second"] == [0, 1, 2, 3]


def test_at_least_one_channel_stays() -> None:
    plan = tp_amp.plan_from_importance(toy(), images(1), tp.importance.LAMPImportance(), 0.01)
    assert set(plan.widths.values()) == {1}


def test_a_model_without_mlps_is_told() -> None:
    with pytest.raises(ValueError, match="no MLP was found in Linear"):
        tp_amp.plan_from_importance(
            torch.nn.Linear(3, 2), torch.randn(1, 3), tp.importance.LAMPImportance(), 0.5
        )


MLP = tp_amp.MLP("mlp", ("mlp.fc1",), "mlp.fc2", 6)
HEADS = tp_amp.Attention("attn", ("attn.qkv",), "attn.proj", 4, 8)
RANKS = tp_amp.HeadRanks("vo", "attn", ("attn.qkv",), "attn.proj", heads=4, width=8)
QUERIES = tp_amp.HeadRanks("qk", "attn", ("attn.qkv",), "attn.proj", heads=4, width=8)


def of_site(site: tp_amp.MLP | tp_amp.Attention | tp_amp.HeadRanks, kept: list[int]) -> PruningPlan:
    return PruningPlan({site.down: kept}, {site.down: site.width}, sites={site.down: site})


def test_two_plans_are_one_for_the_dense_model() -> None:
    first, shorter = of_site(MLP, [0, 2, 3, 5]), replace(MLP, width=4)
    first.probes["mlp.fc2"] = [Probe(4, 1.0, True)]
    later = PruningPlan(
        {"mlp.fc2": [1, 3], "attn.proj": [0, 3]},
        {"mlp.fc2": 4, "attn.proj": 4},
        {"mlp.fc2": [Probe(2, 2.0, True)]},
        dense_entropy=3.0,
        sites={"mlp.fc2": shorter, "attn.proj": HEADS},
    )
    assert first.then(later) == PruningPlan(
        {"mlp.fc2": [2, 5], "attn.proj": [0, 3]},
        {"mlp.fc2": 6, "attn.proj": 4},
        {"mlp.fc2": [Probe(4, 1.0, True), Probe(2, 2.0, True)]},
        sites={"mlp.fc2": MLP, "attn.proj": HEADS},
    )
    assert first == replace(of_site(MLP, [0, 2, 3, 5]), probes=first.probes)  # as it was


def test_what_a_later_plan_knows_of_a_cut_layer_is_not_told_of_the_dense() -> None:
    later = of_site(replace(MLP, width=4), [1, 3])
    assert PruningPlan({"mlp.fc2": [0, 2, 3, 5]}).then(later) == PruningPlan({"mlp.fc2": [2, 5]})


@pytest.mark.parametrize(
    ("first", "later", "told"),
    [
        (of_site(MLP, [0, 5]), of_site(MLP, [0]), "made for 6 .* of mlp.fc2, this one leaves 2"),
        (of_site(MLP, [0, 5]), PruningPlan({"mlp.fc2": [2]}), "for more than 2 .* leaves 2"),
        (of_site(MLP, [0, 5]), PruningPlan({"mlp.fc2": [-1]}), "leaves 2; make it for the model"),
        (
            of_site(HEADS, [0, 1]),
            of_site(replace(RANKS, heads=2), [0]),
            "heads of attn, .* channels of each",
        ),
        (of_site(HEADS, [0, 1]), of_site(QUERIES, [0]), "this plan cuts heads of attn"),
        (of_site(RANKS, [0, 1]), of_site(HEADS, [0]), "the later one heads: no one plan"),
    ],
)
def test_plans_that_do_not_follow_each_other_raise(
    first: PruningPlan, later: PruningPlan, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        first.then(later)


def test_only_a_plan_can_follow() -> None:
    with pytest.raises(TypeError, match="must be a PruningPlan, found a dict"):
        PruningPlan({}).then({"mlp.fc2": [0]})  # type: ignore[arg-type]
