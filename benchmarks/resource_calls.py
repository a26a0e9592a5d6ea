"""One public call on one model, in a process of its own, for benchmarks/resources.py.

    python benchmarks/resource_calls.py "ViT-B/16" compensate --images 8 --threads 2

Prints one line of JSON once all is prepared, and one when the call is done.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from speed import resident_peak
from torch import Tensor, nn

import tp_amp

BATCH = 8  # images in a batch
KEPT = 0.5  # of each MLP, in plans made by hand
STREAM_KEPT = 0.75  # of each residual stream
EVERY_WIDTH = ("mlp", "qk", "vo", "stream")
TARGET = {"params": 0.8}
STEPS = 2  # of the bisection of each MLP
REFINE = 10
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 2}
# Name in the table -> library, name there, further arguments. The last one is for tests.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ViT-B/16": ("timm", "vit_base_patch16_224", {}),
    "ViT-L/16": ("timm", "vit_large_patch16_224", {}),
    "SigLIP so400m/14": ("timm", "vit_so400m_patch14_siglip_224", {}),
    "Swin-B": ("timm", "swin_base_patch4_window7_224", {}),
    "CLIP ViT-L/14": ("open_clip", "ViT-L-14", {}),
    "tiny": ("timm", "vit_tiny_patch16_224", SMALL),
}
TINY = "tiny"


class Case:
    """A model with random weights, random images for it, and a folder to save it in."""

    def __init__(self, name: str, images: int, folder: Path) -> None:
        library, known, arguments = MODELS[name]
        torch.manual_seed(0)
        self.model: Any
        if library == "timm":
            self.model = timm.create_model(known, pretrained=False, **arguments).eval()
            side = arguments.get("img_size", self.model.pretrained_cfg["input_size"][-1])
        else:
            self.model = open_clip.create_model(known, **arguments).visual.eval()
            side = self.model.image_size[-1]
        self.batches: list[Tensor] = list(torch.randn(images, 3, side, side).split(BATCH))
        self.example = self.batches[0][:1]
        self.folder, self.progress = folder, {"progress": False}

    @property
    def mlps(self) -> list[tp_amp.MLP]:
        return tp_amp.find_mlps(self.model, self.example)

    @property
    def downs(self) -> list[str]:
        return [mlp.down for mlp in self.mlps]

    def plan(self) -> tp_amp.PruningPlan:
        """The first channels of each MLP."""
        keep = {mlp.down: list(range(max(1, int(KEPT * mlp.width)))) for mlp in self.mlps}
        return tp_amp.PruningPlan(keep)

    def pruned(self) -> tuple[nn.Module, tp_amp.PruningPlan]:
        """A cut copy, and its plan."""
        model, plan = copy.deepcopy(self.model), self.plan()
        tp_amp.apply_plan(model, plan, self.example)
        return model, plan


# Prepares what stands before a call, and gives the call.
Prepare = Callable[[Case], Callable[[], Any]]


def collecting(kind: Any, **options: Any) -> Prepare:
    return lambda case: lambda: kind(**options).collect(case.model, case.batches, **case.progress)


def planning(kind: Any) -> Prepare:
    return lambda case: lambda: tp_amp.plan_from_importance(case.model, case.example, kind(), KEPT)


def planning_for_target(case: Case) -> Callable[[], Any]:
    importance = tp_amp.ReconstructionImportance(None)  # the widths' errors in another unit
    importance.collect(case.model, case.batches, layers=case.downs, **case.progress)
    return lambda: tp_amp.plan_for_target(case.model, case.example, importance, TARGET)


def going_the_whole_way(case: Case) -> Callable[[], Any]:
    """The recommended recipe in closed form, with all that has to be collected."""

    def prune() -> None:
        importance = tp_amp.ReconstructionImportance(data=case.batches)
        plan = tp_amp.plan_for_target(case.model, case.example, importance, TARGET)
        tp_amp.compensate(case.model, plan, case.batches, every_linear=True, **case.progress)

    return prune


def compensating(**options: Any) -> Prepare:
    def prepare(case: Case) -> Callable[[], Any]:
        plan = case.plan()
        return lambda: tp_amp.compensate(case.model, plan, case.batches, **options, **case.progress)

    return prepare


def turning(name: str) -> Prepare:
    return lambda case: (
        lambda: getattr(tp_amp, name)(case.model, case.example, case.batches, **case.progress)
    )


def planning_every_width(case: Case) -> Callable[[], Any]:
    """With all that has to be collected, which `plan_for_target` does itself here."""
    turning("rotate")(case)()
    turning("rotate_heads")(case)()
    importance = tp_amp.ReconstructionImportance(data=case.batches)
    return lambda: tp_amp.plan_for_target(
        case.model, case.example, importance, TARGET, widths=EVERY_WIDTH
    )


def compensating_every_width(case: Case) -> Callable[[], Any]:
    streams = turning("rotate")(case)()
    heads = turning("rotate_heads")(case)()
    inside = tp_amp.rank_plan(heads, {"qk": KEPT, "vo": KEPT})
    whole = tp_amp.stream_plan(streams, STREAM_KEPT).then(inside).then(case.plan())
    return lambda: tp_amp.compensate(
        case.model, whole, case.batches, every_linear=True, **case.progress
    )


def searching(**options: Any) -> Prepare:
    def prepare(case: Case) -> Callable[[], Any]:
        importance = tp_amp.EntropyTaylorImportance()
        importance.collect(case.model, case.batches, layers=case.downs, **case.progress)

        def search() -> None:
            tp_amp.AdaptiveMLPPruner(
                case.model,
                case.example,
                importance,
                case.batches,
                steps=STEPS,
                **options,
                **case.progress,
            ).step()

        return search

    return prepare


def distilling(case: Case) -> Callable[[], Any]:
    student, _ = case.pruned()
    return lambda: tp_amp.distill(student, case.model, case.batches, epochs=1, **case.progress)


def cutting(case: Case) -> Callable[[], Any]:
    plan = case.plan()
    return lambda: tp_amp.apply_plan(case.model, plan, case.example)


def saving(case: Case) -> Callable[[], Any]:
    model, plan = case.pruned()
    return lambda: tp_amp.save_pruned(model, case.folder, plan)


def loading(case: Case) -> Callable[[], Any]:
    model, plan = case.pruned()
    tp_amp.save_pruned(model, case.folder, plan)
    return lambda: tp_amp.load_pruned(case.model, case.folder)


ENTROPY, RECONSTRUCTION = tp_amp.EntropyTaylorImportance, tp_amp.ReconstructionImportance
CALLS: dict[str, Prepare] = {
    "inspect": lambda case: lambda: tp_amp.inspect(case.model, case.example),
    "find_mlps": lambda case: lambda: tp_amp.find_mlps(case.model, case.example),
    "find_attentions": lambda case: lambda: tp_amp.find_attentions(case.model, case.example),
    "collect, EntropyTaylorImportance": collecting(ENTROPY),
    "collect, EntropyTaylorImportance, activation_checkpointing": collecting(
        ENTROPY, activation_checkpointing=True
    ),
    "collect, ReconstructionImportance": collecting(RECONSTRUCTION),
    "collect, ReconstructionImportance, activation_checkpointing": collecting(
        RECONSTRUCTION, activation_checkpointing=True
    ),
    "plan_from_importance, GramSchmidtImportance": planning(tp_amp.GramSchmidtImportance),
    "plan_from_importance, DIMAPImportance": planning(tp_amp.DIMAPImportance),
    "plan_for_target": planning_for_target,
    "apply_plan": cutting,
    "compensate": compensating(),
    "compensate, every_linear": compensating(every_linear=True),
    "compensate, every_linear, refine": compensating(every_linear=True, refine=REFINE),
    "compensate, every_linear, and all before it": going_the_whole_way,
    "rotate": turning("rotate"),
    "rotate_heads": turning("rotate_heads"),
    "plan_for_target, every width": planning_every_width,
    "compensate, every width": compensating_every_width,
    "AdaptiveMLPPruner.step": searching(),
    "AdaptiveMLPPruner.step, target": searching(target=TARGET),
    "distill, one epoch": distilling,
    "save_pruned": saving,
    "load_pruned": loading,
}


def from_here() -> int:
    """Give back what is free, and let the peak start at what is held now, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident_peak()


def measured(call: Callable[[], Any], before: int) -> dict[str, Any]:
    """Seconds and the peak of one call."""
    start, cpu = time.perf_counter(), time.process_time()
    call()
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "peak_bytes": max(before, resident_peak()),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("call", choices=list(CALLS))
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args(arguments)
    logging.getLogger("tp_amp").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        case = Case(options.model, options.images, Path(folder))
        call = CALLS[options.call](case)
        parameters = sum(parameter.numel() for parameter in case.model.parameters())
        before = from_here()
        print(json.dumps({"parameters": parameters, "before_bytes": before}), flush=True)
        print(json.dumps(measured(call, before)), flush=True)


if __name__ == "__main__":
    main()
