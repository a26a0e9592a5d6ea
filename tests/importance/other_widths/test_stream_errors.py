"""What streams lose, against least squares on what their norms give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compensations import left_over, stored
from tiny_models import pictures, swin, vit

import tp_amp
from tp_amp.structure.model_structure import ModelStructure


@pytest.mark.parametrize("build", [vit, swin])
def test_all_readers_lose_what_no_fit_on_the_leading_channels_rebuilds(build: Any) -> None:
    model, images = build(), pictures(320)  # enough for a head that reads a token an image
    tp_amp.rotate(model, images[0][:1], images, progress=False)
    importance = tp_amp.ReconstructionImportance(None, data=images)
    streams = ModelStructure(model, images[0][:1]).some_streams()
    assert len(streams) == (2 if build is swin else 1)
    found = importance.foreseen(model, streams)
    for stream in streams:
        errors = found[stream.name].errors
        expected = torch.zeros(stream.width + 1, dtype=torch.double)
        for name in stream.readers:
            hidden = stored(model, name, torch.cat(images))[0]
            weight = model.get_submodule(name).weight.detach().double()
            places = range(0, hidden.shape[1], stream.width)
            # One channel is spent on the mean that the norms take out.
            for kept in range(1, stream.width):
                channels = [first + c for first in places for c in range(kept - 1)]
                expected[kept] += left_over(hidden, weight, channels)
        expected[0] = expected[1]
        torch.testing.assert_close(errors, expected, rtol=1e-3, atol=1e-4 * float(expected[0]))
