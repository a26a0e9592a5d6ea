"""Other ways to cut all widths of a vision transformer, to the sizes of benchmarks/widths.py.

    python benchmarks/width_rivals.py --data path/to/cifar10

On the reference ViT, without fine-tuning, each with the same share of everything that it cuts, the
share that comes closest to the size: Torch-Pruning's magnitude and Taylor (with labels) on
embedding, channels inside heads and MLPs; slices of the residual stream as in SliceGPT, as they are
and with every Linear fitted; CORP's magnitude on MLPs with affine compensation, and its choice of
queries and keys with the products rebuilt; MLP channels and whole heads by squared gradients of a
loss without labels, with affine compensation, as SnapViT but for its evolution. Written from the
formulas of the papers. Mean and deviation over three draws of images. Writes
results/width_rivals.json after each rival, and the table of the documentation; what is measured
already is not measured again. `--data` is as for train_reference.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch_pruning as tp
from cifar import load_split, load_test
from measuring import draw_batches
from pages import NOT_RUN, PAGES, fill
from reference import (
    RESULTS,
    accuracy,
    conditions,
    draws_parser,
    load_reference,
    settled,
    spread,
    write_json,
)
from torch import Tensor, nn
from width_rival_cuts import Batches, Cut, corp, slices, snapvit, torch_pruning
from widths import SIZES

HALVINGS = 9


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


RIVALS: dict[str, Callable[[nn.Module, Batches], Cut]] = {
    "Torch-Pruning, magnitude": lambda dense, batches: torch_pruning(
        dense, batches, tp.importance.GroupMagnitudeImportance()
    ),
    "Torch-Pruning, Taylor, labels": lambda dense, batches: torch_pruning(
        dense, batches, tp.importance.GroupTaylorImportance()
    ),
    "SliceGPT": lambda dense, batches: slices(dense, batches, every_linear=False),
    "SliceGPT, every Linear fitted": lambda dense, batches: slices(
        dense, batches, every_linear=True
    ),
    "CORP": corp,
    "SnapViT, without its evolution": snapvit,
}


def at_size(cut: Cut, size: float) -> nn.Module:
    """The cut model whose parameters come closest to a number of them."""
    low, high = 0.01, 1.0
    misses = {}
    for _ in range(HALVINGS):
        share = (low + high) / 2
        count = parameters(cut(share, False))
        misses[share] = abs(count - size)
        low, high = (low, share) if count > size else (share, high)
    return cut(min(misses, key=misses.__getitem__), True)


def measure(options: Any, test: tuple[Tensor, Tensor], record: dict[str, Any]) -> None:
    """Every rival that the record lacks, at all sizes, over all draws of images."""
    train = load_split(options.data, "train")
    whole = load_reference("vit", options.checkpoints)
    record.setdefault("dense", accuracy(whole, *test))
    for name in options.rivals:
        if name in record["rivals"]:
            continue
        row: dict[str, Any] = {}
        for seed in options.seeds:
            [batches] = draw_batches(train, (options.images,), seed, "cpu")
            cut = RIVALS[name](copy.deepcopy(whole), batches)
            for size in options.sizes:
                found = row.setdefault(f"{size:g}", {"accuracy": [], "kept": []})
                model = at_size(cut, size * parameters(whole))
                found["accuracy"].append(accuracy(model, *test))
                found["kept"].append(parameters(model) / parameters(whole))
        record["rivals"][name] = row
        write_json(record, options.output / "width_rivals.json")


def report(record: dict[str, Any] | None) -> str:
    """What a person reads: a Markdown table."""
    if record is None:
        return NOT_RUN
    sizes = list(next(iter(record["rivals"].values())))
    titles = ["parameters kept", *(f"{100 * float(size):.0f} %" for size in sizes)]
    rows = [titles, ["---"] * len(titles)]
    for name, row in record["rivals"].items():
        rows.append([name, *(spread(row[size]["accuracy"]) for size in sizes)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, measure, print and write."""
    parser = draws_parser(__doc__)
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES, help="parameters kept")
    parser.add_argument("--rivals", nargs="+", choices=list(RIVALS), default=list(RIVALS))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    test = load_test(options.data, options.test_images)
    facts = conditions(options, len(test[1]))
    record = {"rivals": {}, **facts, **settled(options.output / "width_rivals.json", facts)}
    measure(options, test, record)
    if options.output == RESULTS:
        fill(PAGES / "width_rivals.md", "width_rivals", report(record))
    print(report(record))


if __name__ == "__main__":
    main()
