"""Put every attention's heads into coordinates in which leading channels hold the most."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from tp_amp.plan.cutting import undone_after_errors
from tp_amp.plan.pruning_plan import PruningPlan
from tp_amp.rotation.head_bases import Basis, query_key_basis, value_output_basis
from tp_amp.rotation.second_moments import SecondMoments
from tp_amp.rotation.telling import LeadingErrors, check_rotated, leading_widths
from tp_amp.running.arguments import check_whole, is_number
from tp_amp.running.checks import check_heads, check_model
from tp_amp.structure.attention.finding import listed
from tp_amp.structure.model_structure import ModelStructure
from tp_amp.structure.ranks.head_ranks import HeadRanks, Pair, mix

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RotatedHeads(LeadingErrors):
    """One width inside an attention's heads, once its leading channels hold the most.

    Attributes:
        site: which width of which attention.
        errors: for each number of leading channels kept, from none to all, the mean squared error
            of the logits before they are scaled (`"qk"`) or of what the attention adds (`"vo"`),
            summed over the heads, as a share of all of it: `(width + 1,)`.

    Example:
        >>> import tp_amp
        >>> site = tp_amp.HeadRanks("qk", "attn", ("attn.qkv",), "attn.proj", heads=2, width=2)
        >>> tp_amp.RotatedHeads(site, (1.0, 0.125, 0.0)).site.width
        2
    """

    site: HeadRanks
    errors: tuple[float, ...]


@torch.inference_mode(False)  # what is computed in it could not be put in place
def rotate_heads(
    model: nn.Module,
    example_inputs: Any,
    batches: Iterable[Any],
    forward_fn: Callable[..., Any] | None = None,
    *,
    num_heads: Mapping[nn.Module, int] | None = None,
    progress: bool = True,
) -> list[RotatedHeads]:
    """Give the channels of every head coordinates in which the leading ones hold the most.

    The model computes the same function, to rounding. A query is only ever multiplied with keys,
    and values are only averaged and projected: each pair is rotated by its own optimal basis
    (SVD of Gq^1/2 Gk^1/2, and reduced-rank regression of the projection). A plan that keeps the
    first channels of each head (`rank_plan`) is then the best one of that width for each head.

    Args:
        model: any model; attentions that can't be rotated stay and are logged with the reason.
        example_inputs: as for `find_mlps`.
        batches: unlabelled images; read once, none is kept.
        forward_fn: calls the model on the example inputs, as Torch-Pruning's argument does.
        num_heads: as for `find_attentions`.
        progress: show a progress bar on a terminal.

    Returns:
        Each width that can now be cut, in the order of the forward pass.

    Raises:
        ValueError: no attention can be rotated, there is no batch, or activations are not finite;
            the model is as it was.
        TypeError: `batches` can't be iterated.

    Example:
        >>> import timm, torch, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
        >>> images = torch.randn(4, 3, 224, 224)
        >>> before = model(images)
        >>> rotated = tp_amp.rotate_heads(model, images[:1], [images])
        >>> [(heads.site.pair, heads.site.width) for heads in rotated]
        [('qk', 64), ('vo', 64)]
        >>> torch.allclose(model(images), before, atol=1e-4)
        True
    """
    check_model(model, values=True)
    check_heads(model, num_heads)
    structure = ModelStructure(model, example_inputs, forward_fn, num_heads=num_heads)
    sites, reasons = structure.ranks
    if not sites:
        name = type(model).__name__
        raise ValueError(f"no attention of {name} can be rotated: {listed(reasons)}")
    if reasons:
        logger.warning("these heads keep all channels: %s", listed(reasons))
    moments = _Moments(model, sites)
    moments.collect(batches, progress=progress)
    with undone_after_errors(model):
        return [_rotated(model, site, moments.basis(site)) for site in sites]


def _rotated(model: nn.Module, site: HeadRanks, basis: Basis) -> RotatedHeads:
    mix(model, site, basis.first, basis.second)
    whole = float(basis.errors[0]) or 1.0
    return RotatedHeads(site, tuple((basis.errors / whole).tolist()))


class _Moments(SecondMoments):
    """Of queries, keys and averaged values."""

    def __init__(self, model: nn.Module, sites: Sequence[HeadRanks]) -> None:
        super().__init__(model)
        self.sites = sites

    def watch(self) -> Iterable[Any]:
        """Hooks that add what each layer of the sites gives, or reads."""
        for site in self.sites:
            if site.pair == "vo":
                projection = self.model.get_submodule(site.projection)
                yield projection.register_forward_pre_hook(self._reading(site))
                continue
            for name in site.up:
                linear = self.model.get_submodule(name)
                yield linear.register_forward_hook(self._giving(site, name))

    def _reading(self, site: HeadRanks) -> Callable[..., None]:
        def read(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._add(
                f"{site.down} 2", args[0].reshape(*args[0].shape[:-1], site.heads, site.width)
            )

        return read

    def _giving(self, site: HeadRanks, name: str) -> Callable[..., None]:
        def give(_: nn.Module, args: Any, output: Tensor) -> None:
            parts = output.reshape(*output.shape[:-1], -1, site.heads, site.width).unbind(-3)
            for part, values in zip(site.holds(name), parts, strict=True):
                if part in site.parts:
                    self._add(f"{site.down} {part}", values)

        return give

    def _add(self, key: str, values: Tensor) -> None:
        """Add `(..., heads, width)`: count, sums, and products of one head's channels."""
        rows = values.flatten(0, -3).double()
        found = torch.cat([rows.new_ones(*rows.shape[:2], 1), rows], -1)
        products = torch.einsum("thi,thj->hij", found, found)
        self.sums[key] = self.sums[key] + products if key in self.sums else products

    def basis(self, site: HeadRanks) -> Basis:
        """The best coordinates of one width."""
        found = []
        for part in site.parts:
            sums = self.sums[f"{site.down} {part}"]
            count = sums[:, :1, :1]
            mean, second = sums[:, 1:, :1] / count, sums[:, 1:, 1:] / count
            found.append(second - mean @ mean.mT if part == 1 else second)
        if site.pair == "qk":
            return query_key_basis(*found)
        weight: Any = self.model.get_submodule(site.projection).weight
        projection = weight.detach().double().view(-1, site.heads, site.width)
        return value_output_basis(found[0], projection.movedim(1, 0))


