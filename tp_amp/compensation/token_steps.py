"""What an MLP is refined on: tokens drawn from all images, or whole batches; and what judges it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tp_amp.running.inputs import Inputs

# Tokens of a step; of fewer than eight times as many, an eighth.
_DRAWN = 2048
# Every such image judges, and is not learned from.
_JUDGING = 8
_ALIKE = 1e-3  # of outputs, between a token alone and among others


@dataclass(frozen=True)
class Example:
    """What an MLP reads of one batch, and what it should give.

    Attributes:
        inputs: of the module that is run.
        targets: `(tokens, outputs)`.
        weights: of the tokens `(tokens,)`, 0 for padding.
        images: how many.
    """

    inputs: Inputs
    targets: Tensor
    weights: Tensor | None
    images: int

    def weighed(self) -> Tensor:
        """The targets of what is no padding, times the root of their weight."""
        if self.weights is None:
            return self.targets
        seen = self.weights > 0
        return self.weights[seen].sqrt().to(self.targets)[:, None] * self.targets[seen]


# An error of outputs `(tokens, outputs)` as values whose squares add up to its cost.
Cost = Callable[[Tensor], Tensor]
Run = Callable[[Inputs], Tensor]


class Batches:
    """One step for each batch, judged on all of them: where tokens depend on each other.

    Attributes:
        steps: of one pass.
    """

    def __init__(self, run: Run, cost: Cost, examples: Sequence[Example]) -> None:
        self._run, self._cost, self._examples = run, cost, examples
        self.steps = len(examples)

    def loss(self, step: int, steps: int) -> Tensor | None:
        """An estimate of `total`; None where this rank has no batch for a step of one pass."""
        return steps * self._loss(self._examples[step]) if step < self.steps else None

    def total(self) -> float:
        """The loss on what is learned from."""
        return math.fsum(float(self._loss(example)) for example in self._examples)

    def judged(self) -> float:
        """The loss by which the result is judged."""
        return self.total()

    def _loss(self, example: Example) -> Tensor:
        errors = self._run(example.inputs) - example.targets
        return _weighted(errors, example.weights, self._cost)


class Tokens:
    """Steps of tokens drawn by their weight; images that are not learned from judge.

    Attributes:
        steps: of one pass, so that it draws as many tokens as there are.
    """

    def __init__(self, run: Run, cost: Cost, examples: Sequence[Example]) -> None:
        self._run, self._cost = run, cost
        first = examples[0].inputs.args[0]
        self._shape = (1,) * (first.dim() - 2)
        self._inputs = torch.cat([x.inputs.args[0].flatten(0, -2) for x in examples])
        self._targets = torch.cat([example.targets for example in examples])
        self._weights: Tensor | None = None
        if any(example.weights is not None for example in examples):  # of padding, in some
            self._weights = torch.cat([_given(example) for example in examples])
        judging = _judging(examples).to(first.device)
        self._held = judging.nonzero().flatten()
        self._own = (~judging).nonzero().flatten()
        # Of the weights of what is drawn, up to each of it.
        self._sums = None if self._weights is None else self._weights[self._own].double().cumsum(0)
        self._drawn = min(_DRAWN, math.ceil(len(self._own) / 8))
        self.steps = math.ceil(len(self._own) / self._drawn)
        self._generator = torch.Generator().manual_seed(0)

    def loss(self, step: int, steps: int) -> Tensor | None:
        """An estimate of `total`, on tokens drawn anew."""
        chances = torch.rand(self._drawn, generator=self._generator, dtype=torch.double)
        chances = chances.to(self._own.device)
        if self._sums is None:
            whole = float(len(self._own))
            place = (chances * whole).long()
        else:
            whole = float(self._sums[-1])
            place = torch.searchsorted(self._sums, chances * whole, right=True)
        errors = self._errors(self._own[place.clamp_max(len(self._own) - 1)])
        return self._cost(errors).square().sum() * (whole / self._drawn)

    def total(self) -> float:
        """The loss on the tokens that are learned from."""
        return self._sum(self._own)

    def judged(self) -> float:
        """The loss on the images held out."""
        return self._sum(self._held)

    def _sum(self, tokens: Tensor) -> float:
        parts = []
        for part in torch.split(tokens, 4 * _DRAWN):
            weights = None if self._weights is None else self._weights[part]
            parts.append(float(_weighted(self._errors(part), weights, self._cost)))
        return math.fsum(parts)

    def _errors(self, tokens: Tensor) -> Tensor:
        inputs = self._inputs[tokens].view(*self._shape, len(tokens), -1)
        return self._run(Inputs((inputs,))) - self._targets[tokens]


@torch.no_grad()
def steps_on(run: Run, cost: Cost, examples: Sequence[Example]) -> Tokens | Batches:
    """Tokens where each of them is worked on by itself and images are left to judge; else batches.

    Args:
        run: gives the outputs `(tokens, outputs)` of the layer that is refined.
        cost: of an error of these.
        examples: of all batches, one image in each at least.
    """
    single = all(_one_tensor(example) for example in examples)
    if single and sum(example.images for example in examples) > 1 and _tokenwise(run, examples[0]):
        return Tokens(run, cost, examples)
    return Batches(run, cost, examples)


def _one_tensor(example: Example) -> bool:
    args, count = example.inputs.args, len(example.targets)
    if example.inputs.kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
        return False
    return args[0].dim() > 1 and args[0].shape[:-1].numel() == count


def _tokenwise(run: Run, example: Example) -> bool:
    """Whether the outputs of some tokens are the same without the others, in another order."""
    inputs = example.inputs.args[0]
    rows = inputs.flatten(0, -2)
    some = torch.arange(len(rows) - 1, -1, -max(1, len(rows) // 64), device=rows.device)
    if example.weights is not None:  # what padding holds may be NaN
        some = some[_given(example)[some] > 0]
    alone = rows[some].view(*(1,) * (inputs.dim() - 2), len(some), -1)
    expected = run(example.inputs)[some].double()
    allowed = max(_ALIKE, 16 * torch.finfo(expected.dtype).eps) * float(expected.norm())
    try:
        found = run(replace(example.inputs, args=(alone,)))
    except ValueError:  # it reads maps, with the channels first
        return False
    return found.shape == expected.shape and float((found - expected).norm()) <= allowed


def _judging(examples: Sequence[Example]) -> Tensor:
    """Whether a token is of an image that judges, `(tokens,)`: one in eight, the second first."""
    images = 0
    judging = []
    for example in examples:
        index = torch.arange(images, images + example.images)
        tokens = len(example.targets) // example.images
        judging.append((index % _JUDGING == 1).repeat_interleave(tokens))
        images += example.images
    return torch.cat(judging)


def _given(example: Example) -> Tensor:
    ones = example.targets.new_ones(len(example.targets))
    return ones if example.weights is None else example.weights.to(ones)


def _weighted(errors: Tensor, weights: Tensor | None, cost: Cost) -> Tensor:
    """The cost of errors `(tokens, outputs)`; what padding holds must not matter, be it NaN."""
    if weights is None:
        return cost(errors).square().sum()
    seen = weights > 0
    return (weights[seen].to(errors)[:, None] * cost(errors[seen]).square()).sum()
