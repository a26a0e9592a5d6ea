"""What a record says of itself."""

from __future__ import annotations

from torch import nn

from tp_amp.structure.streams.residual_stream import Reading, Stream, Written

STREAM = Stream(
    "embed",
    8,
    True,
    (
        Written("embed.weight", 0),
        Written("out.weight", 0, "gamma"),
        Written("out.bias", 0, "gamma"),
    ),
    ("norm",),
    (Reading("up.weight", "up.bias", "norm"), Reading("out.weight", None, None)),
)


def test_paths_stand_once() -> None:
    """Of a layer that reads the stream and writes it too."""
    paths = ("embed.weight", "out.weight", "out.bias", "gamma", "up.weight")
    assert STREAM.paths == paths
    assert STREAM.scales == ("gamma",)


def test_it_is_cut_like_others() -> None:
    assert (STREAM.down, STREAM.up, STREAM.inner, STREAM.first) == ("embed", (), (), 0)
    assert (STREAM.unit_width, STREAM.units) == (1, "channels of the stream")
    model = nn.ModuleDict({"embed": nn.Linear(3, 5)})
    assert STREAM.channels_left(model) == 5
