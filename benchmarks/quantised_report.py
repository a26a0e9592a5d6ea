"""The table of benchmarks/quantised.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from pages import NOT_RUN


def right(row: dict[str, Any], count: int) -> np.ndarray:
    """Whether each test image is classified right."""
    bits = np.frombuffer(bytes.fromhex(row["right"]), np.uint8)
    return np.unpackbits(bits)[:count].astype(float)


def costs(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each route: accuracies, what rounding costs either model, and what it costs one more.

    Costs are differences on the same test images, each with its standard error. A route that was
    measured on one of the models alone has none.
    """
    count = record["test_images"]
    found = {(row["route"], row["model"]): right(row, count) for row in record["rows"]}
    result = {}
    for route in dict.fromkeys(row["route"] for row in record["rows"]):
        if (route, "dense") in found and (route, "pruned") in found:
            dense, pruned = (found["float32", n] - found[route, n] for n in ("dense", "pruned"))
            result[route] = {
                "dense": float(found[route, "dense"].mean()),
                "pruned": float(found[route, "pruned"].mean()),
                "dense lost": with_error(dense),
                "pruned lost": with_error(pruned),
                "more": with_error(pruned - dense),
            }
    return result


def with_error(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.std()) / len(values) ** 0.5


def points(value: tuple[float, float]) -> str:
    return f"{100 * value[0]:.1f} ±{100 * value[1]:.1f}"


def report(record: dict[str, Any] | None) -> str:
    """What a person reads: one table in Markdown, in percent and points, with standard errors."""
    if record is None:
        return NOT_RUN
    speeds = {(row["route"], row["compiled"]): row for row in record["speeds"]}
    parameters = {row["model"]: row["parameters"] / 1e6 for row in record["rows"]}
    sizes = ", ".join(f"{name} {size:.2f} M" for name, size in parameters.items())
    lines = [
        f"{record['test_images']} test images; parameters: {sizes}; pruned by "
        f"{record['recipe']} with {record['images']} photographs; {record['calibration']} "
        "photographs to calibrate on",
        "",
        "| | dense (%) | rounding costs | pruned (%) | rounding costs | more than dense "
        "| speed, dense | pruned | compiled, dense | pruned |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for route, cost in costs(record).items():
        cells = [route, f"{100 * cost['dense']:.1f}", points(cost["dense lost"])]
        cells += [f"{100 * cost['pruned']:.1f}", points(cost["pruned lost"]), points(cost["more"])]
        for compiled in (False, True):
            row = speeds.get((route, compiled))
            for name in ("dense", "pruned"):
                cells.append("" if row is None else f"{row[name]['ratio']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
