"""Two and four gloo processes, against one process with the whole batches."""

from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from sensitivities import output_sensitivity, place_sensitivity
from torch import Tensor, nn
from toys import images, relative, toy

import tp_amp
from tp_amp import AdaptiveMLPPruner, EntropyTaylorImportance, ReconstructionImportance
from tp_amp.compensation.costs import spread
from tp_amp.compensation.refinement import refine
from tp_amp.compensation.token_steps import Batches, Example
from tp_amp.importance.objectives import Objective, mean_objective
from tp_amp.running.inputs import Inputs

pytestmark = pytest.mark.slow

# Images of each rank in the first batch and in the second: uneven, and none is no batch.
SIZES = {
    1: [[8], [5]],
    2: [[5, 3], [5, 0]],
    4: [[1, 3, 2, 2], [4, 0, 1, 0]],
}
KINDS = {"prediction": {"classes": 5}, "similarity": {"classes": 0}}
# One process for each rank, forked before any thread is there.
CODE = "import sys; sys.path[:0] = {paths}; import test_distributed; test_distributed.fork_ranks()"


def shards(rank: int, world: int, seed: int) -> list[Tensor]:
    """What a rank reads of two batches."""
    sizes = SIZES[world]
    whole = images(13, seed).split([8, 5])
    pieces = [batch.split(size)[rank] for batch, size in zip(whole, sizes, strict=True)]
    return [piece for piece in pieces if len(piece)]


class Failing:
    """Batches of which the second can't be read, on one rank."""

    def __init__(self, batches: list[Tensor], fails: bool) -> None:
        self.batches, self.fails = batches, fails

    def __iter__(self) -> Iterator[Tensor]:
        yield self.batches[0]
        if self.fails:
            raise ValueError("broken image")
        yield from self.batches[1:]


class Restless:
    """Batches that are others once the search has begun."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches, self.reads = batches, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.reads += 1
        for batch in self.batches:
            yield batch + 1e-6 * max(0, self.reads - 8)


def mean_square(output: Tensor) -> Tensor:
    return output.square().sum(1).mean()


def importance_of(kind: str) -> EntropyTaylorImportance:
    return EntropyTaylorImportance(kind, temperature=0.5)


def pruned(rank: int, world: int, kind: str, calibration: Any = None, **options: Any) -> Any:
    """The plan and the corrections."""
    importance = importance_of(kind)
    importance.data = shards(rank, world, 1)
    calibration = calibration or shards(rank, world, 2)
    model = toy(depth=2, **KINDS[kind])
    pruner = AdaptiveMLPPruner(model, images(1), importance, calibration, **options)
    pruner.step()
    weights = {name: correction.weight for name, correction in pruner.corrections.items()}
    return pruner.plan, weights


def refined(rank: int, world: int) -> dict[str, Tensor]:
    """What a few steps of a regression add to a Linear."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 3)
    own = [shard.flatten(1) for shard in shards(rank, world, 1)]
    examples = [Example(Inputs((x,)), x[:, :3].exp(), None, len(x)) for x in own]
    steps = Batches(lambda inputs: layer(*inputs.args), lambda errors: errors, examples)
    whole = spread(shard[:, 0, 0].exp() for shard in shards(rank, world, 1))
    return refine({"layer": layer}, steps, whole, 3)["layer"]


