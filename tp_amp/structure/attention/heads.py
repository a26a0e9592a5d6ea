"""Cut whole attention heads: Torch-Pruning's group of them, made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch_pruning.dependency import Group
from torch_pruning.pruner import function

from tp_amp.structure.attention.adapting import adapt
from tp_amp.structure.attention.head_forward import HeadCut
from tp_amp.structure.groups import make_group

# What modules call the size of a dimension of their weight.
_SIZES = {(nn.Linear, 0): "out_features", (nn.Embedding, 1): "embedding_dim"}


@dataclass(frozen=True)
class HeadTensor:
    """A parameter or buffer with a part for each head.

    Attributes:
        path: of the tensor.
        dim: its dimension that counts `(parts, heads, block)`.
        block: entries of one head that lie together: 1, or the head's channels.
    """

    path: str
    dim: int
    block: int


class OfHeads:
    """What all that is cut in an attention has in common, where an MLP may have more."""

    @property
    def first(self) -> int:
        """The input channel of the projection that belongs to the first head."""
        return 0

    @property
    def inner(self) -> tuple[str, ...]:
        """Norms over its hidden channels that are cut too: an attention's are its `tensors`."""
        return ()


@dataclass(frozen=True)
class Attention(OfHeads):
    """One attention: q, k and v, heads side by side, and the projection that reads them.

    Attributes:
        name: path of the innermost module that holds all of its parts.
        up: paths of the packed projection, or of q, k and v; an `nn.MultiheadAttention`'s own.
        down: path of the output projection.
        width: number of heads.
        head_width: channels of one head at the projection's input.
        tensors: what else has a part for each head: biases, tables, norms, gates.
        forward: which forward pass runs with fewer heads: its `own`, its own told a `narrow` input
            or with every number of heads and channels put right (`counted`) or both, or with the
            sizes in its code changed where it reshapes (`literal`), or one of this package's,
            `multihead` and `windows`.
        arguments: positions and names of the arguments with an entry for each head.

    Example:
        >>> import timm, torch, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
        >>> attention = tp_amp.find_attentions(model, torch.randn(1, 3, 224, 224))[0]
        >>> attention.name, attention.up, attention.width, attention.head_width
        ('blocks.0.attn', ('blocks.0.attn.qkv',), 3, 64)
    """

    name: str
    up: tuple[str, ...]
    down: str
    width: int
    head_width: int
    tensors: tuple[HeadTensor, ...] = ()
    forward: str = "own"
    arguments: tuple[int | str, ...] = ()

    @property
    def units(self) -> str:
        """What its `width` counts."""
        return "heads"

    @property
    def unit_width(self) -> int:
        """Input channels of `down` that one of its `width` is."""
        return self.head_width

    @property
    def holder(self) -> str:
        """Path of the module whose forward makes q, k and v."""
        return self.name if self.up == (self.name,) else self.up[0].rpartition(".")[0]


