"""A model as an ONNX graph of tensors alone, and what that holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from tp_amp.running.inputs import Inputs, runner

# Of attention: as its parts, and as one operator.
_SOFTMAX, _ATTENTION = "Softmax", ("Attention", "MultiHeadAttention")


@dataclass(frozen=True)
class Exported:
    """What an exported graph holds.

    Attributes:
        parameters: elements of the model's parameters in the file.
        attentions: attentions of the graph, told by their softmax.
        fused: how many of them the runtime computes as one operator.
    """

    parameters: int
    attentions: int
    fused: int


class _OfTensors(nn.Module):
    """A model as a function of the tensors among its arguments, to those among its outputs."""

    def __init__(
        self, model: nn.Module, inputs: Inputs, forward_fn: Callable[..., Any] | None
    ) -> None:
        super().__init__()
        self.model = model
        self._leaves, self._tree = tree_flatten((inputs.args, inputs.kwargs))
        self._forward_fn = forward_fn

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that it takes."""
        return tuple(leaf for leaf in self._leaves if isinstance(leaf, Tensor))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._tree)
        outputs = tree_leaves(Inputs(args, kwargs).call(runner(self.model, self._forward_fn)))
        return tuple(leaf for leaf in outputs if isinstance(leaf, Tensor))


def export(model: nn.Module, inputs: Inputs, forward_fn: Callable[..., Any] | None = None) -> Any:
    """Export a model for the shapes of some inputs; the runtimes optimise the graph themselves.

    So its parameters keep their names, by which they are counted.
    """
    module = _OfTensors(model, inputs, forward_fn).eval()
    program = torch.onnx.export(
        module, module.tensors(), dynamo=True, optimize=False, verbose=False
    )
    if program is None:
        raise ValueError("the exporter gave no graph")
    return program.model_proto


def counted(file: Any, model: nn.Module, left: int) -> Exported:
    """Count what a graph holds.

    Args:
        file: the graph as exported.
        model: what it was made of.
        left: softmaxes that a runtime does not compute within another operator.
    """
    names = {f"model.{name}" for name, _ in model.named_parameters(remove_duplicate=False)}
    sizes = {entry.name: math.prod(entry.dims) for entry in file.graph.initializer}
    parameters = sum(size for name, size in sizes.items() if name in names)
    attentions = _count(file, _SOFTMAX, *_ATTENTION)
    return Exported(parameters, attentions, attentions - left)


def softmaxes_left(write: Callable[[str], object]) -> int:
    """How many softmaxes stand in the graph that a runtime writes to a path."""
    import onnx

    with TemporaryDirectory() as folder:
        path = str(Path(folder) / "optimised.onnx")
        write(path)
        return _count(onnx.load(path, load_external_data=False), _SOFTMAX)


def _count(file: Any, *kinds: str) -> int:
    return sum(node.op_type in kinds for node in file.graph.node)
