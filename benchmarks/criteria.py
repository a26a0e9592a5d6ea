"""Accuracy without fine-tuning against the kept share of the MLPs, for every criterion.

    python benchmarks/criteria.py --model vit --data path/to/cifar10

Every MLP is cut to the same share of its channels, by each criterion's ranking of the dense model.
Then AMP's search finds each MLP's own width, and every criterion is measured at those very widths
and at equal widths of the same number of parameters: that tells the criterion from the search.
Writes results/criteria_<model>.json and .png. `--data` is as for train_reference.py.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch_pruning as tp
from cifar import load_split, normalize
from matplotlib.figure import Figure
from reference import (
    ARCHITECTURES,
    CHECKPOINTS,
    RESULTS,
    accuracy,
    add_cross_entropy_gradients,
    load_reference,
    table,
    versions,
    write_json,
)
from torch import Tensor, nn
from tqdm import tqdm

import tp_amp
from tp_amp.cutting import narrowed
from tp_amp.graph import build_graph
from tp_amp.mlps import read_mlps
from tp_amp.plan import rank_channels

Batches = list[tuple[Tensor, Tensor]]
NOTES = (
    "Scores come from the dense model once; nothing is fine-tuned.",
    "LAMP normalises within a layer, which leaves the order of Magnitude L2 at given widths.",
    "Activation keeps the last batch only, so it reads all scoring images as one batch.",
    "Torch-Pruning 1.6.1's Hessian keeps the last image only (accumulate_grad looks parameters up "
    "by name and stores them by object); 'Hessian, all images' accumulates.",
    "BNScale does not apply: the models have no batch norm. OBDC can't score a transformer's "
    "Linear: it takes no tokens, nor layers with a bias, and needs a Fisher matrix of the reader.",
)


class HessianOfAllImages(tp.importance.HessianImportance):
    """Torch-Pruning's Hessian with the squared gradients of all images, not of the last one."""

    def accumulate_grad(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                square = parameter.grad.square()
                self._accu_grad[parameter] = self._accu_grad.get(parameter, 0) + square
                self._counter[parameter] = self._counter.get(parameter, 0) + 1


def collect_entropy(objective: str, model: nn.Module, batches: Batches) -> Any:
    return tp_amp.EntropyTaylorImportance(objective).collect(model, batches, progress=False)


def collect_activation(model: nn.Module, batches: Batches) -> Any:
    importance = tp.pruner.importance.ActivationImportance()
    with torch.no_grad(), importance.compute_importance(model):
        model(torch.cat([images for images, _ in batches]))
    return importance


def collect_taylor(model: nn.Module, batches: Batches) -> Any:
    add_cross_entropy_gradients(model, batches)
    return tp.importance.TaylorImportance()


def collect_hessian(kind: type, images: int, model: nn.Module, batches: Batches) -> Any:
    importance = kind()
    pictures, labels = (torch.cat(column)[:images] for column in zip(*batches, strict=True))
    for pair in zip(pictures.split(1), labels.split(1), strict=True):
        model.zero_grad()
        add_cross_entropy_gradients(model, [pair])
        importance.accumulate_grad(model)
    return importance


@dataclass(frozen=True)
class Criterion:
    """How to make an importance ready, and what it needs: nothing, a seed, images or labels."""

    needs: str
    prepare: Callable[[nn.Module, Batches], Any]


def all_criteria(hessian_images: int) -> dict[str, Criterion]:
    """Name every criterion, the label-free ones of tp_amp first."""
    magnitude = tp.importance.MagnitudeImportance
    hessian = tp.importance.HessianImportance
    return {
        "EntropyTaylor, prediction": Criterion("images", partial(collect_entropy, "prediction")),
        "EntropyTaylor, similarity": Criterion("images", partial(collect_entropy, "similarity")),
        "Activation": Criterion("images", collect_activation),
        "Taylor": Criterion("labels", collect_taylor),
        "Hessian": Criterion("labels", partial(collect_hessian, hessian, hessian_images)),
        "Hessian, all images": Criterion(
            "labels", partial(collect_hessian, HessianOfAllImages, hessian_images)
        ),
        "Magnitude L1": Criterion("nothing", lambda model, batches: magnitude(p=1)),
        "Magnitude L2": Criterion("nothing", lambda model, batches: magnitude(p=2)),
        "LAMP": Criterion("nothing", lambda model, batches: tp.importance.LAMPImportance()),
        "FPGM": Criterion("nothing", lambda model, batches: tp.pruner.importance.FPGMImportance()),
        "Random": Criterion("seed", lambda model, batches: tp.importance.RandomImportance()),
    }


class Bench:
    """A dense model and the test split; nothing is measured twice."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.model, self.images, self.labels = model, images, labels
        self.example = images[:1].to(next(model.parameters()).device)
        traced = build_graph(model, self.example)
        self.graph, self.mlps = traced.graph, read_mlps(model, traced)
        self._accuracy: dict[str, float] = {}
        self._size: dict[str, dict[str, Any]] = {}

    def rank(self, criterion: Criterion, batches: Batches, seed: int) -> dict[str, list[int]]:
        """Order the channels of each MLP, the best first; leaves the model as it was."""
        torch.manual_seed(seed)
        importance = criterion.prepare(self.model, batches)
        order = {mlp.down: rank_channels(importance, self.graph, mlp) for mlp in self.mlps}
        self.model.zero_grad()
        for module in self.model.modules():
            module.__dict__.pop("_importance", None)  # ActivationImportance leaves it
        return order

    def widths(self, fraction: float) -> dict[str, int]:
        """The same share of every MLP."""
        return {mlp.down: max(1, round(mlp.width * fraction)) for mlp in self.mlps}

    def accuracy(self, order: dict[str, list[int]], widths: dict[str, int]) -> float:
        """Test accuracy with the first channels of each order; the model comes back whole."""
        keep = {name: sorted(order[name][:width]) for name, width in widths.items()}
        key = json.dumps(keep)
        if key not in self._accuracy:
            with ExitStack() as stack:
                for mlp in self.mlps:
                    stack.enter_context(narrowed(self.graph, mlp, keep[mlp.down]))
                self._accuracy[key] = accuracy(self.model, self.images, self.labels, 64)
        return self._accuracy[key]

    def size(self, widths: dict[str, int]) -> dict[str, Any]:
        """Parameters, multiply-accumulates, and the share of the MLPs' parameters that stays."""
        key = json.dumps(widths)
        if key not in self._size:
            model = copy.deepcopy(self.model)
            plan = tp_amp.PruningPlan({name: list(range(w)) for name, w in widths.items()})
            tp_amp.apply_plan(model, self.example, plan)
            macs, parameters = tp.utils.count_ops_and_params(model, self.example)
            kept = self._mlp_parameters(model) / self._mlp_parameters(self.model)
            self._size[key] = {"kept": kept, "parameters": int(parameters), "macs": int(macs)}
        return self._size[key]

    def _mlp_parameters(self, model: nn.Module) -> int:
        names = [name for mlp in self.mlps for name in (*mlp.up, mlp.down)]
        return sum(p.numel() for name in names for p in model.get_submodule(name).parameters())


def draw_batches(
    train: tuple[Tensor, Tensor], counts: Sequence[int], seed: int, device: str
) -> list[Batches]:
    """Draw disjoint sets of training images at random, each in normalised batches of 64."""
    order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(seed))
    sets = []
    for index in order[: sum(counts)].split(list(counts)):
        images, labels = (t[index].to(device) for t in train)
        sets.append(list(zip(normalize(images).split(64), labels.split(64), strict=True)))
    return sets


