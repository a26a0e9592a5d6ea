"""What the graph proposes is proven by values: what it does not show is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import ToyViT, fingerprint, images, relative, toy

import tp_amp
from tp_amp.structure.model_structure import ModelStructure
from tp_amp.structure.streams.reading_streams import turned_copy


class Hidden(ToyViT):
    """Things that autograd's graph does not show."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.register_buffer("places", torch.randn(4, 12))

    def forward(self, x: Tensor) -> Any:
        x = self.embed(x).flatten(2).transpose(1, 2)
        if self.what == "table":
            x = x + self.places
        x = self.blocks(x)
        if self.what == "detached":
            x = x + x.detach().relu()
        y = self.head(self.norm(x).mean(1))
        return (y, x) if self.what == "output" else y


def tied() -> nn.Module:
    model = toy()
    model.blocks[1].query.weight = model.blocks[0].query.weight
    return model


def remade() -> nn.Module:
    model = toy()
    nn.utils.parametrizations.weight_norm(model.blocks[0].project)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Hidden("table"), "tables that are no parameters|gives something else"),
        (lambda: Hidden("detached"), "gives something else"),
        (lambda: Hidden("output"), "the output: the model's output is the stream|something else"),
        (tied, r"blocks\.1\.query\.weight is also|blocks\.0\.query\.weight is also"),
        (remade, "made anew at each call"),
    ],
)
def test_what_the_graph_does_not_show_is_refused(
    make: Callable[[], nn.Module], reason: str
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=reason):
        tp_amp.rotate(model, images(1), [images(4)])
    assert fingerprint(model) == before


def test_a_model_is_left_as_it_was() -> None:
    model = toy().train()
    model.norm.weight.requires_grad_(False)
    before = fingerprint(model)
    [stream], reasons = ModelStructure(model, images(1)).streams
    assert not reasons
    assert (stream.name, stream.width, stream.centred) == ("embed", 12, True)
    assert len(stream.readings) == 2 * 4 + 1
    assert fingerprint(model) == before


def test_a_rotation_that_is_none_is_refused() -> None:
    """The last check has a matrix that leaves lengths as they are, but not the all-ones vector."""
    model = toy()
    structure = ModelStructure(model, images(1))
    [stream], _ = structure.streams
    flip = torch.eye(12).double()
    flip[0, 0] = -1
    with pytest.raises(ValueError, match="the stream of embed can't be rotated"):
        turned_copy(model, [(stream, flip)], structure.inputs)


class TellingBlocks(nn.Module):
    """Takes bytes, and gives a mask, numbers and an empty tensor beside its result."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x.float() / 255)
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = x + layer(norm(x))
        y = self.head(self.norms[-1](x))
        return y, torch.ones(2, 5, dtype=torch.bool), torch.arange(5), y[:, :0]


def test_a_model_of_bytes_that_gives_a_mask_too_is_rotated() -> None:
    model = TellingBlocks().eval()
    x = torch.randint(255, (8, 5, 4), dtype=torch.uint8)
    expected = model(x)[0].detach()
    assert len(tp_amp.rotate(model, x[:1], [x], progress=False)) == 1
    assert relative(model(x)[0], expected) < 1e-5
