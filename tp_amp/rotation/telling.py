"""How many channels an error or a share leaves, for both rotations."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from tp_amp.running.arguments import check_number

logger = logging.getLogger(__name__)


def check_rotated(rotated: Any, kind: type, maker: str) -> None:
    """Raise TypeError for what is no list of handles as a rotation gives it.

    Args:
        rotated: what was passed.
        kind: of each handle.
        maker: the rotation that gives them.
    """
    if isinstance(rotated, kind):
        raise TypeError(f"rotated must be the list that {maker} gives, found one of it; pass [it]")
    listed = isinstance(rotated, Sequence) and not isinstance(rotated, str)
    strange = [one for one in rotated if not isinstance(one, kind)] if listed else [rotated]
    if strange:
        raise TypeError(
            f"rotated must be the list that {maker} gives, found {type(strange[0]).__name__}"
            f"{' in it' if listed else ''}"
        )


class LeadingErrors:
    """What is known of a width once its leading channels hold the most.

    Attributes:
        errors: for each number of leading channels kept, from none to all, the share that is lost.
    """

    errors: tuple[float, ...]

    def width_for(self, error: float) -> int:
        """The fewest channels, one at least, whose share of errors is at most `error`.

        Raises:
            ValueError: `error` is negative or no number.

        Example:
            >>> import tp_amp
            >>> site = tp_amp.HeadRanks("vo", "attn", ("attn.qkv",), "attn.proj", heads=2, width=2)
            >>> tp_amp.RotatedHeads(site, (1.0, 0.125, 0.0)).width_for(0.25)
            1
        """
        check_number("a share of at least 0", lambda share: share >= 0, error=error)
        return next(width for width, lost in enumerate(self.errors) if width and lost <= error)


def leading_widths(
    dense: Mapping[str, int], shares: Mapping[str, float], round_to: int
) -> dict[str, int]:
    """A share of each width, in multiples; where these leave all of one, it is logged.

    Example:
        >>> leading_widths({"embed": 12}, {"embed": 0.6}, 4)
        {'embed': 8}
    """
    widths = {
        name: min(width, max(1, round(width * shares[name] / round_to)) * round_to)
        for name, width in dense.items()
    }
    whole = [name for name, width in widths.items() if width == dense[name] and shares[name] < 1]
    if whole:
        logger.warning(
            "%d widths keep all channels, since round_to=%d leaves no smaller one: %s",
            len(whole),
            round_to,
            ", ".join(whole),
        )
    return widths
