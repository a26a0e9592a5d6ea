"""The search over all widths, against copies of the model sliced at each probe."""

from __future__ import annotations

import copy
import logging

import pytest
import timm
import torch
from entropies import entropy_of
from searches import data, duplicated, pruner_of
from torch import Tensor, nn
from toys import fingerprint, images, masked, perturbed, put, relative, toy

import tp_amp
from tp_amp import AdaptiveMLPPruner, EntropyTaylorImportance


def sliced_copy(model: nn.Module, ups: list[str], down: str, keep: list[int]) -> nn.Module:
    """A deep copy of the model with new, smaller layers."""
    model = copy.deepcopy(model)
    for name in [*ups, down]:
        old = model.get_submodule(name)
        size = (len(keep), old.out_features) if name == down else (old.in_features, len(keep))
        new = nn.Linear(*size, bias=old.bias is not None)
        with torch.no_grad():
            new.weight.copy_(old.weight[:, keep] if name == down else old.weight[keep])
            if old.bias is not None:
                new.bias.copy_(old.bias if name == down else old.bias[keep])
        put(model, name, new)
    return model


def brute_force(
    model: nn.Module,
    mlps: list[tuple[list[str], str]],
    scores: dict[str, Tensor],
    batches: list[Tensor],
    max_increase: float,
    steps: int,
    rescore: bool,
    objective: str,
) -> dict[str, list[int]]:
    """AMP with a deep copy of the model sliced at every probe."""

    def entropy(candidate: nn.Module) -> float:
        with torch.no_grad():
            values = [float(entropy_of(objective, candidate(b))) * len(b) for b in batches]
        return sum(values) / sum(len(b) for b in batches)

    reference, kept = entropy(model), {}
    for ups, down in reversed(mlps):
        if rescore:
            scores = EntropyTaylorImportance(objective).collect(model, data()[0]).scores
        hidden = model.get_submodule(down).in_features
        order = sorted(range(hidden), key=lambda j, s=scores[down]: (-float(s[j]), j))
        left, right, best = 0, hidden, (reference, model, list(range(hidden)))
        for _ in range(steps):
            middle = (left + right) // 2
            if middle == left:
                break
            candidate = sliced_copy(model, ups, down, sorted(order[:middle]))
            value = entropy(candidate)
            if value - reference <= max_increase:
                right, best = middle, (value, candidate, sorted(order[:middle]))
            else:
                left = middle
        reference, model, kept[down] = best
    return kept


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rescore", [False, True])
@pytest.mark.parametrize("classes", [5, 0])
@pytest.mark.parametrize("max_increase", [0.0, 0.003, 0.02])
def test_search_equals_deep_copies_sliced_at_each_probe(
    gated: bool, rescore: bool, classes: int, max_increase: float
) -> None:
    model = toy(gated=gated, classes=classes, depth=3)
    names = ["gate", "value"] if gated else ["first"]
    mlps = [
        ([f"blocks.{i}.mlp.{n}" for n in names], f"blocks.{i}.mlp.{'out' if gated else 'second'}")
        for i in range(3)
    ]
    objective = "prediction" if classes else "similarity"
    scores = EntropyTaylorImportance(objective).collect(model, data()[0]).scores
    expected = brute_force(model, mlps, scores, data()[1], max_increase, 4, rescore, objective)
    pruner = pruner_of(model, max_increase=max_increase, steps=4, rescore=rescore)
    pruner.step()
    assert pruner.plan.keep == expected
    assert pruner.plan.widths == {
        mlp.down: model.get_submodule(mlp.down).in_features for mlp in pruner.mlps
    }


def test_probes_hold_the_entropy_of_the_model_cut_to_that_width() -> None:
    model = toy()
    pruner = pruner_of(model, max_increase=0.01)
    scores = EntropyTaylorImportance().collect(model, data()[0]).scores
    dense = copy.deepcopy(model)
    pruner.step()
    last = pruner.mlps[-1].down
    order = scores[last].argsort(descending=True, stable=True).tolist()
    for probe in pruner.plan.probes[last]:
        with torch.no_grad():
            candidate = masked(dense, {last: order[: probe.width]})
            values = [float(entropy_of("prediction", candidate(b))) for b in data()[1]]
        assert probe.entropy == pytest.approx(sum(values) / 2, rel=1e-5)
        assert probe.accepted == (probe.entropy - pruner.plan.dense_entropy <= 0.01)