def search_widths(
    bench: Bench, scoring: Batches, search: Batches, increase: float
) -> dict[str, int]:
    """Let AMP's pruner find each MLP's width."""
    importance = collect_entropy("prediction", bench.model, scoring)
    model = copy.deepcopy(bench.model)
    pruner = tp_amp.AdaptiveMLPPruner(
        model, bench.example, importance, search, max_increase=increase, progress=False
    )
    pruner.step()
    return pruner.plan.widths


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
    searched = {}
    for increase in tqdm(options.max_increase, desc=f"seed {seed}, searched", disable=None):
        widths = search_widths(bench, *sets, increase)
        reached = bench.accuracy(orders["EntropyTaylor, prediction"], widths)
        run = {"seed": seed, "accuracy": reached, **bench.size(widths), "widths": widths}
        if increase in options.compare_at:
            run["criteria"] = compare_criteria(bench, orders, widths)
        searched[increase] = run
    return {"equal": equal, "searched": searched}


def compare_criteria(
    bench: Bench, orders: dict[str, dict[str, list[int]]], widths: dict[str, int]
) -> dict[str, dict[str, float]]:
    """Accuracy of every criterion at given widths, and at equal ones of the same size."""
    equal = bench.widths(bench.size(widths)["kept"])
    return {
        name: {
            "searched widths": bench.accuracy(order, widths),
            "equal widths": bench.accuracy(order, equal),
        }
        for name, order in orders.items()
    }


