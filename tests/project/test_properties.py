"""Properties over random small architectures (hypothesis).

By default few cases, the same ones each time. Many, other ones each time:

    make cases CASES=3000 SEED=1
    export HYPOTHESIS_PROFILE=long HYPOTHESIS_EXAMPLES=3000
    python -m pytest tests/project/test_properties.py

The first counts the cases. HYPOTHESIS_EXAMPLES is the number of cases for each test.
HYPOTHESIS_PROFILE=hunt, which `make cases` takes, leaves out shrinking, which takes minutes, and
stops at the first failure. A failure prints the architecture; it is kept as a test of its own, in
test_hardening.py.
"""

from __future__ import annotations

import copy
import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from architectures import (
    Spec,
    build,
    inputs,
    masked_forward,
    own_downs,
    specs,
)
from hypothesis import HealthCheck, Phase, assume, event, given, settings
from hypothesis import strategies as st
from sensitivities import output_sensitivity
from toys import fingerprint

import tp_amp
from tp_amp.importance.objectives import Objective

_COMMON: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
settings.register_profile("ci", max_examples=10, derandomize=True, **_COMMON)
_EXAMPLES = int(os.environ.get("HYPOTHESIS_EXAMPLES", "3000"))
settings.register_profile("long", max_examples=_EXAMPLES, print_blob=True, **_COMMON)
settings.register_profile(
    "hunt",
    max_examples=_EXAMPLES,
    phases=[Phase.explicit, Phase.generate],
    report_multiple_bugs=False,
    **_COMMON,
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

seeds = st.integers(0, 2**20)


def whole_state(model: torch.nn.Module) -> dict[str, Any]:
    """All that a call must leave as it was, the modules' own attributes and classes too."""
    inside = {
        name: (type(module), sorted(vars(module)), module._buffers.keys())
        for name, module in model.named_modules()
    }
    return {**fingerprint(model), "inside": inside}


def subsets(sites: dict[str, Any], seed: int) -> dict[str, list[int]]:
    """Some channels of each MLP; of a few all, or one."""
    draw = random.Random(seed)
    keep = {}
    for name, site in sites.items():
        count = draw.choice([1, site.width, draw.randint(1, site.width)])
        keep[name] = sorted(draw.sample(range(site.width), count))
    return keep


def found(model: torch.nn.Module, spec: Spec, seed: int = 1) -> dict[str, Any]:
    return {mlp.down: mlp for mlp in tp_amp.find_mlps(model, inputs(spec, 1, seed))}


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


@given(specs(), seeds)
def test_pruned_equals_masked(spec: Spec, seed: int) -> None:
    model = build(spec)
    before = whole_state(model)
    sites = found(model, spec)
    assert whole_state(model) == before
    assert set(sites) >= own_downs(spec)
    keep = subsets(sites, seed)
    event(f"{len(keep)} MLPs")
    x = inputs(spec, 3)
    expected = masked_forward(model, sites, keep)(x)
    tp_amp.apply_plan(model, inputs(spec, 1), tp_amp.PruningPlan(keep))
    close(model(x).detach(), expected)
    for name, kept in keep.items():
        assert model.get_submodule(name).weight.shape[1] == len(kept)
        for up in sites[name].up:
            assert len(model.get_submodule(up).weight) == sites[name].packed * len(kept)


def plan_of(spec: Spec, model: torch.nn.Module, seed: int) -> tp_amp.PruningPlan:
    sites = found(model, spec)
    widths = {name: site.width for name, site in sites.items()}
    return tp_amp.PruningPlan(subsets(sites, seed), widths, sites=sites)


@given(specs(), seeds)
def test_plan_and_folder_round_trip(spec: Spec, seed: int) -> None:
    model = build(spec)
    plan = plan_of(spec, model, seed)
    assert json.loads(plan.to_json())["keep"] == plan.keep
    again = tp_amp.PruningPlan.from_json(plan.to_json())
    assert again == plan
    pruned, twice = copy.deepcopy(model), copy.deepcopy(model)
    tp_amp.apply_plan(pruned, inputs(spec, 1), plan)
    tp_amp.apply_plan(twice, inputs(spec, 1), again)
    x = inputs(spec, 3)
    assert torch.equal(pruned(x), twice(x))
    with tempfile.TemporaryDirectory() as folder:
        tp_amp.save_pruned(pruned, folder, plan)
        assert tp_amp.load_pruned(model, folder) == plan
    assert torch.equal(model(x), pruned(x))
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in pruned.named_parameters()
    }


