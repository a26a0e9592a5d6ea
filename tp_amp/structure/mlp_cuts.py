"""`MLP`, Torch-Pruning's group of its hidden channels, and by running whether it can be cut."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch_pruning.dependency import Group

from tp_amp.running.watching import all_tensors
from tp_amp.structure.fused import FusedBlockPruner
from tp_amp.structure.graph import TracedGraph
from tp_amp.structure.groups import make_group

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MLP:
    """One MLP: hidden channels go from `up` through per-channel operations into `down`.

    Attributes:
        name: module path of the innermost module that holds all of its layers.
        up: module paths of the one (plain) or two (gated) layers that make the hidden channels.
        down: module path of the layer that reads them.
        width: number of hidden channels.
        inner: module paths of the norms and depthwise convolutions in between, which are cut too.
        packed: how many rows of its one `up` make one hidden channel: channel j comes from rows
            j, j + width, ... (2 for a gated MLP in one layer).
        fused: whether its layers hold more than the MLP: `up` the queries, keys and values after
            the hidden channels, and `down` maybe the heads before them (timm's parallel blocks).
        first: the input channel of `down` that is hidden channel 0.

    Example:
        >>> import timm, torch, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
        >>> mlp = tp_amp.find_mlps(model, torch.randn(1, 3, 224, 224))[0]
        >>> mlp.name, mlp.up, mlp.down, mlp.width
        ('blocks.0.mlp', ('blocks.0.mlp.fc1',), 'blocks.0.mlp.fc2', 768)
    """

    name: str
    up: tuple[str, ...]
    down: str
    width: int
    inner: tuple[str, ...] = ()
    packed: int = 1
    fused: bool = False
    first: int = 0

    @property
    def units(self) -> str:
        """What its `width` counts."""
        return "channels"

    @property
    def unit_width(self) -> int:
        """Input channels of `down` that one of its `width` is."""
        return 1


def mlp_group(graph: Any, mlp: MLP, channels: Sequence[int]) -> Group:
    """Make Torch-Pruning's group of some hidden channels of an MLP.

    It holds what `find_mlps` has checked, so it is right where TP's own index mapping is not
    (packed gated MLPs, rotary embeddings), and no walk over the graph is needed. The root is the
    first `up` as in TP, or `down` where several rows of `up` make one channel.
    """
    rows = list(channels)
    for part in range(1, mlp.packed):
        rows += [j + part * mlp.width for j in channels]
    layers = [(name, "prune_out_channels", rows) for name in mlp.up]
    layers += [(name, "prune_out_channels", list(channels)) for name in mlp.inner]
    read = [mlp.first + j for j in channels] if mlp.first else list(channels)
    down = (mlp.down, "prune_in_channels", read)
    layers = [down, *layers] if mlp.packed > 1 else [*layers, down]
    handlers = []
    for name, side, indices in layers:
        pruner = graph.get_pruner_of_module(graph.model.get_submodule(name))
        handlers.append((name, getattr(pruner, side), indices))
    if mlp.fused:
        handlers.append((mlp.name, FusedBlockPruner().prune_out_channels, list(channels)))
    return make_group(graph, handlers, list(channels))


def whole_reason(model: nn.Module, mlp: MLP) -> str | None:
    """Why an MLP has to keep one channel at least; None where all may go.

    Without any, its layers are Linears of no channels, and what reads them gives its bias.
    """
    if mlp.fused:
        return f"the layers of {mlp.name} hold an attention too"
    layers = {name: model.get_submodule(name) for name in (*mlp.up, *mlp.inner, mlp.down)}
    for name, layer in layers.items():
        if isinstance(layer, nn.Conv2d):
            return f"{name} is a convolution, and PyTorch has none of no channels"
    if type(layers[mlp.down]) is not nn.Linear:
        return f"{mlp.down} is no plain Linear, but {type(layers[mlp.down]).__name__}"
    return None


def failures(mlps: Sequence[MLP], traced: TracedGraph) -> dict[str, str]:
    """Tell with which MLPs cut the model doesn't run; with all the others cut at once it does.

    Each loses one channel, so that a reshape to any number of the forward's own no longer fits, and
    hidden channels that the model gives out beside its result are told by their number. The model
    is run as it was traced, on the meta device where it runs there.

    Returns:
        `down` of each MLP that the model fails with -> why.
    """
    accepted: list[MLP] = []
    failed: dict[str, str] = {}
    narrowable = [mlp for mlp in mlps if mlp.width > 1]
    given = _shapes_given(traced) if narrowable else []

    def judge(candidates: Sequence[MLP]) -> None:
        error = _error([*accepted, *candidates], traced, given) if candidates else None
        if error is None:
            accepted.extend(candidates)
        elif len(candidates) == 1:
            [mlp] = candidates
            failed[mlp.down] = f"with {mlp.width - 1} of {mlp.width} channels {error}"
            logger.debug("%s is no MLP that can be cut: %s", mlp.down, failed[mlp.down])
        else:
            half = len(candidates) // 2
            judge(candidates[:half])
            judge(candidates[half:])

    judge(narrowable)
    return failed


_Shapes = list[tuple[int, ...]]


def _shapes_given(traced: TracedGraph) -> _Shapes:
    """The shapes of all that the model gives."""
    with traced.again() as run:
        return [tuple(tensor.shape) for tensor in all_tensors(run())]


def _error(mlps: Sequence[MLP], traced: TracedGraph, given: _Shapes) -> str | None:
    """How the model fails with one channel less of each MLP."""
    with traced.again() as run:
        groups = [mlp_group(traced.graph, mlp, [mlp.width - 1]) for mlp in mlps]
        try:
            for group in groups:
                for item in group.items:
                    item.dep(item.idxs)
            shapes = [tuple(tensor.shape) for tensor in all_tensors(run())]
        except Exception as error:
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            return f"the model no longer runs ({cause})"
    if shapes == given or _shapes_given(traced) != given:  # they may be others each time
        return None
    changed = [f"{old} as {new}" for old, new in zip(given, shapes, strict=False) if old != new]
    return (
        f"the model gives {changed[0] if changed else 'more or fewer tensors'}: they are read out"
    )
