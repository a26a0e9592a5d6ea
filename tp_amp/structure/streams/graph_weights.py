"""Parameters that an operation of the traced graph takes, where no module's call tells them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tp_amp.structure.nodes import is_operation

# As autograd calls them: what mixes channels, and what only lays values out in another way.
_PRODUCTS = (
    *("Addmm", "Mm", "Bmm", "Baddbmm", "Addbmm", "Addmv", "Mv", "Dot", "Linear", "Matmul"),
    *("Convolution", "ScaledDotProduct", "Softmax", "Einsum", "NativeMultiHead"),
)
_LAYOUTS = (
    *("T", "Transpose", "Permute", "View", "UnsafeView", "Unsqueeze", "Squeeze", "Expand"),
    *("Alias", "Clone", "ReshapeAlias", "ToCopy"),
)


Rows = tuple[int, int] | None


@dataclass(frozen=True)
class Factor:
    """A weight that an operation multiplies by, and the bias that it adds, by their paths.

    Attributes:
        rows: the first and the end of the rows of both that it takes; None for all.
    """

    weight: str
    bias: str | None
    rows: Rows = None


def operation_name(node: Any) -> str:
    """What autograd calls the operation of a node, without the end."""
    return _called(node.grad_fn)


def _called(grad_fn: Any) -> str:
    name = grad_fn.name() if hasattr(grad_fn, "name") else ""
    return str(name).partition("Backward")[0].lstrip("_")


def is_product(node: Any) -> bool:
    """Whether an operation mixes channels: a product of matrices, an attention, a softmax."""
    return is_operation(node) and operation_name(node).startswith(_PRODUCTS)


class GraphWeights:
    """Names the parameters of a traced graph.

    Args:
        model: was traced.
        real: the model's own parameter behind each of those that were traced.
    """

    def __init__(self, model: nn.Module, real: Mapping[Any, Any]) -> None:
        self._real = real
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._modules = dict(model.named_modules())

    def name(self, parameter: Any) -> str | None:
        """Path of a parameter, or of the one that it stands for."""
        return self._names.get(id(self._real.get(parameter, parameter)))

    def behind(self, grad_fn: Any, place: int = 0) -> tuple[str, Rows] | None:
        """Path of the parameter that something is, but for its layout, and which rows of it.

        Args:
            grad_fn: what makes it.
            place: which of its outputs it is.
        """
        rows = None
        while grad_fn is not None and not hasattr(grad_fn, "variable"):
            before = [entry for entry in grad_fn.next_functions if entry[0] is not None]
            if len(before) != 1:
                return None
            name = _called(grad_fn)
            if name == "SplitWithSizes" and rows is None:
                sizes = grad_fn._saved_split_sizes
                rows = sum(sizes[:place]), sum(sizes[: place + 1])
            elif name not in _LAYOUTS:
                return None
            [(grad_fn, place)] = before
        path = None if grad_fn is None else self.name(grad_fn.variable)
        return None if path is None else (path, rows)

    def factor(self, node: Any) -> Factor | None:
        """The weight and bias of a product of the stream with a layer's weight."""
        taken = dict(
            found
            for entry in getattr(node.grad_fn, "next_functions", ())
            if (found := self.behind(*entry)) is not None
        )
        weights = [name for name in taken if self._of_layer(name)]
        if len(weights) != 1:
            return None
        [weight] = weights
        bias, rows = weight.removesuffix("weight") + "bias", taken[weight]
        added = bias in taken or self._added_behind(node, (bias, rows))
        return Factor(weight, bias if added else None, rows)

    def _added_behind(self, product: Any, bias: tuple[str, Rows]) -> bool:
        """Whether a bias is added in a step of its own, as of inputs that are not contiguous."""
        node = product
        while len(node.outputs) == 1:
            [node] = node.outputs
            if operation_name(node) == "Add":
                return bias in [self.behind(*entry) for entry in node.grad_fn.next_functions]
            if operation_name(node) not in _LAYOUTS:
                break
        return False

    def _of_layer(self, path: str) -> bool:
        holder, _, leaf = path.rpartition(".")
        module = self._modules[holder]
        if isinstance(module, nn.MultiheadAttention):
            return leaf == "in_proj_weight"
        return isinstance(module, nn.Linear) and leaf == "weight"
