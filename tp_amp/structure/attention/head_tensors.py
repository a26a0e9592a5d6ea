"""Find out by gradients what an attention has a part of for each head."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tp_amp.running.inputs import Inputs
from tp_amp.running.restoring import hooks
from tp_amp.structure.attention.adapting import OWN, adapt
from tp_amp.structure.attention.head_forward import HeadCut
from tp_amp.structure.attention.heads import Attention, HeadTensor
from tp_amp.structure.comparing.copies import CannotCut, StayingDouble

_ROUNDING = 1e-6


def with_tensors(model: nn.Module, inputs: Inputs, guess: Attention) -> Attention:
    """Find the tensors and arguments with a part for each head."""
    model = copy.deepcopy(model)
    cut = _observable(model, guess)
    leaves, arguments = _leaves(model, guess), _arguments(inputs, cut)
    with _hidden(model, Inputs(*_with(inputs, arguments)), guess) as hidden:
        gradients = _gradients(hidden, [*leaves.values(), *arguments.values()], guess)
    largest = max((float(g.abs().max()) for gs in gradients for g in gs.values()), default=0.0)
    found = [
        HeadTensor(path, *layout)
        for (path, leaf), own in zip(leaves.items(), gradients, strict=False)
        if (layout := _layout(leaf, own, guess, largest * _ROUNDING))
    ]
    keys = tuple(
        key
        for key, own in zip(arguments, gradients[len(leaves) :], strict=True)
        if own
        and all(_only(g.movedim(-3, 0), cut.dense, 1, cut.kept[head]) for head, g in own.items())
    )
    return replace(guess, tensors=tuple(found), arguments=keys)


def _gradients(hidden: Tensor, leaves: list[Tensor], guess: Attention) -> list[dict[int, Tensor]]:
    """For each leaf, the gradients of some heads' channels: they may reach those heads' parts only.

    Leaves that are not connected have none.
    """
    found: list[dict[int, Tensor]] = [{} for _ in leaves]
    for head in sorted({0, guess.width // 2, guess.width - 1}) if leaves else ():
        place = slice(head * guess.head_width, (head + 1) * guess.head_width)
        channels = hidden[..., place]
        # No sum of equal parts, which normalisation would make constant.
        spread = torch.linspace(0.5, 1.5, channels.numel()).to(channels).view_as(channels)
        total = (channels * spread).sum()
        gradients = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
        for own, gradient in zip(found, gradients, strict=True):
            if gradient is not None:
                own[head] = gradient
    return found


def _layout(
    leaf: Tensor, gradients: dict[int, Tensor], guess: Attention, silent: float
) -> tuple[int, int] | None:
    """Find the dimension and block by which each head has its own part of a tensor."""
    if not gradients:
        return None
    if all(float(gradient.abs().max()) <= silent for gradient in gradients.values()):
        # A bias of the keys changes nothing, but it must have their size.
        return (0, guess.head_width) if leaf.shape == (guess.width * guess.head_width,) else None
    for dim, size in enumerate(leaf.shape):
        for block in {guess.head_width: 0, 1: 0}:
            if size % (guess.width * block) == 0 and all(
                _only(gradient.movedim(dim, 0), guess.width, block, head)
                for head, gradient in gradients.items()
            ):
                return dim, block
    return None


def _only(gradient: Tensor, heads: int, block: int, head: int) -> bool:
    """Whether a gradient `(parts * heads * block, ...)` is that of one head alone."""
    values = gradient.reshape(-1, heads, block, gradient[0].numel()).abs().amax((0, 2, 3))
    own = float(values[head])
    return own > 0 and float(values.sum()) - own <= _ROUNDING * own


def _leaves(model: nn.Module, guess: Attention) -> dict[str, Tensor]:
    """Parameters and buffers that may have parts for each head, as leaves of autograd."""
    named = [model.get_submodule(name) for name in (*guess.up, guess.down)]
    projections = [module for module in named if isinstance(module, nn.Linear)]
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        # Statistics of a batch norm can't be leaves; its channels are not the heads' own.
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or module in projections:
            continue
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[key] = buffer.detach().clone().requires_grad_()
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.is_floating_point():
                found[f"{name}.{key}" if name else key] = tensor
    return found


def _observable(model: nn.Module, guess: Attention) -> HeadCut:
    """Let a module run a forward pass that calls its projection."""
    holder = model.get_submodule(guess.holder)
    if guess.forward not in OWN:
        adapt(holder, guess.forward)
    return getattr(holder, "head_cut", HeadCut(guess.width, tuple(range(guess.width))))


def _arguments(inputs: Inputs, cut: HeadCut) -> dict[int | str, Tensor]:
    """Arguments that may have an entry for each head; the first is the input."""
    given: dict[Any, Any] = {**dict(enumerate(inputs.args)), **inputs.kwargs}
    tensors = {key: v for key, v in given.items() if isinstance(v, Tensor)}
    return {
        key: value.clone().requires_grad_()
        for key, value in list(tensors.items())[1:]
        if value.is_floating_point() and value.dim() >= 3 and value.shape[-3] == cut.dense
    }


def _with(inputs: Inputs, changed: dict[int | str, Tensor]) -> tuple[Any, Any]:
    args = tuple(changed.get(place, value) for place, value in enumerate(inputs.args))
    return args, {key: changed.get(key, value) for key, value in inputs.kwargs.items()}


@contextmanager
def _hidden(model: nn.Module, inputs: Inputs, guess: Attention) -> Iterator[Tensor]:
    """The heads' channels at the projection's input, with norms made to keep channels apart.

    Gradients are taken inside, where a module that computes its activations again does it alike.
    """
    seen: list[Tensor] = []

    def watch(_: nn.Module, args: tuple[Tensor]) -> None:
        seen.append(args[0])

    handles = [model.get_submodule(guess.down).register_forward_pre_hook(watch)]
    handles += [norm.register_forward_hook(_scaled) for _, norm in norms_over_heads(model, guess)]
    with hooks(handles):
        try:
            with StayingDouble():
                model(*inputs.args, **inputs.kwargs)
        except Exception as error:
            raise CannotCut(f"a copy of it can't be run alone ({error})") from error
        if len(seen) != 1 or not seen[0].requires_grad:
            raise CannotCut(f"{guess.down} is not called once as a module")
        yield seen[0]


def norms_over_heads(model: nn.Module, guess: Attention) -> list[tuple[str, nn.Module]]:
    """Norms that may go over the channels of all heads."""
    shape = (guess.width * guess.head_width,)
    return [
        (name, module)
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        and getattr(getattr(module, "weight", None), "shape", None) == shape
    ]


def _scaled(norm: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    bias = getattr(norm, "bias", None)
    scaled = args[0] * norm.weight  # type: ignore[operator]
    return scaled if bias is None else scaled + bias
