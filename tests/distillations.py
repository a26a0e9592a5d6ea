"""Small students with their teachers, and short runs of distillation."""

from __future__ import annotations

import copy

import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from toys import images, toy

import tp_amp

TOKENS = ("embed", "blocks")  # what the tokens of the toy depend on


def cut(teacher: nn.Module, example: Tensor | None = None) -> tuple[nn.Module, tp_amp.PruningPlan]:
    student, example = copy.deepcopy(teacher), images(2) if example is None else example
    plan = tp_amp.plan_from_importance(student, example, tp_amp.DIMAPImportance(), 0.5)
    tp_amp.apply_plan(student, example, plan)
    return student, plan


def pair(**arguments: object) -> tuple[nn.Module, nn.Module]:
    teacher = toy(**arguments)
    return cut(teacher)[0], teacher


def distill(student: nn.Module, teacher: nn.Module, batches: object, **options: object):
    options = {"epochs": 2, "warmup_epochs": 0.5, "learning_rate": 0.3, **options}
    precision = options.pop("precision", "no")
    AcceleratorState._reset_state(True)  # of the precision of a run before
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
    return tp_amp.distill(student, teacher, batches, accelerator=accelerator, **options)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def timm_pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    teacher = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=8,
        depth=2,
        embed_dim=16,
        num_heads=2,
        num_classes=3,
        drop_path_rate=0.3,
        proj_drop_rate=0.2,
    )
    return cut(teacher, images(2, size=16, channels=3))[0], teacher


def tokens(model: nn.Module, pictures: Tensor) -> Tensor:
    return model.blocks(model.embed(pictures).flatten(2).transpose(1, 2))
