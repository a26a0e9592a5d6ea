"""What `plan_for_target` foresees to be lost, against what is lost, on a pretrained ViT-S/14.

    python benchmarks/foreseen.py --data path/to/images

Model and images are those of benchmarks/real.py. Each MLP is cut alone, with the channels and the
foreseen error of `ReconstructionImportance`, and compensated; then all are cut together, to the
plans of `plan_for_target`. What is lost is the mean divergence of the dense model's classes from
the cut one's on test images, in nats for each image, which is what is foreseen. Writes
results/foreseen.json and the table and picture of the documentation, or all into another
`--output`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from pages import NOT_RUN, PAGES, PICTURES, fill
from real import default_cache, describe
from real_recipes import IMPORTANCES, Draw
from real_task import BATCH, Task, load_task, normalise, random_task
from reference import RESULTS, versions, write_json
from torch import Tensor, nn
from tqdm import tqdm

import tp_amp

MAPS = 250  # as real.py, so that what the dense model makes of the images is computed once


@torch.inference_mode()
def log_chances(model: nn.Module, task: Task, count: int) -> Tensor:
    """Logarithms of the classes' probabilities, `(images, classes)`."""
    logits = [model(normalise(part)) for part in task.test[0][:count].split(BATCH)]
    return torch.cat(logits).double().log_softmax(1)


def lost(dense: Tensor, cut: Tensor) -> float:
    """Mean divergence of the dense model's classes from the cut one's, in nats."""
    return float((dense.exp() * (dense - cut)).sum(1).mean())


def measure(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    """Foreseen and measured losses of each MLP alone and of whole plans."""
    draw = Draw(task, options.images, options.seed)
    importance, _ = draw.once("Reconstruction", IMPORTANCES["Reconstruction"])
    dense = log_chances(task.model, task, options.test_images)

    def row(plan: tp_amp.PruningPlan, **what: Any) -> dict[str, Any]:
        errors = [float(importance.errors[n][len(kept)]) for n, kept in plan.keep.items()]
        losses = {}
        for name, every in (("cut layers", False), ("every Linear", True)):
            model = draw.compensated(plan, every_linear=every)
            losses[name] = lost(dense, log_chances(model, task, options.test_images))
            if len(plan.keep) == 1:  # nothing else lies between the first and the last cut layer
                break
        return {**what, "foreseen": sum(errors), "lost": losses}

    singles = [(name, share) for name in draw.downs for share in options.shares]
    alone = []
    for name, share in tqdm(singles, disable=None):
        order = importance.orders[name]
        keep = sorted(order[: max(1, round(len(order) * share))].tolist())
        alone.append(row(tp_amp.PruningPlan({name: keep}), layer=name, kept=share))
    together = [row(draw.own_plan(kept), kept=kept) for kept in options.fractions]
    return {"alone": alone, "together": together}


def plot(record: dict[str, Any], path: Path) -> None:
    """Measured over foreseen; on the line they are the same."""
    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    axes = figure.subplots()
    points = {
        "one MLP": [(r["foreseen"], r["lost"]["cut layers"]) for r in record["alone"]],
        "all MLPs, cut layers": [
            (r["foreseen"], r["lost"]["cut layers"]) for r in record["together"]
        ],
        "all MLPs, every Linear": [
            (r["foreseen"], r["lost"]["every Linear"]) for r in record["together"]
        ],
    }
    colours = ("#0072B2", "#D55E00", "#009E73")
    for (label, pairs), colour, marker in zip(points.items(), colours, "osD", strict=True):
        axes.scatter(*zip(*pairs, strict=True), label=label, color=colour, marker=marker)
    every = [value for pairs in points.values() for pair in pairs for value in pair if value > 0]
    ends = min(every, default=1e-3) / 1.5, max(every, default=1.0) * 1.5
    axes.plot(ends, ends, color="#777777", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="foreseen (nats)", ylabel="lost (nats)")
    axes.legend()
    figure.savefig(path, dpi=150)


def report(record: dict[str, Any] | None) -> str:
    """Two Markdown tables, if there is a result."""
    if record is None:
        return NOT_RUN
    lines = ["| MLP | kept | foreseen | lost | lost / foreseen |", "|---|---|---|---|---|"]
    for row in record["alone"]:
        measured = row["lost"]["cut layers"]
        lines.append(
            f"| `{row['layer']}` | {100 * row['kept']:.0f} % | {row['foreseen']:.4f} "
            f"| {measured:.4f} | {measured / row['foreseen']:.1f} |"
        )
    lines += [
        "",
        "| all MLPs, kept | sum of foreseen | lost, cut layers fitted | every Linear fitted |",
        "|---|---|---|---|",
    ]
    for row in record["together"]:
        measured = " | ".join(
            f"{row['lost'][name]:.3f} ({row['lost'][name] / row['foreseen']:.1f} times)"
            for name in ("cut layers", "every Linear")
        )
        lines.append(f"| {100 * row['kept']:.0f} % | {row['foreseen']:.3f} | {measured} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="as for real.py")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="for the weights")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--images", type=int, default=256, help="photographs that are fitted")
    parser.add_argument("--test-images", type=int, default=256)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25], help="of one MLP")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--fast", action="store_true", help="a tiny random model, drawn images")
    options = parser.parse_args(arguments)
    if not options.fast and options.data is None:
        parser.error("--data is needed, but with --fast")
    torch.set_num_threads(options.threads)
    task = random_task() if options.fast else load_task(options.data, options.cache, MAPS)
    if options.fast:
        options.images = min(options.images, len(task.photos[0]))
    common = {**describe(task, options.fast), "images": options.images, "seed": options.seed}
    common |= {"lost_on": min(options.test_images, len(task.right)), **versions()}
    record = common | measure(task, options)
    write_json(record, options.output / "foreseen.json")
    table = report(record)
    picture = options.output / "foreseen.png"
    if options.output == RESULTS:  # that the documentation shows
        fill(PAGES / "foreseen.md", "foreseen", table)
        picture = PICTURES / "foreseen.png"
    plot(record, picture)
    print(table)


if __name__ == "__main__":
    main()
