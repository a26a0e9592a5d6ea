"""Where layers write to a residual stream, on models whose forward pass says so."""

from __future__ import annotations

import pytest
import timm
import torch
from compensations import compensated, stored, tokenwise
from torch import Tensor, nn
from toys import PlainMLP, fingerprint, images, perturbed, toy

from tp_amp.algebra.closed_form import Correction
from tp_amp.compensation.stream import Place, find_place
from tp_amp.running.inputs import Inputs
from tp_amp.running.watching import watch


class Around(nn.Module):
    """One MLP, and what is done with what it gives."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.mlp, self.norm, self.later = PlainMLP(6, 16), nn.LayerNorm(6), nn.Linear(6, 6)
        self.gamma = nn.Parameter(torch.tensor([2.0, -0.5, 0.1, 1.0, 3.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        given = self.mlp(x)
        if self.kind == "scaled":
            return self.later(self.norm(x + self.gamma * given))
        if self.kind == "norm behind it":
            return self.later(x + self.norm(given))
        if self.kind == "gate":
            return self.later(x * given)
        if self.kind == "other order":
            return self.later(x + given.roll(1, 1))
        if self.kind == "nothing beside it":
            return self.later(self.norm(given))
        return x + given  # the output alone


def place_of(model: nn.Module, name: str, x: Tensor, weights: Tensor | None = None) -> Place | None:
    with torch.no_grad():
        return find_place(model, model, name, Inputs((x,)), lambda _: weights)


def tokens(seed: int = 0) -> Tensor:
    return torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_layer_scale_is_found_behind_the_layer(dtype: torch.dtype) -> None:
    model = perturbed(Around("scaled")).to(dtype)
    before = fingerprint(model)
    found = place_of(model, "mlp.second", tokens().to(dtype))
    assert fingerprint(model) == before
    assert found is not None
    assert found.name == "norm"
    torch.testing.assert_close(found.scale, model.gamma.detach().double(), rtol=0.02, atol=0.02)


def test_output_of_what_is_run_is_a_place_too() -> None:
    found = place_of(perturbed(Around("plain")), "mlp.second", tokens())
    assert found is not None
    assert found.name == ""
    torch.testing.assert_close(found.scale, torch.ones(6).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["norm behind it", "gate", "other order", "nothing beside it"])
def test_what_is_no_sum_is_no_place(kind: str) -> None:
    assert place_of(perturbed(Around(kind)), "mlp.second", tokens()) is None


def test_layers_whose_output_is_not_added_are_none() -> None:
    model = toy()
    places = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "head":
            found = place_of(model, name, images(4))
            places[name] = found and found.name
    for block in ("blocks.0", "blocks.1"):
        assert places.pop(f"{block}.project") == f"{block}.norm2"
    assert places.pop("blocks.0.mlp.second") == "blocks.1"
    assert places.pop("blocks.1.mlp.second") == "norm"
    assert set(places.values()) == {None}


def test_what_padding_holds_does_not_hide_a_place() -> None:
    x = tokens()
    x[:, 3:] = float("nan")
    weights = torch.ones(4, 5)
    weights[:, 3:] = 0
    model = perturbed(Around("scaled"))
    assert place_of(model, "mlp.second", x) is None
    found = place_of(model, "mlp.second", x, weights.flatten())
    assert found is not None
    torch.testing.assert_close(found.scale, model.gamma.detach().double(), rtol=1e-4, atol=1e-4)


def test_windows_of_a_swin_are_in_another_order() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, embed_dim=12, depths=(2, 1), num_heads=(2, 2)
    )
    x = torch.randn(2, 3, 56, 56)
    block = perturbed(model).layers[0].blocks[1]  # in windows that are shifted
    state = torch.randn(2, 14, 14, 12)
    path = "layers.0.blocks.1"
    with torch.no_grad():
        model(x)
        inputs = Inputs((state,))
        assert find_place(block, model, f"{path}.attn.proj", inputs, lambda tokens: None) is None
        found = find_place(block, model, f"{path}.mlp.fc2", inputs, lambda tokens: None)
    assert found is not None
    assert found.name == ""


class Maps(nn.Module):
    """An MLP of 1x1 convolutions on maps, as wide as they are high."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(6, 16, 1), nn.Conv2d(16, 6, 1)
        self.gamma = nn.Parameter(torch.linspace(0.5, 2, 6).view(6, 1, 1))
        self.norm = nn.GroupNorm(1, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.gamma * self.second(self.first(x).relu()))


def test_maps_with_channels_first_are_a_stream() -> None:
    model, x = perturbed(Maps()), torch.randn(3, 6, 5, 6)
    found = place_of(model, "second", x)
    assert found is not None
    assert found.name == "norm"
    torch.testing.assert_close(
        found.scale, model.gamma.detach().double().flatten(), rtol=1e-4, atol=1e-4
    )
    with torch.no_grad():
        seen, _ = watch(model, model, "second", Inputs((x,)), stop=True, later="norm")
        given = model.gamma.flatten() * seen.outputs
    assert seen.later is not None
    torch.testing.assert_close(seen.later - given.detach(), x.movedim(1, -1).reshape(-1, 6))


def test_a_correction_adds_to_the_stream_what_it_should() -> None:
    scale = torch.tensor([2.0, -0.5, 0.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    bias = torch.randn(3, generator=generator, dtype=torch.float64)
    found = Place("", scale).as_output(Correction(weight, bias, 2.0, 1.0))
    hidden = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    given = (hidden @ found.weight.T + found.bias) * scale
    expected = hidden @ weight.T + bias
    expected[:, 2] = 0  # does not reach the stream
    torch.testing.assert_close(given, expected)
    assert (found.error_before, found.error) == (2.0, 1.0)


def test_errors_of_a_first_mlp_are_taken_out_by_the_second() -> None:
    """Fitted to its own output, the second MLP could not know of them."""
    model, batch, keep = tokenwise()
    both, _ = compensated(model, keep, [batch])
    first, _ = compensated(model, {"blocks.0.second": keep["blocks.0.second"]}, [batch])
    own, _ = compensated(model, {"blocks.1.second": keep["blocks.1.second"]}, [batch])
    first.blocks[1] = own.blocks[1]
    dense, *cut = (stored(part, "head", batch)[0] for part in (model, both, first))
    errors = [float((tokens - dense).square().mean()) for tokens in cut]
    assert errors[0] < 0.95 * errors[1]
