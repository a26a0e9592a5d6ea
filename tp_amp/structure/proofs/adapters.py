"""Adapters of a layer: low-rank ones (LoRA, DoRA) by structure, and others by who holds it."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from tp_amp.structure.mlp_cuts import MLP
from tp_amp.structure.nodes import (
    after,
    feeding,
    is_operation,
    is_projection,
    outputs,
    producers,
)

# What may stand between two Linears that make one map of low rank: the product, and its views.
_LINEAR = re.compile(r"(T|Mm|Addmm|View|UnsafeView|ReshapeAlias|Clone|ToCopy)Backward\d+")

# What their authors call the modules of bottleneck adapters (AdapterHub, AdaptFormer, OpenDelta).
_ADAPTER = re.compile(r"Adapter(_?(Layer|Module))?$")


def adapted_layer(first: Any, second: Any) -> nn.Module | None:
    """Find the layer that two others, one after another, are an adapter of.

    Both are nodes of the graph. An adapter reads what the layer reads and is added to what it
    gives, of the same sizes on both sides; and it is linear, or narrower inside than at both ends,
    which the MLP of a residual block beside its shortcut is not.
    """
    rank, ends = outputs(first.module), (_inputs(first.module), outputs(second.module))
    if rank >= min(ends) and not _linear_between(second):
        return None
    read = set(producers(first))
    for reader in after(second):
        for node in feeding(reader):
            module = node.module
            if is_operation(node) or node in (first, second) or not is_projection(module):
                continue
            if (_inputs(module), outputs(module)) == ends and set(producers(node)) == read:
                return module  # type: ignore[no-any-return]
    return None


def wrapped(model: nn.Module, name: str) -> str | None:
    """Why a layer that is held with adapters of another kind (LoHa, IA3, OFT) stays whole.

    They are known by PEFT's convention: the layer is its holder's `base_layer`, which can merge.
    Merged in place or switched off, they still have the sizes of the whole layer.
    """
    path, _, last = name.rpartition(".")
    holder = model.get_submodule(path)
    if last != "base_layer" or not callable(getattr(holder, "merge", None)):
        return None
    kind = type(holder).__name__
    return f"it has adapters ({kind}); merge them first (PEFT: merge_and_unload())"


def bottleneck(model: nn.Module, mlp: MLP) -> str | None:
    """The path of the bottleneck adapter that an MLP is, if it is one.

    Structure alone can't tell it from an MLP that was pruned to fewer channels than the stream has:
    it is one where it is that narrow, and the class of what holds it says so too.
    """
    ends = _inputs(model.get_submodule(mlp.up[0])), outputs(model.get_submodule(mlp.down))
    if mlp.width >= min(ends):
        return None
    path = holder(model, mlp.name)
    return path if _ADAPTER.search(type(model.get_submodule(path)).__name__) else None


def holder(model: nn.Module, path: str) -> str:
    """The path itself, or of what holds it, where it is one of layers in a row alone."""
    while path and type(model.get_submodule(path)) is nn.Sequential:
        path = path.rpartition(".")[0]
    return path


def _inputs(module: Any) -> int:
    return int(module.weight.shape[1])


def _linear_between(node: Any) -> bool:
    operations = [producer for producer in feeding(node) if is_operation(producer)]
    return all(
        operation.grad_fn is not None and _LINEAR.fullmatch(operation.grad_fn.name())
        for operation in operations
    )
