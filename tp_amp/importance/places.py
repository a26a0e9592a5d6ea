"""Squared gradients at each place of an image, and the weights of tokens that follow."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tp_amp.running.distributed import of_each


class PlaceGradients:
    """Squared gradients at each place of an image, added up over the images."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}
        self._uneven: set[str] = set()

    def add(self, name: str, rows: Tensor, images: int) -> None:
        """Add the gradients of a batch, image after image; of no images where it has none first."""
        if name in self._uneven:
            return
        places = rows.square().sum(1).view(images, -1).sum(0) if images else rows[:0]
        known = self._totals.get(name)
        if not images or (known is not None and len(known) != len(places)):
            self._uneven.add(name)
            self._totals.pop(name, None)
        else:
            self._totals[name] = places if known is None else known + places

    def weights(self) -> dict[str, Tensor]:
        """Of each layer with known places: half by what all ranks found, half for all alike."""
        added = _added(self._totals)
        check_finite_gradients(added)
        return {
            name: total.to(self._totals[name]) / total.mean() + 1
            for name, total in added.items()
            if float(total.sum()) > 0
        }


def check_finite_gradients(totals: Mapping[str, Tensor]) -> None:
    """Refuse what NaN in weights or images makes.

    Raises:
        ValueError: a sum of gradients is not finite.
    """
    broken = [name for name, total in totals.items() if not bool(torch.isfinite(total).all())]
    if broken:
        raise ValueError(f"gradients at {broken} are not finite; check weights and images for NaN")


def _added(totals: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums over all ranks, of what has the same places on all of them."""
    found = of_each("the sensitivity of places", totals)
    if isinstance(found, dict):
        return found
    same = [
        name
        for name in found[0]
        if all(name in other and other[name].shape == found[0][name].shape for other in found)
    ]
    return {name: torch.stack([other[name] for other in found]).sum(0) for name in same}


def repeated(places: Tensor | None, tokens: int) -> Tensor | None:
    """The weights of so many tokens, image after image; None where they are no whole images."""
    if places is None or tokens % len(places):
        return None
    return places.repeat(tokens // len(places))
