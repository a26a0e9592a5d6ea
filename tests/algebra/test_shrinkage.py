"""Shrunk second moments against Ledoit and Wolf's formula, and against what is true."""

import pytest
import torch
from torch import Tensor

from tp_amp.algebra.shrinkage import SampleMoments


def drawn(samples: int, channels: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows, two for each sample, and what S is in the mean."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.2, 2, channels, dtype=torch.double)
    rows = torch.randn(2 * samples, channels, generator=generator, dtype=torch.double) * scale
    return rows, 2 * torch.diag(scale.square())


def by_definition(parts: list[Tensor]) -> Tensor:
    """Theorem 3.2 of Ledoit and Wolf, with the unbiased variance of the mean."""
    count, channels = len(parts), len(parts[0])
    mean = torch.stack(parts).mean(0)
    mu = mean.trace() / channels * torch.eye(channels, dtype=torch.double)
    delta = (mean - mu).norm() ** 2
    beta = sum((part - mean).norm() ** 2 for part in parts) / (count * (count - 1))
    share = min(beta / delta, torch.ones(()))
    return (1 - share) * mean + share * mu


@pytest.mark.parametrize("samples", [2, 5, 40])
def test_it_is_the_formula_in_any_batches(samples: int) -> None:
    rows, _ = drawn(samples)
    expected = by_definition([part.T @ part for part in rows.chunk(samples)])
    once = SampleMoments().add(rows, samples)
    split = SampleMoments().add(rows[:2], 1).add(rows[2:], samples - 1)
    for found in (once, split):
        assert torch.allclose(found.shrunk(), expected, rtol=1e-10)


def test_it_lies_nearer_to_the_truth_than_the_mean() -> None:
    gained = []
    for seed in range(20):
        rows, truth = drawn(8, seed=seed)
        mean = rows.T @ rows / 8
        shrunk = SampleMoments().add(rows, 8).shrunk()
        gained.append(float((mean - truth).norm() - (shrunk - truth).norm()))
        assert torch.allclose(shrunk.trace(), mean.trace())
    assert sum(gain > 0 for gain in gained) > 15
    assert sum(gained) > 0


def test_directions_that_few_samples_do_not_show_are_not_free() -> None:
    rows, _ = drawn(3)
    assert int(torch.linalg.matrix_rank(rows.T @ rows)) == 6
    assert float(torch.linalg.eigvalsh(SampleMoments().add(rows, 3).shrunk())[0]) > 0.1


def test_many_samples_are_taken_at_their_word() -> None:
    rows, truth = drawn(20_000)
    mean = rows.T @ rows / 20_000
    shrunk = SampleMoments().add(rows, 20_000).shrunk()
    assert torch.allclose(shrunk, mean, atol=5e-3)
    assert torch.allclose(shrunk, truth, atol=0.2)


def test_a_single_sample_tells_its_size_alone() -> None:
    rows, _ = drawn(1)
    shrunk = SampleMoments().add(rows, 1).shrunk()
    assert torch.allclose(shrunk, rows.square().sum() / 12 * torch.eye(12, dtype=torch.double))


def test_rows_of_no_whole_samples_count_as_one() -> None:
    rows, _ = drawn(4)
    found = SampleMoments().add(rows[:7], 2).add(rows[7:], 2)
    parts = [part.T @ part for part in (rows[:7], rows[7:])]
    assert torch.allclose(found.total, sum(parts))
    assert torch.allclose(found.squares, sum(part.norm() ** 2 for part in parts))
