"""Turn layers of a freshly built dense model into what a cut makes of them besides narrower."""

from __future__ import annotations

from typing import Any

from torch import nn

from tp_amp.structure.attention.adapted_class import adapted
from tp_amp.structure.attention.head_forward import HeadCut, HeadForward
from tp_amp.structure.attention.multihead_forward import MultiheadForward
from tp_amp.structure.attention.rank_linear import Part, RankLinear
from tp_amp.structure.constant_linear import ConstantLinear
from tp_amp.structure.ranks.removed_forward import Removed, RemovedForward


def with_heads_cut(layer: Any, cut: dict[str, Any]) -> None:
    """Let an attention run its own forward pass with the heads that are left."""
    layer.__class__ = adapted(HeadForward, type(layer))
    lists = {name: tuple(cut[name]) for name in ("kept", "arguments")}
    layer.__dict__["head_cut"] = HeadCut(**{**cut, **lists})


def with_multihead_cut(layer: Any, cut: dict[str, Any]) -> None:
    """Let an `nn.MultiheadAttention` run with the heads that are left."""
    layer.__class__ = adapted(MultiheadForward, type(layer))
    lists = {name: tuple(cut[name]) for name in ("kept", "arguments")}
    layer.__dict__["head_cut"] = HeadCut(**{**cut, **lists})
    # nn.TransformerEncoderLayer goes round the module's forward otherwise.
    layer.__dict__["_qkv_same_embed_dim"] = False


def with_ranks_cut(layer: nn.Module, parts: dict[str, Any]) -> None:
    """Let a Linear be as wide as before to the attention that calls it."""
    layer.__class__ = RankLinear
    layer.gives = tuple(Part(*part) for part in parts["gives"])  # type: ignore[assignment]
    layer.reads = Part(*parts["reads"]) if parts["reads"] else None  # type: ignore[assignment]


def with_nothing_read(layer: nn.Module, _: bool) -> None:
    """Let a Linear give its bias alone."""
    layer.__class__ = ConstantLinear


def with_attention_removed(layer: nn.Module, removed: dict[str, Any]) -> None:
    """Let an attention give the bias of its projection alone."""
    layer.__class__ = adapted(RemovedForward, type(layer))
    layer.__dict__["removed"] = Removed(**removed)
