"""Accuracy without fine-tuning and without labels, with what was cut rebuilt in closed form.

    python benchmarks/compensation.py --model vit --data path/to/cifar10

Every criterion ranks the dense model; every MLP is cut to the same share of its channels, with and
without compensation fitted on the images that scored, and with it to tp_amp's own widths, by
foreseen loss at the same number of parameters. Beside them: every Linear compensated, without and
with ten passes of refinement, and the recipes of others, from their formulas. Writes
results/compensation_<model>.json and .png after every seed. `--data` is as for train_reference.py.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from cifar import load_split, load_test
from compensation_report import plot, report
from importances import Batches, all_criteria
from measuring import Bench, draw_batches
from reference import (
    ARCHITECTURES,
    accuracy,
    load_reference,
    reference_parser,
    versions,
    write_json,
)
from torch import nn
from tqdm import tqdm

import tp_amp
from tp_amp.algebra.closed_form import correct
from tp_amp.algebra.moments import Moments
from tp_amp.compensation.recipe import apply
from tp_amp.importance.hidden_moments import hidden_moments

# Those whose order at one layer is that of another, or that sees the last image only, are left out.
LEFT_OUT = ("EntropyTaylor, similarity", "Magnitude L2", "LAMP", "Hessian")
FRACTIONS = [0.9, 0.7, 0.5, 0.3, 0.15, 0.1]
FULLEST = "Reconstruction, own widths + affine, every Linear"
WEIGHED = f"{FULLEST}, sensitivity"  # of the tokens
REFINED = f"{FULLEST}, refined"
REFINED_WEIGHED = f"{WEIGHED}, refined"
UNIFORM = "Reconstruction + affine, every Linear"
UNIFORM_REFINED = f"{UNIFORM}, refined"
PASSES = 10
Orders = dict[str, list[int]]


class Comparison:
    """All recipes on one model and one draw of unlabelled images."""

    def __init__(self, bench: Bench, batches: Batches, seed: int, hessian_images: int) -> None:
        self.bench, self.batches, self.seed = bench, batches, seed
        self.criteria = all_criteria(hessian_images)
        self.orders: dict[str, Orders] = {}
        self.importance = tp_amp.ReconstructionImportance("prediction")
        downs = [mlp.down for mlp in bench.mlps]
        self.importance.collect(bench.model, batches, layers=downs, progress=False)
        found = hidden_moments(bench.model, downs, batches, progress=False)
        self.moments = {name: halves.whole for name, halves in found.items()}
        self.orders["Reconstruction"] = {n: self.importance.orders[n].tolist() for n in downs}
        variance = {n: moments.inputs.diagonal() for n, moments in self.moments.items()}
        squares = {n: self._down(n).weight.double().square().sum(0) for n in downs}
        self.variance = {n: descending(variance[n]) for n in downs}
        self.flap = {n: descending(variance[n] * squares[n]) for n in downs}

    def _down(self, name: str, model: nn.Module | None = None) -> Any:
        return (model or self.bench.model).get_submodule(name)

    def order(self, name: str) -> Orders:
        """The channels of each MLP by a criterion, ranked once."""
        if name not in self.orders:
            self.orders[name] = self.bench.rank(self.criteria[name], self.batches, self.seed)
        return self.orders[name]

    def rows(self, fraction: float, recipes: Sequence[str]) -> dict[str, float]:
        """Accuracy of every recipe, or of some, with that fraction of the MLPs kept."""
        widths = self.bench.widths(fraction)
        own = self.planned_widths(self.bench.size(widths)["parameters"])
        found: dict[str, Callable[[], float]] = {}
        for name in [*(n for n in self.criteria if n not in LEFT_OUT), "Reconstruction"]:
            found[name] = lambda name=name: self.bench.accuracy(self.order(name), widths)
            for kind, method, chosen in (
                (name, "mean", widths),
                (name, "affine", widths),
                (f"{name}, own widths", "affine", own),
            ):
                found[f"{kind} + {method}"] = lambda n=name, m=method, w=chosen: self.compensated(
                    self.order(n), w, m
                )
        for name, order, method in (
            ("VBP: variance + mean", lambda: self.variance, "mean"),
            ("FLAP: variance and norm + mean", lambda: self.flap, "mean"),
            ("GRAIL: magnitude + uncentred ridge", lambda: self.order("DIMAP"), "GRAIL"),
            ("CORP: magnitude + affine at once", lambda: self.order("DIMAP"), "affine"),
        ):
            found[name] = lambda o=order, m=method: self.one_shot(o(), widths, m)
        for name, chosen, weights, passes in (
            (FULLEST, own, None, 0),
            (WEIGHED, own, "sensitivity", 0),
            (REFINED, own, None, PASSES),
            (REFINED_WEIGHED, own, "sensitivity", PASSES),
            (UNIFORM, widths, None, 0),
            (UNIFORM_REFINED, widths, None, PASSES),
        ):
            found[name] = lambda w=chosen, t=weights, p=passes: self.compensated(
                self.orders["Reconstruction"],
                w,
                "affine",
                every_linear=True,
                token_weights=t,
                refine=p,
            )
        unknown = set(recipes) - set(found)
        if unknown:
            raise SystemExit(f"no recipes {sorted(unknown)}; there are {list(found)}")
        return {name: measure() for name, measure in found.items() if name in (recipes or found)}

    def planned_widths(self, parameters: float) -> dict[str, int]:
        """The widths of the smallest foreseen loss with so many parameters."""
        plan = tp_amp.plan_for_target(
            self.bench.model, self.bench.example, self.importance, {"params": parameters}
        )
        return plan.widths

    def compensated(
        self, order: Orders, widths: dict[str, int], method: Any, **options: Any
    ) -> float:
        """Test accuracy with tp_amp's compensation."""
        keep = {name: sorted(order[name][:width]) for name, width in widths.items()}
        model = copy.deepcopy(self.bench.model)
        plan = tp_amp.PruningPlan(keep)
        tp_amp.compensate(model, plan, self.batches, method=method, progress=False, **options)
        return accuracy(model, self.bench.images, self.bench.labels, 64)

    def one_shot(self, order: Orders, widths: dict[str, int], method: str) -> float:
        """Test accuracy with every layer fitted on the dense model, as others do."""
        keep = {name: sorted(order[name][:width]) for name, width in widths.items()}
        model = copy.deepcopy(self.bench.model)
        tp_amp.apply_plan(model, self.bench.example, tp_amp.PruningPlan(keep))
        for mlp in self.bench.mlps:
            kept = keep[mlp.down]
            cut: Moments = self.moments[mlp.down].after_cut(self._down(mlp.down).weight, kept)
            if method == "GRAIL":
                fitted = correct(cut, "affine", bias=False, ridge=1e-3)
            else:
                fitted = correct(cut, method)  # type: ignore[arg-type]
            apply(self._down(mlp.down, model), fitted, mlp.first)
        return accuracy(model, self.bench.images, self.bench.labels, 64)


