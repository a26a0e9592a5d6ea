"""Streaming moments of what layers read, and of what they should have given. Pure algebra."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tp_amp.running.distributed import active, exchange

# With fewer tokens for each channel, what is fitted to them fits them better than others.
_ENOUGH = 10

# Count, tokens, two means, and sums of products around the means.
State = tuple[float, int, tuple[Tensor, Tensor], tuple[Tensor, Tensor, float]]


class Moments:
    """Streaming moments of a cut layer's inputs x and of the residuals r that it leaves.

    r is what the layer should have given minus what it gives. All sums are in float64, so batches
    may be of any size, and no activation is kept. Only the sums are held, which take most of the
    memory of a wide layer; what is read of them is divided anew each time.

    Args:
        name: module path of the layer, for errors.

    Attributes:
        count: number of tokens, or the sum of their weights.

    Example:
        >>> moments = Moments().add(torch.randn(50, 3), torch.randn(50, 2))
        >>> moments.inputs.shape, moments.cross.shape
        (torch.Size([3, 3]), torch.Size([2, 3]))
    """

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.count = 0.0
        self.tokens = 0
        self._means: tuple[Tensor, Tensor]
        self._sums: tuple[Tensor, Tensor, float]

    @property
    def mean_inputs(self) -> Tensor:
        """`(inputs,)`."""
        return self._means[0]

    @property
    def mean_residuals(self) -> Tensor:
        """`(outputs,)`."""
        return self._means[1]

    @property
    def inputs(self) -> Tensor:
        """Second moment of x around `mean_inputs`, `(inputs, inputs)`, divided by `count`."""
        return self._sums[0] / self.count

    @property
    def cross(self) -> Tensor:
        """The same of r and x, `(outputs, inputs)`."""
        return self._sums[1] / self.count

    @property
    def squares(self) -> float:
        """Mean of |r|^2."""
        return self._sums[2] / self.count + float(self.mean_residuals.square().sum())

    def add(self, inputs: Tensor, residuals: Tensor, weights: Tensor | None = None) -> Moments:
        """Add tokens: `(tokens, inputs)`, `(tokens, outputs)` and maybe weights `(tokens,)`.

        Raises:
            ValueError: the weights are not one for each token.
        """
        check_weights(self.name, inputs, weights)
        if weights is not None:  # what padding holds must not matter, be it NaN
            seen = weights > 0
            inputs, residuals, weights = inputs[seen], residuals[seen], weights[seen]
        x, r = inputs.double(), residuals.double()
        w = x.new_ones(len(x)) if weights is None else weights.to(x)
        count = float(w.sum())
        if count <= 0:
            return self
        means = (w @ x) / count, (w @ r) / count
        x, r = x - means[0], r - means[1]
        weighted = x * w[:, None]
        batch = weighted.T @ x, r.T @ weighted, float((w @ r.square()).sum())
        return self.merge((count, len(x), means, batch))

    def state(self) -> State | None:
        """Count, tokens, means and sums, for `merge`; None without any token."""
        return (self.count, self.tokens, self._means, self._sums) if self.count else None

    def merge(self, other: State) -> Moments:
        """Add other tokens by Chan's parallel update, which loses no digits to large means."""
        count, tokens, means, batch = other
        self.tokens += tokens
        if not self.count:
            self._means, self.count = means, count
            self._sums = batch[0].clone(), batch[1].clone(), batch[2]
            return self
        total = self.count + count
        x, r = means[0] - self._means[0], means[1] - self._means[1]
        share = self.count * count / total
        self._sums[0].add_(batch[0]).addr_(x, x, alpha=share)
        self._sums[1].add_(batch[1]).addr_(r, x, alpha=share)
        squares = self._sums[2] + batch[2] + share * float(r @ r)
        self._sums = *self._sums[:2], squares
        self._means = (
            self._means[0] + x * (count / total),
            self._means[1] + r * (count / total),
        )
        self.count = total
        return self

    def after_cut(self, weight: Tensor, keep: Sequence[int]) -> Moments:
        """The moments that a layer has once its inputs are cut, from those of all its inputs.

        Args:
            weight: of the dense layer, `(outputs, inputs)`.
            keep: indices of the inputs that stay.
        """
        products = self._sums[0]
        weight = weight.detach().to(products)
        dropped = torch.ones(len(products), dtype=torch.bool, device=weight.device)
        index = torch.as_tensor(keep, dtype=torch.long, device=weight.device)
        dropped[index] = False
        lost, rows = weight[:, dropped], products[dropped]
        cut = Moments(self.name)
        cut.count, cut.tokens = self.count, self.tokens
        cut._means = self.mean_inputs[index], lost @ self.mean_inputs[dropped]
        squares = float(((lost @ rows[:, dropped]) * lost).sum())
        cut._sums = products[index][:, index], lost @ rows[:, index], squares
        return cut