@pytest.mark.parametrize("when", [0, 1, 5])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_error_in_a_search_leaves_the_model_untouched(when: int, error: type[Exception]) -> None:
    model = toy()
    scoring, search = data()
    reads = []

    class Failing:
        def __iter__(self):
            reads.append(1)
            yield search[0]
            if len(reads) > when:
                raise error
            yield search[1]

    importance = EntropyTaylorImportance().collect(model, scoring)
    pruner = AdaptiveMLPPruner(model, images(1), importance, Failing(), max_increase=0.5)
    before = fingerprint(model)
    with pytest.raises(error):
        pruner.step()
    assert fingerprint(model) == before


def test_same_call_gives_the_same_plan_with_a_shuffling_loader() -> None:
    whole = torch.utils.data.TensorDataset(images(32), torch.zeros(32))
    loader = torch.utils.data.DataLoader(whole, batch_size=4, shuffle=True)
    plans = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        scoring, search = tp_amp.split_batches(loader)
        model = toy(classes=0)
        pruner = AdaptiveMLPPruner(
            model, images(1), EntropyTaylorImportance(data=scoring), search, max_increase=0.02
        )
        pruner.step()
        plans.append(pruner.plan)
    assert plans[0] == plans[1]


def test_nothing_pruned_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = toy()
    reads = []

    def growing(output: Tensor) -> Tensor:
        reads.append(1)
        return output.sum() * 0 + len(reads)

    with caplog.at_level(logging.WARNING, logger="tp_amp"):
        pruner_of(model, objective=growing).step()
    assert "blocks.1.mlp.second keeps all 20 channels" in caplog.text
    assert "nothing is pruned" in caplog.text
    assert model.blocks[0].mlp.first.out_features == 20


def test_heads_are_searched_after_the_mlps() -> None:
    """The model with the plan's heads cut off at the projections is the one that comes out."""
    model = perturbed(timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32))
    calibration = [images(4, seed=2, size=32, channels=3)]
    importance = tp_amp.EntropyTaylorImportance(data=[images(4, seed=1, size=32, channels=3)])
    dense = copy.deepcopy(model)
    pruner = tp_amp.AdaptiveMLPPruner(
        model, calibration[0][:1], importance, calibration, prune_num_heads=True, max_increase=10.0
    )
    pruner.step()
    names = [f"blocks.{i}.{part}" for part in ("mlp.fc2", "attn.proj") for i in range(2)]
    assert list(pruner.plan.keep) == names
    assert pruner.plan.dense_widths["blocks.0.attn.proj"] == 3
    assert pruner.plan.widths["blocks.0.attn.proj"] == model.blocks[0].attn.num_heads == 1
    # The search took its widths one after another, heads last.
    last = [probe for probe in pruner.plan.probes["blocks.0.attn.proj"] if probe.accepted][-1]
    reached = entropy_of("prediction", model(calibration[0]).detach())
    assert last.entropy == pytest.approx(float(reached), abs=1e-5)
    # A head's score is the sum over its channels.
    scores = importance.scores["blocks.0.attn.proj"].view(3, 64).sum(1)
    assert pruner.plan.keep["blocks.0.attn.proj"] == [int(scores.argmax())]
    again = copy.deepcopy(dense)
    tp_amp.apply_plan(again, calibration[0][:1], pruner.plan)
    assert relative(again(calibration[0]), model(calibration[0])) < 1e-5


def test_reconstruction_foresees_the_first_width() -> None:
    importance = tp_amp.ReconstructionImportance("prediction", data=[images(40, seed=5)])
    pruner = pruner_of(duplicated(), importance=importance, compensation="affine")
    pruner.step()
    for name, probes in pruner.plan.probes.items():
        errors = importance.errors[name]
        foreseen = next(width for width, error in enumerate(errors) if error <= 1e-2)
        assert probes[0].width == max(1, min(foreseen, 19))


def test_rescoring_collects_reconstruction_again(monkeypatch: pytest.MonkeyPatch) -> None:
    importance = tp_amp.ReconstructionImportance("prediction", data=[images(40, seed=5)])
    collected: list[list[str]] = []
    real = importance.collect

    def collect(model: nn.Module, data: object, **arguments: object) -> object:
        collected.append(list(arguments["layers"] or []))
        return real(model, data, **arguments)

    monkeypatch.setattr(importance, "collect", collect)
    pruner_of(toy(), importance=importance, rescore=True).step()
    assert collected == [["blocks.1.mlp.second"], ["blocks.0.mlp.second"]]