def rank_plan(
    rotated: Sequence[RotatedHeads], kept: Mapping[Pair, float], *, round_to: int = 1
) -> PruningPlan:
    """Plan to keep the leading channels of all heads, the same share in every attention.

    Args:
        rotated: of `rotate_heads`, for the model that the plan is for.
        kept: `"qk"`, `"vo"` or both -> share of the channels that stay, above 0 and at most 1.
        round_to: the widths are multiples of it; where that leaves all channels, it is logged.

    Raises:
        ValueError: a pair or a share is none, or no attention has that width to cut.
        TypeError: `rotated` is no list of `rotate_heads`, or `kept` no dict.

    Example:
        >>> import tp_amp
        >>> site = tp_amp.HeadRanks("vo", "attn", ("attn.qkv",), "attn.proj", heads=2, width=8)
        >>> plan = tp_amp.rank_plan([tp_amp.RotatedHeads(site, (0.0,) * 9)], {"vo": 0.5})
        >>> plan.keep
        {'attn.proj': [0, 1, 2, 3]}
    """
    check_rotated(rotated, RotatedHeads, "rotate_heads")
    pairs = get_args(Pair)
    if not isinstance(kept, Mapping):
        raise TypeError(
            f"kept must be a dict of shares, {dict.fromkeys(pairs, 0.5)} or one of the two alone, "
            f"found {kept!r}"
        )
    for pair, share in kept.items():
        if pair not in pairs or not (is_number(share) and 0 < share <= 1):
            raise ValueError(
                f"kept must name {' or '.join(pairs)} with a share above 0 and at most 1, found "
                f"{pair}: {share!r}"
            )
        if not any(heads.site.pair == pair for heads in rotated):
            raise ValueError(
                f"no attention can be cut in {pair}; rotate_heads tells why, leave it out"
            )
    check_whole(1, round_to=round_to)
    sites = {heads.site.down: heads.site for heads in rotated if heads.site.pair in kept}
    shares = {down: kept[site.pair] for down, site in sites.items()}
    widths = leading_widths({down: site.width for down, site in sites.items()}, shares, round_to)
    keep = {down: list(range(width)) for down, width in widths.items()}
    return PruningPlan(keep, {down: site.width for down, site in sites.items()}, sites=dict(sites))
