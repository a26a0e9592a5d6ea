"""Cut a freshly built dense model to recorded sizes; its text goes into folders for transformers.

So it knows torch alone, and where it runs nothing else of this package is there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def cut_again(
    model: nn.Module,
    layers: dict[str, dict[str, Any]],
    forms: dict[str, Callable[[nn.Module, Any], None]],
) -> None:
    """Give layers the sizes of those of a pruned model, whose weights are loaded afterwards.

    Args:
        model: dense.
        layers: path of a layer -> its `attributes`, the shapes of its `tensors` (None where
            a side was not cut), and what else it
            became, by the name of a form.
        forms: name -> what turns a layer into one of that form.

    Raises:
        ValueError: the dense model has no such layer.
    """
    built = dict(model.named_modules(remove_duplicate=False))
    for path, record in layers.items():
        if path not in built:
            raise ValueError(
                f"{type(model).__name__} has no layer {path}; another release of transformers "
                "calls it otherwise: install the one in config.json (transformers_version)"
            )
        layer = built[path]
        for name, value in record.get("attributes", {}).items():
            setattr(layer, name, tuple(value) if isinstance(value, list) else value)
        for name, shape in record.get("tensors", {}).items():
            _resize(layer, name, shape)
        for name, form in forms.items():
            if name in record:
                form(layer, record[name])


def _resize(layer: nn.Module, name: str, shape: list[int | None]) -> None:
    """Keep the first entries of a tensor, all where None stands.

    A bias that the dense layer has not begins at zero.
    """
    held: Any = getattr(layer, name, None)
    if held is None:
        weight: Any = layer.weight
        sizes = [size or len(weight) for size in shape]
        layer.register_parameter(name, nn.Parameter(weight.new_zeros(sizes)))
        return
    first = held.detach()[tuple(slice(size) for size in shape)].clone()
    if name in layer._buffers:
        layer._buffers[name] = first
    else:
        layer._parameters[name] = nn.Parameter(first, held.requires_grad)
