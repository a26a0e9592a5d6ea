"""Copies of modules in double precision, and what two of them give."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tp_amp.running.inputs import Inputs
from tp_amp.running.watching import all_tensors

TOLERANCE = 1e-5
# Where a module keeps its hooks, which the copy that is checked has none of.
HOOKS = frozenset(n for n, v in vars(nn.Module()).items() if "hook" in n and isinstance(v, dict))
_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)


class CannotCut(Exception):
    """Why an attention can't lose heads."""


def without_inputs(layer: nn.Module, channels: Sequence[int]) -> None:
    """Give a layer another weight, by which it reads nothing from some of its input channels."""
    weight: Any = layer.weight
    masked = weight.detach().clone()
    masked[:, channels] = 0
    layer._parameters["weight"] = nn.Parameter(masked, requires_grad=weight.requires_grad)


def masked_norm(norm: nn.Module, keep: list[int]) -> Callable[..., Tensor]:
    """A hook by which a norm sees some channels alone, and gives zero for the others."""
    narrow = copy.deepcopy(norm)
    for name, parameter in norm.named_parameters():
        setattr(narrow, name, nn.Parameter(parameter[keep]))
    if hasattr(narrow, "normalized_shape"):
        narrow.normalized_shape = (len(keep),)  # type: ignore[assignment]

    def normalise(_: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        return torch.zeros_like(output).index_copy_(
            -1, torch.tensor(keep, device=output.device), narrow(args[0][..., keep])
        )

    return normalise


def noisy_copy(owner: nn.Module) -> nn.Module:
    """A copy in double precision without hooks, with noise on every parameter."""
    if isinstance(owner, nn.parallel.DistributedDataParallel):
        raise CannotCut("DistributedDataParallel can't be copied; pass model.module")
    try:
        model = copy.deepcopy(owner).double()
    except Exception as error:
        raise CannotCut(f"it can't be copied: {error}") from error
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name in HOOKS:
            vars(module)[name].clear()
    for parameter in filter(Tensor.is_floating_point, model.parameters()):
        spread = 0.3 * float(parameter.detach().std()) if parameter.numel() > 1 else 0.0
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.double)
        parameter.data += (spread + 0.05) * noise.to(parameter.device)
        parameter.requires_grad_(True)
        parameter.grad = None
    return model


def in_double(value: Any) -> Any:
    """Arguments of a call with every float tensor in double precision."""
    if isinstance(value, Tensor):
        return value.detach().double() if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(map(in_double, value))
    if type(value) is dict:
        return {key: in_double(v) for key, v in value.items()}
    return value


class StayingDouble(TorchFunctionMode):
    """While it is entered, whatever asks for another float type gets double precision.

    A norm may write down that it computes in float32, which a copy has no weights of.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Ask for double precision in its place."""
        if func in _CASTS:
            func = Tensor.double
        elif func is not Tensor.view:  # which looks at the same bits
            args = tuple(map(_double_type, args))
            kwargs = {name: _double_type(value) for name, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def _double_type(value: Any) -> Any:
    asked = isinstance(value, torch.dtype) and value.is_floating_point
    return torch.double if asked else value


def switches(model: nn.Module) -> list[bool | None]:
    """All that a model may be `switched` to: fused and not, or None where it has no switch."""
    told = any(type(vars(module).get("fused_attn")) is bool for module in model.modules())
    return [True, False] if told else [None]


def switched(model: nn.Module, fused: bool | None) -> nn.Module:
    """The model with fused attention on or off; None leaves it as it is."""
    for module in model.modules():
        if fused is not None and type(vars(module).get("fused_attn")) is bool:
            module.__dict__["fused_attn"] = fused
    return model


def first_output(inputs: Inputs, model: nn.Module) -> Tensor:
    """The first tensor of the output; what follows are attention maps."""
    with StayingDouble():
        return all_tensors(model(*inputs.args, **inputs.kwargs))[0]


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    if one.shape != other.shape:
        return float("inf")
    if not one.numel():
        return 0.0
    if not (one.is_floating_point() or one.is_complex()):
        one, other = one.double(), other.double()  # no truth values can be subtracted
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-30))
