"""Torch-Pruning's dependency graph, made to survive models that it does not know in full."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning import ops
from torch_pruning.pruner import function

from tp_amp.running.inputs import example
from tp_amp.running.watching import all_tensors

logger = logging.getLogger(__name__)


class TolerantGraph(tp.DependencyGraph):  # type: ignore[misc]
    """A graph that survives where Torch-Pruning can't infer shapes or map indices.

    Layers and their couplings are there by then, and that is all that MLPs need.
    """

    def build_dependency(
        self,
        model: nn.Module,
        example_inputs: Any,
        forward_fn: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Build the graph as TP does."""
        # TP flattens nothing that holds None or numbers, as outputs of transformers may.
        kwargs["output_transform"] = kwargs.get("output_transform") or _with_gradients
        # One slope for all channels: an activation like any other, which may be called again.
        prelus = [m for m in model.modules() if isinstance(m, nn.PReLU) and m.num_parameters == 1]
        kwargs["ignored_layers"] = [*(kwargs.get("ignored_layers") or []), *prelus]
        try:
            # TP's own call takes Ctrl-C for a failure, and calls the model in another way.
            return super().build_dependency(model, example_inputs, forward_fn or _call, **kwargs)
        except (IndexError, TypeError, ZeroDivisionError) as error:
            if not getattr(self, "module2node", None):
                raise
            logger.info("Torch-Pruning maps no indices on this model (%r); MLPs need none", error)
            return self


def _with_gradients(output: Any) -> list[Tensor]:
    return [tensor for tensor in all_tensors(output) if tensor.grad_fn is not None]


def _call(model: nn.Module, example_inputs: Any) -> Any:
    return example(example_inputs).call(model)


class LayerGraph(TolerantGraph):
    """A graph of layers and operations alone: groups are made by hand from what is found in it."""

    def _build_dependency(self, module2node: Any) -> None:
        """Leave out Torch-Pruning's couplings, which take half of the time."""


class PerChannelPruner(function.BasePruningFunc):  # type: ignore[misc]
    """Cuts a module whose parameters and buffers have one entry for each channel.

    RMS norms and global response norms, say, of which Torch-Pruning sees the parameters alone.
    """

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """Drop channels `idxs` from every parameter, buffer and attribute that counts them."""
        channels = channels_of(layer)
        keep = sorted(set(range(channels)) - set(idxs))
        for name, parameter in layer.named_parameters(recurse=False):
            dim = list(parameter.shape).index(channels)
            layer._parameters[name] = self._prune_parameter_and_grad(parameter, keep, dim)
        for name, value in list(vars(layer).items()):
            if value == channels and type(value) is int:
                setattr(layer, name, len(keep))
            elif isinstance(value, tuple) and tuple(value) == (channels,):
                setattr(layer, name, (len(keep),))
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: nn.Module) -> int:
        """Count the channels."""
        return channels_of(layer)

    get_in_channels = get_out_channels


def channels_of(module: nn.Module) -> int:
    """Count the channels of a module that has one parameter entry for each; 0 if it hasn't."""
    if next(module.children(), None) is not None or list(module.buffers(recurse=False)):
        return 0
    parameters = list(module.parameters(recurse=False))
    sizes = {parameter.numel() for parameter in parameters}
    one = all(p.numel() == max(p.shape, default=0) for p in parameters)
    return sizes.pop() if one and len(sizes) == 1 else 0


@dataclass(frozen=True, eq=False)
class ExactClass:
    """A class that Torch-Pruning finds as itself in a dict, and whose subclasses are none of it.

    It looks up a module's pruner by the exact class, but by `isinstance` what not to look into: a
    block that inherits from its scale would lose all of its layers.
    """

    itself: type[nn.Module]

    def __hash__(self) -> int:
        return hash(self.itself)

    def __eq__(self, other: object) -> bool:
        return self.itself is (other.itself if isinstance(other, ExactClass) else other)

    def __instancecheck__(self, module: object) -> bool:
        return type(module) is self.itself


def per_channel_pruners(model: nn.Module) -> dict[ExactClass, PerChannelPruner]:
    """One pruner for each class of per-channel module that Torch-Pruning does not know.

    Modules that hold parameters alone (of `torch.fx` graphs, say) are never called, so that no
    graph has them; Torch-Pruning sees their parameters.
    """
    found = {}
    for module in model.modules():
        elementwise = ops.module2type(module) == ops.OPTYPE.ELEMENTWISE
        called = getattr(module.forward, "__func__", None) is not nn.Module.forward
        if elementwise and called and channels_of(module) > 1:
            found[ExactClass(type(module))] = PerChannelPruner()
    return found


def untraced_graph(model: nn.Module) -> TolerantGraph:
    """A graph that knows a model's layers by name alone: enough to cut what is known by name."""
    graph = TolerantGraph()
    graph.model, graph.module2node = model, {}
    graph._module2name = {module: name for name, module in model.named_modules()}
    for kind, pruner in per_channel_pruners(model).items():
        graph.register_customized_layer(kind, pruner)
    return graph
