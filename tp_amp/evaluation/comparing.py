"""Importances side by side, at the same sizes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tp_amp.algebra.closed_form import Method
from tp_amp.compensation.cut_and_compensate import compensate
from tp_amp.compensation.recipe import Recipe
from tp_amp.evaluation.fidelity import Metric, default_metric
from tp_amp.importance.readiness import make_ready
from tp_amp.plan.pruning_plan import PruningPlan
from tp_amp.plan.ranking import rank_channels
from tp_amp.reports.comparison import Comparison, Row
from tp_amp.running.arguments import check_importance, check_number
from tp_amp.running.batches import bar, check_batches, split_batches
from tp_amp.running.checks import check_model
from tp_amp.running.restoring import evaluating, seeded
from tp_amp.structure.model_structure import ModelStructure, Site
from tp_amp.structure.tolerant_graph import untraced_graph

logger = logging.getLogger(__name__)


def compare(
    model: nn.Module,
    example_inputs: Any,
    importances: Sequence[Any] | Mapping[str, Any],
    data: Iterable[Any],
    *,
    evaluation: Iterable[Any] | None = None,
    fractions: Sequence[float] = (0.75, 0.5, 0.25),
    metric: Metric | None = None,
    compensation: Method = "none",
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """Cut copies of a model by each importance to the same sizes, and measure what is left.

    Every MLP keeps the same fraction of its channels, so that the importances differ in nothing
    but which ones. The model itself is left as it was.

    Args:
        model: the dense model.
        example_inputs: as for `find_mlps`.
        importances: of tp_amp and of Torch-Pruning, or by the name to show. They are made ready
            here: images, and for Taylor and Hessian gradients of a cross entropy with the labels.
        data: images in batches that score, with labels `(images, labels)` where importances need
            them.
        evaluation: other images in batches, that the metric is taken on; by default half of
            `data`, as `split_batches` splits it, and the rest scores.
        fractions: of every MLP's channels that stay.
        metric: takes a model in eval mode and gives a number; by default accuracy where the
            batches have labels and the model is a classifier, else the mean cosine similarity
            between the outputs of the cut and of the dense model.
        compensation: `"none"`, `"mean"` or `"affine"`, as for `compensate`, with the images that
            score.
        seed: of the split and of random importances.
        progress: show a progress bar on a terminal.

    Returns:
        All rows. An importance that fails is named with its error, which is logged too.

    Raises:
        ValueError: no MLP is found, a fraction is out of range, a name stands twice, or every
            importance failed.
        TypeError: `data` can't be iterated.

    Example:
        >>> import timm, torch, torch_pruning as tp, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=10)
        >>> data = list(torch.randn(8, 3, 224, 224).split(4))
        >>> importances = [tp_amp.EntropyTaylorImportance(), tp.importance.LAMPImportance()]
        >>> found = tp_amp.compare(model, data[0][:1], importances, data, fractions=[0.5])
        >>> [(row.importance, row.kept) for row in found.rows]
        [('EntropyTaylorImportance', 0.5), ('LAMPImportance', 0.5)]
    """
    named = _named(importances)
    if not isinstance(fractions, Iterable):
        raise TypeError(f"fractions must be a list of numbers, found {fractions!r}")
    for fraction in fractions:
        check_number("above 0, 1 at most", lambda value: 0 < value <= 1, fractions=fraction)
    if not named or not fractions:
        raise ValueError("nothing to compare: pass at least one importance and one fraction")
    if metric is not None and not callable(metric):
        raise TypeError(f"metric must take a model and give a number, found {metric!r}")
    Recipe(compensation)
    check_model(model, values=True)
    check_batches(data)
    if evaluation is not None:
        check_batches(evaluation)
    structure = ModelStructure(model, example_inputs)
    if not structure.mlps:
        raise ValueError(
            f"no MLP was found in {type(model).__name__}; tp_amp.inspect tells for each layer why"
        )
    scoring, judging = split_batches(data, seed=seed) if evaluation is None else (data, evaluation)
    with seeded(seed):  # loaders draw
        scoring = list(scoring)
        if metric is None:
            label, metric = default_metric(model, judging)
        else:
            label = getattr(metric, "__name__", type(metric).__name__)
    with evaluating(model, trainable=False):
        dense = Row("dense", 1.0, _parameters(model), float(metric(model)))
    rows: list[Row] = []
    failures: dict[str, str] = {}
    sizes: dict[float, int] = {}
    steps = bar(None, description="compare", progress=progress, total=len(named) * len(fractions))
    with steps:
        for name, importance in named.items():
            done = steps.n
            try:
                with seeded(seed):
                    plans = _plans(structure, importance, scoring, fractions)
                found = []
                for fraction, plan in plans.items():
                    pruned = _cut(model, plan, scoring, compensation)
                    size = _parameters(pruned)
                    if sizes.setdefault(fraction, size) != size:
                        raise ValueError(
                            f"cut to {fraction:.0%} it leaves {size} parameters, those before it "
                            f"left {sizes[fraction]}"
                        )
                    with seeded(seed):
                        found.append(Row(name, fraction, size, float(metric(pruned))))
                    steps.update()
                rows += found
            except Exception as error:
                failures[name] = " ".join(str(error).split()) or type(error).__name__
                logger.warning("%s is not measured: %s", name, failures[name])
                steps.update(done + len(fractions) - steps.n)
    if not rows:
        raise ValueError(f"no importance could be measured: {failures}")
    return Comparison(label, dense, rows, failures, compensation)


def _named(importances: Sequence[Any] | Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(importances, (Mapping, Sequence)):
        found = type(importances).__name__
        raise TypeError(f"importances must be a list, or a dict by name, found one {found}")
    for importance in importances.values() if isinstance(importances, Mapping) else importances:
        check_importance(importance)
    if isinstance(importances, Mapping):
        return dict(importances)
    names = [type(importance).__name__ for importance in importances]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{twice} stand twice; pass a dict of names to importances")
    return dict(zip(names, importances, strict=True))


def _plans(
    structure: ModelStructure, importance: Any, batches: list[Any], fractions: Sequence[float]
) -> dict[float, PruningPlan]:
    """Rank once, on a copy, which may be left with gradients; the caller's importance is kept."""
    model = copy.deepcopy(structure.model)
    graph = untraced_graph(model)
    sites: dict[str, Site] = {mlp.down: mlp for mlp in structure.mlps}
    ready = make_ready(_own(importance), model, batches, layers=sites, progress=False)
    orders = {name: rank_channels(ready, graph, site) for name, site in sites.items()}
    dense = {name: site.width for name, site in sites.items()}
    return {
        fraction: PruningPlan(
            {n: sorted(order[: max(1, round(dense[n] * fraction))]) for n, order in orders.items()},
            dense,
            sites=sites,
        )
        for fraction in fractions
    }


def _own(importance: Any) -> Any:
    """A copy to collect with, that shares the importance's data but none of its dicts."""
    own = copy.copy(importance)
    for name, value in vars(importance).items() if hasattr(importance, "__dict__") else ():
        if isinstance(value, dict):
            setattr(own, name, dict(value))
    return own


def _cut(model: nn.Module, plan: PruningPlan, batches: list[Any], method: Method) -> nn.Module:
    pruned = copy.deepcopy(model).eval()
    with torch.inference_mode(False):
        compensate(pruned, plan, batches, method=method, progress=False)
    return pruned


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
