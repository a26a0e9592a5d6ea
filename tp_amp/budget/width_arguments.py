"""Which kinds of widths a plan may choose, and in which steps; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tp_amp.running.arguments import check_whole

KINDS = ("mlp", "heads", "qk", "vo", "stream")
RoundTo = int | Mapping[str, int]


def check_kinds(widths: Any, round_to: Any) -> None:
    """Check the arguments that say what is cut, before anything is read.

    Raises:
        ValueError: a kind is none, there is none or one twice, whole heads are to be cut with the
            channels inside them, or a step is no whole number.
        TypeError: `widths` is no collection of names.
    """
    if isinstance(widths, str) or not isinstance(widths, Collection):
        raise TypeError(f'widths must be a list of kinds such as ["mlp", "qk"], found {widths!r}')
    kinds = list(widths)
    if not kinds or len(set(kinds)) < len(kinds) or not set(kinds) <= set(KINDS):
        raise ValueError(f"widths must be some of {KINDS}, found {kinds}")
    if "heads" in kinds and {"qk", "vo"} & set(kinds):
        raise ValueError(
            "no one plan cuts whole heads and the channels inside them; take 'heads' or 'qk' and "
            "'vo' out of widths"
        )
    if not isinstance(round_to, Mapping):
        check_whole(round_to=round_to)
        return
    if unknown := round_to.keys() - set(kinds):
        raise ValueError(f"round_to names {sorted(unknown)}, the widths are {kinds}")
    for kind, step in round_to.items():
        check_whole(**{f"round_to[{kind!r}]": step})
