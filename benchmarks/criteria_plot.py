"""The picture of benchmarks/criteria.py: accuracy over what is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart; colour, marker, line.
STYLES = {
    "EntropyTaylor, prediction": ("#0072B2", "o", "-"),
    "EntropyTaylor, similarity": ("#D55E00", "s", "-"),
    "GramSchmidt": ("#009E73", "p", "-"),
    "DIMAP": ("#E69F00", ">", "-"),
    "Activation": ("#666666", "^", "--"),
    "Taylor": ("#000000", "v", "--"),
    "Hessian": ("#999999", "x", ":"),
    "Hessian, all images": ("#CC79A7", "D", "--"),
    "Magnitude L1": ("#56B4E9", "<", "-."),
    "Magnitude L2": ("#E69F00", ">", "-."),
    "LAMP": ("#E69F00", ">", "-."),
    "FPGM": ("#7F6000", "P", "-."),
    "Random": ("#999999", "+", ":"),
}
STARS = {"EntropyTaylor, prediction": "#F0E442", "GramSchmidt": "#009E73"}


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw the accuracy over what is kept: equal widths as curves, searched widths as stars."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    macs = record["dense"]["macs"]
    draw_panel(left, record, lambda size: 100 * size["kept"])
    draw_panel(right, record, lambda size: 100 * size["macs"] / macs)
    left.set_xlabel("MLP parameters kept (%)")
    right.set_xlabel("multiply-accumulates of the whole model kept (%)")
    left.set_ylabel("test accuracy (%)")
    figure.suptitle(f"{record['model']} on CIFAR-10, cut in one shot, not fine-tuned")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def draw_panel(
    axes: Any, record: dict[str, Any], position: Callable[[dict[str, Any]], float]
) -> None:
    """Draw all criteria, AMP's searches and the dense model over one measure of size."""
    equal, dense = record["equal_widths"], 100 * record["dense"]["accuracy"]
    axes.axhline(dense, color="#666666", linewidth=0.8, label="dense")
    positions = [position(size) for size in equal["sizes"].values()]
    for names, accuracies in merge_equal(equal["criteria"]).items():
        draw_curve(axes, names, positions, accuracies)
    for name, found in record["searched_widths"].items():
        draw_stars(axes, name, position, [run for runs in found.values() for run in runs])
    axes.set_ylim(lowest_shown(equal["criteria"]) - 3, dense + 2)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def lowest_shown(criteria: dict[str, Any]) -> float:
    """Random and the shipped Hessian fall out of the frame: the others can then be told apart."""
    shown = [entry for name, entry in criteria.items() if name not in ("Random", "Hessian")]
    return min(100 * mean(values) for entry in shown for values in entry["accuracy"].values())


def merge_equal(criteria: dict[str, Any]) -> dict[tuple[str, ...], list[list[float]]]:
    """Criteria with the same accuracies everywhere become one curve with all their names."""
    merged: dict[str, list[str]] = {}
    for name, entry in criteria.items():
        merged.setdefault(json.dumps(list(entry["accuracy"].values())), []).append(name)
    return {tuple(names): json.loads(accuracies) for accuracies, names in merged.items()}


def draw_curve(
    axes: Any, names: tuple[str, ...], positions: list[float], accuracies: list[list[float]]
) -> None:
    """Draw one criterion: the mean over the seeds, and a band of the standard deviation."""
    colour, marker, line = STYLES[names[0]]
    own = line == "-"
    centre = [100 * mean(values) for values in accuracies]
    width = [100 * stdev(values) if len(values) > 1 else 0.0 for values in accuracies]
    axes.plot(
        positions,
        centre,
        color=colour,
        marker=marker,
        linestyle=line,
        linewidth=2 if own else 1.2,
        markersize=6 if own else 4.5,
        label=", ".join(names),
        zorder=3 if own else 4,
    )
    low, high = ([c + sign * w for c, w in zip(centre, width, strict=True)] for sign in (-1, 1))
    axes.fill_between(positions, low, high, color=colour, alpha=0.15, linewidth=0)


def draw_stars(
    axes: Any,
    name: str,
    position: Callable[[dict[str, Any]], float],
    runs: list[dict[str, Any]],
) -> None:
    """Draw AMP's searched widths with one criterion's ranking."""
    axes.plot(
        [position(run) for run in runs],
        [100 * run["accuracy"] for run in runs],
        linestyle="none",
        marker="*",
        markersize=12,
        markerfacecolor=STARS[name],
        markeredgecolor="black",
        label=f"AMP's widths: {name}",
        zorder=5,
    )
