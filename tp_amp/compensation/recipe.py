"""How cut layers are compensated, and the correction put into a layer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tp_amp.algebra.closed_form import METHODS, RIDGE, Correction, Method
from tp_amp.algebra.held_out import best_correction
from tp_amp.algebra.moments import Halves
from tp_amp.importance.error_objective import ErrorObjective, error_objective
from tp_amp.importance.places import repeated
from tp_amp.running.arguments import check_flags, check_number, check_whole
from tp_amp.running.inputs import Inputs
from tp_amp.running.padding import valid_tokens

logger = logging.getLogger(__name__)

TokenWeights = Callable[[Any], Tensor] | Literal["sensitivity"] | None


@dataclass(frozen=True)
class Recipe:
    """How to compensate.

    Attributes:
        method: `"none"`, `"mean"` or `"affine"`.
        ridge: the least lambda, relative to the mean diagonal of the kept channels' covariance.
        add_bias: give layers that are fitted and have no bias one.
        every_linear: fit the Linears between the first and the last cut layer too, against what
            they give in the dense model.
        refine: passes over the images in which, after the solution in closed form, both layers of
            each cut MLP are improved by gradients of what is missing behind it; for `every_linear`
            alone.
        activation_checkpointing: run each block again in the backward passes through the whole
            model, those of `refine` and `token_weights="sensitivity"`, as for
            `EntropyTaylorImportance`.
        objective: what errors cost, for `refine` and `token_weights="sensitivity"`: as for
            `ReconstructionImportance`.
        token_weights: takes the images (or the dict of keyword arguments) of a batch and gives
            the weight of each token, `(images, tokens)`, 0 for padding; or `"sensitivity"`: each
            layer's tokens weigh what an error at their place costs the predictions (or
            similarities) of the dense model, by its squared gradient. By default all are 1.

    Raises:
        ValueError: `method`, `ridge`, `token_weights`, `refine` or `objective` is not valid, or
            nothing needs `activation_checkpointing`.

    Example:
        >>> import torch, tp_amp
        >>> ones = lambda images: torch.ones(len(images), 197)
        >>> tp_amp.Recipe("affine", token_weights=ones).ridge
        0.0001
    """

    method: Method = "affine"
    ridge: float = RIDGE
    add_bias: bool = False
    token_weights: TokenWeights = None
    every_linear: bool = False
    refine: int = 0
    activation_checkpointing: bool = False
    objective: ErrorObjective = "auto"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"compensation must be one of {METHODS}, found {self.method!r}")
        check_number("zero or more", lambda value: value >= 0, ridge=self.ridge)
        check_flags(
            add_bias=self.add_bias,
            every_linear=self.every_linear,
            activation_checkpointing=self.activation_checkpointing,
        )
        weights = self.token_weights
        if weights is not None and weights != "sensitivity" and not callable(weights):
            raise ValueError(
                f'token_weights must be "sensitivity", a callable or None, found {weights!r}'
            )
        check_whole(0, refine=self.refine)
        error_objective(self.objective)
        if self.refine and not (self.every_linear and self.method == "affine"):
            raise ValueError(
                f"refine={self.refine} goes on from every Linear solved for; pass "
                'every_linear=True and the method "affine" too'
            )
        if self.activation_checkpointing and not self.refine and weights != "sensitivity":
            raise ValueError(
                'only refine and token_weights="sensitivity" run backward passes; leave '
                "activation_checkpointing out"
            )


def apply(layer: nn.Module, correction: Correction, first: int = 0) -> None:
    """Add a correction to a layer's weight, from input channel `first` on, and to its bias."""
    weight: Any = layer.weight
    changed = weight.detach().clone()
    width = correction.weight.shape[1]
    added = correction.weight.to(changed).view(len(changed), width, *changed.shape[2:])
    changed[:, first : first + width] += added
    layer._parameters["weight"] = nn.Parameter(changed, weight.requires_grad)
    if correction.bias is not None:
        old: Any = layer._parameters.get("bias")
        shift = correction.bias.to(changed)
        moved = shift if old is None else old.detach() + shift
        required = weight.requires_grad if old is None else old.requires_grad
        layer._parameters["bias"] = nn.Parameter(moved, required)


@contextmanager
def applied(layer: nn.Module, correction: Correction, first: int) -> Iterator[None]:
    """Let a layer run with a correction; on exit it has its own parameters back."""
    own = dict(layer._parameters)
    apply(layer, correction, first)
    try:
        yield
    finally:
        layer._parameters.update(own)


def corrected(name: str, halves: Halves, recipe: Recipe, bias: bool) -> Correction:
    """Solve for one layer's correction, and say what stands against it."""
    if not bias:
        logger.info("%s has no bias to correct; add_bias=True gives it one", name)
    return best_correction(halves, recipe.method, bias=bias, ridge=recipe.ridge, name=name)


def some(names: Sequence[str]) -> str:
    """The first of some names, for one line."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def tell_few(names: Sequence[str]) -> None:
    """Warn, once for all layers, that they saw few tokens for their channels."""
    if names:
        logger.warning(
            "the images are few: %d layers (%s) saw fewer than ten tokens for each kept channel, "
            "and were corrected by what errs least on images held out; more images keep more",
            len(names),
            some(names),
        )


def tell_unrefined(names: Sequence[str], refined: int) -> None:
    """Warn, once for all MLPs, that refining found nothing better for some."""
    if names:
        logger.warning(
            "refining found nothing better than the closed form on images held out for %d of %d "
            "MLPs (%s); try more images or fewer passes",
            len(names),
            refined,
            some(names),
        )


def given_weights(recipe: Recipe, batch: Inputs) -> Tensor | None:
    """The weight of each token of a batch, in one row, where the caller gives them.

    Raises:
        TypeError: they are no tensor.
        ValueError: one is negative or not finite.
    """
    if not callable(recipe.token_weights):
        return None
    found: Any = recipe.token_weights(batch.kwargs or batch.args[0])
    if not isinstance(found, Tensor):
        raise TypeError(
            "token_weights returned a "
            f"{type(found).__name__}; it must return a tensor with the weight of each token"
        )
    if not bool((torch.isfinite(found) & (found >= 0)).all()):
        raise ValueError(
            "token_weights returned negative weights or such that are not finite; give zero to "
            "tokens that do not count"
        )
    return found.flatten()


def token_weights(
    given: Tensor | None, model: nn.Module, batch: Inputs, places: Tensor | None, tokens: int
) -> Tensor | None:
    """The weight of each token of a batch that a layer reads; None where all weigh the same.

    Args:
        given: by the caller, which counts alone.
        model: that the batch is for.
        batch: maybe with a mask, which says that padding weighs nothing.
        places: the weight of each place of an image at the layer, if they differ.
        tokens: that the layer reads.
    """
    if given is not None:
        return given
    weights, valid = repeated(places, tokens), valid_tokens(batch, model, tokens)
    if weights is None or valid is None:
        return valid if weights is None else weights
    return weights * valid.to(weights)
