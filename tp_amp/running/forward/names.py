"""The names of what a forward pass takes, and of what it can't do without."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

from torch import nn

_SEVERAL = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def takes(function: Any, names: Collection[str]) -> bool:
    """Whether some keyword arguments hold all that a model's forward pass needs."""
    return not isinstance(_alone(function), nn.Module) or set(required(function)) <= set(names)


def accepts(function: Any, name: str) -> bool:
    """Whether a keyword argument may be passed to a forward pass."""
    parameters = _parameters(function)
    more = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    return more or name in named(function)


def required(function: Any) -> list[str]:
    """The names of what a forward pass can't be called without."""
    return [
        parameter.name
        for parameter in _parameters(function)
        if parameter.default is parameter.empty and parameter.kind not in _SEVERAL
    ]


def named(function: Any) -> list[str]:
    """All names that a forward pass has for its arguments."""
    return [p.name for p in _parameters(function) if p.kind not in _SEVERAL]


def _parameters(function: Any) -> list[inspect.Parameter]:
    function = _alone(function)
    try:
        if isinstance(function, nn.Module):  # as it was written, not as a hook calls it
            return list(inspect.signature(type(function).forward).parameters.values())[1:]
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return []


def _alone(function: Any) -> Any:
    """A model without what spreads it over devices."""
    while isinstance(function, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        function = function.module
    return function