class HeadPruner(function.BasePruningFunc):  # type: ignore[misc]
    """Puts right what an attention owns besides its projections, once heads are cut."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        """Drop the heads of the channels `idxs` of the projection's input.

        Args:
            layer: the module at the attention's `name`.
            idxs: all channels of the heads to drop.
        """
        attention = self.attention
        dropped = {index // attention.head_width for index in idxs}
        kept = [head for head in range(attention.width) if head not in dropped]
        for tensor in attention.tensors:
            self._cut(layer, tensor, kept)
        for module in layer.modules():
            _recount(module, attention, len(kept))
        self._adapt(layer, kept)
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: nn.Module) -> int:
        """Count the channels of all heads."""
        return self.attention.width * self.attention.head_width

    get_in_channels = get_out_channels

    def _cut(self, layer: nn.Module, tensor: HeadTensor, kept: list[int]) -> None:
        holder, _, name = _below(tensor.path, self.attention.name).rpartition(".")
        module = layer.get_submodule(holder)
        values = getattr(module, name)
        size = values.shape[tensor.dim]
        parts = size // (self.attention.width * tensor.block)
        keep = rows(kept, self.attention.width, tensor.block, parts)
        if name in module._parameters:
            cut = self._prune_parameter_and_grad(values, keep, tensor.dim)
            module._parameters[name] = cut
        else:
            index = torch.tensor(keep, device=values.device)
            module._buffers[name] = values.index_select(tensor.dim, index)
        for (kind, dim), attribute in _SIZES.items():
            if isinstance(module, kind) and name == "weight" and dim == tensor.dim:
                setattr(module, attribute, len(keep))
        if tuple(getattr(module, "normalized_shape", ())) == (size,):
            module.normalized_shape = (len(keep),)  # type: ignore[assignment]

    def _adapt(self, layer: nn.Module, kept: list[int]) -> None:
        """Give the module a forward pass for fewer heads, where its own needs help."""
        attention = self.attention
        holder = layer.get_submodule(_below(attention.holder, attention.name))
        dense = HeadCut(attention.width, tuple(range(attention.width)))
        old: HeadCut | None = getattr(holder, "head_cut", None)
        if attention.forward == "own" and not attention.arguments and old is None:
            return
        left = tuple((old or dense).kept[head] for head in kept)
        width = len(kept) * attention.head_width if "narrow" in attention.forward else None
        block = attention.head_width if attention.forward == "literal" else None
        adapt(holder, attention.forward)
        holder.__dict__["head_cut"] = HeadCut(
            (old or dense).dense,
            left,
            attention.arguments or (old or dense).arguments,
            width,
            block,
        )


def head_group(graph: Any, attention: Attention, heads: Sequence[int]) -> Group:
    """Make Torch-Pruning's group of some heads of an attention.

    The root is the projection's input, as where Torch-Pruning makes the group: one channel for
    each of the heads' channels, head after head. Modules that the graph has not seen, since
    the forward pass reads their weights only, are given nodes of their own.

    Args:
        graph: the `tp.DependencyGraph`; only its model, names and pruners are used.
        attention: from `find_attentions`.
        heads: indices of the heads.
    """
    width, block = attention.width, attention.head_width
    channels = rows(heads, width, block)
    layers: list[tuple[str, Any, list[int]]] = []
    own = HeadPruner(attention)
    for name in (attention.down, *attention.up):
        module = graph.model.get_submodule(name)
        if not isinstance(module, nn.Linear):
            continue
        pruner = graph.get_pruner_of_module(module)
        if name == attention.down:
            layers.append((name, pruner.prune_in_channels, channels))
        else:
            parts = module.out_features // (width * block)
            layers.append((name, pruner.prune_out_channels, rows(heads, width, block, parts)))
    layers.append((attention.name, own.prune_out_channels, channels))
    return make_group(graph, layers, channels)


def rows(heads: Sequence[int], width: int, block: int, parts: int = 1) -> list[int]:
    """Channels of some heads, where `(parts, heads, block)` lie in a row.

    Example:
        >>> rows([1], width=2, block=2, parts=3)
        [2, 3, 6, 7, 10, 11]
    """
    return [
        (part * width + head) * block + i
        for part in range(parts)
        for head in heads
        for i in range(block)
    ]


def _recount(module: nn.Module, attention: Attention, heads: int) -> None:
    """Put right the numbers that a module keeps of its heads and of their channels.

    By their names, since others have the same value; by the value alone where only that runs.
    """
    channels, all_alike = attention.width * attention.head_width, "counted" in attention.forward
    for name, value in list(vars(module).items()):
        if type(value) is not int or isinstance(module, nn.Linear):
            continue
        sized = any(word in name for word in ("dim", "size", "width", "channel"))
        if value == attention.width and not sized and ("head" in name or all_alike):
            setattr(module, name, heads)
        elif value == channels and (all_alike or (sized and _of_all_heads(name))):
            setattr(module, name, heads * attention.head_width)


def _of_all_heads(name: str) -> bool:
    return any(word in name for word in ("all_head", "attn", "attention_dim", "inner", "kv_dim"))


def _below(path: str, holder: str) -> str:
    """Path as seen from a module that holds it."""
    return path[len(holder) + 1 :] if holder and path != holder else path * (path != holder)
