"""Layers that compensation can't correct: fed by a router, or called several times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from tp_amp.running.distributed import of_each
from tp_amp.running.inputs import Inputs, one_image
from tp_amp.running.restoring import hooks, shapes_first

_JUDGED = 8  # images that tell whether a layer reads the same number of tokens of each
# Operations that pick rows by integers, that put rows at such places, and matrix products.
_PICKS = {"index", "_unsafe_index", "gather", "index_select", "masked_select", "take"}
_PUTS = ("index_put", "index_add", "index_copy", "index_reduce", "scatter", "masked_scatter")
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}


def routed_layers(model: nn.Module, inputs: Inputs, names: Sequence[str]) -> set[str]:
    """Those of some layers that a router sends some of the tokens to, as in mixtures of experts.

    Of several images of one size they read now more rows, now fewer; or as many, which values have
    chosen (the experts the tokens, or the best of all tokens for all that follows). So they read
    others once layers before them are cut, and what they give can't be compared token by token with
    the dense model. A model that runs on the meta device has none of the first kind, since no
    number of rows can depend on values there. Under a process group a layer is one if it is on any
    rank's images.
    """
    counts, found = shapes_first(model, inputs, partial(_rows, model, names))
    read = {name: {rows.get(name, 0) for rows in counts} for name in names}
    found |= {name for name, rows in read.items() if len(rows) > 1 or 0 in rows}
    ranks = of_each("the layers that a router feeds", found)
    return set().union(*ranks) if isinstance(ranks, list) else ranks


@torch.no_grad()
def _rows(
    model: nn.Module, names: Sequence[str], inputs: Inputs, stand_ins: Mapping[Any, Any]
) -> tuple[list[dict[str, int]], set[str]]:
    """How many rows layers read of each of a few images, and the layers whose rows are chosen.

    Without values, of the first image alone.
    """
    counts: list[dict[str, int]] = []
    found: set[str] = set()

    def count(name: str) -> Any:
        def add(_: nn.Module, args: tuple[Any, ...]) -> None:
            rows = args[0].numel() // max(1, args[0].shape[-1])
            counts[-1][name] = counts[-1].get(name, 0) + rows
            if chosen.of(args[0]) & {"rows"}:
                found.add(name)

        return add

    images = 1 if stand_ins else min(_JUDGED, inputs.images)
    with hooks(model.get_submodule(n).register_forward_pre_hook(count(n)) for n in names):
        for place in range(images):
            counts.append({})
            image = one_image(inputs, 1, place)
            with _ChosenRows(model, image.tensors()) as chosen:
                image.call(model)
    return counts, found


def check_called_once(calls: Mapping[str, int]) -> None:
    """Check that compensation can correct some of the layers that are cut.

    Args:
        calls: how often each of them is called in a forward pass.

    Raises:
        ValueError: each is called several times.
    """
    if calls and min(calls.values()) > 1:
        raise ValueError(
            "compensation corrects layers that are called once in a forward pass, and "
            f"{', '.join(f'{name} is called {n} times' for name, n in calls.items())}; "
            "ignored_layers leaves it whole, and apply_plan cuts it without compensation"
        )


class _ChosenRows(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows what a model computes, to know which tensors hold rows that values have chosen.

    Each tensor is marked: `given` and `weight` depend on the inputs and on parameters, `data` on
    both, so that a cut changes it; `places` are integers or truth values that come from floating
    data, `back` of them what sorts such ones, so that rows stand again where they were; `mask` is
    floating and made of places, and a product with it picks rows, or puts picked ones back; `rows`
    is picked. It needs no values.

    Args:
        model: is run.
        inputs: of the model.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._marks: Any = WeakTensorKeyDictionary()
        for mark, tensors in (("given", inputs), ("weight", model.parameters())):
            for tensor in tensors:
                self._marks[tensor] = {mark}

    def of(self, tensor: Tensor) -> set[str]:
        """The marks of a tensor."""
        return set(self._marks.get(tensor, ()))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and mark what it gives."""
        given = [v for v in tree_leaves((args, kwargs or {})) if isinstance(v, Tensor)]
        output = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if name.startswith("new_") or name.endswith("_like"):
            given = []  # it reads their sizes alone
        marks = [self.of(tensor) for tensor in given]
        values = [own for t, own in zip(given, marks, strict=True) if _floating(t)]
        for result in tree_leaves(output):
            if isinstance(result, Tensor):
                marked = _marked if _floating(result) else _marked_places
                self._marks[result] = marked(name, marks, values)
        return output


def _marked_places(name: str, marks: list[set[str]], values: list[set[str]]) -> set[str]:
    """The marks of integers or truth values, from those of what an operation is given.

    Args:
        name: of the operation.
        marks: of all tensors.
        values: of the floating ones.
    """
    held: set[str] = set().union(*marks)
    if any("data" in own for own in values):
        return {"places"}
    turned = "places" in held and (name == "sort" or name.startswith(_PUTS))
    return held & {"given", "weight", "places", "back"} | ({"back"} if turned else set())


def _marked(name: str, marks: list[set[str]], values: list[set[str]]) -> set[str]:
    """The marks of a floating result; arguments as for `_marked_places`."""
    held: set[str] = set().union(*marks)
    found = held & {"given", "weight"}
    if held & {"data", "places"} or found == {"given", "weight"}:
        found = {"data"}
    rows = "rows" in held
    if name in _PICKS:
        source, index = marks[0], set().union(*marks[1:])
        if "places" in index and source & {"given", "data"}:
            rows = not (rows and "back" in index)
    elif name.startswith(_PUTS):
        rows = "rows" in marks[0]
    elif name in _PRODUCTS:
        for one, other in (marks[-2:], marks[:-3:-1]):
            if "mask" in one and other & {"given", "data"} and "mask" not in other:
                rows = "rows" not in other
    made = "places" in held and not any("data" in own for own in values)
    kept = ["mask" in own for own in values]
    mask = made or (any(kept) and (name == "mul" or all(kept)))
    if mask and name not in (*_PICKS, *_PRODUCTS, "embedding"):
        found |= {"mask"}
    return found | {"rows"} if rows else found


def _floating(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
