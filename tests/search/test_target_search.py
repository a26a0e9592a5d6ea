"""The tolerance that meets a size, and widths filled up to it: on entropies in closed form."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import timm
import torch
from searches import data, pruner_of
from toys import toy

import tp_amp
from tp_amp.reports.numbers import Probe
from tp_amp.running.timing import Estimate
from tp_amp.search.bisection import accepted, search_width
from tp_amp.search.compensated_probes import Compensator
from tp_amp.search.search_estimate import Profile, estimate_search
from tp_amp.search.target_search import PASSES, curves, filled, foreseen_width, meet_target

DENSE = {"a": 96, "b": 64, "c": 128}
Rise = Callable[[str, int], float]


class Costs:
    """A budget of channels, each of one parameter; all layers are allowed the same."""

    def __init__(self, amount: float) -> None:
        self.amount, self.widths, self.unit = amount, DENSE, "params"

    def cost(self, widths: Mapping[str, int]) -> float:
        return sum(widths.values())

    def is_close(self, cost: float) -> bool:
        return 0.99 * self.amount <= cost <= self.amount

    def tolerances(self, increase: float) -> dict[str, float]:
        return dict.fromkeys(DENSE, increase)


def hyperbolas(name: str, width: int) -> float:
    """What a layer of that width adds to the entropy (nats); more, the narrower it is."""
    return {"a": 1.0, "b": 0.1, "c": 3.0}[name] * (1 / width - 1 / DENSE[name])


def searched(rise: Rise, increase: float, steps: int = 7) -> tuple[Any, dict[str, list[Probe]]]:
    """One pass of the search on entropies that are known."""
    entropy, widths, probes = 2.0, {}, {}
    for name, dense in DENSE.items():
        before = entropy
        tried = search_width(
            lambda width, name=name, before=before: before + rise(name, width),  # type: ignore[misc]
            dense,
            reference=before,
            max_increase=increase,
            steps=steps,
        )
        best = accepted(tried)
        widths[name], entropy = (best.width, best.entropy) if best else (dense, entropy)
        probes[name] = tried
    return widths, probes


def met(
    rise: Rise, amount: float, start: float = 1e-2, step: int = 1
) -> tuple[float, dict[str, int], list[float]]:
    tried: list[float] = []

    def run(increase: float) -> tuple[dict[str, int], Mapping[str, Sequence[Probe]]]:
        tried.append(increase)
        return searched(rise, increase)

    found = meet_target(
        Costs(amount),  # type: ignore[arg-type]
        run,
        start=start,
        entropy=2.0,
        smallest=dict.fromkeys(DENSE, step),
        steps=dict.fromkeys(DENSE, step),
    )
    return (*found, tried)


@pytest.mark.parametrize("start", [1e-6, 1e-2, 10.0])
@pytest.mark.parametrize("amount", [60, 120, 200, 270])
def test_three_passes_come_as_close_as_a_search_of_all_tolerances(
    amount: int, start: float
) -> None:
    _, widths, tried = met(hyperbolas, amount, start)
    assert len(tried) <= PASSES
    assert 0.99 * amount <= sum(widths.values()) <= amount
    # By brute force: the smallest tolerance whose exact widths fit.
    low, high = 1e-9, 1e3
    for _ in range(80):
        middle = math.sqrt(low * high)
        best = {
            n: min(w for w in range(1, d + 1) if hyperbolas(n, w) <= middle)
            for n, d in DENSE.items()
        }
        low, high = (low, middle) if sum(best.values()) <= amount else (middle, high)
    best = {
        n: min(w for w in range(1, d + 1) if hyperbolas(n, w) <= high) for n, d in DENSE.items()
    }
    loss, least = (sum(hyperbolas(n, w) for n, w in each.items()) for each in (widths, best))
    assert loss <= 1.3 * least + 1e-3


def test_where_a_step_in_the_tolerance_jumps_over_the_target_widths_lie_between() -> None:
    """At 1e-3 everything goes, below nothing: no tolerance meets 150 of 288."""

    def cliff(name: str, width: int) -> float:
        return 0.0 if width == DENSE[name] else 1e-3

    _, widths, tried = met(cliff, 150, start=1e-4)
    assert len(tried) <= PASSES
    assert sum(widths.values()) == 150
    shares = [width / DENSE[name] for name, width in widths.items()]
    assert max(shares) - min(shares) < 0.05  # the same share of the way for each layer


def test_an_entropy_that_falls_leaves_the_target_filled() -> None:
    _, widths, _ = met(lambda name, width: width / 1000 - DENSE[name] / 1000, 200)
    assert sum(widths.values()) == 200


def test_a_tolerance_that_never_suffices_ends_at_the_target_too() -> None:
    increase, widths, tried = met(lambda name, width: math.inf, 100)
    assert math.isinf(increase)
    assert len(tried) == PASSES
    assert sum(widths.values()) == 100


@pytest.mark.parametrize("step", [8, 32])
def test_filled_widths_are_multiples_and_one_step_more_is_above(step: int) -> None:
    budget: Any = Costs(200)
    narrow = dict.fromkeys(DENSE, step)
    widths = filled(budget, narrow, DENSE, dict.fromkeys(DENSE, step))
    assert all(width % step == 0 for width in widths.values())
    assert 200 - step < sum(widths.values()) <= 200


def test_curves_are_rises_over_the_model_before() -> None:
    probes = {
        "a": [Probe(48, 2.5, True), Probe(24, 4.0, False)],
        "b": [Probe(32, 2.4, False), Probe(48, 2.6, True)],
    }
    assert curves(probes, DENSE, 2.0) == {
        "a": [(96, 0.0), (48, 0.5), (24, 2.0)],
        "b": [(64, 0.0), (48, pytest.approx(0.1)), (32, pytest.approx(0.1))],
    }


def test_the_foreseen_width_lies_on_the_line_between_probes() -> None:
    curve = [(96, 0.0), (48, 0.5), (24, 2.0)]
    widths = [foreseen_width(curve, t) for t in (0.0, 0.25, 0.5, 1.25, 2.0, 2.5, 9.0)]
    assert widths == [96, 72, 48, 36, 24, 16, 1]
    assert foreseen_width([(96, 0.0), (48, math.inf)], 1.0) == 96
    assert foreseen_width([(96, 0.0)], 1.0) == 1


@pytest.mark.parametrize("seed", range(3))
def test_the_search_meets_a_target_where_the_entropy_hardly_depends_on_widths(
    seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(seed)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=3, num_classes=10
    ).eval()
    x = torch.randn(16, 3, 32, 32)
    before = sum(p.numel() for p in model.parameters())
    pruner = tp_amp.AdaptiveMLPPruner(
        model,
        x[:1],
        tp_amp.EntropyTaylorImportance(data=[x[:8]]),
        [x[8:]],
        target={"params": 0.7},
        progress=False,
    )
    pruner.step()
    after = sum(p.numel() for p in model.parameters())
    assert 0.69 * before < after <= 0.7 * before
    assert not [text for text in caplog.messages if "below the target" in text]


def test_widths_that_end_far_below_the_target_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Of 60 channels multiples of 32 are 32 and 60: most targets lie far between."""
    pruner = pruner_of(toy(hidden=60), target={"params": 0.8}, round_to=32)
    pruner.step()
    assert "below the target of" in caplog.text
    assert "a smaller round_to comes closer" in caplog.text
    assert all(width in (32, 60) for width in pruner.plan.widths.values())


