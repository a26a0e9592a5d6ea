"""The table and the picture of benchmarks/real.py."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, mode, variance
from typing import Any

from matplotlib.figure import Figure
from real_recipes import CLOSED, CORP, FEW, HEADS, IMPORTANCES, RECOMMENDED, UNIFORM

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#E69F00", "#0072B2", "#009E73", "#56B4E9", "#777777", "#7F6000", "#BBBBBB")
CURVES = {
    f"{RECOMMENDED}, distilled": ("#7B3294", "^", "-"),
    f"{CLOSED}, distilled": ("#7B3294", "v", "--"),
    f"{CLOSED} ({FEW} photographs), distilled": ("#7B3294", "<", ":"),
    f"{CLOSED}, by sensitivity": ("#B22222", "v", "-"),
    RECOMMENDED: ("#D55E00", "o", "-"),
    f"{HEADS}, distilled": ("#7B3294", "D", "-"),
    HEADS: ("#0072B2", "o", "--"),
    CLOSED: ("#B22222", "*", "-"),
    f"{UNIFORM}, by sensitivity, refined": ("#B22222", "*", "--"),
    UNIFORM: ("#D55E00", "o", "--"),
    CORP: ("#CC79A7", "D", ":"),
    "GRAIL: magnitude + uncentred ridge": ("#CC79A7", "P", ":"),
    "FLAP: variance and norm + mean": ("#000000", ">", ":"),
    "VBP: variance + mean": ("#000000", "<", ":"),
}
for _name, _colour in (
    (CORP, "#CC79A7"),
    ("EntropyTaylor", "#0072B2"),
    ("Magnitude L2", "#56B4E9"),
):
    CURVES[f"{_name}, distilled"] = (_colour, "^", "--")
for _name, _colour in zip(IMPORTANCES, COLOURS, strict=True):
    CURVES[f"{_name} + affine"] = (_colour, "s", "-")
    CURVES[_name] = (_colour, "x", "-.")


def summaries(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Mean over the draws of each recipe, share and number of images, the largest share first."""
    groups: dict[tuple[float, int, str], list[dict[str, Any]]] = {}
    for row in record["rows"]:
        groups.setdefault((-row["kept"], row["images"], row["recipe"]), []).append(row)
    found = []
    for (kept, images, recipe), rows in groups.items():
        means = {
            name: mean(row[name] for row in rows) if rows[0][name] is not None else None
            for name in (
                "accuracy",
                "lost",
                "cosine",
                "map_correlation",
                "parameters_kept",
                "seconds",
                "cpu_seconds",
            )
        }
        # The test images are the same for all draws, so their error does not fall with these.
        for name, error in (("accuracy", "standard_error"), ("lost", "lost_standard_error")):
            drawn = variance([row[name] for row in rows]) / len(rows) if len(rows) > 1 else 0.0
            means[error] = (mean(row[error] for row in rows) ** 2 + drawn) ** 0.5
        common = {"recipe": recipe, "kept": -kept, "images": images, "draws": len(rows)}
        found.append(common | means)
    return sorted(found, key=lambda x: (-x["kept"], x["images"], -x["accuracy"]))


def report(record: dict[str, Any]) -> str:
    """What a person reads: a Markdown table, in percent, with standard errors."""
    dense = record["dense"]
    lines = [
        f"{record['model']}: dense {100 * dense['accuracy']:.1f} ±"
        f"{100 * dense['standard_error']:.1f} % of {record['test_images']} test images, "
        f"{dense['parameters'] / 1e6:.2f} M parameters",
        "",
        "| MLPs kept | parameters kept | photographs | draws | recipe | accuracy (%) "
        "| lost (points) | class token, cosine | saliency, correlation | s | CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in summaries(record):
        cells = [
            f"{100 * row['kept']:.0f} %",
            f"{100 * row['parameters_kept']:.1f} %",
            f"{row['images']}",
            f"{row['draws']}",
            row["recipe"],
            f"{100 * row['accuracy']:.1f} ±{100 * row['standard_error']:.1f}",
            f"{100 * row['lost']:.1f} ±{100 * row['lost_standard_error']:.1f}",
            *("" if row[n] is None else f"{row[n]:.3f}" for n in ("cosine", "map_correlation")),
            f"{row['seconds']:.0f}",
            f"{row['cpu_seconds']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def alike(rows: list[dict[str, Any]]) -> tuple[int, list[dict[str, Any]]]:
    """The number of images that most rows have, and those rows."""
    images = mode(row["images"] for row in rows)
    return images, [row for row in rows if row["images"] == images]


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw accuracy against the share kept, of the number of images that most rows have.

    What all recipes of this project have in common is called tp_amp there.
    """
    images, rows = alike(summaries(record))
    figure = Figure(figsize=(10.5, 5.6), layout="constrained")
    axes = figure.add_subplot()
    accuracy, error = (100 * record["dense"][key] for key in ("accuracy", "standard_error"))
    axes.axhline(accuracy, color="#666666", linewidth=0.8, label="dense")
    axes.axhspan(accuracy - error, accuracy + error, color="#666666", alpha=0.12, linewidth=0)
    names = dict.fromkeys([*CURVES, *(row["recipe"] for row in rows)])
    for name in names:
        points = [row for row in rows if row["recipe"] == name]
        if not points:
            continue
        colour, marker, line = CURVES.get(name, ("#444444", ".", ":"))
        axes.errorbar(
            [100 * row["parameters_kept"] for row in points],
            [100 * row["accuracy"] for row in points],
            [100 * row["standard_error"] for row in points],
            color=colour,
            marker=marker,
            linestyle=line,
            linewidth=2.2 if "every Linear" in name else 1.2,
            zorder=3 if "every Linear" in name else 2,
            capsize=2,
            label=name.replace(f"{CLOSED}, by sensitivity", "tp_amp"),
        )
    axes.set_xlabel("parameters kept (%)")
    axes.set_ylabel("test accuracy (%)")
    axes.set_title(f"A ViT-S/14 cut without labels, {images} photographs")
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
