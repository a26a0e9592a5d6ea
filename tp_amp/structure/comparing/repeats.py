"""What a check of an attention asks about, so that one like it is not checked again."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp.running.fingerprints import digest
from tp_amp.running.inputs import Inputs
from tp_amp.structure.comparing.copies import HOOKS

_PLAIN = (bool, int, float, str, bytes, torch.dtype, torch.device)


def call_form(module: nn.Module, inputs: Inputs) -> Hashable:
    """A call of a module without the values of its parameters and of its first tensor.

    Calls of the same form run the same code on the same sizes: classes, attributes, buffers and
    all other arguments are equal in every value, and what is shared in one is shared in the other.
    A check puts noise on parameters, so it asks about no more. What can't be compared is only
    equal to itself: the objects of both calls must live as long as the forms are compared.

    Args:
        module: is called.
        inputs: of the call.
    """
    form = _Form(inputs.tensors()[:1])
    return form.of(inputs.args), form.of(inputs.kwargs), form.of(module)


class _Form:
    """Tensors and modules are numbered as they are met; the first of them stand for no values."""

    def __init__(self, valueless: list[Tensor]) -> None:
        self._valueless = {id(tensor) for tensor in valueless}
        self._numbers: dict[int, int] = {}

    def of(self, value: Any) -> Hashable:
        kind = type(value)
        if isinstance(value, (Tensor, nn.Module)):
            if id(value) in self._numbers:
                return "again", self._numbers[id(value)]
            self._numbers[id(value)] = len(self._numbers)
            own = self._tensor(value) if isinstance(value, Tensor) else self.of(_held(value))
            return kind, own
        if isinstance(value, dict):
            return kind, tuple((self.of(key), self.of(held)) for key, held in value.items())
        if isinstance(value, (tuple, list)):
            return kind, tuple(map(self.of, value))
        if isinstance(value, (set, frozenset)):
            return kind, frozenset(map(self.of, value))
        return kind, value if kind in _PLAIN else id(value)

    def _tensor(self, tensor: Tensor) -> Hashable:
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
        if not plain or tensor.is_meta:
            return id(tensor)
        noisy = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        known = noisy or id(tensor) in self._valueless
        values = "" if known else digest([("", tensor)])
        return tensor.shape, tensor.dtype, tensor.device, values


def _held(module: nn.Module) -> dict[str, Any]:
    """What a module holds, without hooks, which the copy that is checked has none of."""
    return {name: value for name, value in vars(module).items() if name not in HOOKS}
