"""Estimates of long runs, against what a model with a clock of its own then takes."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from searches import data, pruner_of
from torch import Tensor, nn
from toys import images, toy

import tp_amp
from tp_amp.running import timing as estimate
from tp_amp.running.timing import Estimate
from tp_amp.search import search_estimate


class Clock:
    """A clock that goes on by what each block takes alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: nn.Module, seconds: float) -> None:
        self.now, self.seconds = 100.0, seconds
        for module in (estimate, search_estimate):  # it has the clock by name
            monkeypatch.setattr(module, "clock", lambda: self.now)
        for block in model.blocks:
            # Within the block, so that a block that is not run takes no time.
            block.norm1.register_forward_pre_hook(self.tick)

    def tick(self, *_: Any) -> None:
        self.now += self.seconds


def messages(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == level]


@pytest.fixture
def info(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="tp_amp.running.timing")
    return caplog


def told_seconds(line: str) -> float:
    """Of the first duration in a message."""
    number, unit = line.split("took " if " took " in line else "about ")[1].split(" ")[:2]
    return float(number) * {"s": 1, "min": 60, "h": 3600}[unit.rstrip(",;")]


@pytest.mark.parametrize("limit", [2**30, 10000, 0], ids=["all", "some", "nothing"])
def test_the_search_takes_what_is_estimated(
    limit: int, monkeypatch: pytest.MonkeyPatch, info: pytest.LogCaptureFixture
) -> None:
    model = toy(depth=6)
    clock = Clock(monkeypatch, model, 1.0)
    pruner = pruner_of(model, max_increase=10.0, steps=3, cache_bytes=limit, progress=False)
    pruner.importance.refresh(model)
    before = pruner.estimate()
    info.clear()
    start = clock.now
    pruner.step()
    taken = clock.now - start
    foreseen, took = messages(info, logging.INFO)
    assert foreseen.startswith("the search takes at most about")
    assert took.startswith("the search took ")
    dense = 6 * len(data()[1]) * 1.0  # which has been run when the search tells what is to come
    assert told_seconds(foreseen) + dense == pytest.approx(before.seconds, rel=0.02)
    # Beside the search there are a few passes: the dense one, and those that find the chain.
    assert told_seconds(took) == pytest.approx(taken, rel=0.25)
    assert told_seconds(took) <= 1.02 * told_seconds(foreseen)
    assert told_seconds(took) >= 0.7 * told_seconds(foreseen)


def test_batches_without_a_length_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loader:
        def __iter__(self) -> Any:
            return iter(data()[1] * 2)

    found = []
    for calibration in (Loader(), data()[1] * 2):
        model = toy(depth=3)
        Clock(monkeypatch, model, 1.0)
        importance = tp_amp.GramSchmidtImportance()
        pruner = tp_amp.AdaptiveMLPPruner(model, images(1), importance, calibration)
        found.append(pruner.estimate())
    assert found[0] == found[1]


def test_scoring_tells_after_the_first_batch(
    monkeypatch: pytest.MonkeyPatch, info: pytest.LogCaptureFixture
) -> None:
    model = toy(depth=4)
    Clock(monkeypatch, model, 3.0)
    importance = tp_amp.EntropyTaylorImportance("prediction")
    importance.collect(model, images(8).split(2), progress=False)
    size = sum(score.nbytes for score in importance.scores.values()) / 1e9
    assert messages(info, logging.INFO) == [
        f"scoring takes at most about 48.0 s, {size:.2f} GB",
        f"scoring took 48.0 s, {size:.2f} GB; estimated were 48.0 s, {size:.2f} GB",
    ]


def test_a_run_that_goes_on_tells_of_what_is_left(
    monkeypatch: pytest.MonkeyPatch, info: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    model, batches = toy(depth=4), images(8).split(2)

    def stopping() -> Any:
        yield batches[0]
        raise KeyboardInterrupt

    importance = tp_amp.EntropyTaylorImportance("prediction")
    with pytest.raises(KeyboardInterrupt):
        importance.collect(model, stopping(), checkpoint=tmp_path)
    Clock(monkeypatch, model, 3.0)
    importance.collect(model, batches, checkpoint=tmp_path, progress=False)
    told, took = messages(info, logging.INFO)
    assert told.startswith("scoring takes at most about 36.0 s")
    assert took.startswith("scoring took 36.0 s")


def test_far_longer_than_estimated_warns(
    monkeypatch: pytest.MonkeyPatch, info: pytest.LogCaptureFixture
) -> None:
    model = toy(depth=4)
    clock = Clock(monkeypatch, model, 1.0)

    def slower() -> Any:
        for batch in images(8).split(2):
            yield batch
            clock.seconds = 5.0

    class Loader(list[Tensor]):
        def __iter__(self) -> Any:
            return slower()

    importance = tp_amp.EntropyTaylorImportance("prediction")
    importance.collect(model, Loader(images(8).split(2)), progress=False)
    (warning,) = messages(info, logging.WARNING)
    assert warning.startswith("scoring took 64.0 s")
    assert "estimated were 16.0 s" in warning


def test_short_runs_say_nothing(info: pytest.LogCaptureFixture) -> None:
    pruner_of(toy(depth=2)).step()
    assert not info.records


def test_a_sequential_test_and_a_target_stay_within_the_estimate(
    monkeypatch: pytest.MonkeyPatch, info: pytest.LogCaptureFixture
) -> None:
    for options in ({"error_probability": 0.1}, {"target": {"params": 0.9}}):
        model = toy(depth=4)
        Clock(monkeypatch, model, 2.0)
        pruner_of(model, steps=3, progress=False, **options).step()
    assert len(messages(info, logging.INFO)) > 6
    assert not any("took" in warning for warning in messages(info, logging.WARNING))


def test_a_known_dense_entropy_leaves_no_estimate(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pruner_of(toy(depth=2), checkpoint=tmp_path).step()
    with caplog.at_level(logging.INFO, logger="tp_amp"):
        pruner_of(toy(depth=2), checkpoint=tmp_path).step()
    assert "no estimate of the time: the dense entropy comes from the checkpoint" in caplog.text


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.21, "3.2 s"), (119, "119.0 s"), (300, "5.0 min"), (7200, "2.0 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert str(Estimate(seconds, 2 * 10**9)) == f"{text}, 2.00 GB"
