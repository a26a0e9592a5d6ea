"""What pruning costs on models of billions of parameters: seconds, memory, and what was estimated.

    python benchmarks/scale.py
    python benchmarks/scale.py --device cuda --batch-size 128 --images 128 --search-images 128

open_clip's ViT-g/14 (one billion parameters) in bfloat16, with random weights, is scored, searched
and cut, so that the cost is real; which widths come out says nothing about trained weights. Images
are random colours. Scores are collected with and without activation checkpointing and must agree.
Memory is the most that the process (on CUDA the device) has held up to the end of each stage.
Images per second are those of the dense model and at AMP's mean width. The larger towers are
planned on the meta device, each in a process of its own. Writes results/scale.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from reference import RESULTS, table, versions, write_json
from torch import Tensor, nn

import tp_amp

MODEL = "ViT-g-14"
CHANGES: dict[str, Any] = {}  # of the architecture
# Mean width of AMP's MLPs, and DGMR's MLP ratio.
PLANNED = {"ViT-g-14": 2682, "ViT-bigG-14": 3998, "EVA02-E-14-plus": 7295}
RATIO = 1


def build(name: str, device: str) -> nn.Module:
    """An image tower of open_clip in bfloat16, with its own random initialisation."""
    config = open_clip.get_model_config(name)
    vision = CLIPVisionCfg(**{**config["vision_cfg"], **CHANGES})
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return _build_vision_tower(config["embed_dim"], vision).eval()
    finally:
        torch.set_default_dtype(dtype)


def random_colours(count: int, size: int, seed: int) -> Tensor:
    """Images of four by four areas, each of one colour."""
    generator = torch.Generator().manual_seed(seed)
    areas = torch.randn(count, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(areas, size).bfloat16()


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class Stages:
    """Seconds and memory of one stage after the other."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.found: dict[str, dict[str, float]] = {}

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        given = work()
        if self.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        self.found[name] = {"seconds": seconds, "peak_gb": peak_bytes(self.device) / 1e9}
        print(f"{name}: {seconds:.1f} s, {self.found[name]['peak_gb']:.2f} GB", flush=True)
        return given


def peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.is_file():  # Linux hands ru_maxrss down from the process that started this one
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Told(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def prune(options: argparse.Namespace) -> dict[str, Any]:
    """Score, search and cut for real."""
    stages = Stages(options.device)
    model = stages.run("build", lambda: build(MODEL, options.device))
    size = model.image_size[0]
    images = random_colours(options.images + options.search_images, size, options.seed)
    scoring, judging = (
        part.split(options.batch_size)
        for part in images.split([options.images, options.search_images])
    )
    mlps = stages.run("find", lambda: tp_amp.find_mlps(model, images[:1]))
    downs = [mlp.down for mlp in mlps]

    def score(again: bool) -> Any:
        importance = tp_amp.EntropyTaylorImportance("similarity", activation_checkpointing=again)
        return importance.collect(model, scoring, layers=downs, progress=False)

    importance = stages.run("score, activation checkpointing", lambda: score(True))
    plain = stages.run("score, plain", lambda: score(False))
    same = all(torch.equal(importance.scores[down], plain.scores[down]) for down in downs)
    before = parameters(model)
    dense = throughput(model, judging[0], options)
    pruner = stages.run(
        "trace",
        lambda: tp_amp.AdaptiveMLPPruner(
            model,
            images[:1].to(options.device),
            importance,
            judging,
            max_increase=options.max_increase,
            steps=options.steps,
            cache_bytes=options.cache_bytes,
            progress=False,
        ),
    )
    estimate = stages.run("estimate", pruner.estimate)
    groups = pruner.step(interactive=True)
    first = stages.run("search", lambda: next(groups, None))
    stages.run("cut", lambda: [group.prune() for group in (first, *groups) if group is not None])
    found = {
        "model": MODEL,
        "device": options.device,
        "parameters": {"before": before, "after": parameters(model)},
        "hidden": {"before": mlps[0].width, "after": sorted(pruner.plan.widths.values())},
        "stages": stages.found,
        "same_scores": same,
        "estimated_seconds": estimate.seconds,
        "estimated_gb": estimate.bytes / 1e9,
        "images_per_second": {"dense": dense},
    }
    return found


def narrow_throughput(options: argparse.Namespace, width: int) -> float:
    """Images per second with every MLP at the same width, of a model of its own."""
    model = build(MODEL, options.device)
    images = random_colours(options.batch_size, model.image_size[0], options.seed)
    image = images[:1].to(options.device)
    kept = {mlp.down: list(range(width)) for mlp in tp_amp.find_mlps(model, image)}
    tp_amp.apply_plan(model, image, tp_amp.PruningPlan(kept))
    return throughput(model, images, options)


def throughput(model: nn.Module, images: Tensor, options: argparse.Namespace) -> float:
    """Images per second, the median of a few passes."""
    return tp_amp.measure(model, [images], repeats=options.repeats).images_per_second


def plan(name: str) -> dict[str, Any]:
    """Plan a tower on the meta device to AMP's and DGMR's sizes, and cut it there."""
    start, counts = time.process_time(), {}
    for paper in ("DGMR", "AMP"):
        with torch.device("meta"):
            model = build(name, "meta")
            image = torch.empty(1, 3, *model.image_size, dtype=torch.bfloat16)
        dense = parameters(model)
        widths = tp_amp.mlp_ratio_widths(model, image, RATIO)
        if paper == "AMP":
            widths = dict.fromkeys(widths, PLANNED[name])
        planned = tp_amp.plan_from_importance(model, image, first_channels, widths)
        tp_amp.apply_plan(model, image, planned)
        counts[paper] = parameters(model)
    return {
        "dense": dense,
        **counts,
        "seconds": time.process_time() - start,
        "peak_gb": peak_bytes("cpu") / 1e9,
    }


def first_channels(group: Any) -> Tensor:
    """Scores for a model without weights: the first channels stay."""
    return -torch.arange(len(group[0].idxs), dtype=torch.float)


def planned(name: str) -> dict[str, Any]:
    """The same in a process of its own, whose memory is counted from the start."""
    command = [sys.executable, str(Path(__file__).resolve()), "--plan", name]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output)


