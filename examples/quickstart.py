"""Prune a vision transformer with AMP and compare it with Torch-Pruning's own importances.

    python examples/quickstart.py

Real images (scikit-learn's 8x8 digits), a small ViT trained on the spot, and no fine-tuning after
pruning. Prints two tables and draws quickstart.png next to this file.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models import VisionTransformer
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import tp_amp

MINIMUM_ACCURACY = 0.95  # a badly trained model says nothing about pruning
# Nats of entropy that the cut of each MLP may add. Digits are easy: where half of the MLPs stays,
# every importance but Random keeps the dense accuracy and there is nothing to compare.
MAX_INCREASE = 3e-3
RANDOM_SEEDS = 5

Data = tuple[Tensor, Tensor]  # images and labels


def load_data(seed: int) -> tuple[Data, Data]:
    """Load images (count, 1, 8, 8) and labels: 60 % for training, 40 % for the test."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images).float().unsqueeze(1), torch.tensor(digits.target)
    train, test = train_test_split(
        range(len(labels)), test_size=0.4, stratify=digits.target, random_state=seed
    )
    images = (images - images[train].mean()) / images[train].std()
    return (images[train], labels[train]), (images[test], labels[test])


def train_model(data: Data, epochs: int, batch_size: int = 64, peak: float = 1e-2) -> nn.Module:
    images, labels = data
    model = VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, global_pool="avg",
        embed_dim=64, depth=6, num_heads=4, mlp_ratio=4,
    )  # fmt: skip
    # Muon needs a fraction of AdamW's epochs here.
    optimizer = create_optimizer_v2(model, opt="muon", lr=peak, weight_decay=0.05)
    steps = len(images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak, total_steps=epochs * steps, pct_start=0.1, cycle_momentum=False
    )
    for _ in tqdm(range(epochs), desc="training", unit="epoch", disable=None):
        for batch in torch.randperm(len(images)).split(batch_size)[:steps]:
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def prune_with_amp(model: nn.Module, data: Data) -> tuple[tp_amp.PruningPlan, DataLoader]:
    """Prune the model in place; give the plan, and the batches that scored, to compare with."""
    loader = DataLoader(TensorDataset(*data), batch_size=128)  # labels are there, AMP ignores them

    # All of AMP. Some images score the channels, others measure the entropy in the search.
    scoring, search = tp_amp.split_batches(loader)
    importance = tp_amp.EntropyTaylorImportance(data=scoring)
    pruner = tp_amp.AdaptiveMLPPruner(
        model, data[0][:1], importance, search, max_increase=MAX_INCREASE
    )
    pruner.step()

    return pruner.plan, scoring


def taylor(model: nn.Module, batches: DataLoader) -> Any:
    for images, labels in batches:  # gradients add up over the batches
        cross_entropy(model(images), labels).backward()
    return tp.importance.TaylorImportance()


def hessian(model: nn.Module, batches: DataLoader) -> Any:
    # Torch-Pruning 1.6.1's accumulate_grad forgets all images but the last. So the squared
    # gradients are added up here, and put where the importance reads them.
    squares = {parameter: torch.zeros_like(parameter) for parameter in model.parameters()}
    for images, labels in batches:
        for image, label in zip(images.split(1), labels.split(1), strict=True):
            model.zero_grad()
            cross_entropy(model(image), label).backward()
            for parameter, square in squares.items():
                square += parameter.grad.square()
    for parameter, square in squares.items():
        parameter.grad = square
    return tp.importance.HessianImportance()


# Each takes a model and labelled batches, and gives an importance that is ready to score.
CRITERIA = {
    "AMP": lambda model, batches: tp_amp.EntropyTaylorImportance().collect(model, batches),
    "Taylor": taylor,
    "Hessian": hessian,
    "LAMP": lambda model, batches: tp.importance.LAMPImportance(),
    "Magnitude": lambda model, batches: tp.importance.MagnitudeImportance(),
    "Random": lambda model, batches: tp.importance.RandomImportance(),
}
SEE_LABELS = ("Taylor", "Hessian")  # AMP, and what reads weights alone, do without


@torch.inference_mode()
def accuracy(model: nn.Module, data: Data) -> float:
    """Percentage of images that are classified right."""
    return 100 * float((model(data[0]).argmax(-1) == data[1]).float().mean())


def uniform_widths(widths: dict[str, int]) -> dict[str, int]:
    """Give every MLP the same width, plus one channel for the first ones until the sum is right."""
    width, left_over = divmod(sum(widths.values()), len(widths))
    return {name: width + (index < left_over) for index, name in enumerate(widths)}


def compare(
    dense: nn.Module, widths: dict[str, int], batches: DataLoader, test: Data
) -> dict[str, list[float]]:
    """Measure each criterion at AMP's widths, and at uniform widths of the same sum."""
    example = test[0][:1]
    results: dict[str, list[float]] = {name: [] for name in CRITERIA}
    for name, make_ready in tqdm(CRITERIA.items(), desc="comparing", disable=None):
        model = copy.deepcopy(dense)  # some criteria leave gradients behind
        importance = make_ready(model, batches)
        for chosen in (widths, uniform_widths(widths)):
            runs = []
            for seed in range(RANDOM_SEEDS if name == "Random" else 1):
                torch.manual_seed(seed)
                plan = tp_amp.plan_from_importance(model, example, importance, chosen)
                pruned = copy.deepcopy(dense)
                tp_amp.apply_plan(pruned, example, plan)
                runs.append(accuracy(pruned, test))
            results[name].append(statistics.mean(runs))
    return results


