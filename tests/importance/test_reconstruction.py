import copy
import logging
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from toys import ToyViT, fingerprint, images, masked, relative, toy

import tp_amp
from tp_amp.algebra import pivoting
from tp_amp.importance import hidden_moments as hidden_module
from tp_amp.importance.hidden_moments import hidden_moments
from tp_amp.importance.objectives import Objective
from tp_amp.importance.sensitivity import output_sensitivity


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


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


def trace_left(covariance: Tensor, weight: Tensor, kept: list[int]) -> float:
    c, w = covariance.numpy(), weight.numpy()
    if kept:
        across = c[:, kept]
        c = c - across @ np.linalg.inv(c[np.ix_(kept, kept)]) @ across.T
    return float(np.trace(w @ c @ w.T))


def naive_order(covariance: Tensor, weight: Tensor, steps: int) -> list[int]:
    kept: list[int] = []
    for _ in range(steps):
        free = [j for j in range(len(covariance)) if j not in kept]
        kept.append(min(free, key=lambda j: trace_left(covariance, weight, [*kept, j])))
    return kept


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
def test_five_times_faster_than_the_plain_loop_at_1536_by_384() -> None:
    """In CPU seconds of one thread; measured at 20 times."""
    covariance, weight = gelu_covariance(1536), normal(384, 1536, seed=9)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.process_time()
        order, _ = tp_amp.reconstruction_order(covariance, weight)
        middle = time.process_time()
        expected = plain_loop(covariance, weight)[0]
        assert time.process_time() - middle > 5 * (middle - start)
    finally:
        torch.set_num_threads(threads)
    assert order.tolist() == expected


DOWN = "blocks.0.mlp.second", "blocks.1.mlp.second"


def activations(model: nn.Module, name: str, batch: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _m, args: seen.append(args[0].flatten(0, -2).double())
    )
    with torch.no_grad():
        model(batch)
    handle.remove()
    return seen[0]


def expected_order(model: nn.Module, name: str, batch: Tensor) -> list[int]:
    values = activations(model, name, batch)
    weight = model.get_submodule(name).weight.detach().double()
    return naive_order(torch.cov(values.T, correction=0), weight, values.shape[1] - 1)


def test_plan_keeps_the_first_picks() -> None:
    model, batch = toy(hidden=14), images(30)
    importance = tp_amp.ReconstructionImportance(None).collect(
        model, batch.split(7), progress=False
    )
    plan = tp_amp.plan_from_importance(model, images(1), importance, 0.5)
    for name in DOWN:
        assert plan.keep[name] == sorted(expected_order(model, name, batch)[:7])
        assert len(importance.errors[name]) == 15


def test_collect_leaves_the_model_as_it_was() -> None:
    model = toy().train()
    model.head.weight.requires_grad_(False)
    before = fingerprint(model)
    tp_amp.ReconstructionImportance(None).collect(model, [images()], progress=False)
    assert fingerprint(model) == before


def meta_pruner(model: ToyViT, importance: object) -> tp.pruner.MetaPruner:
    blocks = [layer for b in model.blocks for layer in (b.query, b.key, b.value, b.project)]
    return tp.pruner.MetaPruner(
        model,
        (images(1),),
        importance,
        pruning_ratio=0.5,
        ignored_layers=[model.embed, model.head, *blocks],
    )


def test_meta_pruner_keeps_the_first_picks() -> None:
    model, batch = toy(hidden=14), images(30)
    keep = {name: sorted(expected_order(model, name, batch)[:7]) for name in DOWN}
    dense = copy.deepcopy(model)
    meta_pruner(model, tp_amp.ReconstructionImportance(None, data=[batch])).step()
    with torch.no_grad():
        assert relative(model(batch), masked(dense, keep)(batch)) < 1e-5


def test_data_is_collected_again_when_a_weight_has_changed() -> None:
    model, batch = toy(hidden=14), images(30)
    importance = tp_amp.ReconstructionImportance(None, data=[batch])
    for _ in range(2):
        plan = tp_amp.plan_from_importance(model, images(1), importance, 0.5)
        assert plan.keep[DOWN[0]] == sorted(expected_order(model, DOWN[0], batch)[:7])
        first = plan.keep[DOWN[0]]
        with torch.no_grad():
            model.blocks[0].mlp.second.weight.mul_(torch.linspace(0, 30, 14).roll(5))
    assert plan.keep[DOWN[0]] == first
    again = tp_amp.plan_from_importance(model, images(1), importance, 0.5).keep[DOWN[0]]
    assert again == sorted(expected_order(model, DOWN[0], batch)[:7]) != first


def test_other_projections_are_collected_when_asked_about() -> None:
    model = toy(hidden=8)  # fewer than twelve, so no layer has more inputs than outputs
    importance = tp_amp.ReconstructionImportance(None, data=[images(30)])
    plan = tp_amp.plan_from_importance(model, images(1), importance, 0.5)
    assert plan.keep[DOWN[1]] == sorted(expected_order(model, DOWN[1], images(30))[:4])


