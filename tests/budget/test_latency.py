"""Latencies against a clock that knows the widths; once against the real one."""

import copy
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from packaging.version import Version
from torch import nn
from toys import fingerprint, images, toy
from zoo import SWIN_HEADS

import tp_amp
from tp_amp.budget.budget import Budget
from tp_amp.running.runtimes.building import Built
from tp_amp.structure.model_structure import ModelStructure, Site

DOWNS = ["blocks.0.mlp.second", "blocks.1.mlp.second"]
Clock = Callable[[Callable[[nn.Module], float]], None]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Let a forward pass take the milliseconds that a function of the model gives."""

    def set_to(milliseconds: Callable[[nn.Module], float]) -> None:
        monkeypatch.setattr(
            "tp_amp.budget.latency.seconds", lambda model, *_: milliseconds(model) / 1000
        )

    return set_to


def widths_of(model: nn.Module) -> list[int]:
    return [model.get_submodule(name).in_features for name in DOWNS]


def linear(model: nn.Module) -> float:
    return 4 + 0.1 * sum(widths_of(model))


def budget_of(
    model: nn.Module,
    target: dict[str, float],
    round_to: int = 1,
    inputs: Any = None,
    runtime: str = "eager",
    min_width: int = 1,
) -> Budget:
    inputs = images(1) if inputs is None else inputs
    structure = ModelStructure(model, inputs)
    return Budget(target, structure, structure.mlps, round_to, runtime, min_width)


def reconstruction() -> tp_amp.ReconstructionImportance:
    return tp_amp.ReconstructionImportance("prediction", data=[images()])


def cut(model: nn.Module, widths: dict[str, int], inputs: Any) -> nn.Module:
    model = copy.deepcopy(model)
    plan = tp_amp.PruningPlan({name: list(range(width)) for name, width in widths.items()})
    tp_amp.apply_plan(model, inputs, plan)
    return model


@pytest.mark.parametrize("widths", [(40, 40), (1, 40), (13, 29), (1, 1)])
def test_the_cost_is_the_time_of_the_model_cut_for_real(
    clock: Clock, widths: tuple[int, int]
) -> None:
    clock(linear)
    model = toy(hidden=40)
    found = budget_of(model, {"latency": 0.5})
    named = dict(zip(DOWNS, widths, strict=True))
    assert found.cost(named) == pytest.approx(linear(cut(model, named, images(1))))
    assert found.dense == pytest.approx(12)
    assert found.amount == pytest.approx(6)


def test_an_mlp_that_goes_saves_what_no_width_of_it_does(clock: Clock) -> None:
    """What its norms and calls take, say, which one channel costs as well as all."""

    def milliseconds(model: nn.Module) -> float:
        return 4 + sum(2 + 0.05 * width for width in widths_of(model) if width)

    clock(milliseconds)
    model = toy(hidden=40)
    found = budget_of(model, {"latency": 6.5}, min_width=0)
    for widths in ((0, 40), (0, 1), (40, 40)):
        named = dict(zip(DOWNS, widths, strict=True))
        expected = milliseconds(cut(model, named, images(1)))
        assert found.cost(named) == pytest.approx(expected)
    target = {"latency": 6.5}  # two of one channel each take 8.1 ms
    with pytest.raises(ValueError, match="can't be met"):
        tp_amp.plan_for_target(model, images(1), reconstruction(), target)
    plan = tp_amp.plan_for_target(model, images(1), reconstruction(), target, min_width=0)
    assert sorted(plan.widths.values())[0] == 0
    assert 5.8 < milliseconds(cut(model, plan.widths, images(1))) <= 6.5


def test_layers_that_differ_have_tables_of_their_own(clock: Clock) -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", **SWIN_HEADS)
    inputs = images(1, size=64, channels=3)
    structure = ModelStructure(model, inputs)
    mlps, (attentions, _) = structure.mlps, structure.attentions
    sites: list[Site] = [*mlps, *attentions]

    def milliseconds(model: Any) -> float:
        """Early stages have more tokens, and a head costs more than a channel."""
        total = 3.0
        for site in sites:
            stage = int(site.name.split(".")[1])
            channels = model.get_submodule(site.down).in_features
            total += channels / 2**stage * (5 if site in attentions else 1)
        return total

    clock(milliseconds)
    found = Budget({"latency": 0.5}, structure, sites)
    widths = {site.down: max(1, site.width // (2 + i % 3)) for i, site in enumerate(sites)}
    assert found.cost(widths) == pytest.approx(milliseconds(cut(model, widths, inputs)))


@pytest.mark.parametrize(
    "milliseconds",
    [linear, lambda model: 4 + sum(1 + w // 10 + (w / 40) ** 2 for w in widths_of(model))],
)
@pytest.mark.parametrize("target", [{"latency": 0.8}, {"latency": 9.0}])
@pytest.mark.parametrize("way", ["plan", "search"])
def test_the_target_is_met(
    clock: Clock,
    milliseconds: Callable[[nn.Module], float],
    target: dict[str, float],
    way: str,
) -> None:
    clock(milliseconds)
    model = toy(hidden=40)
    dense, before = milliseconds(model), fingerprint(model.train())
    if way == "plan":
        plan = tp_amp.plan_for_target(model, images(1), reconstruction(), target)
        assert fingerprint(model) == before
        tp_amp.apply_plan(model, images(1), plan)
    else:
        pruner = tp_amp.AdaptiveMLPPruner(
            model,
            images(1),
            tp_amp.EntropyTaylorImportance("prediction", data=[images()]),
            [images(seed=2)],
            target=target,
        )
        assert fingerprint(model) == before
        pruner.step()
    [amount] = target.values()
    allowed = amount * dense if amount <= 1 else amount
    # Between measured widths the table is a straight line and these times are not.
    slack = 1 + 1e-9 if milliseconds is linear else 1.1
    assert (0.9 if way == "plan" else 0.5) * allowed < milliseconds(model) <= slack * allowed


def test_a_target_out_of_reach_tells_the_range(clock: Clock) -> None:
    clock(linear)
    model = toy(hidden=40)
    before = fingerprint(model)
    message = re.escape(
        "the target of 1.2 ms of latency can't be met: reachable are 4.2 to 12, "
        "fractions 0.350 to 1"
    )
    with pytest.raises(ValueError, match=message):
        tp_amp.plan_for_target(model, images(1), reconstruction(), {"latency": 0.1})
    with pytest.raises(ValueError, match=r"reachable are 6 to 12, fractions 0\.500 to 1"):
        tp_amp.AdaptiveMLPPruner(
            model,
            images(1),
            reconstruction(),
            [images(seed=2)],
            target={"latency": 0.1},
            min_width=10,
        )
    assert fingerprint(model) == before


@pytest.mark.parametrize("time", [12.0003, 11.9999, 12.0, 15.0])
def test_a_model_that_cutting_makes_no_faster_is_told(clock: Clock, time: float) -> None:
    """Times that differ by noise alone have no range whose ends could be told in order."""
    model = toy(hidden=40)
    clock(lambda model: 12.0002 if sum(widths_of(model)) == 80 else time)
    message = r"cutting makes the model no faster: it has 12 ms of latency, and .*time larger"
    with pytest.raises(ValueError, match=message):
        tp_amp.plan_for_target(model, images(1), reconstruction(), {"latency": 0.9})


def test_widths_that_suit_the_device_badly_are_not_measured(clock: Clock) -> None:
    seen: set[int] = set()

    def milliseconds(model: nn.Module) -> float:
        seen.update(widths_of(model))
        return 4 + sum(w * (2 if w % 8 else 1) for w in widths_of(model)) / 10

    clock(milliseconds)
    model = toy(hidden=64)
    found = budget_of(model, {"latency": 0.8}, round_to=8)
    assert seen == {8, 16, 24, 40, 48, 64}
    assert found.cost(dict.fromkeys(DOWNS, 48)) == pytest.approx(4 + 9.6)


def test_time_never_falls_with_the_width(clock: Clock) -> None:
    """A narrow width that is slow by itself counts as slow as it is, and so do wider ones."""
    clock(lambda model: 4 + sum({13: 60, 38: 70}.get(w, w) for w in widths_of(model)) / 10)
    found = budget_of(toy(hidden=64), {"latency": 0.8})
    costs = found.costs(DOWNS[0])
    assert len(costs) == 65
    assert bool((costs.diff() >= 0).all())
    expected = {1: 0, 13: 5.9, 26: 5.9, 38: 6.3, 51: 6.3, 64: 6.3}
    assert {width: float(costs[width]) for width in expected} == pytest.approx(expected)


def test_a_layer_narrower_than_a_step_stays(clock: Clock) -> None:
    clock(linear)
    found = budget_of(toy(hidden=40), {"latency": 1.0}, round_to=64)
    assert found.cost(dict.fromkeys(DOWNS, 40)) == found.dense == pytest.approx(12)


def test_what_the_table_misses_is_told(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """As long as its widest layer takes: what layers save does not add up."""
    clock(lambda model: 2 + max(widths_of(model)))
    found = budget_of(toy(hidden=40), {"latency": 0.6})
    with caplog.at_level(logging.INFO, "tp_amp.budget.budget"):
        found.confirm({DOWNS[0]: range(5), DOWNS[1]: range(40)})
        found.amount = 22.0
        found.confirm(dict.fromkeys(DOWNS, range(20)))
    wrong, right = caplog.records
    assert wrong.levelname == "WARNING"
    assert (
        "is 42 ms (1.000 of the dense model's), the target 25.2 ms (0.600), from the table 24.5 ms"
        in wrong.getMessage()
    )
    assert right.levelname == "INFO"
    assert "is 22 ms (0.524 of the dense model's), the target 22 ms (0.524)" in right.getMessage()


def test_a_busy_spell_is_no_part_of_the_table(clock: Clock) -> None:
    calls = 0

    def milliseconds(model: nn.Module) -> float:
        nonlocal calls
        calls += 1
        return linear(model) * (7 if 10 < calls < 25 else 1)

    clock(milliseconds)
    found = budget_of(toy(hidden=40), {"latency": 0.6})
    assert found.cost(dict.fromkeys(DOWNS, 1)) == pytest.approx(4.2)


def test_load_that_stays_slows_all_alike(clock: Clock) -> None:
    calls = 0

    def milliseconds(model: nn.Module) -> float:
        nonlocal calls
        calls += 1
        return linear(model) * (2 if calls > 18 else 1)

    clock(milliseconds)
    found = budget_of(toy(hidden=40), {"latency": 0.6})
    assert found.cost(dict.fromkeys(DOWNS, 1)) / found.dense == pytest.approx(4.2 / 12)


def test_without_values_there_is_no_time() -> None:
    model, inputs = toy().to("meta"), images(1).to("meta")
    with pytest.raises(ValueError, match=r"meta device can't be measured; move it to the device"):
        budget_of(model, {"latency": 0.5}, inputs=inputs)


def test_the_real_clock_sees_that_a_narrow_model_is_faster() -> None:
    torch.manual_seed(0)
    model = toy(width=48, hidden=4000)
    found = budget_of(model, {"latency": 0.5}, inputs=images(64))
    smallest = dict.fromkeys(DOWNS, 1)
    assert 0 < found.cost(smallest) < 0.7 * found.dense
    assert found.latency is not None
    assert found.latency.measure({name: range(1) for name in DOWNS}) < 0.8 * found.dense


class Runtime:
    """Stands for a runtime: what is built takes the milliseconds of a function, and is counted."""

    def __init__(self, milliseconds: Callable[[nn.Module], float]) -> None:
        self.milliseconds, self.built = milliseconds, list[list[int]]()

    def build(self, model: nn.Module, inputs: Any, runtime: str, forward_fn: Any) -> Any:
        assert runtime == "compile"
        assert not model.training
        self.built.append(widths_of(model))
        taken = self.milliseconds(model)
        return Built(lambda *_: taken)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Runtime]:
    """PyTorch takes the milliseconds of one function of the model, a runtime those of another."""

    def set_to(
        eager: Callable[[nn.Module], float], elsewhere: Callable[[nn.Module], float]
    ) -> Runtime:
        made = Runtime(elsewhere)
        monkeypatch.setattr("tp_amp.budget.latency.build", made.build)
        monkeypatch.setattr(
            "tp_amp.budget.latency.seconds",
            lambda run, *_: (eager(run) if isinstance(run, nn.Module) else run()) / 1000,
        )
        return made

    return set_to


def hollow(model: nn.Module) -> float:
    """Narrow widths gain a runtime less than in proportion, and each call costs it more."""
    return 2 + sum((width / 40) ** 0.5 for width in widths_of(model))


@pytest.mark.parametrize("share", [0.9, 0.8, 0.7])
def test_the_target_is_met_in_the_runtime(
    runtime: Callable[..., Runtime], share: float, caplog: pytest.LogCaptureFixture
) -> None:
    made = runtime(linear, hollow)
    model = toy(hidden=40)
    before = fingerprint(model.train())
    with caplog.at_level(logging.WARNING, "tp_amp.budget.budget"):
        plan = tp_amp.plan_for_target(
            model, images(1), reconstruction(), {"latency": share}, runtime="compile"
        )
    assert fingerprint(model) == before
    assert not caplog.records
    tp_amp.apply_plan(model, images(1), plan)
    assert abs(hollow(model) / (share * 4) - 1) < 0.06
    assert made.built[:2] == [[40, 40], [1, 1]]
    assert made.built[-1] == widths_of(model)
    assert len(made.built) <= 5


def test_a_target_hardly_above_what_the_runtime_reaches_is_met(
    runtime: Callable[..., Runtime],
) -> None:
    """The first widths save less than foreseen; the smallest are known to save enough."""

    def flat(model: nn.Module) -> float:
        return 2 + sum((width / 40) ** 0.25 for width in widths_of(model))

    runtime(linear, flat)
    model = toy(hidden=40)
    plan = tp_amp.plan_for_target(
        model, images(1), reconstruction(), {"latency": 0.72}, runtime="compile"
    )
    tp_amp.apply_plan(model, images(1), plan)
    assert abs(flat(model) / (0.72 * 4) - 1) < 0.05


def test_a_search_meets_the_target_in_the_runtime(runtime: Callable[..., Runtime]) -> None:
    runtime(linear, hollow)
    model = toy(hidden=40)
    pruner = tp_amp.AdaptiveMLPPruner(
        model,
        images(1),
        tp_amp.EntropyTaylorImportance("prediction", data=[images()]),
        [images(seed=2)],
        target={"latency": 0.75},
        runtime="compile",
    )
    pruner.step()
    assert abs(hollow(model) / 3 - 1) < 0.06
    assert pruner.plan.widths == dict(zip(DOWNS, widths_of(model), strict=True))


def test_the_range_that_is_told_is_the_runtimes(runtime: Callable[..., Runtime]) -> None:
    runtime(linear, lambda model: 100 + sum(widths_of(model)))
    model = toy(hidden=40)
    with pytest.raises(ValueError, match=r"reachable are 102 to 180, fractions 0\.567 to 1"):
        tp_amp.plan_for_target(
            model, images(1), reconstruction(), {"latency": 50.0}, runtime="compile"
        )


def test_a_model_that_is_no_faster_in_the_runtime_is_told(runtime: Callable[..., Runtime]) -> None:
    runtime(linear, lambda model: 7.0)
    with pytest.raises(ValueError, match="cutting makes the model no faster: it has 7 ms"):
        budget_of(toy(hidden=40), {"latency": 0.8}, runtime="compile").check(
            dict.fromkeys(DOWNS, 1)
        )


@pytest.mark.parametrize(
    ("target", "runtime", "message"),
    [
        ({"params": 0.5}, "compile", "runtime='compile' is where a latency is measured"),
        ({"latency": 0.5}, "tensorrt", "runtime must be one of"),
    ],
)
def test_a_runtime_without_a_latency_or_unknown_raises(
    target: dict[str, float], runtime: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tp_amp.plan_for_target(toy(), images(1), reconstruction(), target, runtime=runtime)


@pytest.mark.skipif(Version(torch.__version__) < Version("2.6"), reason="exports otherwise")
def test_what_is_built_is_the_cut_model() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    torch.manual_seed(0)
    model = toy(width=48, hidden=4000)
    found = budget_of(model, {"latency": 0.5}, inputs=images(64), runtime="onnxruntime")
    assert found.cost(dict.fromkeys(DOWNS, 1)) < 0.7 * found.dense
