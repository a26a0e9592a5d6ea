"""Accuracy without fine-tuning with channels cut inside every attention's heads.

    python benchmarks/head_ranks.py --data path/to/cifar10

On the two reference models: queries and keys, values and the projection, or both are cut to a share
of each head's channels, in the coordinates of `rotate_heads` (leading channels), in those of the
dense model (drawn ones, as there is nothing to rank them by), and rotated with compensation. Mean
and deviation over three draws of unlabelled images. Writes results/head_ranks.json and the table
of the documentation. `--data` is as for train_reference.py.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import torch
from cifar import load_split, load_test, normalize
from pages import NOT_RUN, PAGES, fill
from reference import (
    ARCHITECTURES,
    RESULTS,
    accuracy,
    conditions,
    draws_parser,
    load_reference,
    spread,
    write_json,
)
from torch import Tensor, nn

import tp_amp

CUTS = [{"qk": 0.5}, {"qk": 0.25}, {"vo": 0.75}, {"vo": 0.5}, {"qk": 0.5, "vo": 0.75}]
COLUMNS = ("drawn channels", "rotated", "+ affine", "+ every Linear")


def variants(model: nn.Module, images: Tensor, kept: dict[str, float], seed: int) -> Any:
    """The cut models, by column."""
    batches = images.split(64)
    rotated = copy.deepcopy(model)
    heads = tp_amp.rotate_heads(rotated, images[:1], batches, progress=False)
    plan = tp_amp.rank_plan(heads, kept)
    draw = random.Random(seed)
    drawn = {
        down: sorted(draw.sample(range(plan.dense_widths[down]), len(channels)))
        for down, channels in plan.keep.items()
    }
    made = [copy.deepcopy(model), *(copy.deepcopy(rotated) for _ in range(3))]
    tp_amp.apply_plan(made[0], tp_amp.PruningPlan(drawn, sites=plan.sites))
    tp_amp.apply_plan(made[1], plan)
    for every, cut in ((False, made[2]), (True, made[3])):
        tp_amp.compensate(cut, plan, batches, every_linear=every, progress=False)
    return dict(zip(COLUMNS, made, strict=True))


def measure(name: str, options: Any, test: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """All cuts of one reference model."""
    dense = load_reference(name, options.checkpoints)
    train, _ = load_split(options.data, "train")
    size = sum(parameter.numel() for parameter in dense.parameters())
    rows = []
    for kept in CUTS:
        row: dict[str, Any] = {"kept": kept, "accuracy": {column: [] for column in COLUMNS}}
        for seed in options.seeds:
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
            images = normalize(train[order[: options.images]])
            for column, cut in variants(dense, images, kept, seed).items():
                row["accuracy"][column].append(accuracy(cut, *test))
            left = sum(parameter.numel() for parameter in cut.parameters())
        rows.append(row | {"parameters_kept": left / size})
    return {"dense": accuracy(dense, *test), "parameters": size, "rows": rows}


def report(record: dict[str, Any] | None) -> str:
    """What a person reads: one Markdown table of both models."""
    if record is None:
        return NOT_RUN
    rows = [["model", "kept of each head", "parameters", *COLUMNS], ["---"] * (3 + len(COLUMNS))]
    for name, found in record["models"].items():
        whole = f"{100 * found['dense']:.1f}"
        rows.append([name, "all (dense)", "100.0 %", whole, *[""] * (len(COLUMNS) - 1)])
        for row in found["rows"]:
            kept = ", ".join(f"{pair} {100 * share:.0f} %" for pair, share in row["kept"].items())
            columns = [spread(row["accuracy"][column]) for column in COLUMNS]
            rows.append([name, kept, f"{100 * row['parameters_kept']:.1f} %", *columns])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, measure, print and write."""
    parser = draws_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=list(ARCHITECTURES), default=["vit", "swin"])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    test = load_test(options.data, options.test_images)
    record = {
        **conditions(options, len(test[1])),
        "models": {name: measure(name, options, test) for name in options.models},
    }
    write_json(record, options.output / "head_ranks.json")
    if options.output == RESULTS:
        fill(PAGES / "head_ranks.md", "head_ranks", report(record))
    print(report(record))


if __name__ == "__main__":
    main()
