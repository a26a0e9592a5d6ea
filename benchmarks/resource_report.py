"""The table of benchmarks/resources.py."""

from __future__ import annotations

from typing import Any

from pages import NOT_RUN
from resource_calls import CALLS, MODELS

LOADED = 0.2  # cores that others used, from which on a time is marked
NAMES = {"time": "stopped after {timeout:g} s", "memory": "stopped at {memory_gb:g} GB"}
HEADER = "| call | s | CPU s | GB over what stood before | GB in all | |\n|---|---|---|---|---|---|"


def report(record: dict[str, Any] | None) -> str:
    """What a person reads: a Markdown table for each model, number of images and of threads."""
    if record is None or not record["rows"]:
        return NOT_RUN
    models, calls = list(MODELS), list(CALLS)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in record["rows"]:
        group = models.index(row["model"]), row["images"], row["threads"], row["processor"]
        groups.setdefault(group, []).append(row)
    parts = []
    for (model, images, threads, processor), rows in sorted(groups.items()):
        rows.sort(key=lambda row: calls.index(row["call"]))
        known = [row["parameters"] for row in rows if row["parameters"]]
        size = f", {known[0] / 1e6:.1f} M parameters" if known else ""
        unit = "image" if images == 1 else "images"
        cores = "thread" if threads == 1 else "threads"
        parts.append(f"**{models[model]}**{size}: {images} {unit}, {threads} {cores}, {processor}")
        lines = [f"| {' | '.join(cells(row))} |" for row in rows]
        parts.append("\n".join([HEADER, *lines]))
    loaded = [row for row in record["rows"] if is_loaded(row) and row["outcome"] == "done"]
    if loaded:
        parts.append(
            f"\\* Other programs used over {LOADED} cores meanwhile: of {len(loaded)} rows the "
            "time is too long, while memory is what it is."
        )
    return "\n\n".join(parts)


def is_loaded(row: dict[str, Any]) -> bool:
    return float(row["other_cores"]) > LOADED


def cells(row: dict[str, Any]) -> list[str]:
    """One line of the table: figures where the call is done, else what is known of them."""
    done, before, figures = row["outcome"] == "done", row["before_bytes"], ["", "", "", ""]
    if done:
        mark = "\\*" if is_loaded(row) else ""
        figures[:2] = [f"{row['seconds']:.2f}{mark}", f"{row['cpu_seconds']:.2f}"]
    if done or (row["outcome"] in NAMES and before):
        least, peak = "" if done else "≥ ", row["peak_bytes"]
        figures[2:] = [f"{least}{(peak - before) / 1e9:.2f}", f"{least}{peak / 1e9:.2f}"]
    return [row["call"], *figures, note(row)]


def note(row: dict[str, Any]) -> str:
    """Why a call gave no figure."""
    if row["outcome"] == "done":
        return ""
    text = NAMES.get(row["outcome"], "failed: {message}").format(**row)
    return text if row["before_bytes"] else f"{text} while it was prepared"
