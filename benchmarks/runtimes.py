"""Latency targets and speeds in PyTorch, torch.compile, onnxruntime and OpenVINO, on the CPU.

    python benchmarks/runtimes.py

Weights and images are random: only speed is measured. Three parts: five latency targets on a ViT-S
and a Swin-T, planned by `plan_for_target` and measured again afterwards; images per second of a
ViT-S/14 of whose MLPs half is left, at uneven widths, in batches of 1 and 64; and how long widths
around 1,000 take. Each row is written as soon as it is there, to results/runtimes.json, and a
command that is started again goes on with the next one; after `--minutes` it ends by itself. Then
it writes the tables of the documentation.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import timm
import torch
from pages import NOT_RUN, PAGES, fill
from reference import RESULTS, is_out_of_reach, settled, versions, write_json
from round_to import cut_to, draw_widths
from torch import nn

import tp_amp
from tp_amp.budget.budget import Budget
from tp_amp.budget.target_plan import plan_within
from tp_amp.running.inputs import Inputs
from tp_amp.running.runtimes.building import RUNTIMES, build
from tp_amp.running.timing import seconds
from tp_amp.structure.model_structure import ModelStructure

CPU = torch.device("cpu")
TARGETS = (0.9, 0.85, 0.8, 0.75, 0.7)
STEPS = (1024, 1008, 1001, 1000)
SIZES = (1, 64)  # of batches
ROUND_TO = 8
TITLES = {
    "throughput": "A ViT-S/14 of whose MLPs half is left, and the dense one, which take turns",
    "steps": "Time with MLPs of these widths to that with 1,024, with the quartiles",
    "targets": "Latency that was reached, of the dense model's, for these targets; measured twice",
}
PARTS = tuple(TITLES)
WHOLE: dict[str, Any] = {
    "targets": {
        "ViT-S/16": ("vit_small_patch16_224", {}),
        "Swin-T": ("swin_tiny_patch4_window7_224", {}),
    },
    "throughput": ("vit_small_patch14_dinov2", {"img_size": 224}),
    "steps": ("vit_small_patch16_224", {"depth": 4}),
}
_TINY = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}
# Most of its time is spent in its MLPs, so that targets can be met in spite of noise.
FAST: dict[str, Any] = {
    "targets": {"ViT-S/16": ("vit_tiny_patch16_224", {**_TINY, "mlp_ratio": 24})},
    "throughput": ("vit_tiny_patch16_224", _TINY),
    "steps": ("vit_tiny_patch16_224", {**_TINY, "mlp_ratio": 22}),
}


def made(name: str, arguments: dict[str, Any]) -> tuple[nn.Module, torch.Tensor]:
    """A model with random weights, and one image."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **arguments).eval()
    size = arguments.get("img_size", 224)
    return model, torch.randn(1, 3, size, size)


