"""What a model holds at one moment, and the way back to it."""

from __future__ import annotations

import operator
import random
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor, nn

# What holds no state of a model, though it has attributes.
_NO_STATE = (
    *(type, types.FunctionType, types.MethodType, types.ModuleType, Enum, Tensor),
    *(staticmethod, classmethod, property),
)
_HOLD_NOTHING = {str, int, float, bool, bytes, type(None), nn.Parameter}
_CONTAINERS = (dict, list, set, deque)
_LIBRARIES = {"builtins", "torch", "typing"}  # whose classes no model notes anything on
_OBJECTS = 2  # a configuration, and one inside it


class Snapshot:
    """What the modules of a model hold, down to the contents of their containers.

    A first forward pass may install a hook on one module, note that on another, on their class or
    in their configuration, and keep what it has computed in a buffer or a dict of a third. Taken
    back in part, it would come twice or never again; here all of it is taken back: classes (which
    parametrizations change) and what stands on them, attributes, parameters, buffers, submodules,
    hooks, the contents of dicts, lists and sets, attributes and slots of plain objects, generators
    of random numbers, and the values of buffers, arrays and tensors that are no parameters.
    Parameters are the same objects afterwards; their values are not looked at. What a forward pass
    notes where no module leads to (in a closure, or in a global dict) is not seen.
    """

    def __init__(self, model: nn.Module) -> None:
        self._classes: list[tuple[nn.Module, type[nn.Module]]] = []
        self._contents: list[tuple[Any, Any]] = []  # a container, and a copy of it
        self._empty: list[Any] = []  # containers without content: most dicts of hooks
        self._values: list[tuple[Tensor, Tensor]] = []
        self._arrays: list[tuple[numpy.ndarray[Any, Any], numpy.ndarray[Any, Any]]] = []
        self._generators: list[Callable[[], object]] = []  # what sets each one back
        # What can't be changed as a dict: classes and objects with slots, with their attributes.
        self._attributes: list[tuple[Any, dict[str, Any]]] = []
        self._kinds: set[type] = set()
        seen: set[int] = set()
        rest: list[tuple[Any, int]] = [(model, 0)]
        while rest:
            value, depth = rest.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, _CONTAINERS) and not value:
                self._empty.append(value)
            else:
                rest += self._take(value, depth)

    def _take(self, value: Any, depth: int) -> list[tuple[Any, int]]:
        """Remember a value; give what it holds, with how many plain objects it lies in."""
        if isinstance(value, nn.Module):
            self._classes.append((value, type(value)))
            return [(vars(value), depth), *self._take_kinds(type(value), depth)]
        if isinstance(value, dict):
            self._contents.append((value, dict(value)))
            return [(held, depth) for held in value.values() if type(held) not in _HOLD_NOTHING]
        if isinstance(value, _CONTAINERS):
            self._contents.append((value, list(value)))
            return [(held, depth) for held in value if type(held) not in _HOLD_NOTHING]
        if isinstance(value, tuple):
            return [(held, depth) for held in value if type(held) not in _HOLD_NOTHING]
        if isinstance(value, Tensor):
            if _can_be_copied(value):
                self._values.append((value, value.detach().clone()))
            return []
        if isinstance(value, numpy.ndarray):
            self._arrays.append((value, value.copy()))
            return []
        if back := _way_back(value):
            self._generators.append(back)
            return []
        if depth == _OBJECTS or isinstance(value, _NO_STATE):
            return []
        attributes = getattr(value, "__dict__", None)
        found = [(attributes, depth + 1)] if isinstance(attributes, dict) else []
        if slots := _in_slots(value):
            self._attributes.append((value, slots))
        return [*found, *((held, depth + 1) for held in slots.values())]

    def _take_kinds(self, kind: type, depth: int) -> list[tuple[Any, int]]:
        """Remember what stands on a class and those that it is made of, but for torch's own."""
        rest: list[tuple[Any, int]] = []
        for part in kind.__mro__:
            if part not in self._kinds and part.__module__.partition(".")[0] not in _LIBRARIES:
                self._kinds.add(part)
                self._attributes.append((part, _on_class(part)))
                rest += [(held, depth) for held in _on_class(part).values()]
        return rest

    def restore(self) -> None:
        """Give all of it back."""
        for module, own in self._classes:
            if type(module) is not own:
                module.__class__ = own
        for value, attributes in self._attributes:
            now = _on_class(value) if isinstance(value, type) else _in_slots(value)
            for name in now.keys() - attributes.keys():
                delattr(value, name)
            for name, held in attributes.items():
                if name not in now or now[name] is not held:
                    setattr(value, name, held)
        for content in self._empty:
            if content:
                content.clear()
        for content, held in self._contents:
            _restore(content, held)
        for tensor, value in self._values:
            # `data`, for autograd graphs that hold the tensor.
            if tensor.shape != value.shape:
                tensor.data = value
            elif not torch.equal(tensor.detach(), value):
                tensor.data.copy_(value)
        for array, values in self._arrays:
            if array.shape == values.shape:
                array[...] = values
        for back in self._generators:
            back()


@contextmanager
def given_back(model: nn.Module) -> Iterator[None]:
    """Whatever is put on a model meanwhile, by a first forward pass say, is taken off as a whole.

    Contexts end in the reverse order of their start: what was changed before this one ends later.
    """
    held = Snapshot(model)
    try:
        yield
    finally:
        held.restore()


def _way_back(value: Any) -> Callable[[], object] | None:
    """What sets a generator of random numbers back to where it is now."""
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, numpy.random.RandomState):
        return partial(value.set_state, value.get_state())
    if isinstance(value, numpy.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    return None


def _can_be_copied(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_meta


def _on_class(kind: type) -> dict[str, Any]:
    return {name: held for name, held in vars(kind).items() if not name.startswith("__")}


def _in_slots(value: Any) -> dict[str, Any]:
    """The attributes that an object keeps outside its dict."""
    names: list[str] = []
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        names += [slots] if isinstance(slots, str) else slots
    return {n: getattr(value, n) for n in names if n[:2] != "__" and hasattr(value, n)}


def _restore(content: Any, held: Any) -> None:
    same = len(held) == len(content) and all(map(operator.is_, held, content))
    if isinstance(content, dict):
        same = same and all(map(operator.is_, held.values(), content.values()))
    if not same:
        content.clear()
        (content.extend if isinstance(content, (list, deque)) else content.update)(held)
