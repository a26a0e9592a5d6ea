"""DIMAP against uniform magnitude and LAMP, without fine-tuning.

    python benchmarks/dimap.py --data path/to/cifar10

Structured, on the Swin: Torch-Pruning cuts attention, MLPs or both, DIMAP at given shares of their
channels, the others brought to the parameters that DIMAP leaves. Unstructured, on both models: the
same number of single weights is set to zero. Accuracy is over disjoint draws of test images.
Writes results/dimap.json. `--data` is as for train_reference.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from cifar import load_split, normalize
from reference import (
    ARCHITECTURES,
    accuracy,
    load_reference,
    reference_parser,
    spread,
    table,
    versions,
    write_json,
)
from removing import (
    UNSTRUCTURED,
    Part,
    count_macs,
    count_parameters,
    cut_by_modules,
    cut_by_one_threshold,
    cut_uniformly,
    zeroed,
)
from torch import Tensor, nn
from tqdm import tqdm

import tp_amp
from tp_amp.structure.attention.blocks import find_attention_blocks

Draws = list[tuple[Tensor, Tensor]]
PARTS: dict[str, Part] = {"attention and MLPs": (1, 1), "attention": (1, 0), "MLPs": (0, 1)}
NOTES = (
    "Scores read weights only and each model has one checkpoint, so the pruned models are not "
    "random: ± is the standard deviation over disjoint draws of test images, and differences are "
    "taken draw by draw. It says nothing about other checkpoints.",
    "All methods rank a layer's weights or channels by their squares; they differ in how much they "
    "take from which layer: uniform the same share of each, LAMP by one threshold for all layers, "
    "DIMAP by one threshold for each module.",
    "Structured: 'channels' is the share of head dimensions and MLP neurons that DIMAP removes, "
    "'kept' is of parameters. Uniform and LAMP are bisected to the parameters that DIMAP leaves; "
    "uniform takes whole head dimensions and its MLPs make up the rest, so the counts are least "
    "alike where attention alone is cut. Attention is not fused, as timm ships the Swin, and so "
    "keeps the dense model's scale.",
    "Structured LAMP is Torch-Pruning's with global_pruning: its scores are shares within a layer, "
    "so the few head dimensions outrank the many MLP neurons. Ranked locally it would be uniform.",
    "Unstructured: 'removed' is of the attention and MLP weights, which the paper prunes; 'of all' "
    "is of all parameters.",
)


def accuracies(model: nn.Module, draws: Draws) -> list[float]:
    return [accuracy(model, *draw, 64) for draw in draws]


def measure_structured(dense: nn.Module, draws: Draws, shares: list[float]) -> dict[str, Any]:
    """Cut each part in each way, to as many parameters as DIMAP leaves at each share."""
    found: dict[str, Any] = {name: {} for name in PARTS}
    cases = [(name, share) for name in PARTS for share in shares]
    for name, share in tqdm(cases, desc="structured", disable=None):
        found[name][str(share)] = {
            method: structured_facts(model, dense, draws)
            for method, model in cut_to_same_size(dense, PARTS[name], share).items()
        }
    return {"dense": structured_facts(dense, dense, draws), "parts": found}


def cut_to_same_size(dense: nn.Module, part: Part, share: float) -> dict[str, nn.Module]:
    ours = cut_by_modules(dense, part, share)
    parameters = count_parameters(ours)
    models = {"uniform magnitude": cut_uniformly(dense, part, parameters)}
    if all(part):  # one threshold for one module is DIMAP's own
        models["LAMP, one threshold"] = cut_by_one_threshold(dense, parameters)
    return models | {"DIMAP": ours}


def structured_facts(model: nn.Module, dense: nn.Module, draws: Draws) -> dict[str, Any]:
    """Sizes, and the shares of the parameters of attention and MLPs that are kept."""
    blocks = find_attention_blocks(dense)
    modules = {
        "attention": [name for block in blocks for name in (*block.qkv, block.project)],
        "mlp": [name for block in blocks for name in (*block.up, block.down)],
    }

    def size(whole: nn.Module, module: str) -> int:
        return sum(count_parameters(whole.get_submodule(name)) for name in modules[module])

    return {
        "parameters": count_parameters(model),
        "macs": count_macs(model),
        "kept": {module: size(model, module) / size(dense, module) for module in modules},
        "accuracy": accuracies(model, draws),
    }


def measure_unstructured(dense: nn.Module, draws: Draws, ratios: list[float]) -> dict[str, Any]:
    """Set single weights to zero in each way."""
    names = list(tp_amp.dimap_masks(dense, 0))
    prunable = sum(dense.get_submodule(name).weight.numel() for name in names)
    found: dict[str, Any] = {}
    for ratio in tqdm(ratios, desc="unstructured", disable=None):
        methods = found[str(ratio)] = {}
        for name, make_masks in UNSTRUCTURED.items():
            masks = make_masks(dense, names, ratio)
            removed = sum(int((~mask).sum()) for mask in masks.values())
            reached = accuracies(zeroed(dense, masks), draws)
            methods[name] = {"removed": removed, "accuracy": reached}
    return {
        "parameters": count_parameters(dense),
        "prunable": prunable,
        "dense": {"accuracy": accuracies(dense, draws)},
        "ratios": found,
    }


def draw_test_images(data: Path, count: int, images: int) -> Draws:
    """Draw disjoint sets of test images at random."""
    pixels, labels = load_split(data, "test")
    if count * images > len(labels):
        raise ValueError(f"{count} draws of {images} test images need more than {len(labels)}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return [(normalize(pixels[i]), labels[i]) for i in order.split(images)[:count]]


def report(record: dict[str, Any]) -> str:
    """What a person reads: accuracies in percent, mean and standard deviation over the draws."""
    parts = [
        "Structured, swin: test accuracy (%) at the same number of parameters:\n"
        + table_structured(record["structured"])
    ]
    for name, found in record["unstructured"].items():
        parts.append(
            f"Unstructured, {name}: test accuracy (%) by the share of weights removed, dense "
            f"{spread(found['dense']['accuracy'])}:\n{table_unstructured(found)}"
        )
    return "\n\n".join([*parts, "\n".join(NOTES)])


def table_structured(found: dict[str, Any]) -> str:
    rows = [structured_row("dense", "", "", found["dense"], "")]
    for part, shares in found["parts"].items():
        for share, methods in shares.items():
            for name, entry in methods.items():
                removed = f"{100 * float(share):g} %"
                rows.append(structured_row(name, part, removed, entry, lead(methods, name)))
    sizes = ["parameters", "MACs (M)", "attention kept", "MLP kept"]
    return table(["method", "cut", "channels", *sizes, "accuracy", "DIMAP ahead by"], rows)


def structured_row(
    method: str, part: str, removed: str, entry: dict[str, Any], ahead: str
) -> list[str]:
    kept = [f"{100 * share:.1f}" for share in entry["kept"].values()]
    sizes = [f"{entry['parameters']:,}", f"{entry['macs'] / 1e6:.1f}"]
    return [method, part, removed, *sizes, *kept, spread(entry["accuracy"]), ahead]


def table_unstructured(found: dict[str, Any]) -> str:
    rows = []
    for ratio, methods in found["ratios"].items():
        of_all = methods["DIMAP"]["removed"] / found["parameters"]
        ahead = [lead(methods, name) for name in methods if name != "DIMAP"]
        reached = [spread(entry["accuracy"]) for entry in methods.values()]
        rows.append([f"{100 * float(ratio):g} %", f"{100 * of_all:.1f} %", *reached, *ahead])
    ahead = [f"DIMAP - {name}" for name in UNSTRUCTURED if name != "DIMAP"]
    return table(["removed", "of all", *UNSTRUCTURED, *ahead], rows)


def lead(methods: dict[str, Any], name: str) -> str:
    """How far DIMAP is ahead of a method, in percentage points."""
    if name == "DIMAP":
        return ""
    pairs = zip(methods["DIMAP"]["accuracy"], methods[name]["accuracy"], strict=True)
    return spread([ours - theirs for ours, theirs in pairs], "+")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = reference_parser(__doc__)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3, 0.4, 0.525])
    parser.add_argument("--draws", type=int, default=3, help="disjoint sets of test images")
    parser.add_argument("--test-images", type=int, default=1500, help="in each draw")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, measure, print and write."""
    options = parse(arguments)
    draws = draw_test_images(options.data, options.draws, options.test_images)
    models = {name: load_reference(name, options.checkpoints) for name in ARCHITECTURES}
    record = {
        "configuration": {k: v for k, v in vars(options).items() if isinstance(v, int | list)},
        "versions": versions(),
        "notes": NOTES,
        "structured": measure_structured(models["swin"], draws, options.shares),
        "unstructured": {
            name: measure_unstructured(model, draws, options.ratios)
            for name, model in models.items()
        },
    }
    print(report(record))
    write_json(record, options.output / "dimap.json")


if __name__ == "__main__":
    main()
