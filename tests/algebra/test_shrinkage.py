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
    """Variances of the mean's entries over their squares, but for the diagonal."""
    count = len(parts)
    mean = torch.stack(parts).mean(0)
    beside = ~torch.eye(len(mean), dtype=torch.bool)
    variances = torch.stack(parts).var(0) / count
    share = min(variances[beside].sum() / mean[beside].square().sum(), torch.ones(()))
    return torch.where(beside, (1 - share) * mean, mean)


@pytest.mark.parametrize("samples", [2, 5, 40])
def test_it_is_the_formula_in_any_batches(samples: int) -> None:
    rows, _ = drawn(samples)
    expected = by_definition([part.T @ part for part in rows.chunk(samples)])
    once = SampleMoments().add(rows, samples)
    split = SampleMoments().add(rows[:2], 1).add(rows[2:], samples - 1)
    for found in (once, split):
        assert torch.allclose(found.shrunk(), expected, rtol=1e-10)


def test_samples_may_have_more_rows_than_channels() -> None:
    rows, _ = drawn(40)
    found = SampleMoments().add(rows, 4).shrunk()
    expected = by_definition([part.T @ part for part in rows.chunk(4)])
    assert torch.allclose(found, expected, rtol=1e-10)


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
    mixed = torch.randn(12, 12, generator=torch.Generator().manual_seed(3), dtype=torch.double)
    rows, truth = rows @ mixed, mixed.T @ truth @ mixed
    mean = rows.T @ rows / 20_000
    shrunk = SampleMoments().add(rows, 20_000).shrunk()
    assert (shrunk - mean).norm() < 1e-3 * mean.norm()
    assert (shrunk - truth).norm() < 0.03 * truth.norm()


def test_a_single_sample_tells_its_sizes_alone() -> None:
    rows, _ = drawn(1)
    shrunk = SampleMoments().add(rows, 1).shrunk()
    assert torch.allclose(shrunk, torch.diag(rows.square().sum(0)))


def test_channels_may_be_in_any_unit() -> None:
    rows, _ = drawn(4)
    plain = SampleMoments().add(rows, 4).shrunk()
    scaled = SampleMoments().add(10 * rows, 4).shrunk()
    assert torch.allclose(scaled, 100 * plain)
    single = SampleMoments().add(rows[:2] * torch.logspace(-3, 3, 12).double(), 1).shrunk()
    expected = torch.diag(torch.logspace(-3, 3, 12).double() ** 2 * rows[:2].square().sum(0))
    assert torch.allclose(single, expected)


def test_rows_of_no_whole_samples_count_as_one() -> None:
    rows, _ = drawn(4)
    found = SampleMoments().add(rows[:7], 2).add(rows[7:], 2)
    parts = [part.T @ part for part in (rows[:7], rows[7:])]
    assert torch.allclose(found.total, sum(parts))
    beside = sum(part.norm() ** 2 - part.diagonal().norm() ** 2 for part in parts)
    assert torch.allclose(found.squares, beside)