def report(record: dict[str, Any]) -> str:
    """What a person reads."""
    found = record["pruned"]
    rows = [
        [name, f"{stage['seconds']:.1f}", f"{stage['peak_gb']:.2f}"]
        for name, stage in found["stages"].items()
    ]
    rows.append(["search, estimated", f"{found['estimated_seconds']:.1f}", ""])
    towers = [
        [
            name,
            *(f"{tower[key] / 1e9:.3f}" for key in ("dense", "AMP", "DGMR")),
            f"{tower['seconds']:.1f}",
            f"{tower['peak_gb']:.2f}",
        ]
        for name, tower in record["planned"].items()
    ]
    speeds = ", ".join(f"{name}: {x:.2f}" for name, x in found["images_per_second"].items())
    return "\n\n".join(
        [
            table(["", "s", "GB"], rows),
            f"images per second: {speeds}",
            table(["billions of parameters", "dense", "AMP", "DGMR", "CPU s", "GB"], towers),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", choices=PLANNED, help="only plan, and print JSON")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=4, help="that score")
    parser.add_argument("--search-images", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2, help="of the bisection")
    parser.add_argument("--max-increase", type=float, default=1e-3, help="nats")
    parser.add_argument("--cache-bytes", type=int, default=2**26)
    parser.add_argument("--repeats", type=int, default=3, help="forward passes that are timed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    if options.plan:
        print(json.dumps(plan(options.plan)))
        return
    told, logger = Told(), logging.getLogger("tp_amp.running.timing")
    level = logger.level
    logger.addHandler(told)
    logger.setLevel(logging.INFO)
    try:
        pruned = prune(options)
    finally:
        logger.removeHandler(told)
        logger.setLevel(level)
    gc.collect()  # graphs and models hold each other
    width = min(PLANNED[MODEL], pruned["hidden"]["before"])
    pruned["images_per_second"][str(width)] = narrow_throughput(options, width)
    settings = ("threads", "images", "search_images", "batch_size", "steps", "max_increase")
    record = {
        **{name: getattr(options, name) for name in (*settings, "cache_bytes", "seed")},
        "versions": versions(),
        "pruned": pruned,
        "told": told.lines,
        "planned": {name: planned(name) for name in PLANNED},
    }
    print(report(record))
    write_json(record, options.output / "scale.json")


if __name__ == "__main__":
    main()
