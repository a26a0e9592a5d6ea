"""What attentions lose, against least squares on activations and gradients taken another way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compensations import left_over, stored
from tiny_models import pictures, vit
from torch import Tensor, nn

import tp_amp
from tp_amp.structure.model_structure import ModelStructure


def sites_of(model: nn.Module, pair: str) -> list[Any]:
    found, _ = ModelStructure(model, pictures(12)[0][:1]).ranks
    sites = [site for site in found if site.pair == pair]
    assert len(sites) == 2  # one in each block
    return sites


def test_values_lose_what_no_fit_on_the_leading_channels_rebuilds() -> None:
    model, images = vit(16, 2, 0.4), pictures(12)
    importance = tp_amp.ReconstructionImportance(None, data=images)
    sites = sites_of(model, "vo")
    found = importance.foreseen(model, sites)
    for site in sites:
        hidden = stored(model, site.down, torch.cat(images))[0]
        weight = model.get_submodule(site.down).weight.detach().double()
        expected = [
            left_over(hidden, weight, [8 * h + c for h in (0, 1) for c in range(kept)])
            for kept in range(9)
        ]
        assert found[site.down].order.tolist() == list(range(8))
        assert found[site.down].errors.tolist() == pytest.approx(
            expected, rel=1e-4, abs=1e-5 * expected[0]
        )


def test_heads_are_kept_by_what_no_fit_on_the_others_rebuilds() -> None:
    model, images = vit(16, 4, 0.4), pictures(12)
    importance = tp_amp.ReconstructionImportance(None, data=images)
    sites = tp_amp.find_attentions(model, images[0][:1])
    found = importance.foreseen(model, sites)
    for site in sites:
        hidden = stored(model, site.down, torch.cat(images))[0]
        weight = model.get_submodule(site.down).weight.detach().double()
        order = found[site.down].order.tolist()
        for kept in range(5):
            channels = [4 * head + c for head in order[:kept] for c in range(4)]
            expected = left_over(hidden, weight, channels)
            assert float(found[site.down].errors[kept]) == pytest.approx(
                expected, rel=1e-4, abs=1e-6
            )


def test_queries_lose_half_the_square_of_what_scaling_them_changes() -> None:
    """Each token's dropped channels have a scale, whose gradient at one is what they add."""
    model, images = vit(16, 2, 0.4), pictures(40)

    def loss(output: Tensor) -> Tensor:
        return output.square().sum(-1).mean()

    importance = tp_amp.ReconstructionImportance(loss, data=images)
    sites = sites_of(model, "qk")
    found = importance.foreseen(model, sites)
    for site in sites:
        errors = found[site.down].errors
        most = 0.0  # fewer channels never cost less
        for kept in range(7, 3, -1):
            most = max(most, scaled_squares(model, site.down, images, loss, kept) / 2)
            # What channels have in common is shrunk towards nothing, as of few images.
            assert float(errors[kept]) == pytest.approx(most, rel=0.25)
        assert bool((errors.diff() <= 0).all())
        assert float(errors[-1]) == 0


def scaled_squares(
    model: nn.Module, layer: str, images: list[Tensor], loss: Any, kept: int
) -> float:
    """Mean over images of the sum over tokens of the squared derivative by the scale."""
    total, count = 0.0, 0
    for image in torch.cat(images).split(1):
        scales: list[Tensor] = []

        def scale(_: nn.Module, args: Any, output: Tensor, scales: list[Tensor] = scales) -> Tensor:
            own = torch.ones(*output.shape[:-1], 1, requires_grad=True)
            scales.append(own)
            queries = output[..., :16].unflatten(-1, (2, 8))  # of two heads
            dropped = queries[..., kept:] * own[..., None]
            queries = torch.cat([queries[..., :kept], dropped], -1).flatten(-2)
            return torch.cat([queries, output[..., 16:]], -1)

        hook = model.get_submodule(layer).register_forward_hook(scale)
        [gradient] = torch.autograd.grad(loss(model(image)), scales)
        hook.remove()
        total, count = total + float(gradient.square().sum()), count + 1
    return total / count
