"""What rounding to eight bits costs a pretrained ViT-S/14, before and after pruning, and brings.

    python benchmarks/quantised.py --data path/to/images
    python benchmarks/quantised.py --data path/to/images --what speed compiled

The model, the images and the pruned model are those of real.py. Every route of quantising.py rounds
the dense and the pruned model, calibrated on photographs without labels; accuracies are over the
test images. Speeds are ratios to the dense model in float32, which takes turns with both; they are
of a machine that does nothing else, so they are a run of their own. Writes results/quantised.json
after every row; what is there already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from pages import PAGES, fill
from quantised_report import report
from quantising import ROUTES, Call, compiled
from real import default_cache
from real_recipes import CLOSED, RECIPES, Draw
from real_task import Task, load_task, normalise, random_task
from reference import RESULTS, versions, write_json
from torch import Tensor, nn
from tqdm import tqdm

BATCH = 20
# What is made for torch.compile: PT2E's graph only computes on rounded numbers without it.
COMPILED = ("float32", "bfloat16", "torchao dynamic int8", "PT2E static int8")
NOT_EAGER = ("PT2E static int8",)
MODELS = ["dense", "pruned"]


@torch.no_grad()
def logits(call: Call, images: Tensor) -> Tensor:
    """Of uint8 images."""
    return torch.cat([call(normalise(part)) for part in images.split(BATCH)])


def judged(found: Tensor, labels: Tensor) -> dict[str, Any]:
    """Which images are classified right, in a row of bits, and how many."""
    right = found.argmax(1) == labels
    bits = np.packbits(right.numpy()).tobytes().hex()
    return {"accuracy": float(right.double().mean()), "right": bits}


def accuracy(
    model: nn.Module, route: str, task: Task, batches: list[Tensor], count: int
) -> dict[str, Any]:
    """Of a rounded model, on the first test images."""
    began = time.process_time()
    images, labels = (part[:count] for part in task.test)
    found = judged(logits(ROUTES[route](model, batches), images), labels)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    spent = round(time.process_time() - began, 1)
    return {**found, "parameters": parameters, "cpu_seconds": spent}


@torch.no_grad()
def speeds(
    models: dict[str, nn.Module],
    route: str,
    batches: list[Tensor],
    build: Callable[[Call], Call],
    repeats: int,
) -> dict[str, Any]:
    """Milliseconds for an image, and how many times as fast as the dense model in float32."""
    calls: dict[str, Call] = {"float32": models["dense"]}
    calls |= {name: build(ROUTES[route](model, batches)) for name, model in models.items()}
    batch = batches[0]
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 2):  # the first ones warm up, and compile
        for name, call in calls.items():
            began = time.perf_counter()
            call(batch)
            if repeat > 1:
                taken[name].append(time.perf_counter() - began)
    found: dict[str, Any] = {}
    for name in models:
        ratios = [a / b for a, b in zip(taken["float32"], taken[name], strict=True)]
        found[name] = {
            "milliseconds": 1000 * median(taken[name]) / len(batch),
            "ratio": median(ratios),
            "quartiles": np.percentile(ratios, [25, 75]).tolist(),
        }
    return found


def load(task: Task, options: argparse.Namespace) -> dict[str, nn.Module]:
    """The models that are asked for, the pruned one as real.py makes it, or from its folder."""
    models = {"dense": task.model}
    if "pruned" in options.models:
        draw = Draw(task, options.images, 0, None if options.fast else options.cache)
        models["pruned"] = RECIPES[options.recipe](draw, options.kept)
    return {name: models[name] for name in options.models}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with train, test and photos.parquet")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="for the weights")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument(
        "--what", nargs="+", choices=["accuracy", "speed", "compiled"], default=["accuracy"]
    )
    parser.add_argument("--routes", nargs="+", choices=list(ROUTES), default=list(ROUTES))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--recipe", choices=list(RECIPES), default=CLOSED)
    parser.add_argument("--kept", type=float, default=0.5, help="share of the MLPs")
    parser.add_argument("--images", type=int, default=128, help="photographs of the recipe")
    parser.add_argument("--calibration", type=int, default=64, help="photographs for scales")
    parser.add_argument("--test-images", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8, help="images at once, for speeds")
    parser.add_argument("--repeats", type=int, default=9, help="of every timing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--fast", action="store_true", help="a tiny random model, drawn images")
    options = parser.parse_args(arguments)
    if not options.fast and options.data is None:
        parser.error("--data is needed, but with --fast")
    if options.what != ["accuracy"] and len(options.models) < len(MODELS):
        parser.error("speeds are of both models")
    return options


def begin(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """An earlier result, or an empty one.

    Raises:
        SystemExit: the earlier one was measured on something else.
    """
    given = ("recipe", "kept", "images", "calibration", "test_images", "fast")
    common = {name: getattr(options, name) for name in given}
    if not path.is_file():
        return {**common, "rows": [], "speeds": []}
    record: dict[str, Any] = json.loads(path.read_text())
    for name, value in common.items():
        if record[name] != value:
            raise SystemExit(f"{path} is of {name} {record[name]}, not {value}; choose another")
    return record


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, measure what is missing, print and write."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    path = options.output / "quantised.json"
    record = begin(path, options)
    task = random_task() if options.fast else load_task(options.data, options.cache, 250)
    models = load(task, options)
    photographs = torch.cat([images for images, _ in task.draw("photos", options.calibration, 1)])
    for what in options.what:
        for route in tqdm(options.routes, desc=what, disable=None):
            if what == "accuracy":
                batches = list(photographs.split(BATCH))
                for name, model in models.items():
                    key = {"route": route, "model": name}
                    if not any(key.items() <= row.items() for row in record["rows"]):
                        row = accuracy(model, route, task, batches, options.test_images)
                        record["rows"].append({**key, **row})
                        write_json({**record, "versions": versions()}, path)
                continue
            key = {"route": route, "compiled": what == "compiled"}
            skipped = route not in COMPILED if key["compiled"] else route in NOT_EAGER
            if skipped or any(key.items() <= row.items() for row in record["speeds"]):
                continue
            build = compiled if key["compiled"] else lambda call: call
            found = speeds(models, route, [photographs[: options.batch]], build, options.repeats)
            shape = {"batch": options.batch, "threads": options.threads}
            record["speeds"].append({**key, **shape, **found})
            write_json({**record, "versions": versions()}, path)
    table = report(record)
    if options.output == RESULTS:
        fill(PAGES / "quantised.md", "quantised", table)
    print(table)


if __name__ == "__main__":
    main()
