"""Train the reference ViT or Swin on CIFAR-10 and write it under benchmarks/checkpoints.

    python benchmarks/train_reference.py --model vit --data path/to/cifar10

`--data` holds train.parquet and test.parquet, or train/<class>/ and test/<class>/ with images.
Stopped at any moment and started again with the same arguments, it goes on after the last
whole epoch.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy
import timm.layers
import torch
from cifar import CLASSES, SIZE, load_split, normalize
from reference import CHECKPOINTS, accuracy, build_reference, save_reference
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from tqdm import tqdm


def augment(images: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Crop each image at its own offset after reflection padding, and flip half of them."""
    count = len(images)
    padded = nn.functional.pad(images, (padding,) * 4, mode="reflect")
    offsets = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator)
    flip = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.arange(SIZE).expand(count, SIZE)
    columns = torch.where(flip, SIZE - 1 - columns, columns) + offsets[1]
    rows = torch.arange(SIZE) + offsets[0]
    index = torch.arange(count)[:, None, None]
    cropped = padded[
        index.to(images.device),
        :,
        rows[:, :, None].to(images.device),
        columns[:, None, :].to(images.device),
    ]
    return cropped.permute(0, 3, 1, 2)


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up from zero, then cosine to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: tuple[Tensor, Tensor],
    epoch: int,
    arguments: argparse.Namespace,
) -> float:
    """Train for one epoch; its randomness depends on the seed and the epoch alone."""
    images, labels = data
    seed = arguments.seed * 1000 + epoch
    generator = torch.Generator().manual_seed(seed)
    mixup = None
    if arguments.mixup:
        numpy.random.seed(seed)  # Mixup draws from numpy's global state
        mixup = Mixup(arguments.mixup, 1.0, label_smoothing=0.1, num_classes=CLASSES)
    criterion = SoftTargetCrossEntropy() if mixup else LabelSmoothingCrossEntropy(0.1)
    batches = torch.randperm(len(images), generator=generator).split(arguments.batch_size)
    batches = batches[: len(images) // arguments.batch_size]
    total, step = torch.zeros((), device=images.device), epoch * len(batches)
    model.train()
    for batch in tqdm(batches, desc=f"epoch {epoch + 1}/{arguments.epochs}", disable=None):
        batch = batch.to(images.device)
        x, y = normalize(augment(images[batch], generator)), labels[batch]
        if mixup:
            x, y = mixup(x, y)
        for group in optimizer.param_groups:
            peak = arguments.learning_rate * group.get("lr_scale", 1.0)
            group["lr"] = learning_rate(
                step, arguments.epochs * len(batches), arguments.warmup * len(batches), peak
            )
        with torch.autocast(images.device.type, torch.bfloat16):
            loss = criterion(model(x).float(), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += loss.detach()
        step += 1
    return float(total) / len(batches)


def main() -> None:
    """Parse the arguments, train, and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("vit", "swin"), required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=1, help="epochs")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--optimizer", default="muon", help="any of timm's")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--mixup", type=float, default=0.0, help="alpha; 0 for none (short runs)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=CHECKPOINTS)
    parser.add_argument("--resume", type=Path, help="state file; default <output>/<model>.state.pt")
    arguments = parser.parse_args()

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    # On a CPU, backward through fused attention takes longer than the rest of the step.
    timm.layers.set_fused_attn(arguments.device != "cpu")
    torch.manual_seed(arguments.seed)
    images, labels = (t.to(arguments.device) for t in load_split(arguments.data, "train"))
    test_images, test_labels = load_split(arguments.data, "test")
    model = build_reference(arguments.model).to(arguments.device)
    optimizer = create_optimizer_v2(
        model,
        opt=arguments.optimizer,
        lr=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
    )
    recipe = {k: v for k, v in vars(arguments).items() if isinstance(v, int | float | str)}
    state_file = arguments.resume or arguments.output / f"{arguments.model}.state.pt"
    start, seconds = 0, 0.0
    if state_file.is_file():
        state = torch.load(state_file, map_location=arguments.device, weights_only=True)
        if state["recipe"] != recipe:
            raise SystemExit(f"{state_file} is of another recipe, {state['recipe']}; remove it")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds = state["epoch"], state["seconds"]
    for epoch in range(start, arguments.epochs):
        began = time.perf_counter()
        loss = train_epoch(model, optimizer, (images, labels), epoch, arguments)
        seconds += time.perf_counter() - began
        score = accuracy(model, normalize(test_images), test_labels)
        print(
            f"epoch {epoch + 1}: loss {loss:.4f}, test accuracy {score:.4f}, {seconds:.0f} s",
            flush=True,
        )
        state_file.parent.mkdir(parents=True, exist_ok=True)
        partial = state_file.with_suffix(".partial")
        torch.save(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "epoch": epoch + 1,
                "seconds": seconds,
                "recipe": recipe,
            },
            partial,
        )
        partial.replace(state_file)
    score = accuracy(model, normalize(test_images), test_labels)
    facts = {
        "test_accuracy": score,
        "test_images": len(test_labels),
        "seconds": seconds,
        "recipe": {k: v for k, v in recipe.items() if k not in ("device", "threads")},
    }
    save_reference(model, arguments.model, facts, arguments.output)
    print(f"{arguments.model}: test accuracy {score:.4f}, written to {arguments.output}")


if __name__ == "__main__":
    main()