class Halves:
    """Moments of two halves of the images, so that what one half tells is judged on the other.

    Args:
        name: module path of the layer, for errors.

    Example:
        >>> second = torch.tensor([False, True, True, False])
        >>> halves = Halves().add(torch.randn(12, 3), torch.randn(12, 2), second=second)
        >>> [half.tokens for half in halves.each], halves.whole.tokens
        ([6, 6], 12)
    """

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.each = Moments(name), Moments(name)

    def add(
        self, inputs: Tensor, residuals: Tensor, weights: Tensor | None = None, *, second: Tensor
    ) -> Halves:
        """Add the tokens of some images, image after image, as `Moments.add` does.

        Args:
            inputs: `(tokens, inputs)`.
            residuals: `(tokens, outputs)`.
            weights: maybe, `(tokens,)`.
            second: whether an image belongs to the second half, `(images,)`; where the tokens are
                no whole images, all go where the first image does.

        Raises:
            ValueError: as `Moments.add`.
        """
        check_weights(self.name, inputs, weights)
        second = second.to(inputs.device)
        if len(inputs) % len(second):
            second = second[:1]
        of_second = second.repeat_interleave(len(inputs) // len(second))
        for half, own in zip(self.each, (~of_second, of_second), strict=True):
            if bool(own.any()):
                half.add(inputs[own], residuals[own], None if weights is None else weights[own])
        return self

    @property
    def whole(self) -> Moments:
        """The moments over both halves."""
        moments = Moments(self.name)
        for half in self.each:
            if (state := half.state()) is not None:
                moments.merge(state)
        return moments

    @property
    def channels(self) -> int:
        """How many inputs a token has; 0 without any token."""
        return next((len(half.mean_inputs) for half in self.each if half.count), 0)

    @property
    def few(self) -> bool:
        """Whether a fit to these tokens must not be believed on them."""
        return 0 < sum(half.tokens for half in self.each) < _ENOUGH * self.channels

    def after_cut(self, weight: Tensor, keep: Sequence[int]) -> Halves:
        """As `Moments.after_cut`, of both halves."""
        cut = Halves(self.name)
        first, second = (
            half.after_cut(weight, keep) if half.count else Moments(self.name) for half in self.each
        )
        cut.each = first, second
        return cut

    def merged(self, where: str) -> Halves:
        """The halves over all ranks' tokens, alike on all ranks."""
        whole = Halves(self.name)
        first, second = (merged(f"{where}, half {i}", half) for i, half in enumerate(self.each))
        whole.each = first, second
        return whole


def merged(where: str, moments: Moments) -> Moments:
    """The moments over all ranks' tokens, alike on all ranks."""
    if not active():
        return moments
    own, whole = moments.state(), Moments(moments.name)
    device = own[2][0].device if own else torch.device("cpu")
    for state in exchange(where, own):
        if state is not None:
            count, tokens, means, sums = state
            means = means[0].to(device), means[1].to(device)
            whole.merge((count, tokens, means, (sums[0].to(device), sums[1].to(device), sums[2])))
    return whole


def check_weights(name: str, inputs: Tensor, weights: Tensor | None) -> None:
    """Raise ValueError unless there is one weight for each token."""
    if weights is not None and weights.shape != (len(inputs),):
        raise ValueError(
            f"{name}: found {weights.numel()} weights for {len(inputs)} tokens; "
            "token_weights must give one for each token that the layer reads"
        )
