"""Accuracy without fine-tuning with the residual stream cut, rotated first or not.

    python benchmarks/streams.py --data path/to/cifar10

On the reference ViT, a `tp.pruner.MetaPruner` cuts the embedding channels alone, by Torch-Pruning's
magnitude and Taylor (with labels), by the variance of what the norms give, and, once the stream is
rotated, by position. Mean and deviation over three draws of images. Writes results/streams.json and
the table of the documentation. `--data` is as for train_reference.py.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch_pruning as tp
from cifar import load_split, load_test, normalize
from pages import NOT_RUN, PAGES, fill
from reference import (
    RESULTS,
    accuracy,
    add_cross_entropy_gradients,
    conditions,
    draws_parser,
    load_reference,
    spread,
    write_json,
)
from torch import Tensor, nn

import tp_amp
from tp_amp.running.restoring import hooks

KEPT = (0.875, 0.75, 0.625, 0.5)
COLUMNS = ("magnitude", "Taylor, with labels", "variance", "rotated")


class OfStream:
    """An importance for the group of the embedding alone; all other groups stay whole."""

    def __init__(self, model: Any, score: Any) -> None:
        self.embedding, self.score = model.patch_embed.proj, score

    def __call__(self, group: Any) -> Tensor | None:
        held = any(item.dep.target.module is self.embedding for item in group.items)
        return self.score(group) if held else None


@torch.no_grad()
def variances(model: nn.Module, images: Tensor) -> Tensor:
    """How much each channel varies in what all norms give before their affine parts."""
    found: list[Tensor] = []

    def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        z = nn.functional.layer_norm(args[0], args[0].shape[-1:]).flatten(0, -2)
        found.append(z.square().mean(0) * len(args[0]))

    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    with hooks(norm.register_forward_pre_hook(see) for norm in norms):
        for batch in images.split(64):
            model(batch)
    return torch.stack(found).sum(0)


def cut(model: nn.Module, images: Tensor, importance: Any, kept: float) -> nn.Module:
    """Let Torch-Pruning keep a share of the embedding channels."""
    tp.pruner.MetaPruner(model, images[:1], importance=importance, pruning_ratio=1 - kept).step()
    return model


def variants(dense: nn.Module, images: Tensor, labels: Tensor, kept: float) -> dict[str, nn.Module]:
    """The cut models, by column."""
    batches = images.split(64)
    copies = [copy.deepcopy(dense) for _ in COLUMNS]
    add_cross_entropy_gradients(copies[1], list(zip(batches, labels.split(64), strict=True)))
    varying = variances(dense, images)
    scores = (
        tp.importance.GroupMagnitudeImportance(),
        tp.importance.GroupTaylorImportance(),
        lambda group: varying[group[0].idxs],
    )
    for model, score in zip(copies, scores, strict=False):
        cut(model, images, OfStream(model, score), kept)
    rotated = tp_amp.rotate(copies[3], images[:1], batches, progress=False)
    cut(copies[3], images, tp_amp.LeadingChannels(rotated), kept)
    tp_amp.rescale_norms(copies[3], rotated)
    return dict(zip(COLUMNS, copies, strict=True))


def measure(options: Any, test: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """All widths, over all draws of images."""
    dense = load_reference("vit", options.checkpoints)
    images, labels = load_split(options.data, "train")
    size = sum(parameter.numel() for parameter in dense.parameters())
    rows = []
    for kept in KEPT:
        row: dict[str, Any] = {"kept": kept, "accuracy": {column: [] for column in COLUMNS}}
        for seed in options.seeds:
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
            picked = order[: options.images]
            found = variants(dense, normalize(images[picked]), labels[picked], kept)
            left = {sum(p.numel() for p in model.parameters()) for model in found.values()}
            [row["parameters"]] = left  # all of one size
            for column, model in found.items():
                row["accuracy"][column].append(accuracy(model, *test))
        rows.append(row)
    return {"dense": accuracy(dense, *test), "parameters": size, "rows": rows}


def report(record: dict[str, Any] | None) -> str:
    """What a person reads: a Markdown table."""
    if record is None:
        return NOT_RUN
    rows = [["stream", "parameters", *COLUMNS], ["---"] * (2 + len(COLUMNS))]
    whole = f"{100 * record['dense']:.1f}"
    rows.append(["all (dense)", "100.0 %", whole, *[""] * (len(COLUMNS) - 1)])
    for row in record["rows"]:
        columns = [spread(row["accuracy"][column]) for column in COLUMNS]
        share = f"{100 * row['parameters'] / record['parameters']:.1f} %"
        rows.append([f"{100 * row['kept']:.1f} %", share, *columns])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, measure, print and write."""
    parser = draws_parser(__doc__)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    test = load_test(options.data, options.test_images)
    record = {
        **conditions(options, len(test[1])),
        **measure(options, test),
    }
    write_json(record, options.output / "streams.json")
    if options.output == RESULTS:
        fill(PAGES / "streams.md", "streams", report(record))
    print(report(record))


if __name__ == "__main__":
    main()
