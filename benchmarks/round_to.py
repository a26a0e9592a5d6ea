"""Throughput of a pruned ViT whose MLP widths are multiples of 1, 8, 16, 32 and 64.

    python benchmarks/round_to.py

The widths are drawn at random around 60 % of each MLP, as irregular as a search may leave them, and
then raised to the next multiple. Weights and images are random. Times are CPU seconds of one thread
in float32, or with `--device cuda` seconds in bfloat16. The variants take turns, in another order
in each repeat, and ratios are taken within a repeat, so that other load disturbs all of them alike.
Writes results/round_to.json.
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import timm
import torch
import torch_pruning as tp
from reference import RESULTS, table, versions, write_json
from speed import seconds
from torch import Tensor, nn

import tp_amp

MODEL, PIXELS = "vit_small_patch16_224", 224
MULTIPLES = (1, 8, 16, 32, 64)
BASE, IRREGULAR = "dense", "round_to=1"
KEPT, DEVIATION = 0.6, 0.1  # of the share that is kept of each MLP
# Device -> number format, images in a batch.
SETTINGS = {"cpu": (torch.float32, 8), "cuda": (torch.bfloat16, 512)}


def draw_widths(dense: Mapping[str, int], seed: int, kept: float = KEPT) -> dict[str, int]:
    """Draw the kept width of each MLP from a normal distribution around a share of it."""
    draw = random.Random(seed)
    shares = {name: min(1.0, max(0.1, draw.gauss(kept, DEVIATION))) for name in dense}
    return {name: round(shares[name] * width) for name, width in dense.items()}


def rounded_up(widths: Mapping[str, int], multiple: int) -> dict[str, int]:
    """The next multiple of each width."""
    return {name: -(-width // multiple) * multiple for name, width in widths.items()}


def variants(seed: int) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """The dense model and its pruned copies, each with its widths and its size."""
    torch.manual_seed(seed)
    model = timm.create_model(MODEL, pretrained=False).eval()
    example = torch.randn(1, 3, PIXELS, PIXELS)
    dense = {mlp.down: mlp.width for mlp in tp_amp.find_mlps(model, example)}
    drawn = draw_widths(dense, seed)
    wanted = {BASE: dense} | {f"round_to={m}": rounded_up(drawn, m) for m in MULTIPLES}
    return {name: cut_to(model, example, widths) for name, widths in wanted.items()}


def cut_to(
    model: nn.Module, example: Tensor, widths: Mapping[str, int]
) -> tuple[nn.Module, dict[str, Any]]:
    """A copy with the first channels of each MLP, with its widths and its size."""
    cut = copy.deepcopy(model)
    plan = tp_amp.PruningPlan({down: list(range(width)) for down, width in widths.items()})
    tp_amp.apply_plan(cut, example, plan)
    macs, parameters = tp.utils.count_ops_and_params(cut, example)
    return cut, {"widths": dict(widths), "parameters": int(parameters), "macs": int(macs)}


def measure(
    models: Mapping[str, nn.Module],
    device: str,
    images: int,
    repeats: int,
    seed: int,
    pixels: int,
) -> dict[str, list[float]]:
    """Time a forward pass of each model, after one run each that doesn't count."""
    dtype, _ = SETTINGS[device]
    batch = torch.randn(images, 3, pixels, pixels).to(device, dtype)
    models = {name: model.to(device, dtype) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    order = random.Random(seed)
    with torch.inference_mode():
        for repeat in range(repeats + 1):
            for name in order.sample(list(models), len(models)):
                taken = seconds(lambda model=models[name]: model(batch), device)
                if repeat:
                    times[name].append(taken)
    return times


def spread_of_ratios(times: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of how many times as many images per second as the base."""
    ratios = [b / a for a, b in zip(times, base, strict=True)]
    low, _, high = quantiles(ratios, n=4, method="inclusive")
    return {"median": median(ratios), "lower_quartile": low, "upper_quartile": high}


def report(record: dict[str, Any]) -> str:
    """What a person reads."""

    def text(ratio: dict[str, float]) -> str:
        low, high = ratio["lower_quartile"], ratio["upper_quartile"]
        return f"{ratio['median']:.3f} ({low:.3f}-{high:.3f})"

    rows = [
        [
            name,
            f"{entry['macs'] / 1e9:.3f}",
            f"{entry['images_per_second']:.2f}",
            text(entry["ratio_to_dense"]),
            text(entry["ratio_to_irregular"]),
        ]
        for name, entry in record["variants"].items()
    ]
    header = ["", "GMACs", "images/s", "to dense (quartiles)", "to round_to=1 (quartiles)"]
    return table(header, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=21, help="at least 2")
    parser.add_argument("--images", type=int, help="in a batch; by default 8, on CUDA 512")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=tuple(SETTINGS), default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON")
    options = parser.parse_args(arguments)
    dtype, images = SETTINGS[options.device]
    images = options.images or images
    torch.set_num_threads(1)
    made = variants(options.seed)
    models = {name: model for name, (model, _) in made.items()}
    times = measure(models, options.device, images, options.repeats, options.seed, PIXELS)
    on_cuda = options.device == "cuda"
    record = {
        "model": MODEL,
        "device": torch.cuda.get_device_name() if on_cuda else "CPU, one thread",
        "dtype": str(dtype).removeprefix("torch."),
        "images": images,
        "repeats": options.repeats,
        "seed": options.seed,
        "versions": versions(),
        "variants": {
            name: facts
            | {
                "images_per_second": images / median(times[name]),
                "ratio_to_dense": spread_of_ratios(times[name], times[BASE]),
                "ratio_to_irregular": spread_of_ratios(times[name], times[IRREGULAR]),
            }
            for name, (_, facts) in made.items()
        },
    }
    print(report(record))
    write_json(record, options.output / "round_to.json")


if __name__ == "__main__":
    main()
