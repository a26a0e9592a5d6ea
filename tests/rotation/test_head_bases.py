"""The bases of heads against data: errors as they are measured, and no better ones."""

from __future__ import annotations

import numpy
import pytest
import torch

from tp_amp.rotation.head_bases import query_key_basis, value_output_basis

HEADS, WIDTH = 2, 5


def drawn(tokens: int, seed: int, rank: int = WIDTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(HEADS, rank, WIDTH, generator=generator, dtype=torch.double)
    return torch.randn(HEADS, tokens, rank, generator=generator, dtype=torch.double) @ mixed


def second(values: torch.Tensor) -> torch.Tensor:
    return values.mT @ values / values.shape[1]


def logits_errors(q: torch.Tensor, k: torch.Tensor, first: torch.Tensor, other: torch.Tensor):  # type: ignore[no-untyped-def]
    """Mean squared errors of the logits of all pairs, by number of leading channels kept."""
    new_q, new_k, dense = q @ first.mT, k @ other.mT, q @ k.mT
    return [
        float((new_q[..., :r] @ new_k[..., :r].mT - dense).square().mean((1, 2)).sum())
        for r in range(WIDTH + 1)
    ]


def test_logits_of_all_pairs_have_the_errors_foreseen() -> None:
    q, k = drawn(40, 0), drawn(30, 1)
    basis = query_key_basis(second(q), second(k))
    found = logits_errors(q, k, basis.first, basis.second)
    assert basis.errors.tolist() == pytest.approx(found, rel=1e-6, abs=1e-9 * found[0])
    for head in range(HEADS):  # the best approximation of the table of logits, by Eckart and Young
        values = numpy.linalg.svd((q[head] @ k[head].T).numpy(), compute_uv=False)
        rank_two = q[head] @ basis.first[head, :2].T @ basis.second[head, :2] @ k[head].T
        lost = float((rank_two - q[head] @ k[head].T).square().sum())
        assert lost == pytest.approx(float(numpy.square(values[2:]).sum()), rel=1e-6)


def test_the_projection_has_the_errors_foreseen() -> None:
    averages = drawn(40, 2)
    projection = torch.randn(HEADS, 7, WIDTH, dtype=torch.double)
    basis = value_output_basis(second(averages), projection)
    for kept in range(WIDTH + 1):
        new = averages @ basis.first.mT[..., :kept]
        output = new @ (projection @ basis.second)[..., :kept].mT
        lost = (output - averages @ projection.mT).square().sum(2).mean(1).sum()
        assert float(basis.errors[kept]) == pytest.approx(float(lost), rel=1e-6, abs=1e-9)
        best = sum(
            numpy.square(numpy.linalg.svd(table.numpy(), compute_uv=False)[kept:]).sum()
            for table in averages @ projection.mT
        )
        assert float(lost) * 40 == pytest.approx(best, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("rank", [2, WIDTH])
def test_all_channels_give_the_same_function(rank: int) -> None:
    """Where nothing was seen in some directions too."""
    q, k = drawn(40, 3, rank), drawn(40, 4, rank)
    basis = query_key_basis(second(q), second(k))
    eye = torch.eye(WIDTH, dtype=torch.double).expand(HEADS, -1, -1)
    assert torch.allclose(basis.first.mT @ basis.second, eye, atol=1e-9)
    if rank < WIDTH:
        assert float(basis.errors[rank]) <= 1e-6 * float(basis.errors[0])
    projection = torch.randn(HEADS, 3, WIDTH, dtype=torch.double)
    basis = value_output_basis(second(q), projection)
    assert torch.allclose(basis.second @ basis.first, eye, atol=1e-9)
    assert float(basis.errors[3]) <= 1e-6 * float(basis.errors[0])


def test_heads_that_saw_nothing_stay_finite() -> None:
    nothing = torch.zeros(HEADS, WIDTH, WIDTH, dtype=torch.double)
    for basis in (
        query_key_basis(nothing, nothing),
        value_output_basis(nothing, torch.ones(HEADS, 3, WIDTH, dtype=torch.double)),
    ):
        assert basis.first.isfinite().all()
        assert basis.second.isfinite().all()
        assert basis.errors.isfinite().all()
