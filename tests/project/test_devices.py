"""Everything on every device and in every number format, against the CPU in float64.

`make cuda` runs what is marked `cuda` on a GPU; the same tests run on the CPU everywhere.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import device_ranks
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from entropies import entropy_of
from small_models import vit
from torch import Tensor, nn
from toys import images, masked, relative, toy

import tp_amp
from tp_amp.importance.readiness import make_ready

pytestmark = pytest.mark.usefixtures("one_thread")
QUIET = {"progress": False}
GPU = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
PRECISIONS = ["float32", "bfloat16", "autocast"]


class Place(NamedTuple):
    """Where a model is, and what it computes in."""

    device: str
    precision: str

    def put(self, model: nn.Module) -> nn.Module:
        dtype = torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        return copy.deepcopy(model).to(self.device, dtype)

    def batches(self, count: int = 24, **options: Any) -> list[Tensor]:
        """As a loader gives them, on the CPU in float32."""
        return list(images(count, **options).split(8))

    def context(self) -> Any:
        if self.precision == "autocast":
            return torch.autocast(self.device, torch.bfloat16)
        return nullcontext()

    def run(self, model: nn.Module, x: Tensor) -> Tensor:
        """What the model gives, on the CPU in float64."""
        first = next(model.parameters())
        with torch.no_grad(), self.context():
            return model(x.to(first)).cpu().double()

    def holds(self, model: nn.Module) -> bool:
        """Whether a model is still where it was put, in the same number format."""
        expected = torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        return {(p.device.type, p.dtype) for p in model.parameters()} == {(self.device, expected)}

    @property
    def half(self) -> bool:
        return self.precision != "float32"


@pytest.fixture(params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def place(device: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return Place(device, precision)


@pytest.fixture
def exact() -> Place:
    """The reference."""
    return Place("cpu", "float32")


def close(found: Tensor, expected: Tensor, place: Place, half: float = 0.1) -> bool:
    """Whether values are equal up to what the number format allows."""
    return relative(found.cpu().double(), expected.double()) < (half if place.half else 1e-3)


def wide(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


@pytest.mark.parametrize("objective", ["prediction", "similarity"])
@pytest.mark.parametrize("again", [False, True], ids=["plain", "activation checkpointing"])
def test_scores(place: Place, objective: str, again: bool) -> None:
    model = toy(classes=5 if objective == "prediction" else 0)
    # A temperature at which bfloat16 tells the images apart.
    options: dict[str, Any] = {"temperature": 0.5, "activation_checkpointing": again}
    importance = tp_amp.EntropyTaylorImportance(objective, **options)
    with place.context():
        found = importance.collect(place.put(model), place.batches(), **QUIET).scores
    plain = tp_amp.EntropyTaylorImportance(objective, temperature=0.5)
    expected = plain.collect(wide(model), place.batches(), **QUIET).scores
    assert found.keys() == expected.keys()
    for name, scores in expected.items():
        assert close(found[name], scores, place, half=0.3), name
        if len(scores) > 2:
            pair = torch.stack([found[name].cpu().double(), scores.double()])
            assert torch.corrcoef(pair)[0, 1] > (0.97 if place.half else 1 - 1e-6), name


def test_reconstruction_orders_and_errors(place: Place) -> None:
    model, batches = toy(), place.batches(64)
    with place.context():
        found = tp_amp.ReconstructionImportance(None).collect(place.put(model), batches, **QUIET)
    expected = tp_amp.ReconstructionImportance(None).collect(wide(model), batches, **QUIET)
    for name, errors in expected.errors.items():
        assert sorted(found.orders[name].tolist()) == list(range(len(errors) - 1))
        assert close(found.errors[name], errors, place), name


def test_a_plan_for_a_target_meets_it(place: Place) -> None:
    model = place.put(toy())
    dense = sum(parameter.numel() for parameter in model.parameters())
    importance = tp_amp.ReconstructionImportance(data=place.batches())
    example = place.batches()[0][:1].to(next(model.parameters()))
    with place.context():
        plan = tp_amp.plan_for_target(model, example, importance, {"params": 0.8})
        tp_amp.apply_plan(model, plan)
    assert 0.75 < sum(parameter.numel() for parameter in model.parameters()) / dense <= 0.8
    assert place.holds(model)


@pytest.mark.parametrize("kind", [tp_amp.DIMAPImportance, tp_amp.GramSchmidtImportance])
def test_importances_of_weights(place: Place, kind: Any) -> None:
    model, example = toy(), images(1)
    there = place.put(model)
    given = example.to(next(there.parameters()))
    found = tp_amp.plan_from_importance(there, given, kind(), 0.5)
    expected = tp_amp.plan_from_importance(wide(model), example.double(), kind(), 0.5)
    for name, kept in expected.keep.items():
        common = len({*kept} & {*found.keep[name]})
        assert common >= len(kept) - (2 if place.half else 0), name


def test_torch_prunings_importances_are_made_ready(place: Place) -> None:
    import torch_pruning as tp

    model = place.put(toy())
    batches = [(x, torch.arange(len(x)) % 5) for x in place.batches()]
    with place.context():
        importance = make_ready(tp.importance.TaylorImportance(), model, batches, **QUIET)
    example = images(1).to(next(model.parameters()))
    plan = tp_amp.plan_from_importance(model, example, importance, 0.5)
    assert {len(kept) for kept in plan.keep.values()} == {10}


@pytest.mark.parametrize("compensation", ["none", "affine"])
@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_search(place: Place, compensation: Any, cache_bytes: int) -> None:
    model, batches = toy(), place.batches()
    there = place.put(model)
    importance = tp_amp.EntropyTaylorImportance(data=place.batches(seed=5))
    example = images(1).to(next(there.parameters()))
    options = {"compensation": compensation, "cache_bytes": cache_bytes, "max_increase": 0.05}
    with place.context():
        pruner = tp_amp.AdaptiveMLPPruner(there, example, importance, batches, **options, **QUIET)
        pruner.step()
    plan = pruner.plan
    assert any(len(kept) < 20 for kept in plan.keep.values())
    assert place.holds(there)
    if compensation == "none":
        dense = masked(model.double(), plan.keep)
        x = torch.cat(batches)
        with torch.no_grad():
            expected = dense(x.double())
        assert close(place.run(there, x), expected, place)
        entropy = float(entropy_of("prediction", expected))
        # The first MLP is searched last, so that its last accepted width is that of the plan.
        last = [probe for probe in plan.probes["blocks.0.mlp.second"] if probe.accepted]
        if last:
            assert last[-1].entropy == pytest.approx(entropy, rel=0.05 if place.half else 1e-4)
    else:
        assert place.run(there, batches[0]).isfinite().all()


def half_plan(model: nn.Module, example: Tensor) -> tp_amp.PruningPlan:
    mlps = tp_amp.find_mlps(model, example)
    return tp_amp.PruningPlan({mlp.down: list(range(0, mlp.width, 2)) for mlp in mlps})


@pytest.mark.parametrize("weights", [None, "sensitivity"])
def test_compensation(place: Place, weights: Any) -> None:
    model, batches = toy(), place.batches(64)
    options: dict[str, Any] = {"every_linear": True, "ridge": 1e-2, **QUIET}
    there, exact = place.put(model), wide(model)
    plan = half_plan(exact, images(1).double())
    torch.manual_seed(0)
    with place.context():
        fitted = tp_amp.compensate(there, plan, batches, token_weights=weights, **options)
    assert place.holds(there)
    assert all(value.error <= value.error_before for value in fitted.values())
    if weights is None:
        tp_amp.compensate(exact, plan, batches, **options)
        with torch.no_grad():
            expected = exact(batches[0].double())
        assert close(place.run(there, batches[0]), expected, place, half=0.2)


def test_refinement(place: Place) -> None:
    """Both layers of an MLP come closer to its output than the closed form."""
    model, batches = toy(), place.batches(64)
    plan = half_plan(model, images(1))
    errors = {}
    for refine in (0, 10):
        there = place.put(model)
        with place.context():
            fitted = tp_amp.compensate(
                there, plan, batches, every_linear=True, refine=refine, **QUIET
            )
        assert place.holds(there)
        assert set(fitted) >= set(plan.keep)
        with torch.no_grad():
            expected = wide(model)(torch.cat(batches).double())
        found = place.run(there, torch.cat(batches))
        errors[refine] = float((found - expected).square().mean())
    assert errors[10] < errors[0] * (1.1 if place.half else 1)


@pytest.mark.parametrize("train", ["all", "cut"])
def test_distillation(place: Place, train: Any) -> None:
    teacher = place.put(toy())
    student = copy.deepcopy(teacher)
    example = images(1).to(next(teacher.parameters()))
    tp_amp.apply_plan(student, half_plan(student, example), example)
    x = torch.cat(place.batches())

    def tokens(model: nn.Module) -> Tensor:
        """Before the final norm."""
        with torch.no_grad():
            embedded = model.embed(x.to(next(model.parameters())))
            return model.blocks(embedded.flatten(2).transpose(1, 2)).cpu().double()

    before = float((tokens(student) - tokens(teacher)).square().mean())
    AcceleratorState._reset_state(True)  # of the precision of a run before
    mixed = "bf16" if place.precision == "autocast" else "no"
    accelerator = Accelerator(mixed_precision=mixed, cpu=place.device == "cpu")
    options = {"epochs": 4, "learning_rate": 0.3, "train": train, "accelerator": accelerator}
    tp_amp.distill(student, teacher, place.batches(), **options, **QUIET)
    assert float((tokens(student) - tokens(teacher)).square().mean()) < 0.9 * before
    assert place.holds(student)
    assert place.holds(teacher)


def test_saving(place: Place, tmp_path: Path) -> None:
    model = place.put(toy())
    example = images(1).to(next(model.parameters()))
    plan = half_plan(model, example)
    tp_amp.compensate(model, plan, place.batches(), **QUIET)
    tp_amp.save_pruned(model, tmp_path, plan)
    for device in {place.device, "cpu"}:
        again = place.put(toy()).to(device)
        tp_amp.load_pruned(again, tmp_path)
        expected = model.state_dict()
        for name, value in again.state_dict().items():
            assert value.device.type == device
            assert torch.equal(value.cpu(), expected[name].cpu()), name


def test_heads(place: Place) -> None:
    """Attentions are found, cut and searched there as on the CPU."""
    model = vit(depth=2)
    there, expected = place.put(model), tp_amp.find_attentions(model, images(1, 3, 16, 3))
    example = images(1, 3, 16, 3).to(next(there.parameters()))
    scoring, batches = images(32, 3, 16, 3).split(8)[:2], images(32, 4, 16, 3).split(8)[:2]
    assert [x.down for x in tp_amp.find_attentions(there, example)] == [x.down for x in expected]
    assert len(tp_amp.inspect(there, example).attentions) == len(expected) == 2
    importance = tp_amp.EntropyTaylorImportance(data=scoring)
    with place.context():
        pruner = tp_amp.AdaptiveMLPPruner(
            there, example, importance, batches, prune_num_heads=True, max_increase=1.0, **QUIET
        )
        pruner.step()
    assert all(len(pruner.plan.keep[site.down]) < site.width for site in expected)
    assert place.run(there, batches[0]).isfinite().all()
    assert place.holds(there)


def test_residual_streams(place: Place, exact: Place) -> None:
    """Rotated, planned and cut there as on the CPU."""
    model, x = vit(depth=2), images(32, 3, 16, 3)
    there, here = place.put(model), wide(model)
    example = x[:1].to(next(there.parameters()))
    dense = exact.run(wide(model), x)
    with place.context():
        found = tp_amp.rotate(there, example, x.split(8), **QUIET)
        [expected] = tp_amp.rotate(here, x[:1].double(), x.double().split(8), **QUIET)
        assert [f.stream for f in found] == [expected.stream]
        assert len(tp_amp.inspect(there, example).streams) == 1
    assert torch.tensor(found[0].errors).allclose(torch.tensor(expected.errors), atol=0.02)
    assert place.holds(there)
    assert close(place.run(there, x), dense, place)
    plan = tp_amp.stream_plan(found, 0.5)
    tp_amp.apply_plan(there, plan)
    tp_amp.apply_plan(here, plan)
    assert place.holds(there)
    assert close(place.run(there, x), exact.run(here, x), place, half=0.2)


TWO_GPUS = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs"),
]


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=TWO_GPUS)])
def test_two_ranks_find_what_one_does(device: str, tmp_path: Path) -> None:
    """Over gloo on the CPU, over NCCL on two GPUs."""
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join([str(tests), str(Path(tp_amp.__file__).parents[1])])
    command = [sys.executable, str(tests / "device_ranks.py")]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path), device],
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(device_ranks.WORLD)
    ]
    try:
        told = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), told
    alone = device_ranks.work(device)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(device_ranks.WORLD)]
    assert ranks[0]["plan"] == ranks[1]["plan"]
    assert ranks[0].keys() == ranks[1].keys() == alone.keys()
    for name, value in alone.items():
        if name != "plan":
            torch.testing.assert_close(ranks[0][name], value, rtol=1e-3, atol=1e-5)
            assert torch.equal(ranks[0][name], ranks[1][name]), name