def test_a_search_with_a_target_makes_three_passes_at_most_and_says_so_before(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tp_amp.search.width_search import WidthSearch

    passes: list[Any] = []
    run = WidthSearch.run

    def counted(self: WidthSearch, *arguments: Any) -> Any:
        passes.append(arguments)
        return run(self, *arguments)

    monkeypatch.setattr(WidthSearch, "run", counted)
    for target in (0.7, 0.8, 0.95):
        passes.clear()
        pruner_of(toy(depth=3), target={"params": target}, compensation="affine").step()
        assert 1 <= len(passes) <= PASSES
    with caplog.at_level(logging.DEBUG, logger="tp_amp.running.timing"):
        pruner_of(toy(depth=3), target={"params": 0.7}).step()
    told = [text for text in caplog.messages if text.startswith("the search takes at most")]
    assert len(told) == 1


def test_the_estimate_counts_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that ticks once for each reading, two estimates see the same times."""
    arguments: dict[str, Any] = {"importance": tp_amp.DIMAPImportance(), "progress": False}
    found: list[tuple[float, float, float]] = []

    def seen(profile: Profile, *others: Any) -> Estimate:
        one = estimate_search(profile, *others)
        found.append((profile.seconds, one.seconds, 0.0))
        return one

    monkeypatch.setattr("tp_amp.search.adaptive_pruner.estimate_search", seen)
    for target in ({}, {"target": {"params": 0.7}}):
        pruner, ticks = pruner_of(toy(depth=3), **arguments, **target), itertools.count()
        for name in ("tp_amp.search.search_estimate.clock", "tp_amp.running.timing.clock"):
            monkeypatch.setattr(name, lambda ticks=ticks: float(next(ticks)))
        told = pruner.estimate().seconds
        found[-1] = (*found[-1][:2], told)
    (dense, one, once), (same_dense, same_one, several) = found
    assert (dense, one) == (same_dense, same_one)
    assert once == pytest.approx(one + dense)
    # Beside the passes: the dense model's own, and the one that judges the widths that are filled.
    assert several == pytest.approx(PASSES * one + 2 * dense)


def test_the_estimate_of_a_search_counts_its_corrections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two layers of a kind: a correction of 5 s, six probes and the accepted one."""
    graph, sites = pruner_of(toy()).DG, tp_amp.find_mlps(toy(), torch.randn(1, 1, 8, 8))
    downs = [site.down for site in sites]
    compensator = Compensator(graph, data()[0], tp_amp.Recipe("affine"), downs)
    times = iter([0.0, 8.0, 10.0, 15.0])  # the first collects moments for 3 s
    monkeypatch.setattr("tp_amp.search.compensated_probes.clock", lambda: next(times))
    assert compensator.seconds(sites, [6, 6]) == 2 * (3 + 7 * 5)
    assert compensator.seconds(sites, [0, 6]) == 3 + 7 * 5
    assert Compensator(graph, data()[0], tp_amp.Recipe("none"), downs).seconds(sites, [6, 6]) == 0


def test_few_tokens_are_told_once_not_at_each_probe(caplog: pytest.LogCaptureFixture) -> None:
    pruner = pruner_of(
        toy(depth=3), target={"params": 0.8}, compensation="affine", compensation_data=data()[0]
    )
    pruner.step()
    assert sum("the images are few" in text for text in caplog.messages) == 1
