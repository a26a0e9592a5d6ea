"""Models that took long to make, kept on disk for the recipes that go on from them."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import tp_amp

if TYPE_CHECKING:
    from real_recipes import Draw

# Of distillation: at most a quarter of an hour of two cores, which are twice as fast in
# bfloat16 where they have instructions for it, and a tenth as fast where not.
STEPS = {"no": 215, "bf16": 430}
STEP_IMAGES, PEAK, WARMUP = 12, 2e-5, 0.1
WEIGHTS = {"cls": 1.0, "tokens": 1.0}


def clock() -> np.ndarray:
    """Seconds, and the processor's, of all threads."""
    return np.array([time.perf_counter(), time.process_time()])


class Photographs:
    """Batches in an order of their own in each epoch, half of the images mirrored."""

    def __init__(self, images: Tensor, size: int, seed: int) -> None:
        self.images, self.size, self.seed, self.epoch = images, size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        for index in torch.randperm(len(self.images), generator=generator).split(self.size):
            images = self.images[index]
            mirrored = torch.rand(len(images), generator=generator) < 0.5
            images[mirrored] = images[mirrored].flip(-1)
            yield images


def has_bfloat16() -> bool:
    """Whether this CPU multiplies matrices of bfloat16."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def distilled(draw: Draw, student: nn.Module) -> nn.Module:
    """Train the whole for `STEPS` steps to give the dense model's tokens, without labels."""
    began = clock()
    teacher = copy.deepcopy(draw.model)
    cpu = next(teacher.parameters()).device.type == "cpu"
    for module in (*student.modules(), *teacher.modules()):
        # On a CPU, backward through fused attention takes longer.
        if cpu and hasattr(module, "fused_attn"):
            module.fused_attn = False
    photographs = Photographs(torch.cat(draw.batches), STEP_IMAGES, draw.seed)
    precision = "bf16" if not cpu or has_bfloat16() else "no"
    epochs = max(1, round(STEPS[precision] / len(photographs)))
    tp_amp.distill(
        student,
        teacher,
        photographs,
        weights=WEIGHTS,
        epochs=epochs,
        learning_rate=PEAK * 256 / STEP_IMAGES,
        warmup_epochs=WARMUP * epochs,
        weight_decay=(0.0, 0.0),
        accelerator=Accelerator(mixed_precision=precision, cpu=cpu),
        seed=draw.seed,
        progress=False,
    )
    steps, spent = epochs * len(photographs), (clock() - began).round(1)
    draw.trained = {"steps": steps, "precision": precision}
    draw.trained |= {"seconds": spent[0], "cpu_seconds": spent[1]}
    return student


def remembered(
    name: str, make: Callable[[Draw, float], nn.Module]
) -> Callable[[Draw, float], nn.Module]:
    """A recipe whose models stay in the draw's folder, with the seconds that they took."""

    def recall(draw: Draw, kept: float) -> nn.Module:
        if draw.folder is None:
            return make(draw, kept)
        path = place(draw, draw.folder, name, kept)
        if path.is_file():
            known = torch.load(path, weights_only=False)  # a module, written below
            draw.recalled += np.array(known["spent"])
            return known["model"]
        model, spent, _ = draw.timed(lambda: make(draw, kept))
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": model, "spent": spent.tolist()}, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)
        return model

    return recall


def place(draw: Draw, folder: Path, name: str, kept: float) -> Path:
    """The file of one recipe's model, by all that decides it."""
    key = repr([name, kept, draw.seed, sum(len(images) for images in draw.batches)])
    return folder / f"student-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