def every_width(rank: int, world: int) -> tuple[tp_amp.PruningPlan, dict[str, Tensor]]:
    """A ViT cut in its stream, inside its heads and in its MLPs: the plan and the weights."""
    model = small_models.vit(depth=2, img_size=8, patch_size=4, in_chans=1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    example, own = images(1), shards(rank, world, 1)
    tp_amp.rotate(model, example, own, progress=False)
    tp_amp.rotate_heads(model, example, own, progress=False)
    importance = ReconstructionImportance(mean_square, data=own)
    kinds = ("mlp", "qk", "vo", "stream")
    plan = tp_amp.plan_for_target(
        model, example, importance, {"params": 0.6}, widths=kinds, min_width=0
    )
    tp_amp.compensate(model, plan, own, every_linear=True, objective=mean_square, progress=False)
    return plan, model.state_dict()


def refusals(model: nn.Module, own: list[Tensor]) -> list[str]:
    """What the first calls of every way say of a model."""
    example, plan = images(1), tp_amp.PruningPlan({"blocks.0.mlp.second": [0, 1]})
    return [
        caught(tp_amp.find_mlps, model, example),
        caught(importance_of("prediction").collect, model, own),
        caught(tp_amp.compensate, model, plan, own, progress=False),
        caught(AdaptiveMLPPruner, model, example, tp_amp.DIMAPImportance(), own),
    ]


def caught(function: Callable[..., Any], *args: Any, **options: Any) -> str:
    try:
        function(*args, **options)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def sound(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """What must be as with one process."""
    found: dict[str, Any] = {}
    for kind, arguments in KINDS.items():
        model, own = toy(**arguments), shards(rank, world, 1)
        found[f"{kind} scores"] = importance_of(kind).collect(model, own).scores
        found[f"{kind} entropy"] = mean_objective(model, own, Objective(kind, 0.5))
    found["plain plan"] = pruned(rank, world, "prediction")
    options = {"rescore": True, "prune_num_heads": False, "cache_bytes": 0}
    found["rescored plan"] = pruned(rank, world, "similarity", max_increase=0.02, **options)
    options = {"compensation": "affine", "target": {"params": 0.8}}
    found["compensated plan"] = pruned(rank, world, "prediction", **options)
    recipe = tp_amp.Recipe(every_linear=True, refine=3)
    found["refined plan"] = pruned(rank, world, "prediction", compensation=recipe)
    found["refined"] = refined(rank, world)
    found["every width"] = every_width(rank, world)
    model, own = toy(), shards(rank, world, 1)
    found["errors"] = ReconstructionImportance(None).collect(model, own, progress=False).errors
    names = ["blocks.0.mlp.second"]
    found["sensitivity"] = output_sensitivity(model, names, own, Objective(mean_square))
    found["places"] = place_sensitivity(model, names, own, Objective(mean_square))
    return found


def odd(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """What happens only to several processes."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard  # not in torch 2.4

    found: dict[str, Any] = {}
    own, model = shards(rank, world, 1), toy()
    collect = importance_of("prediction").collect
    failing = Failing(own, fails=rank == world - 2)
    found["failing scores"] = caught(importance_of("similarity").collect, toy(classes=0), failing)
    found["failing search"] = caught(pruned, rank, world, "prediction", failing)
    found["other weights"] = caught(importance_of("prediction").collect, toy(seed=rank), own)
    other = (mean_objective, model, own, Objective("prediction"))
    found["other calls"] = caught(*(other if rank else (collect, model, own)))
    # Restless on one rank alone, and nothing to replay on another.
    calibration = Restless(shards(rank, world, 2)) if rank == 1 else None
    with logged("tp_amp.search.prefix_cache") as lines:
        options = {} if rank else {"cache_bytes": 0}
        found["restless plan"] = pruned(rank, world, "prediction", calibration, **options)
    found["gave up"] = lines
    sharded = FullyShardedDataParallel(toy(), device_id=torch.device("cpu"), use_orig_params=True)
    found["sharded"] = refusals(sharded, own) + refusals(fully_shard(toy()), own)
    wrapped = nn.parallel.DistributedDataParallel(toy())
    found["wrapped"] = caught(tp_amp.rotate, wrapped, images(1), own)
    found["no batch"] = caught(collect, model, own if rank else [])
    with logged("tp_amp.running.distributed") as lines:
        collect(model, shards(0, world, 1))
    found["same images"] = lines

    def importance(group: Any) -> Tensor:
        channels = len(group[0].idxs)
        return torch.rand(channels, generator=torch.Generator().manual_seed(rank))

    pruner = AdaptiveMLPPruner(toy(), images(1), importance, own)
    found["other rankings"] = caught(pruner.step)

    with redirect_stderr(Terminal()) as terminal:
        collect(model, own)
    found["progress"] = terminal.getvalue()

    mine = folder / f"{world}-{rank}"
    found["interrupted"] = caught(collect, model, failing, checkpoint=mine)
    with counted(model) as calls:
        again = importance_of("prediction").collect(model, own, checkpoint=mine)
    found["resumed scores"], found["batches not repeated"] = again.scores, len(own) - len(calls)
    found["wrote"] = sorted(path.name for path in mine.glob("*"))
    return found


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def killed(rank: int, world: int) -> tuple[str, float]:
    """One process is killed in its second run of the model; the seconds until others know."""
    model = toy()

    def die(_module: nn.Module, _args: Any) -> None:
        if len(calls) == 2 and rank == world - 2:
            os.kill(os.getpid(), signal.SIGKILL)

    start = time.monotonic()
    with counted(model) as calls:
        model.register_forward_pre_hook(die)
        message = caught(importance_of("prediction").collect, model, shards(rank, world, 1))
    return message, time.monotonic() - start


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """One entry for each run of the model."""
    calls: list[int] = []
    handle = model.register_forward_pre_hook(lambda _module, _args: calls.append(1))
    yield calls
    handle.remove()


@contextmanager
def logged(name: str) -> Iterator[list[str]]:
    """What a logger tells."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(name).addHandler(handler)
    yield lines
    logging.getLogger(name).removeHandler(handler)


def run_rank(rank: int, world: int, folder: Path) -> None:
    if world > 1:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/meeting-{world}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=50),
        )
    found = sound(rank, world, folder)
    if world > 1:
        found |= odd(rank, world, folder)
        torch.save(found, folder / f"{world}-{rank}.pt")
        found["killed"] = killed(rank, world)
    torch.save(found, folder / f"{world}-{rank}.pt")


def fork_ranks() -> None:
    """Called in a process of its own: folder and numbers of processes are its arguments."""
    folder, *worlds = sys.argv[1:]
    torch.set_num_threads(1)
    for world in map(int, worlds):
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                run_rank(rank, world, Path(folder))
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What each rank found, by the number of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    here, package = Path(__file__), Path(tp_amp.__file__)
    paths = [str(here.parent), str(here.parents[1]), str(package.parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(paths=paths), str(folder), *map(str, SIZES)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    found: dict[int, list[dict[str, Any]]] = {}
    for world in SIZES:
        files = [folder / f"{world}-{rank}.pt" for rank in range(world)]
        found[world] = [torch.load(f, weights_only=False) for f in files if f.exists()]
        assert len(found[world]) == world, done.stderr[-4000:]
    return found


@pytest.fixture(scope="module")
def alone(results: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    return results[1][0]


@pytest.fixture(params=[2, 4])
def ranks(
    results: dict[int, list[dict[str, Any]]], request: pytest.FixtureRequest
) -> list[dict[str, Any]]:
    found = results[request.param]
    assert len(found) == request.param
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_entropy_are_those_of_one_process(
    ranks: list[dict[str, Any]], alone: dict[str, Any], kind: str
) -> None:
    assert alone[f"{kind} scores"]
    for found in ranks:
        assert found[f"{kind} entropy"] == ranks[0][f"{kind} entropy"]
        assert found[f"{kind} entropy"] == pytest.approx(alone[f"{kind} entropy"], rel=1e-5)
        assert found[f"{kind} scores"].keys() == alone[f"{kind} scores"].keys()
        for name, scores in alone[f"{kind} scores"].items():
            assert relative(found[f"{kind} scores"][name], scores) < 1e-5
            assert torch.equal(found[f"{kind} scores"][name], ranks[0][f"{kind} scores"][name])


@pytest.mark.parametrize("name", ["plain plan", "rescored plan", "compensated plan"])
def test_every_rank_finds_the_plan_of_one_process(
    ranks: list[dict[str, Any]], alone: dict[str, Any], name: str
) -> None:
    plan, weights = alone[name]
    assert any(width < 20 for width in plan.widths.values())
    for found in ranks:
        own, corrections = found[name]
        assert own.to_json() == ranks[0][name][0].to_json()
        assert own.keep == plan.keep
        for down, probes in plan.probes.items():
            assert [p.width for p in own.probes[down]] == [p.width for p in probes]
            entropies = [p.entropy for p in probes]
            assert [p.entropy for p in own.probes[down]] == pytest.approx(entropies, rel=1e-5)
        assert corrections.keys() == weights.keys()
        for layer, weight in weights.items():
            assert relative(corrections[layer], weight) < 1e-8
            assert torch.equal(corrections[layer], ranks[0][name][1][layer])


def test_refinement_takes_the_steps_of_one_process(
    ranks: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    for found in ranks:
        for key, added in alone["refined"].items():
            assert relative(found["refined"][key], added) < 1e-4
            assert torch.equal(found["refined"][key], ranks[0]["refined"][key])
        plan, weights = found["refined plan"]
        assert plan.keep == alone["refined plan"][0].keep
        assert weights.keys() == alone["refined plan"][1].keys()
        for layer, weight in ranks[0]["refined plan"][1].items():
            assert torch.equal(weights[layer], weight)


def test_every_width_is_cut_and_fitted_as_by_one_process(
    ranks: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    plan, weights = alone["every width"]
    kinds = {type(plan.sites[name]) for name in plan.keep}
    assert kinds == {tp_amp.MLP, tp_amp.HeadRanks, tp_amp.Stream}
    for found in ranks:
        own, fitted = found["every width"]
        assert own.to_json() == ranks[0]["every width"][0].to_json()
        assert own.widths == plan.widths
        for name, values in weights.items():
            torch.testing.assert_close(fitted[name], values, rtol=1e-4, atol=1e-5)
            assert torch.equal(fitted[name], ranks[0]["every width"][1][name])


def test_moments_and_sensitivities_are_those_of_one_process(
    ranks: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    for found in ranks:
        for what in ("errors", "sensitivity", "places"):
            for name, values in alone[what].items():
                assert relative(found[what][name], values) < 1e-5
                assert torch.equal(found[what][name], ranks[0][what][name])


@pytest.mark.parametrize("where", ["failing scores", "failing search", "interrupted"])
def test_a_rank_that_raises_ends_all_with_its_message(
    ranks: list[dict[str, Any]], where: str
) -> None:
    bad = len(ranks) - 2
    for rank, found in enumerate(ranks):
        told = "ValueError: broken image"
        assert found[where] == (told if rank == bad else f"RankError: rank {bad} failed: {told}")


def test_a_wrapped_model_is_not_rotated_and_the_remedy_is_told(ranks: list[dict[str, Any]]) -> None:
    """`rotate` proves a stream on a copy, and torch can't copy what it has wrapped."""
    for found in ranks:
        assert "pass model.module" in found["wrapped"]


def test_a_model_sharded_over_the_ranks_is_refused(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert len(found["sharded"]) == 8
        for message in found["sharded"]:
            assert "has its weights sharded over processes; prune first" in message


def test_ranks_that_differ_are_told(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert "load the same weights on every rank" in found["other weights"]
        assert found["other rankings"].startswith("ValueError: the importance's rankings on ranks")
        assert "rank 0 at the model's weights, rank 1 at the next batch" in found["other calls"]


def test_a_rank_without_any_batch_is_told_and_so_are_the_others(
    ranks: list[dict[str, Any]],
) -> None:
    assert ranks[0]["no batch"].startswith("ValueError: the data holds no batch")
    for found in ranks[1:]:
        assert found["no batch"].startswith("RankError: rank 0 failed: ValueError: the data holds")


def test_the_same_images_on_all_ranks_are_warned_of_once(ranks: list[dict[str, Any]]) -> None:
    assert ["the same images" in line for line in ranks[0]["same images"]] == [True]
    assert not any(found["same images"] for found in ranks[1:])


def test_where_batches_of_one_rank_change_all_ranks_run_the_whole_model(
    ranks: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    for found in ranks:
        assert len(found["gave up"]) == 1
        assert "every probe runs the whole model" in found["gave up"][0]
        assert found["restless plan"][0].to_json() == ranks[0]["restless plan"][0].to_json()
        assert found["restless plan"][0].keep == alone["plain plan"][0].keep


def test_the_first_rank_alone_writes_and_shows_progress(
    ranks: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    assert "scoring" in ranks[0]["progress"]
    assert ranks[0]["wrote"] == ["scores.safetensors"]
    assert not any(found["progress"] or found["wrote"] for found in ranks[1:])


def test_an_interrupted_scoring_goes_on_to_the_same_scores(
    ranks: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    for found in ranks:
        assert found["batches not repeated"] == 1
        for name, scores in alone["prediction scores"].items():
            assert relative(found["resumed scores"][name], scores) < 1e-5


def test_a_killed_process_ends_the_others_with_a_message(ranks: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(ranks):
        if rank == len(ranks) - 2:
            assert "killed" not in found
            continue
        message, seconds = found["killed"]
        assert message.startswith(f"RankError: rank {rank} lost another process at ")
        assert "it was killed" in message
        assert seconds < 45  # below the timeout of the process group, which is 50 s here
