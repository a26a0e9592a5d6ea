"""What is said about inputs that a model fails on."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tp_amp.running.forward.remedies import remedy, shapes_of

IMAGES = torch.zeros(4, 3, 8, 8)
LABELS = torch.arange(4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 4, 4)

    def forward(self, pixel_values: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.embed(pixel_values)


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        ((LABELS,), {}, "labels, no images"),
        ((LABELS, IMAGES), {}, "labels, no images"),
        ((IMAGES, LABELS), {}, "pass the images alone"),
        ((IMAGES.to(torch.uint8),), {}, "the images are uint8"),
        ((IMAGES.permute(0, 2, 3, 1),), {}, "channels last"),
        ((IMAGES[0],), {}, r"pass images\[None\]"),
        ((), {"pixel_values": IMAGES[0]}, r"pass images\[None\]"),
        ((), {"pixel_values": IMAGES[..., :5]}, "have the size and channels"),
        ((IMAGES.double(),), {}, r"pass inputs\.to\(torch\.float32\)"),
        ((IMAGES, torch.zeros(4)), {}, "have the size and channels"),
        ((), {"image": IMAGES}, r"takes \(pixel_values, mask\), found the keys \['image'\]"),
        (("a.png",), {}, "pass a tensor of images"),
    ],
)
def test_what_to_do_is_told_by_what_inputs_look_like(
    args: tuple[Any, ...], kwargs: dict[str, Any], said: str
) -> None:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    found = remedy(Model(), args, kwargs, tensors, RuntimeError("sizes differ"))
    assert re.search(said, found), found


def test_numbers_that_a_model_asks_for_are_no_labels() -> None:
    """As the time and the class of a diffusion model."""

    class Conditional(Model):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            return self.embed(x) + y[:, None, None, None]

    found = remedy(Conditional(), (IMAGES, LABELS), {}, [IMAGES, LABELS], RuntimeError("sizes"))
    assert found.startswith("check that images have the size and channels")
    named = {"pixel_values": IMAGES, "labels": LABELS}
    found = remedy(Model(), (), named, [IMAGES, LABELS], RuntimeError("sizes"))
    assert found.startswith("check that images have the size and channels")


def test_shapes_or_kinds_are_told() -> None:
    assert shapes_of((IMAGES, LABELS), {}, [IMAGES, LABELS]) == (
        "inputs of shape (4, 3, 8, 8), (4,)"
    )
    assert shapes_of(("a",), {"b": 1}, []) == "inputs without a tensor (str, b: int)"