def test_one_by_one_convolution_is_ordered_as_the_same_linear() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 7, 3), nn.ReLU(), nn.Conv2d(7, 3, 1))
    importance = tp_amp.ReconstructionImportance(None)
    importance.collect(model, [images(30)], layers=["2"], progress=False)
    values = model[:2](images(30)).detach().double().movedim(1, -1).flatten(0, -2)
    covariance = torch.cov(values.T, correction=0)
    weight = model[2].weight.detach().double().flatten(1)
    assert importance.orders["2"][:6].tolist() == naive_order(covariance, weight, 6)


def test_layers_beyond_the_memory_are_collected_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = toy(), images(30)
    once = tp_amp.ReconstructionImportance(None).collect(model, [batch], progress=False)
    monkeypatch.setattr(hidden_module, "_BYTES", 8 * 20**2)
    turns = tp_amp.ReconstructionImportance(None).collect(model, [batch], progress=False)
    assert once.orders.keys() == turns.orders.keys() >= set(DOWN)
    for name in DOWN:
        assert torch.equal(once.orders[name], turns.orders[name])
    with pytest.raises(TypeError, match="one-shot"):
        tp_amp.ReconstructionImportance(None).collect(model, iter([batch]), progress=False)


@pytest.mark.parametrize("name", ["blocks.7", "blocks.0.norm1", "embed"])
def test_layer_that_is_no_projection_raises(name: str) -> None:
    model = toy()
    with pytest.raises(ValueError, match=name):
        tp_amp.ReconstructionImportance(None).collect(model, [images()], layers=[name])


def test_layer_that_is_not_called_raises() -> None:
    model = toy()
    model.unused = nn.Linear(9, 3)
    with pytest.raises(ValueError, match="unused was not called"):
        tp_amp.ReconstructionImportance(None).collect(model, [images()], layers=["unused"])


def test_nan_images_raise() -> None:
    bad = images()
    bad[3, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.second are not finite.*NaN"):
        tp_amp.ReconstructionImportance(None).collect(toy(), [images(), bad], layers=[DOWN[1]])


def test_pruned_layer_raises_without_data() -> None:
    model = toy()
    importance = tp_amp.ReconstructionImportance(None).collect(model, [images()], progress=False)
    tp_amp.apply_plan(model, images(1), tp_amp.PruningPlan({DOWN[0]: list(range(10))}))
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.second has 10 input .* 20 scores"):
        tp_amp.plan_from_importance(model, images(1), importance, 0.5)


def test_group_without_collected_layer_gives_none(caplog: pytest.LogCaptureFixture) -> None:
    model = toy()
    importance = tp_amp.ReconstructionImportance(None)
    importance.collect(model, [images()], layers=[DOWN[0]], progress=False)
    graph = tp.DependencyGraph().build_dependency(model, images(1))
    group = graph.get_pruning_group(
        model.blocks[1].mlp.first, tp.prune_linear_out_channels, list(range(20))
    )
    with caplog.at_level(logging.WARNING):
        assert importance(group) is None
    assert "no layer that reads the group of blocks.1.mlp.first" in caplog.text


def test_group_of_a_wide_convolution_gives_none() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 1), nn.ReLU(), nn.Conv2d(6, 3, 3))
    graph = tp.DependencyGraph().build_dependency(model, images(1))
    group = graph.get_pruning_group(model[0], tp.prune_conv_out_channels, list(range(6)))
    assert tp_amp.ReconstructionImportance(None, data=[images()])(group) is None


def test_errors_count_by_what_they_cost_the_predictions() -> None:
    """Half the trace of the Fisher information times the error, in nats."""
    model, name = toy(), "blocks.1.mlp.second"
    batches = images(60).split(10)
    found = tp_amp.ReconstructionImportance("prediction").collect(model, batches, layers=[name])
    fisher = output_sensitivity(model, [name], batches, Objective("prediction"))[name]
    weight = model.get_submodule(name).weight.detach().double()
    covariance = hidden_moments(model, [name], batches, progress=False)[name].whole.inputs
    for count in (0, 5, 12):
        kept = found.orders[name][:count]
        left = (
            covariance
            - covariance[:, kept]
            @ torch.linalg.pinv(covariance[kept][:, kept], hermitian=True)
            @ covariance[kept]
        )
        nats = 0.5 * torch.trace(fisher @ weight @ left @ weight.T)
        assert float(found.errors[name][count]) == pytest.approx(float(nats), rel=1e-4, abs=1e-9)


def test_layers_that_are_not_called_are_passed_over_by_default() -> None:
    model = toy()
    model.unused = torch.nn.Linear(9, 2)
    found = tp_amp.ReconstructionImportance("prediction").collect(model, [images()])
    assert "unused" not in found.orders
    assert "blocks.0.mlp.second" in found.orders
