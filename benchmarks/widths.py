"""Accuracy without fine-tuning with MLPs, heads, channels in these and streams at one price.

    python benchmarks/widths.py --data path/to/cifar10

The two reference models are cut to shares of all their parameters, by `plan_for_target` with
several `widths`, and every Linear is fitted. Channels inside heads are cut in the coordinates of
`rotate_heads`, those of streams in the coordinates of `rotate`. Refined is a kind of its own, which
is measured where `--kinds` names it. Mean and deviation over three draws
of unlabelled images, and the nats that the plans foresee to be lost beside those that are lost.
Writes results/widths.json after each cell, and the table of the documentation; cells that are there
already are not measured again. `--data` is as for train_reference.py.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from statistics import mean
from typing import Any

import torch
from cifar import load_split, load_test
from measuring import draw_batches
from pages import NOT_RUN, PAGES, fill
from reference import (
    ARCHITECTURES,
    RESULTS,
    accuracy,
    conditions,
    draws_parser,
    is_out_of_reach,
    load_reference,
    settled,
    spread,
    write_json,
)
from torch import Tensor, nn

import tp_amp

# Name -> what is cut, and passes of refining.
KINDS: dict[str, tuple[tuple[str, ...], int]] = {
    "MLPs": (("mlp",), 0),
    "MLPs, heads": (("mlp", "heads"), 0),
    "MLPs, qk": (("mlp", "qk"), 0),
    "MLPs, qk, vo": (("mlp", "qk", "vo"), 0),
    "MLPs, qk, vo, stream": (("mlp", "qk", "vo", "stream"), 0),
    "MLPs, qk, vo, stream, refined": (("mlp", "qk", "vo", "stream"), 20),
}
SIZES = (0.6, 0.5, 0.4, 0.3)


class Draw:
    """One draw of images, and the dense model in the coordinates that they give it.

    Only where the stream may be cut it is rotated too.
    """

    def __init__(self, dense: nn.Module, batches: list[Tensor]) -> None:
        self.batches, self.example = batches, batches[0][:1]
        self.importance = tp_amp.ReconstructionImportance(data=self.batches)
        self.heads, self.all = copy.deepcopy(dense), copy.deepcopy(dense)
        tp_amp.rotate(self.all, self.example, batches, progress=False)
        for model in (self.heads, self.all):
            tp_amp.rotate_heads(model, self.example, batches, progress=False)

    def cut(self, kinds: Sequence[str], refine: int, size: float) -> tuple[nn.Module, float]:
        """The model at a share of its parameters, and the nats that its plan foresees to lose."""
        model = copy.deepcopy(self.all if "stream" in kinds else self.heads)
        target = {"params": size}
        plan = tp_amp.plan_for_target(model, self.example, self.importance, target, widths=kinds)
        found = self.importance.foreseen(model, list(plan.sites.values()))
        lost = sum(float(found[name].errors[width]) for name, width in plan.widths.items())
        options: Any = {"every_linear": True, "refine": refine, "progress": False}
        tp_amp.compensate(model, plan, self.batches, **options)
        return model, lost


@torch.no_grad()
def divergence(dense: nn.Module, model: nn.Module, images: Tensor) -> float:
    """How many nats the cut model's classes are from the dense model's, the mean over images."""
    total = 0.0
    for batch in images.split(250):
        of_dense, of_cut = (each(batch).double().log_softmax(-1) for each in (dense, model))
        total += float((of_dense.exp() * (of_dense - of_cut)).sum())
    return total / len(images)


def measure(name: str, options: Any, test: tuple[Tensor, Tensor], record: dict[str, Any]) -> None:
    """Every size and kind of one reference model that the record lacks."""
    dense = load_reference(name, options.checkpoints)
    found = record["models"].setdefault(name, {"dense": accuracy(dense, *test), "rows": {}})
    train = load_split(options.data, "train")
    draws: list[Draw] = []
    for size, kind in itertools.product(options.sizes, options.kinds):
        row = found["rows"].setdefault(f"{size:g}", {})
        if kind in row:
            continue
        for seed in options.seeds[len(draws) :]:
            [drawn] = draw_batches(train, (options.images,), seed, "cpu")
            draws.append(Draw(dense, [images for images, _ in drawn]))
        values: dict[str, list[float]] = {"accuracy": [], "foreseen": [], "lost": []}
        for draw in draws:
            try:
                cut, lost = draw.cut(*KINDS[kind], size)
            except ValueError as error:
                if not is_out_of_reach(error):
                    raise
                continue
            values["accuracy"].append(accuracy(cut, *test))
            values["foreseen"].append(lost)
            values["lost"].append(divergence(dense, cut, test[0]))
        row[kind] = values
        write_json(record, options.output / "widths.json")


def report(record: dict[str, Any] | None) -> str:
    """What a person reads: one Markdown table of both models."""
    if record is None:
        return NOT_RUN
    measured = [row for found in record["models"].values() for row in found["rows"].values()]
    kinds = [kind for kind in KINDS if any(kind in row for row in measured)]
    rows = [["model", "parameters kept", *kinds], ["---"] * (2 + len(kinds))]
    for name, found in record["models"].items():
        whole = f"{100 * found['dense']:.1f}"
        rows.append([name, "100 % (dense)", whole, *[""] * (len(kinds) - 1)])
        for size, row in found["rows"].items():
            cells = [told(row.get(kind)) for kind in kinds]
            rows.append([name, f"{100 * float(size):.0f} %", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def told(values: dict[str, list[float]] | None) -> str:
    """Accuracy, and in brackets the nats that are foreseen to be lost and those that are."""
    if values is None:
        return NOT_RUN
    if not values["accuracy"]:
        return "out of reach"
    foreseen, lost = (mean(values[key]) for key in ("foreseen", "lost"))
    return f"{spread(values['accuracy'])} ({foreseen:.3f}, {lost:.3f})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, measure, print and write."""
    parser = draws_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=list(ARCHITECTURES), default=["vit", "swin"])
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES, help="parameters kept")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS)[:-1])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    test = load_test(options.data, options.test_images)
    path = options.output / "widths.json"
    facts = conditions(options, len(test[1]))
    record = {"models": {}, **facts, **settled(path, facts)}
    for name in options.models:
        measure(name, options, test, record)
    if options.output == RESULTS:
        fill(PAGES / "widths.md", "widths", report(record))
    print(report(record))


if __name__ == "__main__":
    main()
