"""The order of neurons by what they leave, against the naive loop and least squares."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from greedy_orders import naive_order
from token_data import normal
from torch import Tensor, nn

import tp_amp
from tp_amp.algebra import pivoting


def hidden(kind: str, seed: int = 0) -> Tensor:
    """Activations `(tokens, neurons)` whose covariance is of some kind."""
    values = normal(50, 7, seed=seed) @ normal(7, 7, seed=seed + 1) + 1
    if kind == "rank deficient":
        values = values[:, :4] @ normal(4, 7, seed=seed + 2) + 1
    if kind == "diagonal":
        q = np.linalg.qr((values - values.mean(0)).numpy())[0]
        values = torch.from_numpy(q) * torch.tensor([3.0, 1, 7, 2, 5, 4, 6]) + 1
    return values


def left_over(values: Tensor, weight: Tensor, kept: list[int]) -> float:
    """Mean squared output error of the best affine reconstruction from some neurons."""
    output = (values @ weight.T).numpy()
    rows = np.hstack([values[:, kept].numpy(), np.ones((len(values), 1))])
    solution = np.linalg.lstsq(rows, output, rcond=None)[0]
    return float(((output - rows @ solution) ** 2).sum(1).mean())


KINDS = {"plain": 7, "rank deficient": 4, "diagonal": 7}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_order_is_the_naive_greedy_one(kind: str, seed: int) -> None:
    values, weight = hidden(kind, 10 * seed), normal(3, 7, seed=99 + seed)
    covariance = torch.cov(values.T, correction=0)
    order, _ = tp_amp.reconstruction_order(covariance, weight)
    rank = KINDS[kind]
    # With a neuron left, three outputs may be complete, and the last picks a tie.
    steps = rank - 1
    assert order[:steps].tolist() == naive_order(covariance, weight, steps)
    assert sorted(order.tolist()) == list(range(7))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_those_of_the_best_affine_reconstruction(kind: str, seed: int) -> None:
    values, weight = hidden(kind, 10 * seed), normal(3, 7, seed=99 + seed)
    order, errors = tp_amp.reconstruction_order(torch.cov(values.T, correction=0), weight)
    expected = [left_over(values, weight, order[:k].tolist()) for k in range(8)]
    assert errors.tolist() == pytest.approx(expected, rel=1e-7, abs=1e-9 * expected[0])
    assert bool((errors.diff() <= 0).all())
    assert float(errors[7]) < 1e-9 * float(errors[0])
    if kind == "rank deficient":
        assert float(errors[4]) < 1e-9 * float(errors[0]) < float(errors[3])


def test_neurons_that_add_nothing_come_last_by_index() -> None:
    covariance = torch.diag(torch.tensor([0.0, 2.0, 0.0, 1.0]))
    order, errors = tp_amp.reconstruction_order(covariance, torch.eye(4))
    assert order.tolist() == [1, 3, 0, 2]
    assert errors.tolist() == pytest.approx([3, 1, 0, 0, 0])


def test_nothing_varies() -> None:
    order, errors = tp_amp.reconstruction_order(torch.zeros(3, 3), torch.eye(3))
    assert order.tolist() == [0, 1, 2]
    assert errors.tolist() == [0, 0, 0, 0]


def test_arguments_are_left_alone() -> None:
    covariance, weight = torch.cov(hidden("plain").T, correction=0), normal(3, 7)
    before = covariance.clone(), weight.clone()
    tp_amp.reconstruction_order(covariance, weight)
    assert torch.equal(covariance, before[0])
    assert torch.equal(weight, before[1])


PANEL = pivoting.PANEL


def plain_loop(covariance: Tensor, weight: Tensor) -> tuple[list[int], Tensor, list[float]]:
    """One pivot after another: order, errors, and by how much each gain beats the next one.

    The margin is 0 where it is no larger than the rounding of what is left of the two variances.
    """
    largest = covariance.double().diagonal().max()
    residual, product = covariance.double().clone(), weight.double() @ covariance.double()
    error = (product * weight).sum()
    order: list[int] = []
    errors, margins = [error], []
    while True:
        left = residual.diagonal()
        gain = product.square().sum(0) / left
        gain[left <= 1e-12 * largest] = -1
        gain[order] = -1
        pivot = int(gain.argmax())
        if gain[pivot] < 0:
            break
        best, at = gain.topk(min(2, len(gain)))
        margin = float(1 - best[-1] / best[0]) if len(at) > 1 else 1.0
        margins.append(margin if margin > 1e-12 * largest / left[at].min() else 0.0)
        row = residual[pivot] / left[pivot].sqrt()
        gained = product[:, pivot] / left[pivot].sqrt()
        residual -= torch.outer(row, row)
        product -= torch.outer(gained, row)
        order.append(pivot)
        errors.append(errors[-1] - gained.square().sum())
    return order, torch.stack(errors).clamp_min(0), margins


def gelu_covariance(
    width: int, tokens: int = 0, *, decay: float = 1.0, seed: int = 0, copies: int = 1
) -> Tensor:
    """Of GELU outputs with a spectrum that decays; `copies` of each neuron, far apart."""
    few, once = max(1, width // 4), width // copies
    mix = normal(few, once, seed=seed) * torch.arange(1, few + 1).double().pow(-decay)[:, None]
    tokens = tokens or 3 * width + 8
    noise = 0.3 * normal(tokens, once, seed=seed + 1)
    values = nn.functional.gelu(normal(tokens, few, seed=seed + 2) @ mix + noise - 0.5)
    return torch.cov(values.repeat(1, copies).T, correction=0).reshape(width, width)


def assert_as_plain_loop(covariance: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same errors, and the same order for as long as no two gains tie up to rounding."""
    order, errors = tp_amp.reconstruction_order(covariance, weight)
    expected, expected_errors, margins = plain_loop(covariance, weight)
    clear = next((i for i, margin in enumerate(margins) if margin < 1e-9), len(margins))
    assert order[:clear].tolist() == expected[:clear]
    assert sorted(order.tolist()) == list(range(len(covariance)))
    size = len(expected_errors)
    assert float((errors[:size] - expected_errors).abs().max()) <= 1e-9 * float(errors[0])
    assert bool((errors.diff() <= 0).all())
    assert bool((errors >= 0).all())
    return order, errors


