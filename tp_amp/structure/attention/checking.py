"""Check by values that heads can be cut from an attention."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from tp_amp.running.inputs import Inputs
from tp_amp.running.restoring import hooks
from tp_amp.structure.attention.adapting import OWN
from tp_amp.structure.attention.head_tensors import CannotCut, norms_over_heads, with_tensors
from tp_amp.structure.attention.heads import Attention, head_group, rows

TOLERANCE = 1e-5
# Where a module keeps its hooks, which the copy that is checked has none of.
HOOKS = frozenset(n for n, v in vars(nn.Module()).items() if "hook" in n and isinstance(v, dict))


@torch.enable_grad()
def checked(owner: nn.Module, inputs: Inputs, guess: Attention) -> Attention:
    """Complete what is known of an attention, and check that heads can be cut from it.

    A copy of the module, in double precision and with noise on all parameters (tables are often
    zero at first), loses one head, then all but one, and must give what it gives with those heads'
    channels cut off at the projection; the former fused and the latter not, where it has a switch.
    The module itself is not touched.

    Args:
        owner: the module at the attention's `name`, in eval mode.
        inputs: of one real call of it.
        guess: the attention with paths as seen from `owner`, so that its `name` is empty.

    Raises:
        CannotCut: with the reason.
    """
    model = noisy_copy(owner)
    inputs = Inputs(in_double(inputs.args), in_double(inputs.kwargs))
    attention = with_tensors(model, inputs, guess)
    reason = CannotCut("it has no forward pass")
    for forward in OWN if guess.forward == "own" else (guess.forward,):
        attention = replace(attention, forward=forward)
        try:
            for fused, dropped in _trials(model, guess.width):
                _compare(switched(model, fused), inputs, attention, dropped)
            return attention
        except CannotCut as error:
            reason = error
    raise reason


def _compare(model: nn.Module, inputs: Inputs, attention: Attention, dropped: list[int]) -> None:
    """Cut heads from a copy, and zero them in another."""
    zeroed, narrow = copy.deepcopy(model), copy.deepcopy(model)
    graph = tp.DependencyGraph()
    graph.model, graph.module2node = narrow, {}
    less = f"with {attention.width - len(dropped)} of {attention.width} heads"
    with torch.no_grad(), _zeroed(zeroed, attention, dropped):
        try:
            head_group(graph, attention, dropped).prune(record_history=False)
            found = first_output(inputs, narrow)
        except Exception as error:
            raise CannotCut(f"{less} its forward pass fails ({error})") from error
        expected = first_output(inputs, zeroed)
        change = distance(first_output(inputs, model), expected)
    if change < 10 * TOLERANCE:
        raise CannotCut("its output does not depend on its heads")
    if distance(found, expected) > TOLERANCE * min(1.0, change):
        raise CannotCut(f"{less} it does not give what it gives with the others' channels zeroed")


@contextmanager
def _zeroed(model: nn.Module, attention: Attention, heads: list[int]) -> Iterator[None]:
    """Take the heads' channels from the projection; norms over all heads see the others only."""
    weight = model.get_submodule(attention.down).weight
    weight[:, rows(heads, attention.width, attention.head_width)] = 0  # type: ignore[operator]
    others = [head for head in range(attention.width) if head not in heads]
    keep = rows(others, attention.width, attention.head_width)
    paths = {tensor.path for tensor in attention.tensors}
    norms = [m for n, m in norms_over_heads(model, attention) if f"{n}.weight" in paths]
    with hooks(norm.register_forward_hook(masked_norm(norm, keep)) for norm in norms):
        yield


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
        spread = 0.3 * float(parameter.std()) if parameter.numel() > 1 else 0.0
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


def _trials(model: nn.Module, heads: int) -> list[tuple[bool | None, list[int]]]:
    """Which heads to drop, and whether the attention shall be fused (None: it has no switch)."""
    one, all_but_one = [(heads - 1) // 2], list(range(heads - 1))
    kinds = switches(model)
    return [(kinds[0], one), (kinds[-1], all_but_one)]


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
    output = model(*inputs.args, **inputs.kwargs)
    while not isinstance(output, Tensor):
        output = output[0] if isinstance(output, (tuple, list)) else next(iter(output.values()))
    return output


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    if one.shape != other.shape:
        return float("inf")
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-30))
