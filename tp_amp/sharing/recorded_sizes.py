"""What a pruned model differs in from the dense one: sizes, and forward passes for fewer heads."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from tp_amp.structure.attention.head_forward import HeadCut, HeadForward
from tp_amp.structure.attention.multihead_forward import MultiheadForward
from tp_amp.structure.attention.rank_linear import RankLinear
from tp_amp.structure.constant_linear import ConstantLinear
from tp_amp.structure.ranks.removed_forward import RemovedForward


def recorded_sizes(dense: nn.Module, model: nn.Module) -> dict[str, dict[str, Any]]:
    """Record each layer that differs, as `cut_again` reads it.

    Args:
        dense: freshly built, on the meta device or not.
        model: the same, pruned.

    Returns:
        Path of a layer -> its `attributes`, the shapes of its `tensors`, None where a side was not
        cut (a head of more classes may be built then), and what else it became.

    Raises:
        ValueError: the model has layers, weights or sizes that no cut leaves behind.
    """
    built = dict(dense.named_modules(remove_duplicate=False))
    pruned = dict(model.named_modules(remove_duplicate=False))
    if strange := sorted(built.keys() ^ pruned.keys()):
        where = "model" if strange[0] in pruned else "dense model"
        raise ValueError(f"only the {where} has a layer {strange[0]}; {_REMEDY}")
    records = {path: _record(path, built[path], layer) for path, layer in pruned.items()}
    return {path: record for path, record in records.items() if record}


_REMEDY = (
    "what is changed besides the cut must stand in the configuration or arguments that the dense "
    "model is built from, or leave library out and load the folder by load_pruned"
)


def _record(path: str, built: nn.Module, layer: nn.Module) -> dict[str, Any]:
    old = _numbers(built)
    attributes = {n: v for n, v in _numbers(layer).items() if n in old and old[n] != v}
    forms = {name: recorded for name, recorded in _forms(layer).items() if recorded}
    record = {"attributes": attributes, "tensors": _shapes(path, built, layer), **forms}
    return {name: value for name, value in record.items() if value}


def _numbers(layer: nn.Module) -> dict[str, Any]:
    """Whole numbers that a layer keeps of its sizes, and tuples of them."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(layer).items()
        if type(value) is int
        or (isinstance(value, tuple) and value and all(type(v) is int for v in value))
    }


def _shapes(path: str, built: nn.Module, layer: nn.Module) -> dict[str, list[int | None]]:
    """The shapes of tensors that were cut, or are a bias that was not there."""
    old, new = _tensors(built), _tensors(layer)
    changed = {name: list(t.shape) for name, t in new.items() if _shape(old, name) != t.shape}
    for name in old.keys() ^ new.keys():
        if name != "bias" or name in old:
            raise ValueError(f"{path}.{name} is in one of dense and pruned model; {_REMEDY}")
    sides: dict[str, list[int | None]] = {}
    for name, shape in changed.items():
        # A bias that is added is as long as the weight.
        dense = _shape(old, name) or list(old["weight"].shape[:1])
        if len(dense) != len(shape) or any(a > b for a, b in zip(shape, dense, strict=True)):
            raise ValueError(
                f"{path}.{name} is {tuple(shape)}, {tuple(dense)} in the dense model; {_REMEDY}"
            )
        if name in layer._non_persistent_buffers_set:
            raise ValueError(f"{path}.{name} was cut and is no weight, so that no file can hold it")
        sides[name] = [a if a < b else None for a, b in zip(shape, dense, strict=True)]
    return sides


def _shape(tensors: dict[str, Tensor], name: str) -> Any:
    return tensors[name].shape if name in tensors else None


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    held = {**layer._parameters, **layer._buffers}
    return {name: tensor for name, tensor in held.items() if tensor is not None}


def _forms(layer: nn.Module) -> dict[str, Any]:
    if isinstance(layer, RankLinear):
        parts = [[*asdict(part).values()] for part in layer.gives]
        reads = None if layer.reads is None else [*asdict(layer.reads).values()]
        return {"inside_heads": {"gives": parts, "reads": reads}}
    if isinstance(layer, ConstantLinear):
        return {"constant": True}
    if isinstance(layer, RemovedForward):
        return {"removed": asdict(layer.removed)}
    cut: HeadCut | None = vars(layer).get("head_cut")
    if isinstance(layer, HeadForward) and cut:
        return {"heads": asdict(cut)}
    if isinstance(layer, MultiheadForward):
        return {"multihead": asdict(cut) if cut else {}}
    return {}
