"""Let an attention module run another forward pass: by its class, so that all else stays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tp_amp.structure.attention.adapted_class import adapted
from tp_amp.structure.attention.head_forward import HeadForward
from tp_amp.structure.attention.multihead_forward import MultiheadForward
from tp_amp.structure.attention.window_forward import ShiftedWindowForward

_FAST = "_qkv_same_embed_dim"
_SWIN = "torchvision.models.swin_transformer"

# A module's own forward pass, the nearest to the dense module's first: as it is, with its input
# saying the width of the heads, with all its numbers of heads and channels put right, both, and
# with sizes that it writes down changed where it reshapes.
OWN = ("own", "narrow", "counted", "narrow counted", "literal")

FORWARDS: dict[str, type[nn.Module]] = {
    **dict.fromkeys(OWN, HeadForward),
    "multihead": MultiheadForward,
    "windows": ShiftedWindowForward,
}


def adapt(module: nn.Module, kind: str) -> None:
    """Let a module run another forward pass, by its class; parameters and their names stay."""
    if not isinstance(module, FORWARDS[kind]):
        module.__class__ = adapted(FORWARDS[kind], type(module))
    if kind == "multihead":
        # nn.TransformerEncoderLayer goes round the module's forward otherwise.
        module.__dict__[_FAST] = False


@contextmanager
def exposing(model: nn.Module) -> Iterator[None]:
    """Let every attention call its output projection as a module, so that hooks see the heads.

    `nn.MultiheadAttention` and torchvision's Swin read the projection's weight only. Values stay
    the same but for rounding. `nn.MultiheadAttention` with `add_bias_kv` or `add_zero_attn`, and
    subclasses with a forward pass of their own, are left alone.

    Args:
        model: any model; it is given back as it was.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> attention, x = nn.MultiheadAttention(8, 2), torch.randn(3, 1, 8)
        >>> handle = attention.out_proj.register_forward_hook(lambda m, a, o: print(a[0].shape))
        >>> with exposing(attention):
        ...     output = attention(x, x, x)
        torch.Size([1, 3, 8])
    """
    found = [(module, kind) for module in model.modules() if (kind := stand_in(module))]
    saved = [(module, type(module), vars(module).get(_FAST)) for module, _ in found]
    try:
        for module, kind in found:
            adapt(module, kind)
        yield
    finally:
        for module, own, fast in saved:
            module.__class__ = own
            if fast is not None:
                module.__dict__[_FAST] = fast


def stand_in(module: nn.Module) -> str | None:
    """Which forward pass stands in for that of a module that never calls its projection."""
    forward = type(module).forward
    if forward is nn.MultiheadAttention.forward:
        plain = module.bias_k is None and not module.add_zero_attn
        return "multihead" if plain else None
    windows = hasattr(module, "get_relative_position_bias")
    return "windows" if windows and forward.__module__ == _SWIN else None
