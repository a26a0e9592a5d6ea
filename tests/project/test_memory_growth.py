"""No loop keeps more from step to step than what it has to keep.

Counted are the bytes of all tensors that are alive at the beginning of each step, those that
autograd saves included.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch_pruning as tp
from live_memory import Steps
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from toys import images, toy

import tp_amp
from tp_amp.algebra.moments import Halves
from tp_amp.compensation.walk import _Walk
from tp_amp.importance import sensitivity
from tp_amp.importance.readiness import make_ready
from tp_amp.search.width_search import WidthSearch

pytestmark = pytest.mark.usefixtures("one_thread")
BATCH, BATCHES = 4, 10
STATE = BATCH * 64 * 12 * 4  # bytes between two blocks, of one batch
SETTLED = 3  # steps until everything that a loop keeps is there
PROBES = SETTLED + 4  # of each MLP
QUIET = {"progress": False}


class Read:
    """Batches whose each reading is a loop, and each batch a step of it."""

    def __init__(self, steps: Steps, labels: bool = False) -> None:
        self.steps, self.passes = steps, 0
        self.batches: list[Any] = list(images(BATCH * BATCHES, size=32).split(BATCH))
        if labels:
            self.batches = [(batch, torch.arange(len(batch)) % 5) for batch in self.batches]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        name = f"pass {self.passes}"
        for batch in self.batches:
            self.steps.mark(name)
            yield batch


def marked(patch: pytest.MonkeyPatch, steps: Steps, owner: Any, name: str, label: Any) -> None:
    """Let each call of a function be a step, of a loop that its arguments name."""
    function = getattr(owner, name)

    def call(*args: Any, **options: Any) -> Any:
        steps.mark(label(*args))
        return function(*args, **options)

    patch.setattr(owner, name, call)


def collecting(kind: Any, **options: Any) -> Any:
    def loop(steps: Steps, _patch: Any, _stack: Any) -> Callable[[], Any]:
        model, batches = toy(), Read(steps)
        return lambda: kind(**options).collect(model, batches, **QUIET)

    return loop


def getting_ready(kind: Any) -> Any:
    def loop(steps: Steps, _patch: Any, _stack: Any) -> Callable[[], Any]:
        model, batches = toy(), Read(steps, labels=True)
        return lambda: make_ready(kind(), model, batches, **QUIET)

    return loop


def rotating(rotate: Any) -> Any:
    def loop(steps: Steps, _patch: Any, _stack: Any) -> Callable[[], Any]:
        model, batches = toy(), Read(steps)
        return lambda: rotate(model, images(1, size=32), batches, **QUIET)

    return loop


def sensing(steps: Steps, patch: Any, _stack: Any) -> Callable[[], Any]:
    """The backward passes before a compensation."""

    def name(_model: Any, layers: Any, *_: Any) -> str:
        return f"{len(layers)} layers"  # all that are fitted, or the MLPs that are refined

    marked(patch, steps, sensitivity, "_gradients", name)
    return compensating(token_weights="sensitivity", every_linear=True, refine=1)


def fitting(steps: Steps, patch: Any, _stack: Any) -> Callable[[], Any]:
    """The batches that each layer is fitted on."""
    marked(patch, steps, Halves, "add", lambda halves, *_: halves.name)
    return compensating(every_linear=True)


def stepping(steps: Steps, stack: ExitStack) -> None:
    """Let each step of an optimizer be a step of a loop."""
    known: list[Any] = []

    def hook(optimizer: Any, _args: Any, _options: Any) -> None:
        known.extend([optimizer] * (optimizer not in known))
        steps.mark(f"optimizer {known.index(optimizer)}")

    stack.callback(register_optimizer_step_pre_hook(hook).remove)


def refining(steps: Steps, _patch: Any, stack: ExitStack) -> Callable[[], Any]:
    stepping(steps, stack)
    return compensating(every_linear=True, refine=2)


def compensating(**options: Any) -> Callable[[], Any]:
    model, plan = halved()
    batches = images(BATCH * BATCHES, size=32).split(BATCH)
    return lambda: tp_amp.compensate(model, plan, batches, **options, **QUIET)


def halved(**arguments: Any) -> tuple[nn.Module, tp_amp.PruningPlan]:
    """A dense model, and a plan that keeps half of each MLP."""
    model = toy(**arguments)
    mlps = tp_amp.find_mlps(model, images(1, size=32))
    return model, tp_amp.PruningPlan({mlp.down: list(range(mlp.width // 2)) for mlp in mlps})


def distilling(**options: Any) -> Any:
    def loop(steps: Steps, _patch: Any, stack: ExitStack) -> Callable[[], Any]:
        stepping(steps, stack)
        teacher, plan = halved()
        student = copy.deepcopy(teacher)
        tp_amp.apply_plan(student, plan, images(1, size=32))
        batches = images(BATCH * BATCHES, size=32).split(BATCH)
        further = {"epochs": 2, "learning_rate": 1.0, **options, **QUIET}
        return lambda: tp_amp.distill(student, teacher, batches, **further)

    return loop


def searching(**options: Any) -> Any:
    def loop(steps: Steps, patch: Any, _stack: Any) -> Callable[[], Any]:
        marked(
            patch, steps, WidthSearch, "_probe", lambda _search, widths, _width: widths.site.down
        )
        return search(**options)

    return loop


def probing(steps: Steps, _patch: Any, _stack: Any) -> Callable[[], Any]:
    """The batches of each probe."""
    return search(Read(steps), cache_bytes=0)


def search(calibration: Any = None, depth: int = 2, **options: Any) -> Callable[[], Any]:
    model = toy(hidden=160, depth=depth)  # so wide that no MLP runs out of widths to try
    batches = images(BATCH * BATCHES, size=32).split(BATCH)
    importance = tp_amp.EntropyTaylorImportance().collect(model, batches, **QUIET)
    options = {"max_increase": 1e-3, "steps": PROBES, **options, **QUIET}
    example = images(1, size=32)
    calibration = batches if calibration is None else calibration
    return tp_amp.AdaptiveMLPPruner(model, example, importance, calibration, **options).step


ENTROPY, RECONSTRUCTION = tp_amp.EntropyTaylorImportance, tp_amp.ReconstructionImportance
AGAIN = {"activation_checkpointing": True}
# Name -> the loop, and how many loops with enough steps there are in it.
LOOPS: dict[str, tuple[Any, int]] = {
    "collect, entropy": (collecting(ENTROPY), 1),
    "collect, entropy, activation checkpointing": (collecting(ENTROPY, **AGAIN), 1),
    "collect, reconstruction": (collecting(RECONSTRUCTION), 2),  # covariances, sensitivity
    "collect, reconstruction, checkpointing": (collecting(RECONSTRUCTION, **AGAIN), 2),
    "Taylor": (getting_ready(tp.importance.TaylorImportance), 1),
    "Hessian": (getting_ready(tp.importance.HessianImportance), 1),
    "activations": (getting_ready(tp.pruner.importance.ActivationImportance), 1),
    "rotation of streams": (rotating(tp_amp.rotate), 1),
    "sensitivities": (sensing, 1),
    "compensate": (fitting, 7),  # the first MLP's `down`, and all six Linears of the next block
    "refine": (refining, 2),
    "distill": (distilling(), 1),
    "distill, average": (distilling(ema=0.9), 1),
    "a probe of the search": (probing, 15),  # the dense model, seven widths of each MLP
    "search": (searching(cache_bytes=0), 2),
    "search, cached": (searching(), 2),
    "search, compensated": (searching(compensation="affine"), 2),
}


def growth(name: str, hoard: bool) -> dict[str, int]:
    """Bytes by which each loop has grown at its last step since it was settled."""
    steps, kept = Steps(), list[Tensor]()
    loop, count = LOOPS[name]
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        function = loop(steps, patch, stack)
        if hoard:
            mark = steps.mark
            steps.mark = lambda n: (kept.append(torch.zeros(1)), mark(n))  # type: ignore
        found = steps.run(function)
    long = {label: held for label, held in found.items() if len(held) >= PROBES}
    assert len(long) == count
    return {label: held[-1] - held[SETTLED] for label, held in long.items()}


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_does_not_grow(name: str) -> None:
    assert max(growth(name, hoard=False).values()) <= 0


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_one_number_kept_in_each_step_would_be_seen(name: str) -> None:
    assert min(growth(name, hoard=True).values()) > 0


def test_the_walk_holds_as_much_at_each_depth_but_for_corrections() -> None:
    """States of all batches at one depth, as in the dense model and as in the cut one."""
    steps = Steps()
    model, plan = halved(depth=7)
    batches = images(BATCH * BATCHES, size=32).split(BATCH)
    with pytest.MonkeyPatch.context() as patch:
        marked(patch, steps, _Walk, "take", lambda _walk, _step: "depth")
        fitted: dict[str, Any] = {}
        found = steps.run(
            lambda: fitted.update(
                tp_amp.compensate(model, plan, batches, every_linear=True, **QUIET)
            )
        )
    held = found["depth"][SETTLED:-1]
    corrections = sum(
        value.nbytes
        for name, correction in fitted.items()
        for value in vars(correction).values()
        if name.startswith("blocks.3.") and isinstance(value, Tensor)
    )
    assert 0 < corrections < STATE
    assert max(b - a for a, b in itertools.pairwise(held)) <= corrections


@pytest.mark.parametrize("options", [{"cache_bytes": 0}, {}, {"error_probability": 0.05}], ids=str)
def test_a_search_keeps_no_more_from_mlp_to_mlp_than_what_is_cut(options: Any) -> None:
    """Cached states of blocks that come after the cut are given back."""
    steps, depth = Steps(), 4
    step = search(depth=depth, **options)
    size = sum(p.nbytes for n, p in step.__self__.model.named_parameters() if ".mlp." in n)
    with pytest.MonkeyPatch.context() as patch:
        marked(patch, steps, WidthSearch, "_probe", lambda *_: "probe")
        held = steps.run(step)["probe"]
    assert len(held) == depth * PROBES
    sequential = "error_probability" in options
    entropies = 8 * BATCH * BATCHES * len(held) if sequential else 0
    given_back = (depth - 2) * BATCHES * STATE if "cache_bytes" not in options else 0
    assert held[-1] - held[SETTLED] <= size + entropies - given_back
