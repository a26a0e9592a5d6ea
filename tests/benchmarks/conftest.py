"""The reference models have half as many blocks as those that the README's numbers are of."""

from __future__ import annotations

import pytest
import reference

FEWER = {"vit": {"depth": 3}, "swin": {"depths": (2, 2, 2)}}


@pytest.fixture(autouse=True)
def fewer_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """All else of them is as it is: widths, heads and windows that are shifted."""
    for name, (kind, arguments) in reference.ARCHITECTURES.items():
        monkeypatch.setitem(reference.ARCHITECTURES, name, (kind, arguments | FEWER[name]))
