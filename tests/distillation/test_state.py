"""Settings of a run, its learning rate, and the state that a killed run goes on from."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from distillations import distill, pair, same, timm_pair, weights
from torch.utils.data import DataLoader, TensorDataset
from toys import fingerprint, images

from tp_amp.distillation.state import learning_rate


def test_the_schedule_is_linear_then_a_cosine(tmp_path: Path) -> None:
    found = [learning_rate(step, 10, 4, 8.0, 2.0) for step in range(10)]
    assert found[:4] == [2.0, 4.0, 6.0, 8.0]
    half_way = (found[4], found[7])
    assert half_way == pytest.approx((8.0, 5.0))
    assert found[9] == pytest.approx(5 + 3 * math.cos(math.pi * 5 / 6))

    student, teacher = pair()
    distill(
        student,
        teacher,
        images(16).split(4),
        epochs=3,
        warmup_epochs=1,
        accumulate=2,
        learning_rate=0.32,
        minimum_learning_rate=1e-3,
        folder=tmp_path,
    )
    peak = 0.32 * 8 / 256
    expected = [peak / 2, peak]
    expected += [1e-3 + (peak - 1e-3) * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
    history = json.loads((tmp_path / "losses.json").read_text())
    assert history["learning_rate"] == pytest.approx(expected)


@pytest.mark.parametrize("options", [{}, {"ema": 0.9}, {"train": "lora", "rank": 2}])
def test_a_run_that_was_killed_goes_on_to_the_same_weights(
    options: dict[str, object], tmp_path: Path
) -> None:
    student, teacher = timm_pair()
    pictures = images(12, size=16, channels=3)

    class Killed(DataLoader):
        reads = 0

        def __iter__(self):
            Killed.reads += 1
            if Killed.reads == 4:  # the first batch is looked at once, then two epochs are read
                raise KeyboardInterrupt
            return super().__iter__()

    def loader(kind: type = DataLoader) -> DataLoader:
        generator = torch.Generator().manual_seed(5)
        return kind(TensorDataset(pictures), batch_size=4, shuffle=True, generator=generator)

    whole, resumed, plain = (copy.deepcopy(student) for _ in range(3))
    distill(whole, teacher, loader(), epochs=4, **options)
    with pytest.raises(KeyboardInterrupt):
        distill(resumed, teacher, loader(Killed), epochs=4, folder=tmp_path, **options)
    assert [path.name for path in tmp_path.glob("epoch-*")] == ["epoch-0002"]
    torch.manual_seed(123)
    resumed = copy.deepcopy(student)
    distill(resumed, teacher, loader(), epochs=4, folder=tmp_path, resume=True, **options)
    assert same(weights(whole), weights(resumed))
    # Dropout and order matter, so that the test could fail.
    distill(plain, teacher, loader(), epochs=4, seed=1, **options)
    assert not same(weights(whole), weights(plain))
    history = json.loads((tmp_path / "losses.json").read_text())
    assert len(history["loss"]) == 12
    # A finished run gives its weights again.
    again = copy.deepcopy(student)
    distill(again, teacher, loader(), epochs=4, folder=tmp_path, resume=True, **options)
    assert same(weights(whole), weights(again))


def test_a_state_of_another_run_is_not_taken(tmp_path: Path) -> None:
    student, teacher = pair()
    distill(student, teacher, [images()], folder=tmp_path)
    before = fingerprint(student)
    with pytest.raises(ValueError, match="go on with resume=True, or choose another folder"):
        distill(student, teacher, [images()], folder=tmp_path)
    with pytest.raises(ValueError, match=r"other settings.*'learning_rate': \(0.3, 0.1\)"):
        distill(student, teacher, [images()], folder=tmp_path, resume=True, learning_rate=0.1)
    (tmp_path / "epoch-0002" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="is no state of distill"):
        distill(student, teacher, [images()], folder=tmp_path, resume=True)
    assert fingerprint(student) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"clss": 1}}, "weights must name some of"),
        ({"weights": {"cls": -1}}, "weights must be positive"),
        ({"train": "some"}, "train must be"),
        ({"epochs": 0}, "epochs must be"),
        ({"accumulate": 1.5}, "accumulate must be"),
        ({"learning_rate": math.nan}, "learning_rate must be"),
        ({"warmup_epochs": -1}, "warmup_epochs must be"),
        ({"ema": 1.0}, "ema must be a number between 0 and 1"),
        ({"minimum_learning_rate": 1.0}, "lies below the minimum"),
    ],
)
def test_bad_arguments_raise(options: dict[str, object], message: str) -> None:
    student, teacher = pair()
    before = fingerprint(student)
    with pytest.raises(ValueError, match=message):
        distill(student, teacher, [images()], **options)
    assert fingerprint(student) == before
