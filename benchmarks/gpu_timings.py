"""Timings of one model, or of single layers, in a process of its own, for benchmarks/gpu.py.

    python benchmarks/gpu_timings.py "ViT-B/16" --device cuda --batch-size 128 --repeats 10

Prints one line of JSON for each stage as it is done.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import scale
import timm
import torch
from round_to import MULTIPLES, SETTINGS, cut_to, draw_widths, measure, rounded_up
from scale import peak_bytes
from speed import seconds
from torch import Tensor

import tp_amp

# Name in the table -> library, name there, further arguments. The last one is for tests.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ViT-B/16": ("timm", "vit_base_patch16_224", {}),
    "ViT-L/16": ("timm", "vit_large_patch16_224", {}),
    "ViT-g/14": ("open_clip", "ViT-g-14", {}),
    "tiny": (
        "timm",
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 128, "num_heads": 4, "depth": 3},
    ),
}
TINY, LAYERS = "tiny", "layers"
AMP = 2682 / 6144  # the mean share of an MLP that AMP keeps of ViT-g/14
RATIO = 1  # DGMR's hidden channels for each input channel
# Of the `down` layers: hidden channels and outputs; the last is that of EVA-CLIP-E.
SHAPES = [(3072, 768), (4096, 1024), (15360, 1792)]
SMALL_SHAPES = [(96, 24)]

Stage = tuple[str, dict[str, Any]]


class Bench:
    """A model on a device, with one batch of random images."""

    def __init__(self, name: str, device: str, images: int) -> None:
        library, known, arguments = MODELS[name]
        torch.manual_seed(0)
        self.device, self.dtype = device, SETTINGS[device][0]
        self.model: Any
        if library == "open_clip":
            self.model = scale.build(known, device)
            self.side = self.model.image_size[0]
        else:
            self.model = timm.create_model(known, pretrained=False, **arguments).eval()
            self.side = arguments.get("img_size", 224)
        self.model.to(device, self.dtype)
        self.batch: Tensor = torch.randn(images, 3, self.side, self.side).to(self.dtype)
        self.example = self.batch[:1].to(device)
        self.dense = {mlp.down: mlp.width for mlp in tp_amp.find_mlps(self.model, self.example)}
        self.importance = tp_amp.EntropyTaylorImportance()
        self.pruned = 0

    def score(self, again: bool) -> None:
        importance = tp_amp.EntropyTaylorImportance(activation_checkpointing=again)
        importance.collect(self.model, [self.batch], layers=list(self.dense), progress=False)
        self.importance = importance

    def search(self) -> None:
        """AMP's, on a copy."""
        pruner = tp_amp.AdaptiveMLPPruner(
            self.model, self.example, self.importance, [self.batch], progress=False
        )
        # Its groups are not pruned, so that the model stays dense.
        next(pruner.step(interactive=True), None)

    def variants(self) -> dict[str, dict[str, int]]:
        """Widths of the papers, and irregular ones raised to multiples."""
        ratio = tp_amp.mlp_ratio_widths(self.model, self.example, RATIO)
        drawn = draw_widths(self.dense, 0, AMP)
        return {
            "dense": self.dense,
            "AMP's mean width": {n: round(AMP * width) for n, width in self.dense.items()},
            "DGMR's ratio 1": ratio,
            **{f"round_to={m}": rounded_up(drawn, m) for m in MULTIPLES},
        }

    def throughput(self, repeats: int) -> dict[str, Any]:
        """Images per second of each variant; they take turns."""
        made = {n: cut_to(self.model, self.example, w) for n, w in self.variants().items()}
        models = {name: model for name, (model, _) in made.items()}
        images = len(self.batch)
        times = measure(models, self.device, images, repeats, 0, self.side)
        return {
            name: {
                "parameters": facts["parameters"],
                "macs": facts["macs"],
                "mean_width": sum(facts["widths"].values()) / len(facts["widths"]),
                "images_per_second": images / median(times[name]),
                "times_dense": median(
                    a / b for a, b in zip(times["dense"], times[name], strict=True)
                ),
            }
            for name, (_, facts) in made.items()
        }


def timed(job: Callable[[], Any], device: str) -> dict[str, Any]:
    """Seconds, and on CUDA the most memory; or why it failed, so that the rest is measured."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        taken = seconds(job, device)
    except Exception as error:  # memory, above all; whatever it is, it is told
        return {"failed": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
    return {"seconds": taken, "peak_gb": peak_bytes(device) / 1e9}


def of_model(name: str, device: str, images: int, repeats: int) -> Iterator[Stage]:
    """Scoring, searching and throughput of one model."""
    bench = Bench(name, device, images)
    parameters = sum(parameter.numel() for parameter in bench.model.parameters())
    yield "model", {"parameters": parameters, "mlps": len(bench.dense)}
    with torch.inference_mode():
        bench.model(bench.batch[:8].to(device))  # what is slow for the first time only
    yield "score", timed(lambda: bench.score(False), device)
    yield "score, activation checkpointing", timed(lambda: bench.score(True), device)
    yield "search", timed(bench.search, device)
    found: dict[str, Any] = {}
    outcome = timed(lambda: found.update(bench.throughput(repeats)), device)
    yield "throughput", outcome | {"variants": found}


def of_layers(device: str, shapes: Sequence[tuple[int, int]]) -> Iterator[Stage]:
    """The two greedy orders, of layers of several sizes."""
    for hidden, outputs in shapes:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(outputs, hidden, generator=generator).to(device)
        factor = torch.randn(hidden, hidden, generator=generator).to(device).double()
        covariance = factor @ factor.T / hidden
        del factor
        size = f"{hidden} x {outputs}"

        def reconstruct(covariance: Tensor = covariance, weight: Tensor = weight) -> Any:
            return tp_amp.reconstruction_order(covariance, weight)

        def diversify(weight: Tensor = weight) -> Any:
            return tp_amp.gram_schmidt_order(weight.T.contiguous(), len(weight))

        tp_amp.reconstruction_order(covariance[:64, :64], weight[:, :64])  # the first time
        yield f"reconstruction_order, {size}", timed(reconstruct, device)
        yield f"gram_schmidt_order, {size}", timed(diversify, device)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=[*MODELS, LAYERS])
    parser.add_argument("--device", choices=list(SETTINGS), required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    options = parser.parse_args(arguments)
    logging.getLogger("tp_amp").setLevel(logging.ERROR)
    stages = (
        of_layers(options.device, SHAPES if options.device == "cuda" else SMALL_SHAPES)
        if options.part == LAYERS
        else of_model(options.part, options.device, options.batch_size, options.repeats)
    )
    for name, values in stages:
        print(json.dumps({"stage": name, **values}), flush=True)


if __name__ == "__main__":
    main()