class Rows:
    """The rows of a result: each is measured once, and written at once.

    Args:
        path: of the JSON.
        facts: what all rows have in common; rows under other ones are refused.
        minutes: after which no further row is begun.
    """

    def __init__(self, path: Path, facts: dict[str, Any], minutes: float) -> None:
        self.path, self.end = path, time.monotonic() + 60 * minutes
        self.record = {"rows": {}, **facts, **settled(path, facts)}
        self.left = 0

    def lacks(self, key: str) -> bool:
        """Whether a row is to be measured now."""
        missing = key not in self.record["rows"]
        late = missing and time.monotonic() > self.end
        self.left += late
        return missing and not late

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keep a row."""
        self.record["rows"][key] = row
        write_json(self.record, self.path)


def throughput(rows: Rows, runtimes: Sequence[str], models: dict[str, Any], repeats: int) -> None:
    """Images per second of a dense ViT and of the same with half of its MLPs, in turns."""
    model, image = made(*models["throughput"])
    dense = {mlp.down: mlp.width for mlp in tp_amp.find_mlps(model, image)}
    cut, _ = cut_to(model, image, draw_widths(dense, 0, 0.5))
    for runtime in runtimes:
        key = f"throughput, {runtime}"
        if rows.lacks(key):
            both = tp_amp.measure_both(
                model,
                cut,
                [image],
                repeats=repeats,
                runtime=runtime,
                batch_sizes=SIZES,
                progress=False,
            )
            rows.add(key, dict(zip(("dense", "pruned"), map(asdict, both), strict=True)))


def steps(rows: Rows, runtimes: Sequence[str], models: dict[str, Any], repeats: int) -> None:
    """How long blocks with some MLP widths take, relative to the widest of them, in turns."""
    model, image = made(*models["steps"])
    inputs = Inputs((image.repeat(8, 1, 1, 1),))
    downs = [mlp.down for mlp in tp_amp.find_mlps(model, image)]
    for runtime in runtimes:
        key = f"steps, {runtime}"
        if rows.lacks(key):
            cut = [cut_to(model, image, dict.fromkeys(downs, width))[0] for width in STEPS]
            runs = [build(each, inputs, runtime).run for each in cut]
            rows.add(key, {"to_widest": in_turns(runs, inputs, 4 * repeats)})


@torch.no_grad()
def in_turns(runs: Sequence[Callable[..., Any]], inputs: Inputs, repeats: int) -> list[list[float]]:
    """The quartiles of each one's time relative to the first one's in the same turn."""
    ratios: list[list[float]] = [[] for _ in runs]
    for turn in range(repeats + 2):
        taken = [seconds(run, inputs, CPU) for run in runs]
        if turn >= 2:
            for found, one in zip(ratios, taken, strict=True):
                found.append(one / taken[0])
    return [statistics.quantiles(found, n=4, method="inclusive") for found in ratios]


def targets(rows: Rows, runtimes: Sequence[str], models: dict[str, Any], _: int) -> None:
    """Latency targets: what was asked for, and what the planned model takes."""
    for name, source in models["targets"].items():
        keys = {(runtime, share): f"targets, {name}, {runtime}, {share}" for runtime in runtimes
                for share in TARGETS}  # fmt: skip
        if not any(key not in rows.record["rows"] for key in keys.values()):
            continue
        model, image = made(*source)
        structure = ModelStructure(model, image)
        importance = tp_amp.ReconstructionImportance(data=[torch.randn(4, *image.shape[1:])])
        table = Budget({"latency": TARGETS[0]}, structure, structure.mlps, ROUND_TO)
        for runtime in runtimes:
            budget: Budget | None = None
            for share in TARGETS:
                if rows.lacks(keys[runtime, share]):
                    budget = budget or in_runtime(table, runtime)
                    rows.add(keys[runtime, share], met(budget, share, structure, importance))


def in_runtime(table: Budget, runtime: str) -> Budget:
    """A budget with the same table of widths, scaled to a runtime."""
    assert table.latency is not None
    budget = copy.copy(table)
    budget.latency = table.latency if runtime == "eager" else table.latency.moved(runtime)
    budget.dense = budget.latency.dense
    return budget


def met(budget: Budget, share: float, structure: ModelStructure, importance: Any) -> dict[str, Any]:
    """One target: milliseconds of the dense and of the planned model, measured twice.

    Where it is out of reach, the reason instead. What one target corrects of the table is not
    carried on to the next: `plan_for_target` measures anew for each.
    """
    budget = copy.copy(budget)
    budget.latency = latency = copy.copy(budget.latency)
    assert latency is not None
    budget.amount, budget.measured = share * budget.dense, None
    row = {"dense": budget.dense, "target": budget.amount}
    try:
        plan = plan_within(budget, structure, structure.mlps, importance)
    except ValueError as error:
        if not is_out_of_reach(error):
            raise
        return {**row, "out_of_reach": str(error)}
    return {
        **row,
        "measured": budget.measured,
        "again": latency.measure(plan.keep),
        "widths": plan.widths,
    }


def report(record: dict[str, Any] | None) -> str:
    """What a person reads: a Markdown table of each part."""
    if record is None:
        return NOT_RUN
    rows = {tuple(key.split(", ")): row for key, row in record["rows"].items()}
    parts = {
        part: [(key[1:], row) for key, row in rows.items() if key[0] == part] for part in PARTS
    }
    heads = {
        "throughput": ["runtime", "batch", "dense, images/s", "pruned, images/s", "times as fast",
                       "parameters in the file", "attentions fused"],
        "steps": ["runtime", *(f"{width:,}" for width in STEPS)],
        "targets": ["model", "runtime", "dense, ms",
                    *(f"{share:.0%}".replace("%", " %") for share in TARGETS)],
    }  # fmt: skip
    lines = {
        "throughput": [line for found in parts["throughput"] for line in _speeds(*found)],
        "steps": [[name, *map(_quartiles, row["to_widest"])] for (name,), row in parts["steps"]],
        "targets": _targets(parts["targets"]),
    }
    tables = [
        f"{TITLES[part]}:\n\n"
        + (_table([head, ["---"] * len(head), *lines[part]]) if lines[part] else NOT_RUN)
        for part, head in heads.items()
    ]
    return "\n\n".join(tables)


def _table(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _speeds(key: Sequence[str], row: dict[str, Any]) -> list[list[str]]:
    dense, pruned = row["dense"], row["pruned"]
    counts = ["", ""]
    if pruned["attentions"] is not None:
        same = pruned["exported_parameters"] == pruned["parameters"]
        fused = [f"{side['fused_attentions']} of {side['attentions']}" for side in (dense, pruned)]
        counts = ["as in the plan" if same else "other", " and ".join(dict.fromkeys(fused))]
    pairs = zip(dense["speeds"], pruned["speeds"], strict=True)
    return [
        [key[0], str(size), f"{old:.1f}", f"{new:.1f}", f"{new / old:.2f}", *counts]
        for (size, old), (_, new) in pairs
    ]


def _quartiles(found: Sequence[float]) -> str:
    low, middle, high = found
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"


def _targets(found: Sequence[tuple[Sequence[str], dict[str, Any]]]) -> list[list[str]]:
    lines: dict[tuple[str, str], list[str]] = {}
    for (model, runtime, share), row in found:
        line = lines.setdefault((model, runtime), [f"{row['dense']:.1f}", *[""] * len(TARGETS)])
        reached = [100 * row[name] / row["dense"] for name in ("measured", "again") if name in row]
        told = ", ".join(f"{percent:.1f} %" for percent in reached) or "out of reach"
        line[1 + TARGETS.index(float(share))] = told
    return [[*key, *line] for key, line in lines.items()]


def all_versions() -> dict[str, str]:
    """Versions of the runtimes too."""
    found = versions()
    for package in ("onnxruntime", "openvino"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, measure what is not there yet, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=RUNTIMES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="at least 2")
    parser.add_argument("--minutes", type=float, default=8, help="begin no row after them")
    parser.add_argument("--fast", action="store_true", help="tiny models, to try it")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    facts = {"threads": options.threads, "repeats": options.repeats, "fast": options.fast}
    path = options.output / "runtimes.json"
    rows = Rows(path, facts | {"versions": all_versions()}, options.minutes)
    # What is built fastest comes first.
    runtimes = sorted(options.runtimes, key=["eager", "openvino", "onnxruntime", "compile"].index)
    for part in options.parts:
        measure = {"throughput": throughput, "steps": steps, "targets": targets}[part]
        measure(rows, runtimes, FAST if options.fast else WHOLE, options.repeats)
    if options.output == RESULTS:
        fill(PAGES / "runtimes.md", "runtimes", report(rows.record))
    print(report(rows.record))
    if rows.left:
        print(f"\n{rows.left} rows are left; start the same command again")


if __name__ == "__main__":
    main()
