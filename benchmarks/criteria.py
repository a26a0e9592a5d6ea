"""Accuracy without fine-tuning against the kept share of the MLPs, for every criterion.

    python benchmarks/criteria.py --model vit --data path/to/cifar10

Every MLP is cut to the same share of its channels, by each criterion's ranking of the dense model.
Then AMP's search finds each MLP's own width, and every criterion is measured at those very widths
and at equal widths of the same parameters or multiply-accumulates: that tells the criterion from
the search. Writes results/criteria_<model>.json and .png. `--data` is as for train_reference.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from cifar import load_split, load_test
from criteria_plot import plot
from criteria_report import NOTES, report
from importances import Batches, all_criteria, collect_entropy
from measuring import Bench, draw_batches
from reference import (
    ARCHITECTURES,
    load_reference,
    reference_parser,
    versions,
    write_json,
)
from tqdm import tqdm

import tp_amp

Orders = dict[str, dict[str, list[int]]]
Runs = dict[float, dict[str, Any]]


def run_seed(
    bench: Bench, sets: list[Batches], seed: int, first: bool, options: argparse.Namespace
) -> dict[str, Any]:
    """Measure everything with one seed's images; criteria without data only the first time."""
    criteria = all_criteria(options.hessian_images)
    orders = {name: bench.rank(criterion, sets[0], seed) for name, criterion in criteria.items()}
    equal = {
        fraction: {
            name: bench.accuracy(order, bench.widths(fraction))
            for name, order in orders.items()
            if first or criteria[name].needs != "nothing"
        }
        for fraction in tqdm(options.fractions, desc=f"seed {seed}, equal widths", disable=None)
    }
    return {"equal": equal, "searched": run_searches(bench, sets, seed, orders, options)}


def run_searches(
    bench: Bench, sets: list[Batches], seed: int, orders: Orders, options: argparse.Namespace
) -> dict[str, Runs]:
    """AMP's search with its own ranking; with Gram-Schmidt's only where criteria are compared."""
    scoring, images = sets
    importances = {
        "EntropyTaylor, prediction": collect_entropy("prediction", bench.model, scoring),
        "GramSchmidt": tp_amp.GramSchmidtImportance(),
    }
    searched: dict[str, Runs] = {name: {} for name in importances}
    for increase in tqdm(options.max_increase, desc=f"seed {seed}, searched", disable=None):
        compared = increase in options.compare_at
        for name in importances if compared else [next(iter(importances))]:
            widths = bench.search(importances[name], images, increase)
            reached = bench.accuracy(orders[name], widths)
            run = {"seed": seed, "accuracy": reached, **bench.size(widths), "widths": widths}
            searched[name][increase] = run
        if compared:
            run = searched["EntropyTaylor, prediction"][increase]
            run["criteria"] = compare_criteria(bench, orders, run["widths"])
    return searched


def compare_criteria(
    bench: Bench, orders: Orders, widths: dict[str, int]
) -> dict[str, dict[str, float]]:
    """Accuracy of every criterion at the searched widths, and at equal ones of the same size."""
    size = bench.size(widths)
    choices = {
        "searched": widths,
        "equal, same parameters": bench.widths(size["kept"]),
        "equal, same MACs": bench.widths_of_macs(size["macs"]),
    }
    return {
        name: {choice: bench.accuracy(order, chosen) for choice, chosen in choices.items()}
        for name, order in orders.items()
    }


def gather(bench: Bench, runs: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Turn one result for each seed into the record that is written."""
    dense = {name: list(range(width)) for name, width in bench.widths(1).items()}
    reached = bench.accuracy(dense, bench.widths(1))
    return {
        "model": options.model,
        "configuration": {
            **{k: v for k, v in vars(options).items() if isinstance(v, int | list)},
            "test_images": len(bench.labels),
        },
        "versions": versions(),
        "notes": NOTES,
        "dense": {"accuracy": reached, **bench.size(bench.widths(1))},
        "equal_widths": {
            "sizes": {str(f): bench.size(bench.widths(f)) for f in options.fractions},
            "criteria": gather_equal(runs, options),
        },
        "searched_widths": {
            name: {str(i): [run["searched"][name][i] for run in runs] for i in found}
            for name, found in runs[0]["searched"].items()
        },
    }


def gather_equal(runs: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    return {
        name: {
            "needs": criterion.needs,
            "accuracy": {
                str(fraction): [
                    run["equal"][fraction][name] for run in runs if name in run["equal"][fraction]
                ]
                for fraction in options.fractions
            },
        }
        for name, criterion in all_criteria(options.hessian_images).items()
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = reference_parser(__doc__)
    parser.add_argument("--model", choices=tuple(ARCHITECTURES), required=True)
    parser.add_argument(
        "--fractions", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
    )
    parser.add_argument("--max-increase", type=float, nargs="+", default=[0.003, 0.01, 0.03])
    parser.add_argument("--compare-at", type=float, nargs="*", default=[0.01])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=512, help="training images that score")
    parser.add_argument("--hessian-images", type=int, default=128, help="of these, for Hessian")
    parser.add_argument("--search-images", type=int, default=256, help="other training images")
    parser.add_argument("--test-images", type=int, default=2000, help="0 for all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, measure, print and write."""
    options = parse(arguments)
    train = load_split(options.data, "train")
    images, labels = load_test(options.data, options.test_images)
    model = load_reference(options.model, options.checkpoints).to(options.device)
    bench = Bench(model, images, labels)
    runs = []
    for seed in options.seeds:
        sets = draw_batches(train, (options.images, options.search_images), seed, options.device)
        runs.append(run_seed(bench, sets, seed, not runs, options))
    record = gather(bench, runs, options)
    print(report(record))
    write_json(record, options.output / f"criteria_{options.model}.json")
    plot(record, options.output / f"criteria_{options.model}.png")


if __name__ == "__main__":
    main()
