"""Which share of a model's parameters and multiply-accumulates its MLPs hold.

    python benchmarks/shares.py

Random weights: only sizes are counted.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import timm
import torch

import tp_amp

MODELS = [
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "vit_large_patch16_224",
    "vit_base_patch16_clip_224",
    "vit_base_patch16_siglip_224",
    "vit_small_patch14_dinov2",
    "vit_base_patch14_dinov2",
    "deit3_base_patch16_224",
    "beit_base_patch16_224",
    "swin_tiny_patch4_window7_224",
    "swin_base_patch4_window7_224",
]


def share(name: str) -> dict[str, Any]:
    """Fractions of the whole model, and how many MLPs there are."""
    model = timm.create_model(name)
    images = torch.zeros(1, *model.pretrained_cfg["input_size"])
    found = tp_amp.inspect(model, images)
    mlps, total = found.shares["MLPs"], found.shares["total"]
    return {
        "mlps": len(found.mlps),
        "parameters": mlps.parameters / total.parameters,
        "macs": mlps.macs / total.macs,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    logging.getLogger("tp_amp").setLevel(logging.ERROR)
    found = {}
    print("| model | MLPs | of parameters | of MACs |\n|---|---|---|---|")
    for name in options.models:
        found[name] = row = share(name)
        print(f"| {name} | {row['mlps']} | {row['parameters']:.1%} | {row['macs']:.1%} |")
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "shares.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