def descending(scores: torch.Tensor) -> list[int]:
    return scores.argsort(descending=True, stable=True).tolist()


def sweep(bench: Bench, draw: Callable[[int], Batches], options: argparse.Namespace) -> Any:
    """Accuracy of tp_amp's fullest recipes by the number of unlabelled images, one seed."""
    names = (FULLEST, WEIGHED, REFINED, REFINED_WEIGHED)
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in names}
    for count in tqdm(options.counts, desc="images", disable=None):
        comparison = Comparison(bench, draw(count), 0, min(count, options.hessian_images))
        for name, by_count in found.items():
            by_count[str(count)] = {
                str(fraction): comparison.rows(fraction, [name])[name]
                for fraction in options.sweep_at
            }
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = reference_parser(__doc__)
    parser.add_argument("--model", choices=tuple(ARCHITECTURES), required=True)
    parser.add_argument("--fractions", type=float, nargs="+", default=FRACTIONS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=512, help="unlabelled training images")
    parser.add_argument("--hessian-images", type=int, default=128, help="of these, for Hessian")
    parser.add_argument("--counts", type=int, nargs="*", default=[32, 128, 512, 2048])
    parser.add_argument("--sweep-at", type=float, nargs="+", default=[0.5, 0.3, 0.15])
    parser.add_argument("--recipes", nargs="+", default=[], help="measure these alone")
    parser.add_argument(
        "--add", action="store_true", help="keep what an earlier result holds beside this"
    )
    parser.add_argument("--test-images", type=int, default=2000, help="0 for all")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, measure, print and write."""
    options = parse(arguments)
    train = load_split(options.data, "train")
    images, labels = load_test(options.data, options.test_images)
    model = load_reference(options.model, options.checkpoints)
    bench = Bench(model, images, labels)
    dense = {mlp.down: list(range(mlp.width)) for mlp in bench.mlps}
    record: dict[str, Any] = {
        "model": options.model,
        "configuration": {k: v for k, v in vars(options).items() if isinstance(v, int | list)},
        "versions": versions(),
        "dense": {
            "accuracy": bench.accuracy(dense, bench.widths(1)),
            **bench.size(bench.widths(1)),
        },
        "sizes": {},
        "accuracy": {},
    }
    path = options.output / f"compensation_{options.model}.json"
    if options.add and path.exists():
        record = {**json.loads(path.read_text()), "versions": record["versions"]}
    for fraction in options.fractions:
        record["sizes"][str(fraction)] = bench.size(bench.widths(fraction))
        record["accuracy"].setdefault(str(fraction), {})
    for part in ("sizes", "accuracy"):
        record[part] = dict(sorted(record[part].items(), key=lambda x: -float(x[0])))

    def draw(count: int, seed: int = 0) -> Batches:
        return draw_batches(train, (count,), seed, "cpu")[0]

    for place, seed in enumerate(options.seeds):
        comparison = Comparison(bench, draw(options.images, seed), seed, options.hessian_images)
        for fraction in tqdm(options.fractions, desc=f"seed {seed}", disable=None):
            for name, value in comparison.rows(fraction, options.recipes).items():
                rows = record["accuracy"][str(fraction)]
                rows[name] = [*(rows[name] if place else []), value]
        write(record, options)
    if options.counts:
        record["images"] = sweep(bench, draw, options)
    write(record, options)
    print(report(record))


def write(record: dict[str, Any], options: argparse.Namespace) -> None:
    write_json(record, options.output / f"compensation_{options.model}.json")
    plot(record, options.output / f"compensation_{options.model}.png")


if __name__ == "__main__":
    main()
