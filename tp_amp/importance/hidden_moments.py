"""Moments of what layers read, over unlabelled images."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp.algebra.moments import Halves
from tp_amp.running.batches import check_batches, stream
from tp_amp.running.distributed import together
from tp_amp.running.fingerprints import in_second_half
from tp_amp.running.inputs import Inputs
from tp_amp.running.padding import images_alone, valid_tokens
from tp_amp.running.restoring import hooks
from tp_amp.structure.observing import observing


def hidden_moments(
    model: nn.Module,
    layers: Collection[str],
    batches: Iterable[Any],
    *,
    progress: bool,
) -> dict[str, Halves]:
    """Moments of the inputs of some layers, over all tokens, of all ranks.

    Raises:
        ValueError: a layer is never called.
    """
    moments = {name: Halves(name) for name in layers}
    batch, second = Inputs(), torch.zeros(1, dtype=torch.bool)

    def watch(name: str) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            values = args[0].movedim(1, -1) if isinstance(module, nn.Conv2d) else args[0]
            hidden = values.reshape(-1, values.shape[-1])
            weights = valid_tokens(batch, model, len(hidden))
            moments[name].add(hidden, hidden[:, :0], weights, second=second)

        return add

    with (
        together("covariances"),
        observing(model, gradients=False),
        hooks(model.get_submodule(n).register_forward_pre_hook(watch(n)) for n in layers),
    ):
        for batch in stream(batches, model, description="covariances", progress=progress):
            second = in_second_half(images_alone(batch))
            batch.call(model)
        moments = {name: m.merged(f"the moments of {name}") for name, m in moments.items()}
    for name, collected in moments.items():
        if not collected.channels:
            raise ValueError(f"{name} was not called on the batches; leave it out of the layers")
        counted = [half.inputs for half in collected.each if half.count]
        if not all(bool(torch.isfinite(inputs).all()) for inputs in counted):
            raise ValueError(f"activations of {name} are not finite; check the images for NaN")
    return moments


def narrowing_layers(model: nn.Module, batches: Iterable[Any]) -> list[str]:
    """The Linears with more inputs than outputs that are called on the first batch."""
    check_batches(batches, repeatable=True)
    called: list[str] = []
    with (
        observing(model, gradients=False),
        hooks(
            module.register_forward_pre_hook(lambda _m, _a, name=name: called.append(name))
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module.in_features > module.out_features
        ),
    ):
        next(stream(batches, model, description="first batch", progress=False)).call(model)
    return list(dict.fromkeys(called))
