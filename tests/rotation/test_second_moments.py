"""What both rotations collect: from any mode, of sound images, and nothing is left behind."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from drawing_model import Drawing
from torch import Tensor, nn
from toys import fingerprint, images, perturbed, relative
from zoo import TINY

import tp_amp

Rotate = Callable[..., list[Any]]
both = pytest.mark.parametrize("rotate", [tp_amp.rotate, tp_amp.rotate_heads])


def vit() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, **TINY)
    return perturbed(model), images(4, size=32, channels=3)


@both
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_images_that_are_not_finite_are_told(rotate: Rotate, bad: float) -> None:
    model, x = vit()
    before = fingerprint(model)
    x[2, 1, 5, 5] = bad
    with pytest.raises(ValueError, match="are not finite; check the images"):
        rotate(model, x[:1], x.split(2), progress=False)
    assert fingerprint(model) == before


@both
def test_it_works_in_inference_mode(rotate: Rotate) -> None:
    model, x = vit()
    other = copy.deepcopy(model)
    expected = rotate(other, x[:1], [x], progress=False)
    with torch.inference_mode():
        found = rotate(model, x[:1], [x], progress=False)
    assert found == expected
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    model(x).sum().backward()


def test_models_that_draw_are_proven() -> None:
    """Each run of a copy draws the same."""
    model, x = Drawing().double().eval(), images(8).double()
    torch.manual_seed(5)
    before = model(x)
    tp_amp.rotate(model, x[:1], [x], progress=False)
    torch.manual_seed(5)
    assert relative(model(x), before) < 1e-10


def test_no_stream_is_left_whole_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    stream = tp_amp.Stream("embed", 8, True, (), ("norm",), ())
    rotated = [tp_amp.RotatedStream(stream, (0.0,) * 9)]
    with caplog.at_level(logging.WARNING):
        assert tp_amp.stream_plan(rotated, 1.0).widths == {"embed": 8}
        assert not caplog.records
        assert tp_amp.stream_plan(rotated, 0.5, round_to=16).widths == {"embed": 8}
    assert "keep all channels, since round_to=16 leaves no smaller one: embed" in caplog.text
