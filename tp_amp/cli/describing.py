"""What `tp-amp prune` and `tp-amp report` say of a plan."""

from __future__ import annotations

from typing import Any

from tp_amp.plan.pruning_plan import PruningPlan
from tp_amp.reports.comparison import table

_SIZES = {
    "parameters": ("parameters", "M", 1e6),
    "macs": ("MACs", "G", 1e9),
    "latency": ("latency of one image", "ms", 1.0),
}


def widths(plan: PruningPlan) -> dict[str, dict[str, int]]:
    """Dense and kept channels or heads of each layer that a plan names."""
    return {
        name: {"dense": plan.dense_widths.get(name, width), "kept": width}
        for name, width in plan.widths.items()
    }


def described(record: dict[str, Any]) -> str:
    """A table of the widths, and how size and outputs changed, where that is known."""
    rows = [
        [name, str(found["dense"]), str(found["kept"]), f"{found['kept'] / found['dense']:.0%}"]
        for name, found in record["widths"].items()
    ]
    lines = [table(["channels or heads read by", "dense", "kept", ""], rows)]
    for key, before in record.get("before", {}).items():
        after = record["after"][key]
        if key in _SIZES:
            name, unit, scale = _SIZES[key]
            runtime = record.get("runtime", "eager")
            if key == "latency" and runtime != "eager":
                name = f"{name} in {runtime}"
            sizes = f"{before / scale:.3f} {unit} -> {after / scale:.3f} {unit}"
            lines.append(f"{name}: {sizes} ({after / before:.1%})")
        else:
            images = f"{record['images_judged']} images that did not score"
            lines.append(changed(key, before, after, images))
    if record.get("target"):
        [(kind, asked)] = record["target"].items()
        key = "parameters" if kind == "params" else kind
        before, after = record["before"][key], record["after"][key]
        reached = after / before if asked <= 1 else after
        lines.append(f"target: {kind}={asked:g}, reached {reached:.4g}")
    return "\n".join(lines)


def changed(metric: str, before: float, after: float, images: str) -> str:
    """How a metric changed, on which images."""
    return f"{metric}: {before:.4f} -> {after:.4f}, on {images}"
