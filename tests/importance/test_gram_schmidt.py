from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import scipy.linalg
import torch
import torch_pruning as tp
from small_models import Convolutions, packed, vit
from torch import Tensor, nn
from torch_pruning.pruner import function
from toys import fingerprint, images, masked, relative, toy

import tp_amp
from tp_amp.importance import gram_schmidt

CHECKPOINTS = Path(__file__).parents[2] / "benchmarks" / "checkpoints"


def random(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def naive_round(weight: Tensor, count: int) -> list[int]:
    """The paper's loop; it stops where only rounding is left."""
    residual, norms, picks = weight.double(), weight.double().norm(dim=1), []
    for _ in range(count):
        left = residual.norm(dim=1)
        left[left < 1e-5 * norms] = 0
        left[picks] = 0
        if left.max() == 0:
            break
        pick = int(left.argmax())
        direction = residual[pick] / residual[pick].norm()
        residual = residual - torch.outer(residual @ direction, direction)
        picks.append(pick)
    return picks


def naive_order(weight: Tensor) -> list[int]:
    left = [i for i in range(len(weight)) if weight[i].any()]
    order = [i for i in range(len(weight)) if not weight[i].any()]
    order, zeros = [], order
    while left:
        picks = [left[i] for i in naive_round(weight[left], weight.shape[1])]
        order += picks
        left = [i for i in left if i not in picks]
    return order + zeros


def assert_greedy(weight: Tensor, picks: Tensor) -> None:
    """Each pick of a first round has the largest residual, by a QR decomposition of the picks."""
    assert len(picks.unique()) == len(picks)
    basis, triangle = torch.linalg.qr(weight[picks].double().T)
    largest = torch.zeros(len(picks), dtype=torch.float64)
    for rows in weight.split(2048):
        squares = (rows.double() @ basis).square()
        residuals = rows.double().square().sum(1, keepdim=True) - squares.cumsum(1) + squares
        largest = largest.maximum(residuals.max(0).values)
    assert (triangle.diagonal().square() >= (1 - 1e-9) * largest).all()


@pytest.mark.parametrize(
    ("rows", "columns"), [(30, 10), (10, 30), (10, 10), (1, 7), (7, 1), (700, 40), (1100, 64)]
)
def test_order_is_that_of_the_naive_loop(rows: int, columns: int) -> None:
    weight = random(rows, columns)
    order = tp_amp.gram_schmidt_order(weight)
    assert order.dtype == torch.int64
    assert order.tolist() == naive_order(weight)


@pytest.mark.parametrize("candidates", [1, 7, 40])
def test_order_does_not_depend_on_the_size_of_blocks(
    candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random(200, 30) * torch.linspace(0.01, 1, 200)[:, None]
    expected = naive_order(weight)
    monkeypatch.setattr(gram_schmidt, "CANDIDATES", candidates)
    assert tp_amp.gram_schmidt_order(weight).tolist() == expected


@pytest.mark.parametrize("rows", [60, 900])
@pytest.mark.parametrize("rank", [1, 5, 16])
def test_low_rank_starts_the_next_round_when_the_rank_is_used_up(rows: int, rank: int) -> None:
    weight = (random(rows, rank).double() @ random(rank, 24, seed=1).double()).float()
    order = tp_amp.gram_schmidt_order(weight)
    assert order[:rank].tolist() == naive_round(weight, 24)
    assert order.tolist() == naive_order(weight)


def test_duplicated_and_scaled_rows_wait_for_the_next_round() -> None:
    weight = random(20, 40)
    copies = torch.cat([weight, 0.5 * weight, weight])
    order = tp_amp.gram_schmidt_order(copies).tolist()
    assert order == naive_order(copies)
    first = tp_amp.gram_schmidt_order(weight).tolist()
    assert order[:20] == first, "of identical rows the lower index comes first"
    assert order[20:40] == [i + 40 for i in first]


@pytest.mark.parametrize(
    "weight",
    [torch.eye(30), torch.ones(20, 8), torch.zeros(9, 4), 3 * torch.eye(5)[[0, 1, 0, 1, 2]]],
    ids=["identity", "equal rows", "zeros", "two pairs"],
)
def test_ties_go_by_index(weight: Tensor) -> None:
    order = tp_amp.gram_schmidt_order(weight).tolist()
    assert order == naive_order(weight)
    assert sorted(order) == list(range(len(weight)))


def test_ties_up_to_rounding_go_by_index() -> None:
    rotation = torch.linalg.qr(random(60, 60).double()).Q
    assert tp_amp.gram_schmidt_order(rotation).tolist() == list(range(60))


def test_zero_rows_come_last_by_index() -> None:
    weight = random(12, 4)
    weight[[2, 7, 5]] = 0
    order = tp_amp.gram_schmidt_order(weight).tolist()
    assert order[-3:] == [2, 5, 7]
    assert order == naive_order(weight)


def test_scales_do_not_matter() -> None:
    """Rows of very different length, and weights far below float32's square root of tiny."""
    weight = random(40, 12) * torch.logspace(-9, 9, 40)[torch.randperm(40)][:, None]
    assert tp_amp.gram_schmidt_order(weight).tolist() == naive_order(weight)
    small = random(40, 12) * 1e-30
    assert tp_amp.gram_schmidt_order(small).tolist() == naive_order(small)


def test_ill_conditioned_rows_are_picked_exactly() -> None:
    columns = torch.logspace(0, -4.5, 40, dtype=torch.float64)
    weight = random(120, 40).double() * columns
    assert tp_amp.gram_schmidt_order(weight, 40).tolist() == naive_round(weight, 40)


@pytest.mark.parametrize("count", [0, 1, 5, 12, 13, 40])
def test_count_gives_the_first_picks(count: int) -> None:
    weight = random(40, 12)
    order = tp_amp.gram_schmidt_order(weight, count)
    assert order.tolist() == tp_amp.gram_schmidt_order(weight)[:count].tolist()


def test_first_round_is_scipys_pivot_order() -> None:
    weight = random(1000, 96)
    pivots = scipy.linalg.qr(weight.double().numpy().T, mode="r", pivoting=True)[1]
    assert tp_amp.gram_schmidt_order(weight, 96).tolist() == pivots[:96].tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_and_layouts_leave_the_weight_as_it_was(dtype: torch.dtype) -> None:
    weight = nn.Parameter(random(12, 50).to(dtype)).T
    before = weight.detach().clone()
    order = tp_amp.gram_schmidt_order(weight)
    assert order.tolist() == naive_order(before)
    assert torch.equal(weight, before)
    assert not order.requires_grad


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_order_on_cuda_is_that_on_the_cpu() -> None:
    weight = random(1500, 96)
    order = tp_amp.gram_schmidt_order(weight.cuda())
    assert order.is_cuda
    assert order.tolist() == tp_amp.gram_schmidt_order(weight).tolist()


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_order_on_trained_weights_is_that_of_the_naive_loop(name: str) -> None:
    from safetensors.torch import load_file

    if not (CHECKPOINTS / f"{name}.safetensors").is_file():
        pytest.skip("the reference models are not trained yet")
    weights = load_file(CHECKPOINTS / f"{name}.safetensors")
    for path in [path for path in weights if path.endswith(("fc1.weight", "qkv.weight"))][-2:]:
        order = tp_amp.gram_schmidt_order(weights[path])
        assert order.tolist() == naive_order(weights[path]), path


def test_bad_weights_are_named() -> None:
    with pytest.raises(
        TypeError, match=r"floating tensor of shape \(hidden, in\), found torch.int64"
    ):
        tp_amp.gram_schmidt_order(torch.ones(2, 2, dtype=torch.long))
    with pytest.raises(TypeError, match="found list"):
        tp_amp.gram_schmidt_order([[1.0]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(2, 3, 1, 1\); flatten the filters"):
        tp_amp.gram_schmidt_order(torch.ones(2, 3, 1, 1))
    with pytest.raises(ValueError, match="not finite"):
        tp_amp.gram_schmidt_order(torch.tensor([[1.0, float("nan")]]))
    for count in (-1, 3):
        with pytest.raises(ValueError, match=f"can't pick {count} of 2 rows"):
            tp_amp.gram_schmidt_order(torch.ones(2, 2), count)


@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 383, 384, 385, 511, 512, 513])
@pytest.mark.parametrize("columns", [1, 2, 24])
def test_numbers_of_rows_around_the_sizes_of_blocks(rows: int, columns: int) -> None:
    weight = random(rows, columns)
    assert tp_amp.gram_schmidt_order(weight).tolist() == naive_order(weight)


@pytest.mark.parametrize("cached", [1, 7, 1000])
def test_order_does_not_depend_on_how_many_rows_are_rotated_at_once(
    cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random(150, 30)
    monkeypatch.setattr(gram_schmidt, "CACHED", cached)
    assert tp_amp.gram_schmidt_order(weight).tolist() == naive_order(weight)


def test_near_copies_are_picked_by_what_is_left_of_them() -> None:
    """A copy's residual falls by eight digits at once, within one block."""
    weight = random(60, 90).double()
    weight = torch.cat([weight, weight + 1e-4 * random(60, 90, seed=1).double()])
    assert tp_amp.gram_schmidt_order(weight, 90).tolist() == naive_round(weight, 90)


@pytest.mark.parametrize("decades", [3, 5])
def test_rows_with_a_spectrum_that_decays(decades: int) -> None:
    columns = torch.logspace(0, -decades, 200, dtype=torch.float64)
    mix = torch.linalg.qr(random(200, 200).double()).Q
    weight = ((random(700, 200).double() * columns) @ mix).float()
    assert tp_amp.gram_schmidt_order(weight, 150).tolist() == naive_round(weight, 150)


@pytest.mark.timing
@pytest.mark.usefixtures("one_thread")
def test_ten_times_faster_than_the_naive_loop_at_3072_by_768() -> None:
    """Both in float64, in CPU seconds of one thread; the two take turns on a noisy machine."""
    weight, ratios = random(3072, 768), []
    for _ in range(3):
        start = time.process_time()
        expected = naive_round(weight, 768)
        middle = time.process_time()
        order = tp_amp.gram_schmidt_order(weight, 768)
        ratios.append((middle - start) / (time.process_time() - middle))
        assert order.tolist() == expected
        if ratios[-1] > 10:
            return
    raise AssertionError(ratios)


@pytest.mark.timing
def test_largest_layer_takes_under_a_minute_and_two_gigabytes() -> None:
    """EVA-CLIP-E's up layer, in a process of its own for its peak memory."""
    code = (
        "import resource, sys, torch, tp_amp\n"
        "weight = torch.randn(15360, 1792, generator=torch.Generator().manual_seed(0))\n"
        "start = resource.getrusage(resource.RUSAGE_SELF).ru_utime\n"
        "picks = tp_amp.gram_schmidt_order(weight, 1792)\n"
        "usage = resource.getrusage(resource.RUSAGE_SELF)\n"
        "peak = usage.ru_maxrss\n"
        # On Linux a process is born with its parent's ru_maxrss; this peak is its own.
        "if sys.platform == 'linux':\n"
        "    status = dict(line.split(':') for line in open('/proc/self/status'))\n"
        "    peak = status['VmHWM'].split()[0]\n"
        "print(usage.ru_utime - start, peak, *picks.tolist())"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    seconds, memory, *picks = output.stdout.split()
    assert float(seconds) < 60
    assert int(memory) < 2e9 / (1 if sys.platform == "darwin" else 1024)
    weight = torch.randn(15360, 1792, generator=torch.Generator().manual_seed(0))
    assert_greedy(weight, torch.tensor([int(pick) for pick in picks]))


def mlp_group(model: nn.Module, channels: list[int] | None = None, block: int = 0) -> Any:
    mlp = tp_amp.find_mlps(model, images(1))[block]
    graph = tp.DependencyGraph().build_dependency(model, (images(1),), verbose=False)
    up: Any = model.get_submodule(mlp.up[0])
    every = list(range(mlp.width)) if channels is None else channels
    return graph.get_pruning_group(up, function.prune_linear_out_channels, every)


def order_of(scores: Tensor) -> list[int]:
    return scores.argsort(descending=True).tolist()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("weights", ["up", "both"])
def test_score_is_the_rank_of_the_neurons_rows(gated: bool, weights: Any) -> None:
    model = toy(gated=gated)
    mlp = model.blocks[0].mlp
    ups = [mlp.gate.weight, mlp.value.weight] if gated else [mlp.first.weight]
    down = (mlp.out if gated else mlp.second).weight
    rows = torch.cat([*ups, down.T] if weights == "both" else ups, 1).detach()
    before = fingerprint(model)
    scores = tp_amp.GramSchmidtImportance(weights)(mlp_group(model))
    assert scores is not None
    assert scores.shape == (20,)
    assert order_of(scores) == naive_order(rows)
    assert scores.sort().values.tolist() == pytest.approx([(i + 1) / 20 for i in range(20)])
    assert fingerprint(model) == before


def test_partial_groups_are_scored_in_their_own_order_and_not_changed() -> None:
    model = toy()
    channels = [7, 3, 15, 0]
    group = mlp_group(model, channels)
    before = [(list(item.idxs), list(item.root_idxs)) for item in group.items]
    scores = tp_amp.GramSchmidtImportance()(group)
    assert scores is not None
    assert order_of(scores) == naive_order(model.blocks[0].mlp.first.weight[channels].detach())
    assert [(item.idxs, item.root_idxs) for item in group.items] == before


@pytest.mark.parametrize("root", ["qkv", "proj"])
def test_packed_attention_is_scored_by_the_rows_of_q_k_and_v(root: str) -> None:
    model = vit()
    attention = model.blocks[0].attn
    inputs = torch.randn(1, 3, 16, 16)
    graph = tp.DependencyGraph().build_dependency(model, (inputs,), verbose=False)
    if root == "proj":
        group = graph.get_pruning_group(
            attention.proj, function.prune_linear_in_channels, list(range(24))
        )
        q, k, v = attention.qkv.weight.detach().split(24)
        rows = torch.cat([q, k, v], 1)
    else:
        group = graph.get_pruning_group(
            attention.qkv, function.prune_linear_out_channels, list(range(72))
        )
        rows = attention.qkv.weight.detach()
    scores = tp_amp.GramSchmidtImportance()(group)
    assert scores is not None
    assert order_of(scores) == naive_order(rows)


def test_residual_stream_is_scored_by_all_that_write_to_it() -> None:
    model = vit(depth=2)
    graph = tp.DependencyGraph().build_dependency(
        model, (torch.randn(1, 3, 16, 16),), verbose=False
    )
    group = graph.get_pruning_group(
        model.patch_embed.proj, function.prune_conv_out_channels, list(range(24))
    )
    writers = [
        model.patch_embed.proj,
        *(layer for b in model.blocks for layer in (b.attn.proj, b.mlp.fc2)),
    ]
    rows = torch.cat([layer.weight.detach().flatten(1) for layer in writers], 1)
    scores = tp_amp.GramSchmidtImportance()(group)
    assert scores is not None
    assert order_of(scores) == naive_order(rows)


def test_convolutions_are_scored_by_their_flattened_filters() -> None:
    torch.manual_seed(0)
    model = Convolutions()
    graph = tp.DependencyGraph().build_dependency(model, (torch.randn(1, 3, 8, 8),), verbose=False)
    group = graph.get_pruning_group(model.second, function.prune_conv_out_channels, list(range(8)))
    filters = model.second.weight.detach().flatten(1)
    columns = model.head.weight.detach().reshape(5, 8, 16).permute(1, 2, 0).flatten(1)
    for weights, rows in {"up": filters, "both": torch.cat([filters, columns], 1)}.items():
        scores = tp_amp.GramSchmidtImportance(weights)(group)  # type: ignore[arg-type]
        assert scores is not None
        assert order_of(scores) == naive_order(rows), weights


def test_a_group_that_nothing_makes_has_no_score(caplog: pytest.LogCaptureFixture) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(x))

    model = Reader()
    graph = tp.DependencyGraph().build_dependency(model, (torch.randn(2, 4),), verbose=False)
    group = graph.get_pruning_group(model.norm, function.prune_layernorm_out_channels, [0, 1, 2, 3])
    assert tp_amp.GramSchmidtImportance()(group) is None
    assert "no score for the group of norm" in caplog.text


def test_weights_that_are_not_finite_are_named() -> None:
    model = toy()
    group = mlp_group(model)
    with torch.no_grad():
        model.blocks[0].mlp.first.weight[2, 3] = float("inf")
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.first are not finite; load sound"):
        tp_amp.GramSchmidtImportance()(group)
    with pytest.raises(ValueError, match="'up' or 'both', found 'down'"):
        tp_amp.GramSchmidtImportance("down")  # type: ignore[arg-type]


def test_is_no_gradient_importance() -> None:
    """Scripts run a backward pass for these two."""
    importance = tp_amp.GramSchmidtImportance()
    assert isinstance(importance, tp.importance.Importance)
    assert not isinstance(importance, tp.importance.TaylorImportance)
    assert not isinstance(importance, tp.importance.HessianImportance)


def test_global_ranking_takes_the_same_share_of_every_layer() -> None:
    model = toy(depth=3)
    blocks = [layer for b in model.blocks for layer in (b.query, b.key, b.value, b.project)]
    tp.pruner.MetaPruner(
        model,
        (images(1),),
        tp_amp.GramSchmidtImportance(),
        global_pruning=True,
        pruning_ratio=0.4,
        ignored_layers=[model.embed, model.head, *blocks],
    ).step()
    assert [block.mlp.first.out_features for block in model.blocks] == [12, 12, 12]


def test_iterative_steps_rank_the_weights_of_the_moment() -> None:
    model = toy(depth=1)
    blocks = [layer for b in model.blocks for layer in (b.query, b.key, b.value, b.project)]
    pruner = tp.pruner.MetaPruner(
        model,
        (images(1),),
        tp_amp.GramSchmidtImportance(),
        pruning_ratio=0.5,
        iterative_steps=2,
        ignored_layers=[model.embed, model.head, *blocks],
    )
    for width in (15, 10):
        weight = model.blocks[0].mlp.first.weight.detach()
        expected = weight[sorted(naive_order(weight)[:width])]
        pruner.step()
        assert torch.equal(model.blocks[0].mlp.first.weight, expected)
        with torch.no_grad():
            model.blocks[0].mlp.first.weight.mul_(torch.linspace(0.5, 2, width)[:, None])


def test_adaptive_pruner_takes_it() -> None:
    model = toy()
    importance = tp_amp.GramSchmidtImportance()
    order = {
        mlp.down: order_of(importance(mlp_group(model, block=i)))  # type: ignore[arg-type]
        for i, mlp in enumerate(tp_amp.find_mlps(model, images(1)))
    }
    pruner = tp_amp.AdaptiveMLPPruner(
        model, images(1), importance, [images()], max_increase=0.05, progress=False
    )
    pruner.step()
    assert any(width < 20 for width in pruner.plan.widths.values())
    for name, kept in pruner.plan.keep.items():
        assert kept == sorted(order[name][: len(kept)])


def test_packed_gate_and_value_are_one_neurons_rows() -> None:
    model = packed()
    mlp, inputs = model.blocks[0].mlp, torch.randn(2, 3, 16, 16)
    rows = torch.cat(mlp.fc1.weight.detach().chunk(2), 1)
    importance = tp_amp.GramSchmidtImportance()
    plan = tp_amp.plan_from_importance(model, inputs, importance, {"blocks.0.mlp.fc2": 9})
    assert plan.keep == {"blocks.0.mlp.fc2": sorted(naive_order(rows)[:9])}
    expected = masked(model, plan.keep)(inputs)
    tp_amp.apply_plan(model, inputs, plan)
    assert relative(model(inputs), expected) < 1e-5
