"""Checks of the values of arguments, which come before an image is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any


def check_whole(least: int = 1, **given: Any) -> None:
    """Raise ValueError for an argument that is no whole number of at least `least`."""
    for name, value in given.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, found {value!r}")


def check_number(kind: str, fits: Callable[[float], bool], **given: Any) -> None:
    """Raise ValueError for an argument that is no finite number, or none of its kind.

    Args:
        kind: what it must be, for the message.
        fits: whether a number is of that kind.
        given: the arguments, by name.
    """
    for name, value in given.items():
        if not is_number(value) or not fits(value):
            raise ValueError(f"{name} must be {kind}, found {value!r}")


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and no truth value."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_flags(**given: Any) -> None:
    """Raise TypeError for an argument that is neither True nor False."""
    for name, value in given.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, found {value!r}")


def check_widths(widths: Any) -> None:
    """Raise for widths that are no dict of module paths and whole numbers."""
    if not isinstance(widths, Mapping):
        raise TypeError(f"widths must be a dict of module paths and numbers, found {widths!r}")
    for name, width in widths.items():
        if not isinstance(name, str):
            raise TypeError(
                f"widths are named by the module path of each down layer, found {name!r}"
            )
        if not isinstance(width, Integral) or isinstance(width, bool):
            raise ValueError(f"the width of {name} must be a whole number, found {width!r}")


def check_names(layers: Any) -> None:
    """Raise for what is no collection of module paths."""
    if isinstance(layers, str) or not all(isinstance(name, str) for name in layers):
        raise TypeError(f"layers must be a list of module paths, found {layers!r}")
    if not layers:
        raise ValueError("layers names no layer; leave it out to take all")


def check_importance(importance: Any) -> None:
    """Raise TypeError for what can't score a group."""
    if isinstance(importance, type):
        name = importance.__name__
        raise TypeError(f"the importance is the class {name}; make one of it: {name}(...)")
    if not callable(importance):
        raise TypeError(
            "the importance must be one of tp_amp or Torch-Pruning, or a callable that scores a "
            f"group, found {importance!r}"
        )
