"""The two small reference models that every number in the README is measured on."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tp_amp
from tp_amp.reports.comparison import table as table

RESULTS = Path(__file__).parent / "results"
CHECKPOINTS = Path(__file__).parent / "checkpoints"
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4},
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {
            "img_size": 32,
            "patch_size": 2,
            "window_size": 4,
            "embed_dim": 48,
            "depths": (2, 4, 2),
            "num_heads": (2, 4, 8),
            "drop_path_rate": 0.0,
        },
    ),
}


def reference_parser(documentation: str) -> argparse.ArgumentParser:
    """The arguments that benchmarks on the reference models share."""
    parser = argparse.ArgumentParser(description=documentation.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    return parser


def draws_parser(documentation: str) -> argparse.ArgumentParser:
    """Those of benchmarks that draw unlabelled images several times."""
    parser = reference_parser(documentation)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=512, help="of each draw")
    parser.add_argument("--test-images", type=int, default=2000, help="0 for all")
    return parser


def conditions(options: argparse.Namespace, test_images: int) -> dict[str, Any]:
    """What all numbers of such a benchmark have in common."""
    return {
        "images": options.images,
        "test_images": test_images,
        "seeds": options.seeds,
        "versions": versions(),
    }


def is_out_of_reach(error: ValueError) -> bool:
    """Whether an error says that no widths meet a target, and not that something else is wrong."""
    return "can't be met" in str(error) or "cutting makes the model no" in str(error)


def settled(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """What a file holds that was measured in the same conditions; nothing where there is no file.

    Raises:
        ValueError: it was measured in others, with which its rows can't stand in one table.
    """
    if not path.is_file():
        return {}
    record: dict[str, Any] = json.loads(path.read_text())
    if (found := {key: record.get(key) for key in facts}) != facts:
        raise ValueError(f"{path} was measured with {found}, not {facts}; move it away")
    return record


def build_reference(model: str) -> nn.Module:
    """Build one reference architecture, `"vit"` or `"swin"`, with random weights."""
    name, arguments = ARCHITECTURES[model]
    return timm.create_model(name, pretrained=False, num_classes=10, mlp_ratio=4.0, **arguments)


def load_reference(model: str, folder: Path = CHECKPOINTS) -> nn.Module:
    """Build one reference architecture with its trained weights, in eval mode."""
    module = build_reference(model)
    module.load_state_dict(load_file(folder / f"{model}.safetensors"))
    return module.eval()


def save_reference(module: nn.Module, model: str, facts: dict[str, Any], folder: Path) -> None:
    """Write weights and a JSON with the architecture, the recipe and the measured accuracy."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    save_file(weights, folder / f"{model}.safetensors")
    name, arguments = ARCHITECTURES[model]
    record = {"timm": name, "arguments": {**arguments, "num_classes": 10, "mlp_ratio": 4.0}}
    (folder / f"{model}.json").write_text(json.dumps(record | facts, indent=2) + "\n")


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 500) -> float:
    """Share of normalised `images` that `model` classifies as `labels`, in eval mode."""
    model.eval()
    device = next(model.parameters()).device
    right = 0
    for batch, label in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        right += int((model(batch.to(device)).argmax(-1).cpu() == label).sum())
    return right / len(labels)


def add_cross_entropy_gradients(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Add up the parameters' gradients over labelled batches, as Torch-Pruning's examples do."""
    for images, labels in batches:
        nn.functional.cross_entropy(model(images), labels).backward()


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    # torch_pruning.__version__ says 1.6.0 in 1.6.1.
    return {
        "tp_amp": tp_amp.__version__,
        "torch-pruning": version("torch-pruning"),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def write_json(record: dict[str, Any], path: Path) -> None:
    """Write a result at once, never to be found half written, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n")
    partial.replace(path)


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean, and standard deviation where there is more than one value, in percent."""
    text = f"{100 * mean(values):{sign}.1f}"
    return f"{text} ±{100 * stdev(values):.1f}" if len(values) > 1 else text
