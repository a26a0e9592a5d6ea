"""Dense models in which an MLP or attention gives a constant, by hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from toys import images, perturbed

from tp_amp.running.inputs import example
from tp_amp.running.watching import all_tensors


def made(make: Callable[[], nn.Module], size: int, wrapped: bool) -> tuple[nn.Module, list[Any]]:
    """A model with drawn norms and biases, and two batches; wrapped as transformers' are."""
    torch.manual_seed(0)
    given = [images(3, seed, size, 3) for seed in (1, 2)]
    batches = [{"pixel_values": x} for x in given] if wrapped else given
    return perturbed(make()), batches


def output(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        return all_tensors(example(batch).call(model))[0]


def giving(model: nn.Module, constants: dict[str, Tensor]) -> nn.Module:
    """The dense model in which some layers give a constant, by hooks."""
    model = copy.deepcopy(model)
    for name, value in constants.items():
        layer = model.get_submodule(name)
        layer.register_forward_hook(lambda _m, _a, y, value=value: value.expand_as(y))
    return model


def on_average(model: nn.Module, name: str, batches: list[Any]) -> Tensor:
    """The mean over all tokens of what a layer gives, by a hook."""
    given: list[Tensor] = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_hook(lambda _m, _a, y: given.append(y.flatten(0, -2)))
    for batch in batches:
        output(model, batch)
    handle.remove()
    return torch.cat(given).double().mean(0).float()
