"""The table and the picture of benchmarks/compensation.py."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from reference import spread, table

# Okabe and Ito's colours, which colour-blind readers tell apart.
CURVES = {
    "Reconstruction, own widths + affine, every Linear, refined": ("#B22222", "*", "-"),
    "Reconstruction, own widths + affine, every Linear": ("#D55E00", "o", "-"),
    "Reconstruction, own widths + affine": ("#E69F00", "s", "-"),
    "EntropyTaylor, prediction + affine": ("#0072B2", "^", "--"),
    "DIMAP + affine": ("#009E73", "v", "--"),
    "CORP: magnitude + affine at once": ("#CC79A7", "D", ":"),
    "GRAIL: magnitude + uncentred ridge": ("#56B4E9", "P", ":"),
    "VBP: variance + mean": ("#7F6000", "<", ":"),
    "EntropyTaylor, prediction": ("#777777", "^", "-."),
    "Taylor": ("#000000", "x", "-."),
}


def report(record: dict[str, Any]) -> str:
    """What a person reads: accuracies in percent, mean and standard deviation over the seeds."""
    fractions = record["accuracy"]
    names = dict.fromkeys(name for values in fractions.values() for name in values)
    last = list(fractions.values())[-1]
    best = sorted(names, key=lambda name: -mean(last.get(name, [0])))
    rows = [
        [name, *(spread(values[name]) if name in values else "" for values in fractions.values())]
        for name in best
    ]
    dense = 100 * record["dense"]["accuracy"]
    parts = [
        f"{record['model']}: dense {dense:.1f} %. Test accuracy (%) by the share of the MLPs kept, "
        "no labels but for Taylor and Hessian, no fine-tuning:\n"
        + table(["recipe", *fractions], rows)
    ]
    for name, counts in record.get("images", {}).items():
        kept = list(next(iter(counts.values())))
        rows = [[n, *(f"{100 * found[k]:.1f}" for k in kept)] for n, found in counts.items()]
        parts.append(f"{name}, by unlabelled images:\n" + table(["images", *kept], rows))
    return "\n\n".join(parts)


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw accuracy against the share of the MLPs kept."""
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(100 * record["dense"]["accuracy"], color="#666666", linewidth=0.8, label="dense")
    for name, (colour, marker, line) in CURVES.items():
        means = {f: 100 * mean(x[name]) for f, x in record["accuracy"].items() if name in x}
        axes.plot(
            [100 * record["sizes"][fraction]["kept"] for fraction in means],
            list(means.values()),
            color=colour,
            marker=marker,
            linestyle=line,
            linewidth=2.2 if "Reconstruction" in name else 1.2,
            zorder=3 if "Reconstruction" in name else 2,
            label=name,
        )
    axes.set_xlabel("MLP parameters kept (%)")
    axes.set_ylabel("test accuracy without fine-tuning (%)")
    axes.set_title(f"{record['model']} on CIFAR-10, cut in one shot, no labels")
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
