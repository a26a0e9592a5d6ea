"""Parameters that several layers share: a cut of one layer would take it apart from the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn


def shared_parameters(model: nn.Module) -> dict[str, list[str]]:
    """Name of each parameter that is also another one -> the others, all by their full names.

    The same `nn.Parameter` in two modules, or two whose values lie in the same memory, as one that
    is the other transposed. A module that is called several times, or stands under several names,
    is one module and shares nothing.
    """
    held = [
        (f"{name}.{leaf}" if name else leaf, parameter)
        for name, module in model.named_modules()
        for leaf, parameter in module._parameters.items()
        if parameter is not None
    ]
    groups: dict[int, list[str]] = {}
    for name, parameter in held:
        groups.setdefault(id(parameter), []).append(name)
    found = [set(names) for names in groups.values() if len(names) > 1]
    found += _overlapping(held)
    shared: dict[str, set[str]] = {}
    for names in found:
        for name in names:
            shared.setdefault(name, set()).update(names - {name})
    return {name: sorted(others) for name, others in shared.items()}


def _overlapping(held: Iterable[tuple[str, Tensor]]) -> Iterator[set[str]]:
    """Pairs of parameters whose values overlap in memory."""
    spans = sorted((*span, name) for name, parameter in held if (span := _span(parameter)))
    reach: tuple[Any, int, str] | None = None  # the one that goes on furthest so far
    for device, start, end, name in spans:
        if reach is not None and reach[0] == device and start < reach[1]:
            yield {reach[2], name}
        if reach is None or reach[0] != device or end > reach[1]:
            reach = device, end, name


def _span(parameter: Tensor) -> tuple[str, int, int] | None:
    """The device, and the first and last byte of a parameter's values, where it has any."""
    plain = type(parameter) in (Tensor, nn.Parameter) and not parameter.is_meta
    if not plain or not parameter.numel() or not parameter.is_floating_point():
        return None
    steps = zip(parameter.shape, parameter.stride(), strict=True)
    length = 1 + sum((size - 1) * stride for size, stride in steps)
    start = parameter.data_ptr()
    return str(parameter.device), start, start + length * parameter.element_size()


def told_apart(shared: dict[str, list[str]], layers: Iterable[str]) -> str | None:
    """Why layers can't be cut because of a parameter that they share; None where they share none.

    Args:
        shared: of the model, from `shared_parameters`.
        layers: module paths.
    """
    for layer in layers:
        for name, others in shared.items():
            if name.rpartition(".")[0] == layer:
                return (
                    f"{name} is also {' and '.join(others)}, and a cut would take them apart; give "
                    "each layer a parameter of its own first, or call one module several times"
                )
    return None
