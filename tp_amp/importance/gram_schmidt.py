"""Gram-Schmidt diversity (DGMR): keep the neurons whose weights add most to those kept already."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import Tensor

from tp_amp.importance.global_ranking import warn_of_global_ranking
from tp_amp.structure.groups import GroupLayer, group_layers, keeps_ties, root_name, root_weights

logger = logging.getLogger(__name__)

# Squared residuals, relative to the row's own squared norm, and to each other:
NEGLIGIBLE = 1e-12  # a row whose residual is rounding of float32 weights adds nothing
CANCELLED = 1e-6  # what subtraction has worn down this far is computed afresh
TIED = 1e-12
CANDIDATES = 512
CACHED = 384  # rows of a thousand columns fill a second-level cache


class GramSchmidtImportance(tp.importance.Importance):  # type: ignore[misc]
    """Score channels by the diversity of their weights (DGMR, arXiv 2506.08591).

    A channel is the row of weights that makes it: for an MLP, its row of `up`, of both `up` layers
    side by side where the MLP is gated. For any other group (attention, embedding, convolutions)
    the rows of all layers that make the channel stand side by side: q, k and v of a packed
    projection, and flattened filters. `gram_schmidt_order` orders them. It needs no data and no
    gradient, and reads the weights anew at each call.

    The score is the rank as a share: 1 for the first pick, 1/channels for the last. A rank says
    nothing about other layers, so the global ranking of `tp.pruner.MetaPruner` takes the same share
    of every layer, as local pruning does and as the paper prunes; a warning says so.

    Args:
        weights: `"up"` as in the paper, or `"both"`: the columns of the layers that read the
            channel (an MLP's `down`) stand beside its rows.

    Raises:
        ValueError: `weights` is neither.

    Example:
        >>> import timm, torch, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=10)
        >>> images = torch.randn(1, 3, 224, 224)
        >>> widths = tp_amp.mlp_ratio_widths(model, images, 1.0)
        >>> importance = tp_amp.GramSchmidtImportance()
        >>> plan = tp_amp.plan_from_importance(model, images, importance, widths)
        >>> plan.widths
        {'blocks.0.mlp.fc2': 192}
    """

    def __init__(self, weights: Literal["up", "both"] = "up") -> None:
        if weights not in ("up", "both"):
            raise ValueError(f"weights must be 'up' or 'both', found {weights!r}")
        self.weights = weights

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """Score the root channels of a group `(channels,)`, in (0, 1]; high means keep.

        Returns:
            None, with a logged reason, for a group whose channels no Linear or convolution makes.

        Raises:
            ValueError: weights are not finite.
        """
        warn_of_global_ranking(self)
        if not keeps_ties(group):
            return None
        layers = list(group_layers(group))
        if all(layer.side == "in" for layer in layers):
            logger.warning(
                "no score for the group of %s: no Linear or convolution makes its channels",
                root_name(group),
            )
            return None
        if self.weights == "up":
            layers = [layer for layer in layers if layer.side == "out"]
        rows = _side_by_side(layers, len(group[0].idxs))
        order = gram_schmidt_order(rows)
        ranks = torch.arange(len(order), 0, -1, device=order.device)
        return torch.empty_like(ranks, dtype=torch.float32).scatter_(0, order, ranks / len(order))


def _side_by_side(layers: list[GroupLayer], channels: int) -> Tensor:
    rows = torch.empty(0)
    for layer in layers:
        part = _where_float64_is(root_weights(layer, channels)).double()
        if not bool(torch.isfinite(part).all()):
            raise ValueError(
                f"the weights of {layer.name} are not finite; load sound weights before pruning"
            )
        rows = torch.cat([rows, part], 1) if rows.numel() else part
        # Many layers make the channels of a residual stream. R of a QR decomposition has the same
        # inner products between channels, and no more columns than channels.
        if rows.shape[1] > 2 * channels:
            rows = torch.linalg.qr(rows.T, mode="r").R.T
    return rows


def gram_schmidt_order(weight: Tensor, count: int | None = None) -> Tensor:
    """Order the rows of a matrix by pivoted Gram-Schmidt, the most diverse first.

    The method of DGMR (arXiv 2506.08591): take the row with the largest residual norm, project its
    direction out of all rows, and repeat. Once no residual is left, after `in` picks at the latest,
    the next round starts on the rows not yet taken, with their original weights. In one round it is
    the pivot order of the QR decomposition with column pivoting of the transpose.

    It computes in float64 on the tensor's device (on the CPU where the device has no float64),
    in blocks: picks among the rows with the largest residuals, for as long as no other row could
    come first, then one rotation of all rows by a product of matrices.

    The order is defined where the paper leaves it open. No row comes twice. A row whose residual
    has fallen to a millionth of its norm, which float32 weights can't tell from zero, waits for the
    next round. Zero rows come last, by index. Of rows whose residual norms agree to twelve digits
    the lower index comes first, as long as no more than 512 rows are tied.

    Args:
        weight: `(hidden, in)`, floating; it is not changed.
        count: how many to pick; all by default. Fewer take less time.

    Returns:
        The indices of the picked rows `(count,)`, int64, the first pick first.

    Raises:
        TypeError: `weight` is no floating tensor.
        ValueError: `weight` is no matrix or not finite, or `count` is out of range.

    Example:
        >>> import torch, tp_amp
        >>> tp_amp.gram_schmidt_order(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 0.5]]))
        tensor([1, 2, 0])
    """
    _check_weight(weight, count)
    wanted = len(weight) if count is None else count
    rows = _where_float64_is(weight.detach())
    squares = _squares(rows)
    left, zero = squares.nonzero().flatten(), (squares == 0).nonzero().flatten()
    order = left[:0]
    while len(left) and len(order) < wanted:
        picks = left[_one_round(rows[left].double(), wanted - len(order))]
        order = torch.cat([order, picks])
        left = left[~torch.isin(left, picks)]
    return torch.cat([order, zero])[:wanted].to(weight.device)


def _one_round(rows: Tensor, count: int) -> Tensor:
    """Pick up to `count` rows until no residual is left; changes `rows` in place."""
    residuals = _squares(rows)
    negligible = NEGLIGIBLE * residuals
    picks = torch.empty(0, dtype=torch.long, device=rows.device)
    while len(picks) < count and rows.shape[1]:
        block = _pick_block(rows, residuals, negligible, count - len(picks))
        if not len(block):
            break
        picks = torch.cat([picks, block])
        rows, residuals = _drop_directions(rows, block)
        residuals[residuals <= negligible] = 0
        residuals[picks] = 0
    return picks


def _pick_block(rows: Tensor, residuals: Tensor, negligible: Tensor, count: int) -> Tensor:
    """Pick rows that surely come next.

    Residuals only ever fall. So while the best of the candidates is above what the best other row
    had at the start of the block, the other rows need no update. Of the candidates' residuals only
    the squared norms are made, by Cholesky's factorisation of their inner products.
    """
    ranked = residuals.argsort(descending=True, stable=True)
    candidates, others = ranked[:CANDIDATES].sort().values, residuals[ranked[CANDIDATES:]]
    among, residuals, negligible = (t[candidates] for t in (rows, residuals, negligible))
    floor = max(CANCELLED * float(residuals.max()), float(others[0]) if len(others) else 0.0)
    factor = rows.new_empty(min(count, *among.shape), len(among))
    picks: list[int] = []
    while len(picks) < len(factor):
        best = residuals.max()
        first = (residuals >= (1 - TIED) * best).int().argmax()
        largest, pick = float(best), int(first)
        if largest == 0 or (picks and largest < floor):
            break
        above = factor[: len(picks)]
        row = torch.addmv(among @ among[pick], above.T, above[:, pick], alpha=-1)
        row /= largest**0.5
        factor[len(picks)] = row
        residuals.addcmul_(row, row, value=-1).masked_fill_(residuals <= negligible, 0)
        residuals[pick] = 0
        picks.append(pick)
    return candidates[picks]


def _drop_directions(rows: Tensor, picks: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the rows so that those picked span the first coordinates, and drop these.

    The rotation is a block of Householder reflections, I - V T V' (Schreiber & Van Loan 1989).
    """
    count = len(picks)
    reflectors, scales = torch.geqrf(rows[picks].T)
    reflectors = reflectors.tril(-1)
    reflectors.diagonal().fill_(1)
    inner = scales[:, None] * (reflectors.T @ reflectors).triu(1)
    triangle = torch.linalg.solve_triangular(inner, scales.diag(), upper=True, unitriangular=True)
    scaled, residuals = (reflectors @ triangle).T, []
    # The rows stay in the cache for all three. A product with the larger matrix on the right is
    # several times faster on CPUs.
    for part in torch.split(rows, CACHED):
        product = (scaled @ part.T).T
        part[:, count:].addmm_(product, reflectors[count:].T, alpha=-1)
        residuals.append(_squares(part[:, count:]))
    return rows[:, count:], torch.cat(residuals)


def _squares(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return norms.square()


def _where_float64_is(tensor: Tensor) -> Tensor:
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def _check_weight(weight: Tensor, count: int | None) -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        found = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"expected a floating tensor of shape (hidden, in), found {found}")
    if weight.dim() != 2:
        raise ValueError(
            f"expected a matrix (hidden, in), found shape {tuple(weight.shape)}; flatten the "
            "filters of a convolution with weight.flatten(1)"
        )
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("the weight is not finite; load sound weights before pruning")
    if count is not None and not 0 <= count <= len(weight):
        raise ValueError(
            f"can't pick {count} of {len(weight)} rows; pass a count from 0 up to that"
        )