@pytest.mark.parametrize("width", [1, 2, PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 3, 200])
@pytest.mark.parametrize("decay", [0.5, 2.0])
def test_panels_give_the_order_of_the_plain_loop(width: int, decay: float) -> None:
    covariance, weight = gelu_covariance(width, decay=decay), normal(20, width, seed=9)
    order, _ = assert_as_plain_loop(covariance, weight)
    assert order[:-1].tolist() == plain_loop(covariance, weight)[0][:-1]


@pytest.mark.parametrize("tokens", [2, PANEL - 1, PANEL, PANEL + 1, PANEL + 2, 150])
def test_fewer_tokens_than_neurons(tokens: int) -> None:
    """What is left has rank `tokens - 1`; with rank one left, all gains tie."""
    covariance, weight = gelu_covariance(180, tokens), normal(20, 180, seed=9)
    order, errors = assert_as_plain_loop(covariance, weight)
    assert float(errors[tokens - 1]) < 1e-9 * float(errors[0])
    last = order[tokens - 1 :].tolist()
    assert last == sorted(last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float32_and_more_outputs_than_neurons(dtype: torch.dtype) -> None:
    covariance, weight = gelu_covariance(100).to(dtype), normal(150, 100, seed=9).to(dtype)
    order, errors = assert_as_plain_loop(covariance, weight)
    assert errors.dtype == torch.float64
    assert order.dtype == torch.int64


def test_of_duplicated_neurons_the_first_stays() -> None:
    covariance, weight = gelu_covariance(210, copies=3), normal(20, 210, seed=9)
    order, errors = assert_as_plain_loop(covariance, weight)
    assert sorted(order[:70].tolist()) == list(range(70))
    assert order[70:].tolist() == list(range(70, 210))
    merged = weight.reshape(20, 3, 70).sum(1)
    once = tp_amp.reconstruction_order(covariance[:70, :70], merged)
    assert order[:70].tolist() == once[0].tolist()
    assert torch.allclose(errors[:71], once[1], rtol=0, atol=1e-9 * float(errors[0]))


@pytest.mark.parametrize("distance", [1e-2, 1e-3, 1e-4])
def test_near_copies(distance: float) -> None:
    """A pick takes its near copy's variance down to rounding of what the panel carries along."""
    covariance, weight = gelu_covariance(200, copies=2), normal(20, 200, seed=9)
    covariance[100:, 100:] += distance**2 * gelu_covariance(100, seed=5)
    assert_as_plain_loop(covariance, weight)


def test_neurons_that_never_vary() -> None:
    covariance, weight = gelu_covariance(200), normal(20, 200, seed=9)
    covariance[::3] = 0
    covariance[:, ::3] = 0
    order, _ = assert_as_plain_loop(covariance, weight)
    assert order[-67:].tolist() == list(range(0, 200, 3))


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_outputs_that_need_few_directions(rank: int) -> None:
    weight = normal(20, rank) @ normal(rank, 150, seed=1)
    order, _ = assert_as_plain_loop(gelu_covariance(150), weight)
    if rank == 0:
        assert order.tolist() == list(range(150))


def test_ties_go_by_index() -> None:
    order, errors = assert_as_plain_loop(torch.eye(150), torch.eye(150))
    assert order.tolist() == list(range(150))
    assert errors.tolist() == list(range(150, -1, -1))
    rotation = torch.linalg.qr(normal(150, 150)).Q
    order, _ = tp_amp.reconstruction_order(torch.eye(150), rotation)
    assert order.tolist() == list(range(150))


@pytest.mark.parametrize("decades", [6, 12, 40])
def test_spectrum_that_falls_fast(decades: int) -> None:
    """Gains fall by many orders within one panel: squared norms are computed afresh there."""
    basis = torch.linalg.qr(normal(140, 140)).Q
    covariance = (basis * torch.logspace(0, -decades, 140, dtype=torch.double)) @ basis.T
    assert_as_plain_loop(covariance, normal(20, 140, seed=9))
    one = torch.diag(torch.logspace(0, -11.5, 140, dtype=torch.double)[torch.randperm(140)])
    assert_as_plain_loop(one, normal(20, 140, seed=9))


@pytest.mark.parametrize("panel", [1, 7, 1000])
def test_order_does_not_depend_on_the_panel(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    covariance, weight = gelu_covariance(150), normal(20, 150, seed=9)
    expected = tp_amp.reconstruction_order(covariance, weight)
    monkeypatch.setattr(pivoting, "PANEL", panel)
    found = tp_amp.reconstruction_order(covariance, weight)
    assert torch.equal(found[0], expected[0])
    assert torch.allclose(found[1], expected[1], rtol=0, atol=1e-12 * float(expected[1][0]))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_order_on_cuda_is_that_on_the_cpu() -> None:
    covariance, weight = gelu_covariance(300), normal(40, 300, seed=9)
    order, errors = tp_amp.reconstruction_order(covariance.cuda(), weight.cuda())
    assert errors.is_cuda
    assert order.tolist() == tp_amp.reconstruction_order(covariance, weight)[0].tolist()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_at_a_few_matrices() -> None:
    """Resident memory, which allocations that are freed and never used again count in, too."""
    code = (
        "import torch, tp_amp\n"
        "def peak(): \n"
        "    lines = dict(line.split(':') for line in open('/proc/self/status'))\n"
        "    return 1024 * int(lines['VmHWM'].split()[0])\n"
        "hidden, outputs = 1536, 384\n"
        "x = torch.randn(hidden, hidden, dtype=torch.float64)\n"
        "covariance, weight = x @ x.T / hidden, torch.randn(outputs, hidden).double()\n"
        "tp_amp.reconstruction_order(covariance[:99, :99], weight[:, :99])\n"
        "del x\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"  # the peak starts from what is held now
        "before = peak()\n"
        "tp_amp.reconstruction_order(covariance, weight)\n"
        "print((peak() - before) / covariance.nbytes)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert float(output.stdout) < 5


@pytest.mark.timing
@pytest.mark.usefixtures("one_thread")
def test_five_times_faster_than_the_plain_loop_at_1536_by_384() -> None:
    """In CPU seconds of one thread; measured at 20 times."""
    covariance, weight = gelu_covariance(1536), normal(384, 1536, seed=9)
    start = time.process_time()
    order, _ = tp_amp.reconstruction_order(covariance, weight)
    middle = time.process_time()
    expected = plain_loop(covariance, weight)[0]
    assert time.process_time() - middle > 5 * (middle - start)
    assert order.tolist() == expected
