"""The search that measures each probe on as few images as a verdict needs."""

from __future__ import annotations

import copy
import logging
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from toys import images, masked, toy

import tp_amp
from tp_amp.search.search_estimate import estimate_search

BATCHES = 32


def pruner_of(model: nn.Module, error: float | None, **options: Any) -> Any:
    importance = tp_amp.EntropyTaylorImportance(data=images(8, seed=3).split(4))
    batches = options.pop("batches", images(4 * BATCHES, seed=4).split(4))
    return tp_amp.AdaptiveMLPPruner(
        model, images(1), importance, batches, error_probability=error, progress=False, **options
    )


def searched(model: nn.Module, error: float | None, **options: Any) -> tuple[Any, int]:
    """The pruner after its search, and the images that the model was called on."""
    model = copy.deepcopy(model)
    pruner = pruner_of(model, error, **options)
    called: list[int] = []
    model.register_forward_pre_hook(lambda _, args: called.append(len(args[0])))
    pruner.step()
    return pruner, sum(called)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rescore": {"rescore": True},
    "target": {"target": {"params": 0.8}},
    "compensation": {"compensation": "affine"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_next_to_no_error_is_the_plain_search_bit_for_bit(options: dict[str, Any]) -> None:
    model = toy(depth=2)
    plain, _ = searched(model, None, **options)
    exact, _ = searched(model, 1e-300, **options)
    assert exact.plan.to_json() == plain.plan.to_json()
    assert exact.forwards.used == exact.forwards.plain


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_prefix_and_a_second_run_find_the_same(options: dict[str, Any]) -> None:
    model = toy(depth=2)
    first, _ = searched(model, 0.1, cache_bytes=0, **options)
    for limit in (0, 2**30):
        again, _ = searched(model, 0.1, cache_bytes=limit, **options)
        assert again.plan.to_json() == first.plan.to_json()
        assert again.forwards == first.forwards


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_plan_within_one_step_with_fewer_images(seed: int) -> None:
    model = toy(seed, hidden=64, depth=3)
    options = {"max_increase": 0.02, "cache_bytes": 0}
    plain, every = searched(model, None, **options)
    found, fewer = searched(model, 0.05, **options)
    widths = found.plan.widths
    steps = {
        name: abs(len(kept) - len(plain.plan.keep[name])) for name, kept in found.plan.keep.items()
    }
    assert max(steps.values()) <= 1, (widths, steps)
    assert fewer < 0.9 * every
    # Besides the search: scoring, and the first batch to see what the model ends in.
    assert fewer - found.forwards.used == every - found.forwards.plain


def entropies(model: nn.Module, kept: dict[str, list[int]], count: int = 4 * BATCHES) -> Tensor:
    """Of each image, of the dense model with all other neurons masked."""
    with torch.no_grad():
        logs = masked(model, kept).eval()(images(count, seed=4)).log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_is_kept_is_within_tolerance_on_all_images(seed: int) -> None:
    model = toy(seed, hidden=64, depth=3)
    plan = searched(model, 0.05, max_increase=0.02)[0].plan
    scores = tp_amp.EntropyTaylorImportance().collect(model, images(8, seed=3).split(4)).scores
    reference, kept = float(entropies(model, {}).mean()), {}
    for name in sorted(plan.keep, reverse=True):
        best, width = scores[name].argsort(descending=True), len(plan.keep[name])
        assert sorted(best[:width].tolist()) == plan.keep[name]
        kept[name] = best[:width].tolist()
        found = float(entropies(model, kept).mean())
        assert found - reference <= (0.02 + 1e-6 if width < 64 else 1e-6)
        reference = found


def test_each_state_was_measured_as_what_it_names(tmp_path: Any) -> None:
    """Also the last accepted one, which goes on while the next layer is searched."""
    model = toy(hidden=64, depth=3)
    plan = searched(
        model, 0.05, max_increase=0.02, batches=images(512, seed=4).split(4), checkpoint=tmp_path
    )[0].plan
    scores = tp_amp.EntropyTaylorImportance().collect(model, images(8, seed=3).split(4)).scores
    names = sorted(plan.keep, reverse=True)
    tensors = load_file(next(tmp_path.glob("*.safetensors")))
    states = {n.split()[-1]: t for n, t in tensors.items() if n.startswith("sequential values ")}
    assert len(states) > 10
    for state, values in states.items():
        widths = [] if state == "values" else map(int, state.split(","))
        kept = {
            name: scores[name].argsort(descending=True)[:width].tolist()
            for name, width in zip(names, widths, strict=False)
        }
        torch.testing.assert_close(
            values, entropies(model, kept, 512)[: len(values)], rtol=1e-4, atol=1e-6
        )


def test_the_time_is_compared_with_what_the_parts_of_probes_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Probes and parts of them, as many as images were run, beside the dense model."""
    asked: list[float] = []

    def estimate(profile: Any, places: Any, probes: Any, limit: int) -> Any:
        asked.append(sum(probes))
        return estimate_search(profile, places, probes, limit)

    monkeypatch.setattr("tp_amp.search.width_search.estimate_search", estimate)
    pruner, _ = searched(toy(hidden=64, depth=3), 0.05, max_increase=0.02)
    used, plain = pruner.forwards
    assert asked[-1] == pytest.approx(used / (4 * BATCHES) - 1)
    assert used < plain


def test_a_run_goes_on_where_it_was_killed(tmp_path: Any) -> None:
    model = toy(depth=2)
    whole, needed = searched(model, 0.1)
    killed, called = copy.deepcopy(model), []

    def kill(module: nn.Module, args: Any) -> None:
        called.append(1)
        if len(called) == 150:
            raise KeyboardInterrupt

    killed.register_forward_pre_hook(kill)
    with pytest.raises(KeyboardInterrupt):
        pruner_of(killed, 0.1, checkpoint=tmp_path).step()
    again, rest = searched(model, 0.1, checkpoint=tmp_path)
    assert again.plan.to_json() == whole.plan.to_json()
    assert again.forwards == whole.forwards
    assert rest < needed
    with pytest.raises(ValueError, match=r"error_probability was 0\.1, now 0\.2"):
        pruner_of(copy.deepcopy(model), 0.2, checkpoint=tmp_path).step()


def test_batches_are_the_units_of_other_objectives() -> None:
    model = toy(depth=2)
    plain, _ = searched(model, None, objective="similarity")
    exact, _ = searched(model, 1e-300, objective="similarity")
    found, _ = searched(model, 0.1, objective="similarity")
    assert exact.plan.to_json() == plain.plan.to_json()
    assert found.forwards.used < found.forwards.plain


class Reversed:
    """Batches in another order each time."""

    def __init__(self) -> None:
        self.turn = 0

    def __iter__(self) -> Any:
        self.turn += 1
        return iter(images(64).split(4)[:: 1 if self.turn % 2 else -1])


def test_other_batches_each_time_are_refused() -> None:
    with pytest.raises(ValueError, match="another one than before"):
        pruner_of(toy(), 0.1, batches=Reversed()).step()


def test_sorted_images_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Each batch one image, four times over."""
    batches = [image.expand(4, -1, -1, -1) + 0.01 * images(4) for image in images(20).split(1)]
    with caplog.at_level(logging.WARNING):
        pruner_of(toy(), 0.1, batches=batches).step()
    assert "shuffle them once" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        pruner_of(toy(), 0.1).step()
    assert "shuffle them once" not in caplog.text


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    pruner_of(toy(), None)
    with pytest.raises(ImportError, match=r"install tp-amp\[sequential\]"):
        pruner_of(toy(), 0.05)


@pytest.mark.parametrize("error", [0, 0.5, 1.0, -0.1])
def test_probability_out_of_range(error: float) -> None:
    with pytest.raises(ValueError, match="error_probability must be a number between 0 and 0"):
        pruner_of(toy(), error)
