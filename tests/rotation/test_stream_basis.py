"""The rotation of a stream against principal components and scipy's Helmert matrix."""

from __future__ import annotations

import numpy
import pytest
import scipy.linalg
import torch

from tp_amp.rotation.stream_basis import helmert, stream_basis


def samples(width: int = 7, count: int = 300) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, generator=generator).double()
    return torch.randn(count, width, generator=generator).double() @ mixing + 0.5


@pytest.mark.parametrize("width", [2, 3, 8])
def test_helmert(width: int) -> None:
    rows = helmert(width).numpy()
    assert numpy.allclose(rows, numpy.vstack([scipy.linalg.helmert(width), [width**-0.5] * width]))


@pytest.mark.parametrize("centred", [True, False])
def test_leading_channels_are_a_truncation(centred: bool) -> None:
    """Cut, centred where a norm does so and turned back, they are the projection on components."""
    x = samples()
    basis = stream_basis(x.mT @ x / len(x), centred=centred)
    rotation = basis.rotation
    width = len(rotation)
    assert torch.allclose(rotation @ rotation.mT, torch.eye(width).double(), atol=1e-12)
    if centred:
        assert torch.allclose(rotation.sum(1), torch.ones(width).double(), atol=1e-12)
        x = x - x.mean(1, keepdim=True)
    components = numpy.linalg.svd(x.numpy())[2]
    for kept in range(1, width + 1):
        turned = x @ rotation.mT
        turned[:, kept:] = 0
        if centred:
            turned[:, :kept] -= turned[:, :kept].mean(1, keepdim=True)
        leading = torch.from_numpy(components[: kept - centred])
        assert torch.allclose(turned @ rotation, x @ leading.mT @ leading, atol=1e-10)
        lost = (x - x @ leading.mT @ leading).square().sum() / len(x)
        assert torch.allclose(basis.errors[kept], lost, atol=1e-10)
    assert basis.errors[0] == pytest.approx(float(x.square().sum()) / len(x))


def test_a_stream_that_is_nothing() -> None:
    basis = stream_basis(torch.zeros(4, 4).double(), centred=True)
    assert torch.equal(basis.errors, torch.zeros(5).double())
    assert torch.allclose(basis.rotation.mT @ basis.rotation, torch.eye(4).double())
