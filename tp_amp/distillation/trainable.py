"""Which parameters distillation trains, how they are held meanwhile, and the way back."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp.distillation.features import Features
from tp_amp.running.inputs import Inputs
from tp_amp.running.restoring import evaluating, shapes_first

logger = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)


def used_parameters(features: Features, inputs: Inputs) -> set[str]:
    """Names of the model's floating parameters that its features depend on."""
    model = features.model

    def used(inputs: Inputs) -> set[str]:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        total = sum(output.sum() for output in inputs.call(features).values())
        gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        found = zip(parameters, gradients, strict=True)
        return {name for name, gradient in found if gradient is not None}

    with torch.enable_grad(), evaluating(model, trainable=True):
        return shapes_first(model, inputs, lambda given, _: used(given))


def cut_modules(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Module paths of the student's layers whose own parameters have other shapes.

    Raises:
        ValueError: the teacher lacks a layer, or none differs.
    """
    layers = dict(teacher.named_modules())
    missing = [name for name, _ in student.named_modules() if name not in layers]
    if missing:
        raise ValueError(
            f"the teacher has no layer {missing[0]}, so it can't tell which layers were cut; pass "
            "the dense model that the student was cut from, or train='all'"
        )
    found = [
        name for name, layer in student.named_modules() if _shapes(layer) != _shapes(layers[name])
    ]
    if not found:
        raise ValueError("no layer of the student is smaller than the teacher's; use train='all'")
    return found


def _shapes(layer: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in layer.named_parameters(recurse=False)}


@contextmanager
def adapted(model: nn.Module, names: Sequence[str], rank: int) -> Iterator[None]:
    """Put LoRA adapters on layers; on exit fold them in, after an error take them off.

    Raises:
        ImportError: peft is not installed.
        ValueError: none of the layers is a Linear or Conv2d.
    """
    try:
        import peft
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise ImportError("install tp-amp[lora] for train='lora'") from error
    # What nn.MultiheadAttention holds is a subclass, whose own forward is never called.
    targets = [n for n in names if type(model.get_submodule(n)) in (nn.Linear, nn.Conv2d)]
    if not targets:
        raise ValueError(f"none of the cut layers is a Linear or Conv2d: {list(names)}")
    if len(targets) < len(names):
        logger.warning("no adapters on %s, which stay as they are", sorted({*names} - {*targets}))
    attributes = set(vars(model))
    pattern = "|".join(map(re.escape, targets))
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=pattern)
    merge = False
    try:
        peft.inject_adapter_in_model(config, model)
        yield
        merge = True
    finally:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, LoraLayer):
                if merge:
                    layer.merge()
                holder, _, last = name.rpartition(".")
                setattr(model.get_submodule(holder), last, layer.get_base_layer())
        for attribute in set(vars(model)) - attributes:
            delattr(model, attribute)


@contextmanager
def held(model: nn.Module, device: torch.device, *, masters: bool) -> Iterator[None]:
    """Hold a model on a device, with float32 weights for half ones if `masters`; then undo both."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    places = [(tensor.device, tensor.dtype) for tensor in tensors]
    gradients = [tensor.grad if tensor.is_leaf else None for tensor in tensors]
    try:
        for tensor in tensors:
            wide = torch.float32 if masters and tensor.dtype in HALF else tensor.dtype
            tensor.grad = None
            tensor.data = tensor.data.to(device, wide)
        yield
    finally:
        for tensor, place, gradient in zip(tensors, places, gradients, strict=True):
            tensor.grad = None
            tensor.data = tensor.data.to(*place)
            tensor.grad = gradient


@contextmanager
def checkpointed(model: nn.Module, enable: bool) -> Iterator[None]:
    """Let a model compute activations again in the backward pass, in its library's own way.

    Raises:
        ValueError: the model has no such way.
    """
    if not enable:
        yield
        return
    switch: Any = getattr(model, "set_grad_checkpointing", None) or getattr(
        model, "gradient_checkpointing_enable", None
    )
    if switch is None:
        raise ValueError(
            f"{type(model).__name__} has neither set_grad_checkpointing (timm, open_clip) nor "
            "gradient_checkpointing_enable (transformers); use checkpointing=False"
        )
    names = ("grad_checkpointing", "gradient_checkpointing", "_gradient_checkpointing_func")
    before = [(module, {n: vars(module).get(n) for n in names}) for module in model.modules()]
    try:
        try:
            switch()
        except AssertionError as error:  # how timm says that a model has none
            raise ValueError(f"{type(model).__name__} can't: {error}") from error
        yield
    finally:
        for module, values in before:
            for name, value in values.items():
                if name in vars(module):
                    setattr(module, name, value)


class Average:
    """The exponential moving average of parameters: decay * average + (1 - decay) * parameter."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = list(parameters), decay
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters of one more step in."""
        for value, parameter in zip(self.values, self.parameters, strict=True):
            value.lerp_(parameter.detach(), 1 - self.decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Put the average into the parameters."""
        for value, parameter in zip(self.values, self.parameters, strict=True):
            parameter.copy_(value)