@torch.inference_mode()
def images_per_second(models: list[nn.Module], images: Tensor, repeats: int = 20) -> list[float]:
    """Median speed; the models take turns, so that a busy moment of the machine hits all."""
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(repeats + 3):
        for model, times in zip(models, seconds, strict=True):
            start = time.perf_counter()
            model(images)
            times.append(time.perf_counter() - start)
    return [len(images) / statistics.median(times[3:]) for times in seconds]  # 3 to warm up


def print_sizes(dense: nn.Module, pruned: nn.Module, images: Tensor) -> None:
    counts = [tp.utils.count_ops_and_params(model, images[:1]) for model in (dense, pruned)]
    macs, parameters = zip(*counts, strict=True)
    print(f"\n{'':22}{'dense':>12}{'pruned':>12}{'ratio':>8}")
    for name, (before, after) in {
        "parameters": parameters,
        "MACs per image": macs,  # multiply-accumulates
        "images per second": images_per_second([dense, pruned], images),
    }.items():
        print(f"{name:22}{before:>12,.0f}{after:>12,.0f}{after / before:>8.2f}")


def print_accuracies(dense: float, results: dict[str, list[float]], images: int) -> None:
    print("\nTest accuracy (%) without fine-tuning; as many MLP channels as AMP kept in each cell")
    print(f"{'importance':14}{'sees labels':>12}{'AMP widths':>14}{'uniform widths':>18}")
    for name, (adaptive, uniform) in results.items():
        labels = "yes" if name in SEE_LABELS else "no"
        print(f"{name:14}{labels:>12}{adaptive:>14.1f}{uniform:>18.1f}")
    error = math.sqrt(dense * (100 - dense) / images)
    print(f"Dense: {dense:.1f}, standard error {error:.1f}. Random: mean of {RANDOM_SEEDS} seeds.")
    print("LAMP orders the channels of one layer as Magnitude does, so the two are equal here.")


def draw(
    plan: tp_amp.PruningPlan, dense: float, results: dict[str, list[float]], path: Path
) -> None:
    blue, red, grey = "#0072B2", "#D55E00", "#8C8C8C"  # distinct for colour-blind readers
    figure = Figure(figsize=(11, 4.2))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
    title = {"loc": "left", "weight": "bold"}

    blocks = [f"block {index + 1}" for index in range(len(plan.keep))]
    full, kept = list(plan.dense_widths.values()), list(plan.widths.values())
    left.barh(blocks, full, 0.6, facecolor="none", edgecolor=grey, label="dense")
    left.bar_label(left.barh(blocks, kept, 0.6, color=blue, label="kept by AMP"), padding=4)
    left.set_title(f"AMP keeps {sum(kept)} of {sum(full)} MLP channels", **title)
    left.set_xlabel("hidden channels of the MLP")

    def error(accuracy: float) -> float:
        return max(100 - accuracy, 0.1)  # all right would be infinitely far on a log scale

    # Errors on a log scale tell 98 % from 99 %; the ticks say the accuracy.
    right.set_xscale("log")
    ticks = [40, 60, 80, 90, 95, 98, 99, 99.5]
    right.set_xticks([100 - tick for tick in ticks], [f"{tick:g}" for tick in ticks])
    right.minorticks_off()
    right.axvline(error(dense), color=grey, linestyle="--", zorder=0, label="dense model")
    rows = range(len(results))
    columns = list(zip(*results.values(), strict=True))
    for values, label, color, marker, place in (
        (columns[0], "AMP's widths", blue, "o", 1.05),
        (columns[1], "uniform widths", red, "s", 1.17),
    ):
        errors = [error(value) for value in values]
        right.scatter(errors, rows, 80, color, marker=marker, label=label, edgecolors="white")
        for row, value in zip(rows, values, strict=True):
            position = right.get_yaxis_transform()  # x in shares of the panel, y in rows
            right.text(place, row, f"{value:.1f}", color=color, transform=position, va="center")
    right.set_yticks(
        rows, [f"{name}\n(sees labels)" if name in SEE_LABELS else name for name in results]
    )
    right.grid(axis="y", color="#E4E4E4")
    right.set_axisbelow(True)
    right.margins(y=0.1)
    right.invert_xaxis()  # better to the right
    right.set_title("Accuracy at this size, by importance", **title)
    right.set_xlabel("test accuracy without fine-tuning (%)")

    for axes in (left, right):
        axes.invert_yaxis()  # the first one on top
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=160)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".png"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    train, test = load_data(options.seed)
    dense = train_model(train, options.epochs)
    dense_accuracy = accuracy(dense, test)
    print(f"dense model: {dense_accuracy:.1f} % of {len(test[1])} test images right")
    if dense_accuracy < 100 * MINIMUM_ACCURACY:
        sys.exit(f"less than {MINIMUM_ACCURACY:.0%}: too little to compare; train more epochs")

    pruned = copy.deepcopy(dense)
    plan, scoring = prune_with_amp(pruned, train)
    widths = ", ".join(f"{plan.widths[name]}/{width}" for name, width in plan.dense_widths.items())
    print(f"pruned with AMP: {accuracy(pruned, test):.1f} %, MLP widths {widths}")
    print_sizes(dense, pruned, test[0])
    results = compare(dense, plan.widths, scoring, test)
    print_accuracies(dense_accuracy, results, len(test[1]))
    draw(plan, dense_accuracy, results, options.output)
    print(f"\nwritten: {options.output}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # too small a model for more: threads would wait for each other
    main()
