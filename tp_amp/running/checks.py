"""What is checked of a model before anything is done with it."""

from __future__ import annotations

import torch
from torch import nn


def check_finite(model: nn.Module) -> None:
    """Raise ValueError naming the first parameter that holds a NaN or an infinity."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(
                f"parameter {name} holds NaN or infinite values; load sound weights before pruning"
            )


def check_not_compiled(model: nn.Module) -> None:
    """Raise ValueError if torch.compile runs the model: its graphs know no layers, nor hooks."""
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod"):
            raise ValueError(
                f"{name or 'the model'} is wrapped by torch.compile; pass model._orig_mod, and "
                "compile what is pruned"
            )
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"{name or 'the model'} was compiled in place; prune a model that is not, and "
                "call compile() afterwards"
            )
