"""Values of the command line, checked as they are read; imports nothing heavy."""

from __future__ import annotations

import argparse
import ast
import math
import re
from typing import Any


def name_and_value(text: str) -> tuple[str, Any]:
    """NAME=VALUE; the value as Python reads it, else as text."""
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE; MODEL stands before them")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def target(text: str) -> dict[str, float]:
    """KIND=SIZE."""
    kind, _, size = text.partition("=")
    number = _number(size)
    kinds = ("params", "macs", "latency")
    if kind not in kinds or not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no target; write params=0.6, macs=0.6 or latency=0.6, a fraction of the "
            "dense model"
        )
    return {kind: number}


def fraction(text: str) -> float:
    """Above 0, 1 at most."""
    if not 0 < _number(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no fraction above 0, 1 at most")
    return float(text)


def not_negative(text: str) -> float:
    """Zero or more."""
    if not 0 <= _number(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of zero or more, such as 0.01")
    return float(text)


def above_zero(text: str) -> float:
    """A number above zero."""
    if not 0 < _number(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above zero, such as 2e-5")
    return float(text)


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(text)


def whole(text: str) -> int:
    """A whole number of 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 0 or more")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
