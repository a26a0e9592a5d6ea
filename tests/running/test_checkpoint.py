"""Runs that are killed and started again."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from searches import pruner_of
from torch import nn
from toys import images, toy

import tp_amp
from tp_amp.running.checkpoint import Checkpoint, describe, digest, write_atomically

# Each run is a process of its own, forked before any thread is there, that may kill itself at the
# start of a forward pass.
CODE = """
import json, os, signal, sys
sys.path[:0] = {paths}
import torch
from searches import pruner_of
from toys import toy
torch.set_num_threads(1)

def run(folder, die_at, options, out):
    model, calls = toy(depth=3), []
    pruner = pruner_of(model, checkpoint=folder or None, progress=False, **options)
    def count(module, args):
        calls.append(1)
        if len(calls) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
    model.register_forward_pre_hook(count)
    pruner.step()
    total = float(sum(p.double().sum() for p in model.parameters()))
    os.write(out, json.dumps([len(calls), pruner.plan.to_json(), total]).encode())

for line in sys.stdin:
    read, write = os.pipe()
    if os.fork() == 0:
        run(*json.loads(line), write)
        os._exit(0)
    os.close(write)
    _, status = os.wait()
    result = os.read(read, 1 << 20).decode()
    print("null" if os.WIFSIGNALED(status) else result, flush=True)
"""


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., Any]]:
    """Gives forward passes, plan and sum of all weights; None if the run was killed."""
    paths = [str(Path(__file__).parents[1]), str(Path(tp_amp.__file__).parent.parent)]
    with subprocess.Popen(
        [sys.executable, "-c", CODE.format(paths=paths)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def start(folder: Path | str, die_at: int = 0, **options: Any) -> Any:
            process.stdin.write(json.dumps([str(folder), die_at, options]) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield start
        process.stdin.close()


OPTIONS = [{}, {"rescore": True}, {"target": {"params": 0.8}, "compensation": "affine"}]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "rescore", "target"])
def test_killed_at_any_moment_it_goes_on_and_finds_the_same(
    run: Callable[..., Any], options: dict[str, Any], tmp_path: Path
) -> None:
    passes, plan, total = run("", **options)
    # Each dies so many passes after it has gone on.
    points = [2, passes // 7, passes // 7 + 1, passes // 6, passes // 7]
    for number in points:
        assert run(tmp_path, number, **options) is None
    last, again, same = run(tmp_path, **options)
    assert again == plan
    assert same == total
    # Repeated each time: to see what the model ends in, and a probe of two batches or the ranking
    # of one layer; with compensation, moments of two batches for each of three layers.
    repeated = 14 if "compensation" in options else 7
    assert sum(points) + last <= passes + repeated * len(points)
    done, once_more, _ = run(tmp_path, **options)
    assert done < passes / 2
    assert once_more == plan


def test_scores_go_on_after_the_last_batch(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def dying(count: int) -> Any:
        for index, batch in enumerate(images(12).split(3)):
            if index == count:
                raise Killed
            yield batch

    model = toy()
    expected = tp_amp.EntropyTaylorImportance().collect(model, images(12).split(3)).scores
    for count in (1, 3):
        with pytest.raises(Killed):
            tp_amp.EntropyTaylorImportance().collect(model, dying(count), checkpoint=tmp_path)
    calls: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    found = tp_amp.EntropyTaylorImportance().collect(
        model, images(12).split(3), checkpoint=tmp_path
    )
    handle.remove()
    assert all(torch.equal(found.scores[name], score) for name, score in expected.items())
    assert len(calls) <= 2  # one batch, and one to see what the model ends in


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"steps": 3}, "steps was 6, now 3"),
        ({"max_increase": 0.5}, "max_increase was 0.01, now 0.5"),
        ({"compensation": "mean"}, "compensation"),
        ({"target": {"macs": 0.9}}, "target"),
        ({"importance": tp_amp.GramSchmidtImportance()}, "importance"),
        ({"seed": 3}, "calibration"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_changed_arguments_are_refused_by_name(
    changed: dict[str, Any], named: str, tmp_path: Path
) -> None:
    pruner_of(toy(), checkpoint=tmp_path).step()
    model = toy()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=named):
        pruner_of(model, checkpoint=tmp_path, **changed).step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_activation_checkpointing_may_be_switched_on_later(tmp_path: Path) -> None:
    plans = []
    for again in (False, True):
        recipe = tp_amp.Recipe(every_linear=True, refine=1, activation_checkpointing=again)
        pruner = pruner_of(toy(depth=4), checkpoint=tmp_path, compensation=recipe)
        pruner.step()
        plans.append(pruner.plan)
    assert plans[0] == plans[1]


def test_another_model_is_refused(tmp_path: Path) -> None:
    pruner_of(toy(), checkpoint=tmp_path).step()
    with pytest.raises(ValueError, match="model was"):
        pruner_of(toy(seed=7), checkpoint=tmp_path).step()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    pruner_of(toy(), checkpoint=tmp_path).step()
    path = tmp_path / "search.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"search\.safetensors is no checkpoint or is damaged"):
        pruner_of(toy(), checkpoint=tmp_path).step()


def test_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    monkeypatch.setattr("tp_amp.running.checkpoint.FORMAT", 2)
    Checkpoint(path, {"steps": 1}).write({"a": torch.arange(3)}, {"b": 0.1})
    monkeypatch.undo()
    with pytest.raises(ValueError, match="format was 2, now 1"):
        Checkpoint(path, {"steps": 1})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "x.safetensors"
    Checkpoint(path, {"steps": 1}).write({"a": torch.arange(3)}, {"b": 0.1 + 0.2})
    again = Checkpoint(path, {"steps": 1})
    assert again.tensors["a"].tolist() == [0, 1, 2]
    assert again.facts == {"b": 0.1 + 0.2}


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda part: part.write_text("old"))

    def fail(part: Path) -> None:
        part.write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_digest_tells_values_names_and_types() -> None:
    weight = nn.Linear(2, 2).weight
    other = weight.detach().clone()
    other[0, 0] += 1e-6
    names = {digest([("a", weight)]), digest([("b", weight)]), digest([("a", other)])}
    assert len(names | {digest([("a", weight.double())])}) == 4
    assert digest([("a", weight.bfloat16())]) == digest([("a", weight.bfloat16())])


def test_arguments_are_described_by_what_tells_them_apart() -> None:
    found = describe({"loss": math.sqrt, "sizes": (1, [2.5, None]), 3: tp_amp.Recipe("mean")})
    assert json.loads(json.dumps(found)) == found
    assert found["loss"] == "sqrt"
    assert found["sizes"] == [1, [2.5, None]]
    assert found["3"] != describe(tp_amp.Recipe("affine"))
