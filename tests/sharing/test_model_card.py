"""The card of a saved folder says what was cut, and nothing else."""

from __future__ import annotations

import pytest

import tp_amp
from tp_amp.reports.numbers import Layer
from tp_amp.sharing.model_card import model_card

UNITS = {
    "channels": "channels of its MLPs",
    "heads": "heads of its attentions",
    "channels of each head": "channels inside its heads",
    "channels of the stream": "channels of its residual streams",
}


def sentence(*units: str) -> str:
    layers = tuple(Layer(f"layer{i}", kind, 8, 4, ()) for i, kind in enumerate(units))
    card = model_card("timm", "vit", tp_amp.Report(layers, None, None, None))
    return card.partition("smaller: ")[2].partition(" were cut")[0]


@pytest.mark.parametrize("units", UNITS)
def test_one_kind_alone(units: str) -> None:
    assert sentence(units, units) == UNITS[units]


def test_several_kinds() -> None:
    assert sentence("channels", "heads") == "channels of its MLPs and heads of its attentions"
    assert sentence("heads", "channels of the stream", "channels") == (
        "heads of its attentions, channels of its residual streams and channels of its MLPs"
    )
    assert sentence() == "no layers"


def test_units_of_sites_are_the_ones_it_knows() -> None:
    stream = tp_amp.Stream("embed", 8, True, (), ("norm",), ())
    ranks = tp_amp.HeadRanks("vo", "attn", ("attn.qkv",), "attn.proj", heads=2, width=2)
    assert {stream.units, ranks.units} < UNITS.keys()