def gather(bench: Bench, runs: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Turn one result for each seed into the record that is written."""
    criteria = {
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
    sizes = {str(f): bench.size(bench.widths(f)) for f in options.fractions}
    dense = {name: list(range(width)) for name, width in bench.widths(1).items()}
    return {
        "model": options.model,
        "configuration": {
            **{k: v for k, v in vars(options).items() if isinstance(v, int | list)},
            "test_images": len(bench.labels),
        },
        "versions": versions(),
        "notes": NOTES,
        "dense": {
            "accuracy": bench.accuracy(dense, bench.widths(1)),
            **bench.size(bench.widths(1)),
        },
        "equal_widths": {"sizes": sizes, "criteria": criteria},
        "searched_widths": {
            str(increase): [run["searched"][increase] for run in runs]
            for increase in options.max_increase
        },
    }


def spread(values: Sequence[float]) -> str:
    """Mean, and standard deviation where there is more than one value, in percent."""
    text = f"{100 * mean(values):.1f}"
    return f"{text} ±{100 * stdev(values):.1f}" if len(values) > 1 else text


def report(record: dict[str, Any]) -> str:
    """What a person reads: accuracies in percent, mean and standard deviation over the seeds."""
    dense, equal = record["dense"], record["equal_widths"]
    parts = [
        f"{record['model']}: dense {100 * dense['accuracy']:.1f} % of "
        f"{record['configuration']['test_images']} test images, "
        f"{dense['parameters'] / 1e6:.2f} M parameters, {dense['macs'] / 1e6:.1f} M MACs",
        "Test accuracy (%) without fine-tuning, every MLP cut to the same share:\n"
        + table(
            ["criterion", "needs", *equal["sizes"]],
            [
                [name, entry["needs"], *map(spread, entry["accuracy"].values())]
                for name, entry in equal["criteria"].items()
            ],
        ),
        "Widths searched by AMP (EntropyTaylor, prediction):\n"
        + table(
            ["max_increase", "MLP kept", "MACs kept", "accuracy"],
            [
                [
                    increase,
                    spread([run["kept"] for run in runs]),
                    spread([run["macs"] / dense["macs"] for run in runs]),
                    spread([run["accuracy"] for run in runs]),
                ]
                for increase, runs in record["searched_widths"].items()
            ],
        ),
    ]
    for increase, runs in record["searched_widths"].items():
        if "criteria" in runs[0]:
            parts.append(
                f"Every criterion at max_increase {increase}: the searched widths, and equal "
                "widths of the same size:\n" + compare(runs)
            )
    return "\n\n".join([*parts, "\n".join(NOTES)])


def compare(runs: list[dict[str, Any]]) -> str:
    """Every criterion at the searched widths and at equal widths of the same size."""
    columns = ("searched widths", "equal widths")
    rows = [
        [name, *(spread([run["criteria"][name][column] for run in runs]) for column in columns)]
        for name in runs[0]["criteria"]
    ]
    return table(["criterion", *columns], rows)


# Okabe and Ito's colours, which colour-blind readers tell apart; colour, marker, line.
STYLES = {
    "EntropyTaylor, prediction": ("#0072B2", "o", "-"),
    "EntropyTaylor, similarity": ("#D55E00", "s", "-"),
    "Activation": ("#009E73", "^", "--"),
    "Taylor": ("#000000", "v", "--"),
    "Hessian": ("#999999", "x", ":"),
    "Hessian, all images": ("#CC79A7", "D", "--"),
    "Magnitude L1": ("#56B4E9", "<", "-."),
    "Magnitude L2": ("#E69F00", ">", "-."),
    "LAMP": ("#E69F00", ">", "-."),
    "FPGM": ("#7F6000", "P", "-."),
    "Random": ("#999999", "+", ":"),
}


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw the accuracy at equal widths as curves and at searched widths as stars."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(100 * record["dense"]["accuracy"], color="#666666", linewidth=0.8, label="dense")
    sizes = record["equal_widths"]["sizes"]
    kept = [100 * size["kept"] for size in sizes.values()]
    for name, entry in record["equal_widths"]["criteria"].items():
        draw_curve(axes, name, kept, list(entry["accuracy"].values()))
    runs = [run for runs in record["searched_widths"].values() for run in runs]
    axes.plot(
        [100 * run["kept"] for run in runs],
        [100 * run["accuracy"] for run in runs],
        linestyle="none",
        marker="*",
        markersize=12,
        markerfacecolor="#0072B2",
        markeredgecolor="white",
        label="AMP, searched widths",
        zorder=5,
    )
    axes.set_xlabel("MLP parameters kept (%)")
    axes.set_ylabel("test accuracy without fine-tuning (%)")
    axes.set_title(f"{record['model']} on CIFAR-10, cut in one shot")
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def draw_curve(axes: Any, name: str, kept: list[float], accuracies: list[list[float]]) -> None:
    """Draw one criterion: the mean over the seeds, and a band of the standard deviation."""
    colour, marker, line = STYLES[name]
    own = name.startswith("EntropyTaylor")
    centre = [100 * mean(values) for values in accuracies]
    width = [100 * stdev(values) if len(values) > 1 else 0.0 for values in accuracies]
    axes.plot(
        kept,
        centre,
        color=colour,
        marker=marker,
        linestyle=line,
        linewidth=2.4 if own else 1.2,
        markersize=6 if own else 4.5,
        label=name,
        zorder=4 if own else 3,
    )
    low, high = ([c + sign * w for c, w in zip(centre, width, strict=True)] for sign in (-1, 1))
    axes.fill_between(kept, low, high, color=colour, alpha=0.15, linewidth=0)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(ARCHITECTURES), required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for JSON and PNG")
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
    train, (images, labels) = (load_split(options.data, split) for split in ("train", "test"))
    count = options.test_images or len(labels)
    picked = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:count]
    model = load_reference(options.model, options.checkpoints).to(options.device)
    bench = Bench(model, normalize(images[picked]), labels[picked])
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
