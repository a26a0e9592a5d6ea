"""What distillation without labels gives back to models of which half of every MLP was cut.

    python benchmarks/distill.py --model vit --data path/to/cifar10

Every MLP of the reference model is cut to half: by AMP's label-free criterion, by it with
compensation, by Torch-Pruning's magnitude, and by what can be rebuilt, every Linear compensated
and refined; beside them tp_amp's own widths with as many parameters, every Linear compensated. Each
is then distilled from the dense model alike, on cropped and flipped training images without labels.
Writes results/distill.json, which keeps what it holds of the other model. `--data` is as for
train_reference.py.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import timm.layers
import torch
import torch_pruning as tp
from accelerate import Accelerator
from cifar import load_split, load_test, normalize
from importances import Batches, collect_entropy
from measuring import draw_batches
from reference import (
    ARCHITECTURES,
    accuracy,
    load_reference,
    reference_parser,
    table,
    versions,
    write_json,
)
from torch import Tensor, nn
from train_reference import augment

import tp_amp

OWN = "plan_for_target + affine, every Linear"
REFINED = "Reconstruction + affine, every Linear, refined"
ROWS = ("EntropyTaylor", "Magnitude L2", "EntropyTaylor + affine", OWN, REFINED)


class Augmented:
    """Unlabelled batches of cropped and flipped images, in another order for each epoch."""

    def __init__(self, images: Tensor, batch_size: int) -> None:
        self.images, self.batch_size = images, batch_size

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(len(self.images)).split(self.batch_size)
        for index in order[: len(self)]:
            yield normalize(augment(self.images[index], torch.default_generator))


def pruned(row: str, dense: nn.Module, batches: Batches, kept: float) -> nn.Module:
    """A copy with the same share of every MLP kept."""
    model, example = copy.deepcopy(dense), batches[0][0][:1]
    if row == "Magnitude L2":
        importance: Any = tp.importance.MagnitudeImportance(p=2)
    elif row == REFINED:
        importance = tp_amp.ReconstructionImportance("prediction", data=batches)
    else:
        importance = collect_entropy("prediction", model, batches)
    plan = tp_amp.plan_from_importance(model, example, importance, kept)
    if row == OWN:  # widths of its own, at the same number of parameters
        at_same_size = copy.deepcopy(dense)
        tp_amp.apply_plan(at_same_size, example, plan)
        importance = tp_amp.ReconstructionImportance("prediction", data=batches)
        target = {"params": sum(p.numel() for p in at_same_size.parameters())}
        plan = tp_amp.plan_for_target(model, example, importance, target)
        tp_amp.compensate(model, plan, batches, every_linear=True, progress=False)
    elif row == REFINED:
        tp_amp.compensate(model, plan, batches, every_linear=True, refine=10, progress=False)
    elif row.endswith("affine"):
        tp_amp.compensate(model, plan, batches, progress=False)
    else:
        tp_amp.apply_plan(model, example, plan)
    return model


def distilled(model: nn.Module, dense: nn.Module, images: Tensor, options: Any) -> float:
    """Distill in place; the processor's seconds that it took."""
    cpu = not torch.cuda.is_available()
    accelerator = Accelerator(mixed_precision="bf16", cpu=cpu)
    began = time.process_time()
    tp_amp.distill(
        model,
        dense,
        Augmented(images, options.batch_size),
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        warmup_epochs=options.warmup,
        train=options.train,
        accelerator=accelerator,
        seed=options.seed,
    )
    return time.process_time() - began


def report(record: dict[str, Any]) -> str:
    """What a person reads: accuracies in percent, and the share of the loss that came back."""
    parts = []
    for name, found in record.items():
        dense = found["dense"]
        rows = []
        for row, run in found["rows"].items():
            lost = dense - found["rows"].get(ROWS[0], {"before": dense})["before"]
            recovered = 1 - (dense - run["after"]) / lost if lost else float("nan")
            accuracies = [f"{100 * run[key]:.1f}" for key in ("before", "after")]
            rows.append([row, *accuracies, f"{100 * recovered:.0f}"])
        header = [f"{name}, dense {100 * dense:.1f}", "cut", "distilled", "recovered (%)"]
        parts.append(table(header, rows))
    return "\n\n".join(parts) + "\n(recovered: of what EntropyTaylor loses without compensation)"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = reference_parser(__doc__)
    parser.add_argument("--model", choices=tuple(ARCHITECTURES), required=True)
    parser.add_argument("--kept", type=float, default=0.5, help="share of every MLP")
    parser.add_argument("--images", type=int, default=512, help="that score and compensate")
    parser.add_argument("--train-images", type=int, default=0, help="to distill on; 0 for all")
    parser.add_argument("--test-images", type=int, default=2000, help="0 for all")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="for 256 images")
    parser.add_argument("--warmup", type=float, default=0.2, help="epochs")
    parser.add_argument("--train", choices=("all", "cut", "lora"), default="all")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, measure, print and write."""
    options = parse(arguments)
    # On a CPU, backward through fused attention takes longer than the rest of the step.
    timm.layers.set_fused_attn(torch.cuda.is_available())
    train = load_split(options.data, "train")
    images, labels = load_test(options.data, options.test_images)
    dense = load_reference(options.model, options.checkpoints)
    batches = draw_batches(train, (options.images,), options.seed, "cpu")[0]
    unlabelled = train[0][: options.train_images or None]

    path = options.output / "distill.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    found: dict[str, Any] = {
        "configuration": {k: v for k, v in vars(options).items() if isinstance(v, int | float)},
        "versions": versions(),
        "dense": accuracy(dense, images, labels, 64),
        "rows": {},
    }
    for row in options.rows:
        model = pruned(row, dense, batches, options.kept)
        before = accuracy(model, images, labels, 64)
        seconds = distilled(model, dense, unlabelled, options)
        after = accuracy(model, images, labels, 64)
        found["rows"][row] = {"before": before, "after": after, "cpu_seconds": round(seconds)}
        record = json.loads(path.read_text()) if path.is_file() else {}
        write_json({**record, options.model: found}, path)
    print(report({options.model: found}))


if __name__ == "__main__":
    main()