def rows(module: torch.nn.Module, values: torch.Tensor) -> numpy.ndarray:
    values = values.movedim(1, -1) if isinstance(module, torch.nn.Conv2d) else values
    return values.detach().reshape(-1, values.shape[-1]).numpy()


def tokens(model: torch.nn.Module, name: str, x: torch.Tensor) -> tuple[numpy.ndarray, ...]:
    """What a layer reads and gives, one row for each token."""
    seen: list[numpy.ndarray] = []

    def see(module: Any, args: Any, output: torch.Tensor) -> None:
        seen.extend(rows(module, values) for values in (args[0], output))

    handle = model.get_submodule(name).register_forward_hook(see)
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0], seen[1]


def behind(model: torch.nn.Module, name: str, x: torch.Tensor) -> dict[str, numpy.ndarray]:
    """A layer's output, and all of its shape that modules read or give once it was called."""
    found: dict[str, numpy.ndarray] = {}
    layer = model.get_submodule(name)

    def see(path: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            if module is layer:
                found.setdefault("own", rows(layer, output))
            for side, value in (("in", args[0] if args else None), ("out", output)):
                if "own" in found and isinstance(value, torch.Tensor) and value.dim() > 1:
                    values = rows(layer if value.dim() == 4 else module, value)
                    if values.shape == found["own"].shape:
                        found.setdefault(f"{path} {side}", values.copy())

        return hook

    handles = [part.register_forward_hook(see(path)) for path, part in model.named_modules()]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


def kept_rows(plan: tp_amp.PruningPlan, name: str, outputs: int) -> list[int]:
    """Which outputs of a layer stay: a cut layer may feed another MLP whose channels are cut."""
    for site in plan.sites.values():
        if name in site.up:
            parts = range(site.packed)
            return [j + part * site.width for part in parts for j in plan.keep[site.down]]
    return list(range(outputs))


@given(specs(), seeds, st.sampled_from(["affine", "mean"]))
def test_compensation_is_optimal(spec: Spec, seed: int, method: Any) -> None:
    """No other weight and bias of a cut layer bring it, or the stream, nearer to the dense one.

    Which of the two it was is told by the error; both are looked at from outside.
    """
    model = build(spec)
    plan = plan_of(spec, model, seed)
    assume(plan.keep)
    x = inputs(spec, 12)
    dense = copy.deepcopy(model)
    narrow = {n for n, kept in plan.keep.items() if len(kept) < plan.dense_widths[n]}
    again = cut_and_called_again(dense, plan)
    if again and again == narrow:
        before = whole_state(model)
        with pytest.raises(ValueError, match="called once"):
            tp_amp.compensate(model, plan, x.split(5), method=method)
        assert whole_state(model) == before
        return
    fitted = tp_amp.compensate(model, plan, x.split(5), method=method, ridge=1e-9, progress=False)
    assert set(fitted) == narrow - again
    if again:  # what is seen of a layer then is its last call
        assert all(c.error <= c.error_before * (1 + 1e-6) for c in fitted.values())
        return
    for name, correction in fitted.items():
        read, _ = tokens(model, name, x)
        now, before_cut = behind(model, name, x), behind(dense, name, x)
        fits: list[tuple[float, float, numpy.ndarray, numpy.ndarray]] = []
        for place, gave in now.items():
            wanted = before_cut.get(place)
            if place == "own":
                wanted = wanted[:, kept_rows(plan, name, wanted.shape[1])]
            if wanted is None or wanted.shape != gave.shape:
                continue
            error = numpy.square(gave - wanted).sum(1).mean()
            scale = numpy.square(wanted).sum(1).mean() + numpy.square(gave).sum(1).mean()
            rounding = 1e-9 * max(scale, correction.error_before) + 1e-14
            if abs(error - correction.error) <= rounding:
                fits.append((error, rounding, gave, wanted))
        assert fits
        error, rounding, gave, wanted = fits[0]
        assert error <= correction.error_before + rounding
        # What the uncompensated layer leaves, fitted by lstsq: the least norm of all best ones.
        layer: Any = model.get_submodule(name)
        own = correction.weight.numpy()
        if method == "affine" and not own.any():
            continue  # on images held out, less was better
        shift = 0 if correction.bias is None else correction.bias.numpy()
        left = wanted - (gave - read @ own.T - shift)
        if layer.bias is not None:
            # A norm of one channel gives a constant but for rounding, which is nothing to fit by.
            constant = read.std(0) <= 1e-6 * numpy.abs(read.mean(0))
            read, left = (read - read.mean(0)) * ~constant, left - left.mean(0)
        elif method == "mean":
            continue
        best = numpy.zeros_like(own.T)
        if method == "affine":
            best = numpy.linalg.lstsq(read, left, rcond=1e-10)[0]
        least = numpy.square(left - read @ best).sum(1).mean()
        # A ridge costs at most lambda |B|^2 of the unpenalised solution.
        allowed = correction.ridge * numpy.square(read).mean() * numpy.square(best).sum()
        assert error <= least + 1.01 * allowed + rounding


def cut_and_called_again(model: torch.nn.Module, plan: tp_amp.PruningPlan) -> set[str]:
    """The layers that lose channels and stand in several places."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    modules = [model.get_submodule(name) for name in names]
    return {
        name
        for name, kept in plan.keep.items()
        if len(kept) < plan.dense_widths[name] and modules.count(model.get_submodule(name)) > 1
    }


@given(specs(), seeds)
def test_refining_costs_no_more(spec: Spec, seed: int) -> None:
    """What judges: the second and the tenth image, or all where tokens depend on each other.

    Of the errors of the first MLP that is cut, before which nothing is lost; of its output, or of
    what it is added to.
    """
    model = build(spec)
    plan = plan_of(spec, model, seed)
    assume(plan.keep and not cut_and_called_again(model, plan))
    x = inputs(spec, 12)
    closed, refined = copy.deepcopy(model), copy.deepcopy(model)
    options: dict[str, Any] = {"every_linear": True, "progress": False}
    fitted = tp_amp.compensate(closed, plan, x.split(5), **options)
    tp_amp.compensate(refined, plan, x.split(5), refine=3, **options)
    for key, value in refined.state_dict().items():
        assert torch.isfinite(value).all()
        assert value.shape == closed.state_dict()[key].shape
    assume(fitted)
    name = next(name for name in fitted if name in plan.keep)
    # What one MLP gives may be the hidden channels of the next, which is refined after it.
    assume(not any(name in site.up for site in plan.sites.values()))
    found = output_sensitivity(
        model, [name], x.split(5), Objective(), optional=[name], progress=False
    )
    metric = numpy.eye(tokens(model, name, x)[1].shape[1])
    if name in found and found[name].diagonal().sum() > 0:
        sensitivity = found[name].numpy()
        metric = sensitivity / sensitivity.diagonal().mean() + 0.1 * metric
    not_worse = []
    for judging in (x[[1, 9]], x):
        wanted, *given = (behind(cut, name, judging) for cut in (model, closed, refined))
        for place in wanted.keys() & given[0].keys() & given[1].keys():
            errors = [cut[place] - wanted[place] for cut in given]
            before, after = (((error @ metric) * error).sum() for error in errors)
            allowed = before * (1 + 1e-6) + 1e-12 * numpy.square(wanted[place]).sum()
            not_worse.append(after <= allowed)
    assert any(not_worse)


@given(
    specs(),
    seeds,
    st.sampled_from([2**30, 2000, 700]),
    st.sampled_from([1e-3, 0.03, 0.3, 3.0]),
    st.sampled_from(["entropy", "reconstruction", "gram"]),
    st.booleans(),
)
def test_search(
    spec: Spec, seed: int, limit: int, increase: float, criterion: str, rescore: bool
) -> None:
    """The same plan with and without what is kept, each entropy that of the masked model."""
    model = build(spec)
    x = inputs(spec, 12, seed)
    assume(found(model, spec, seed))
    plans = []
    for cache_bytes in (limit, 0):
        importance: Any = {
            "entropy": tp_amp.EntropyTaylorImportance(data=x[:6].split(3)),
            "reconstruction": tp_amp.ReconstructionImportance(data=x[:6].split(3)),
            "gram": tp_amp.GramSchmidtImportance(),
        }[criterion]
        pruned = copy.deepcopy(model)
        pruner = tp_amp.AdaptiveMLPPruner(
            pruned,
            x[:1],
            importance,
            x[6:].split(3),
            max_increase=increase,
            steps=3,
            rescore=rescore,
            cache_bytes=cache_bytes,
            progress=False,
        )
        before = whole_state(pruned)
        pruner._search()
        assert whole_state(pruned) == before
        pruner.step()
        plans.append(pruner.plan)
    assert plans[0].to_json() == plans[1].to_json()
    plan = plans[0]
    expected = masked_forward(model, plan.sites, plan.keep)(x)
    close(pruned(x).detach(), expected)
    # From the last site to the first, the entropy of each probe that was accepted.
    if undirected(spec, model(x[6:]).detach()):
        return
    reference, keep = mean_entropy(spec, model(x[6:])), {}
    assert plan.dense_entropy == pytest.approx(reference, rel=1e-9)
    for name in reversed(plan.keep):
        keep[name] = plan.keep[name]
        taken = [probe for probe in plan.probes[name] if probe.accepted]
        output = masked_forward(model, plan.sites, keep)(x[6:])
        if undirected(spec, output):
            return
        value = mean_entropy(spec, output)
        if taken:
            assert taken[-1].width == len(keep[name])
            assert taken[-1].entropy == pytest.approx(value, rel=1e-7, abs=1e-9)
            assert value <= reference + increase + 1e-9
            reference = value
        else:
            assert len(keep[name]) == plan.dense_widths[name]


def undirected(spec: Spec, output: torch.Tensor) -> bool:
    """Whether features have no direction: zero, or but for rounding, where tokens cancel."""
    norms = output.norm(dim=1)
    found = not spec.classes and bool(norms.min() <= 1e-9 * norms.max())
    if found:
        event("features without a direction")
    return found


def mean_entropy(spec: Spec, output: torch.Tensor) -> float:
    """By numpy: of the predicted classes, or without a classifier of similarities in batches."""
    entropies = []
    for batch in output.detach().split(3):
        values = batch.numpy()
        if not spec.classes:
            values = values / numpy.linalg.norm(values, axis=1, keepdims=True)
            values = values @ values.T * 15
        p = numpy.exp(values - values.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        entropies.append(-(p * numpy.log(numpy.maximum(p, 1e-300))).sum(1).mean())
    return float(numpy.mean(entropies))


class Interrupted:
    """Ctrl-C in the `count`-th call of a module."""

    def __init__(self, model: torch.nn.Module, count: int) -> None:
        self.left = count
        for module in model.modules():
            if not list(module.children()):
                module.register_forward_pre_hook(self.tick)

    def tick(self, module: Any, args: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def work(spec: Spec, name: str, model: torch.nn.Module) -> None:
    x = inputs(spec, 6)
    batches = x.split(3)
    if name == "find":
        tp_amp.find_mlps(model, x[:1])
    elif name == "entropy":
        tp_amp.EntropyTaylorImportance().collect(model, batches, progress=False)
    elif name == "reconstruction":
        tp_amp.ReconstructionImportance().collect(model, batches, progress=False)
    elif name == "target":
        importance = tp_amp.ReconstructionImportance(data=batches)
        tp_amp.plan_for_target(model, x[:1], importance, {"params": 0.7})
    elif name in ("search", "search compensated"):
        tp_amp.AdaptiveMLPPruner(
            model,
            x[:1],
            tp_amp.GramSchmidtImportance(),
            batches,
            max_increase=0.1,
            steps=2,
            compensation="affine" if name == "search compensated" else "none",
            progress=False,
        ).step()
    else:
        sites = tp_amp.find_mlps(copy.deepcopy(model), x[:1])
        plan = tp_amp.PruningPlan({site.down: [0] for site in sites})
        if name == "apply":
            tp_amp.apply_plan(model, x[:1], plan)
        else:
            further = {"every_linear": True, "refine": 2} if name == "refine" else {}
            tp_amp.compensate(model, plan, batches, progress=False, **further)


WORKS = (
    *("find", "entropy", "reconstruction", "target", "search", "search compensated"),
    *("apply", "compensate", "refine"),
)


@given(specs(max_depth=2), st.sampled_from(WORKS), st.integers(1, 300))
def test_interrupted_model_is_as_before(spec: Spec, name: str, count: int) -> None:
    model = build(spec)
    interrupted = Interrupted(model, count)
    before = whole_state(model)
    try:
        work(spec, name, model)
    except KeyboardInterrupt:
        assert whole_state(model) == before
        interrupted.left = 0
        assert torch.isfinite(model(inputs(spec, 2))).all()
    except ValueError:
        # What these can't do on such a model; nothing is left behind either.
        interrupted.left = 0
        assert whole_state(model) == before
    else:
        event("not reached")


def anything() -> st.SearchStrategy[Any]:
    plain = st.none() | st.booleans() | st.integers(-2, 12) | st.floats() | st.text(max_size=4)
    return st.recursive(
        plain,
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=2),
        max_leaves=4,
    )


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in nested JSON, by its container and key."""
    items = list(value.items()) if isinstance(value, dict) else []
    items = list(enumerate(value)) if isinstance(value, list) else items
    return [(value, key) for key, _ in items] + [p for _, inner in items for p in places(inner)]


# A place (taken modulo their number), what is done there, the new value or the place it is from.
damages = st.lists(
    st.tuples(
        st.integers(0, 2**16),
        st.sampled_from(["replace", "remove", "copy"]),
        anything(),
        st.integers(0, 2**16),
    ),
    min_size=1,
    max_size=3,
)
# A tenth of the texts are cut short.
lengths = st.integers(0, 9).flatmap(lambda x: st.none() if x else st.integers(0, 2**16))


def damaged(text: str, changes: list[Any], length: int | None) -> str:
    """JSON with some values replaced, removed or moved, or cut short."""
    record = json.loads(text)
    for place, kind, value, source in changes:
        found = places(record)
        if not found:
            break
        container, key = found[place % len(found)]
        if kind == "remove":
            del container[key]
        elif kind == "copy":
            other, other_key = found[source % len(found)]
            container[key] = copy.deepcopy(other[other_key])
        else:
            container[key] = copy.deepcopy(value)
    text = json.dumps(record)
    return text if length is None else text[: length % (len(text) + 1)]


@given(specs(max_depth=2), seeds, damages, lengths)
def test_damaged_plan_is_refused_or_fits(
    spec: Spec, seed: int, changes: list[Any], length: int | None
) -> None:
    model = build(spec)
    good = plan_of(spec, model, seed)
    text = damaged(good.to_json(), changes, length)
    before = whole_state(model)
    try:
        plan = tp_amp.PruningPlan.from_json(text)
        assert tp_amp.PruningPlan.from_json(plan.to_json()).keep == plan.keep
        tp_amp.apply_plan(model, inputs(spec, 1), plan)
    except ValueError:
        assert whole_state(model) == before
        return
    event("fits")
    sites = {**good.sites}
    expected = masked_forward(build(spec), sites, plan.keep)(inputs(spec, 3))
    close(model(inputs(spec, 3)).detach(), expected)


@given(
    specs(max_depth=2),
    seeds,
    st.sampled_from(["plan", "bytes", "short", "missing", "other"]),
    damages,
    lengths,
    st.integers(0, 2**24),
    st.integers(0, 255),
    specs(max_depth=1),
)
def test_damaged_folder_is_refused_or_loads(
    spec: Spec,
    seed: int,
    kind: str,
    changes: list[Any],
    length: int | None,
    place: int,
    byte: int,
    other: Spec,
) -> None:
    model = build(spec)
    plan = plan_of(spec, model, seed)
    pruned = copy.deepcopy(model)
    tp_amp.apply_plan(pruned, plan)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tp_amp.save_pruned(pruned, folder, plan)
        weights = folder / "model.safetensors"
        whole = bytearray(weights.read_bytes())
        if kind == "plan":
            (folder / "plan.json").write_text(damaged(plan.to_json(), changes, length))
        elif kind == "bytes":
            # The header; values of the weights are anything.
            whole[place % (8 + int.from_bytes(whole[:8], "little"))] = byte
            weights.write_bytes(whole)
        elif kind == "short":
            weights.write_bytes(whole[: place % len(whole)])
        elif kind == "missing":
            (folder / ["plan.json", "model.safetensors"][place % 2]).unlink()
        else:
            tp_amp.save_pruned(build(other), folder, tp_amp.PruningPlan({}))
            (folder / "plan.json").write_text(plan.to_json())
        before = whole_state(model)
        try:
            tp_amp.load_pruned(model, folder)
        except ValueError:
            assert whole_state(model) == before
            return
    event(f"loads: {kind}")
    assert model(inputs(spec, 2)).shape == pruned(inputs(spec, 2)).shape
