"""Measurements against counts by hand and a clock that is set by hand."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from toys import fingerprint, images, toy

import tp_amp
from tp_amp.evaluation import measuring
from tp_amp.running import timing

CLASSES = 5


def labelled(count: int = 4, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (images(size, seed=i), torch.randint(CLASSES, (size,), generator=generator))
        for i in range(count)
    ]


def test_parameters_and_macs_are_those_counted_by_hand() -> None:
    width, hidden, tokens, depth = 12, 20, 4, 2
    measured = tp_amp.measure(toy(), [images(6)])
    linears = width * hidden * 2 + 4 * width**2
    biases = hidden + width + 4 * width
    norms = 2 * 2 * width
    rest = (16 * width + width) + 2 * width + (width * CLASSES + CLASSES)
    assert measured.parameters == depth * (linears + biases + norms) + rest
    products = 2 * tokens**2 * width
    assert measured.macs == (
        tokens * 16 * width + depth * (tokens * linears + products) + width * CLASSES
    )


def test_macs_are_for_one_image_at_any_batch_size() -> None:
    one, many = (tp_amp.measure(toy(), [images(count)]) for count in (1, 6))
    assert one.macs == many.macs
    assert (one.batch_size, many.batch_size) == (1, 6)


@pytest.mark.parametrize("kind", ["pairs", "dicts"])
def test_accuracy_is_that_counted_image_by_image(kind: str) -> None:
    model, batches = toy(), labelled()
    right = sum(
        int(model(image[None])[0].argmax()) == int(label)
        for batch, labels in batches
        for image, label in zip(batch, labels, strict=True)
    )
    given = [{"x": x, "labels": y} for x, y in batches] if kind == "dicts" else batches
    measured = tp_amp.measure(model, given)
    assert measured.accuracy == right / 24
    assert 0 < right < 24
    assert measured.labelled_images == 24


def test_batches_without_labels_are_not_counted() -> None:
    batches = labelled()
    alone = tp_amp.measure(toy(), batches)
    mixed = tp_amp.measure(toy(), [batches[0], images(6, seed=9), *batches[1:]])
    assert (mixed.accuracy, mixed.labelled_images) == (alone.accuracy, alone.labelled_images)


def test_without_labels_only_the_first_batch_is_read() -> None:
    def batches() -> Iterator[Tensor]:
        yield images(6)
        raise RuntimeError("read on")

    assert tp_amp.measure(toy(), batches()).accuracy is None


def test_without_a_classifier_accuracy_is_not_measured_and_that_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="tp_amp"):
        measured = tp_amp.measure(toy(classes=0), labelled())
    assert measured.accuracy is None
    assert "ToyViT does not end in a classifier" in caplog.text


def test_speed_is_the_median_of_passes_that_are_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on an accelerator: a call hands the work over, and time passes in the wait for it."""
    # One more, since a model is called with values before it is run without any.
    left = [9.0] * (1 + measuring.WARM_UP) + [0.5, 0.25, 2.0, 1.0, 4.0]
    now, pending = 0.0, 0.0

    class Clock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            nonlocal pending
            if x.device.type != "meta":
                pending += left.pop(0)
            return self.layer(x)

    def wait(device: torch.device) -> None:
        nonlocal now, pending
        now, pending = now + pending, 0.0

    monkeypatch.setattr(timing, "wait", wait)
    monkeypatch.setattr(timing, "clock", lambda: now)
    measured = tp_amp.measure(Clock(), [torch.randn(8, 4)], repeats=5)
    assert not left
    assert measured.images_per_second == 8 / 1.0
    assert measured.quartiles == (8 / 2.0, 8 / 0.5)
    assert measured.repeats == 5


def test_compared_models_take_turns_and_see_the_same_images() -> None:
    """One-shot batches do: each is read once, for both."""
    dense, other = toy(), toy(1, hidden=8)
    turns: list[str] = []
    dense.register_forward_hook(lambda *_: turns.append("dense"))
    other.register_forward_hook(lambda *_: turns.append("other"))
    found = tp_amp.measure_both(dense, other, iter([images(6)]), repeats=2)
    # Without labels, the images are then read for the cosine: of what kind the output is, whether
    # it can be read, and both.
    assert turns[-14:-4] == ["dense", "other"] * (measuring.WARM_UP + 2)
    assert turns[-4:] == ["dense", "dense", "dense", "other"]
    found = tp_amp.measure_both(dense, other, iter(labelled()), repeats=2)
    alone = [tp_amp.measure(model, labelled(), repeats=2) for model in (dense, other)]
    for together, apart in zip(found, alone, strict=True):
        for name in ("parameters", "macs", "accuracy", "labelled_images", "conditions"):
            assert getattr(together, name) == getattr(apart, name), name
    assert found[0].accuracy != found[1].accuracy


@pytest.mark.parametrize("batches", [[images(2)], [(images(2), torch.tensor([0, 7]))], []])
def test_compared_models_are_left_as_they_were(batches: list[object]) -> None:
    models = toy().train(), toy(1)
    before = [fingerprint(model) for model in models]
    with contextlib.suppress(ValueError):
        tp_amp.measure_both(*models, batches, repeats=1)
    assert [fingerprint(model) for model in models] == before


def test_compared_models_must_be_alike() -> None:
    with pytest.raises(
        ValueError, match=r"models are torch.float32 on cpu and torch.float64 on cpu"
    ):
        tp_amp.measure_both(toy(), toy().double(), [images(2)])


def test_conditions_name_batch_dtype_and_device() -> None:
    threads = torch.get_num_threads()
    expected = f"CPU, {threads} thread" + ("s" if threads > 1 else "")
    measured = tp_amp.measure(toy().double(), [images(3)])
    assert measured.conditions == f"batches of 3, float64, {expected}"
    with torch.autocast("cpu", torch.bfloat16):
        assert tp_amp.measure(toy(), [images(3)]).dtype == "autocast to bfloat16"


def test_model_and_random_state_are_left_as_they_were() -> None:
    model = toy().train()
    model.norm.weight.requires_grad_(False)
    x, y = (torch.cat(parts) for parts in zip(*labelled(), strict=True))
    loader = DataLoader(TensorDataset(x, y), 5, shuffle=True)
    before = fingerprint(model)
    first, again = (tp_amp.measure(model, loader, repeats=1) for _ in range(2))
    assert fingerprint(model) == before
    assert first.accuracy == again.accuracy
    assert first.labelled_images == 24


@pytest.mark.parametrize(
    ("batches", "repeats", "error", "message"),
    [
        ([], 1, ValueError, "holds no batch"),
        (images(2), 1, TypeError, "found one tensor"),
        ([images(2)], 0, ValueError, "repeats must be an integer of at least 1, found 0"),
        ([images(2)[:, :, :3]], 1, ValueError, "the model failed on inputs of shape"),
        ([(images(2), torch.tensor([0, 5]))], 1, ValueError, "from 0 to 5 .* 5 classes"),
        ([(images(2), torch.tensor([-1, 3]))], 1, ValueError, "from -1 to 3 .* 5 classes"),
    ],
)
def test_what_can_not_be_measured_raises_and_changes_nothing(
    batches: object, repeats: int, error: type[Exception], message: str
) -> None:
    model = toy().train()
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        tp_amp.measure(model, batches, repeats=repeats)  # type: ignore[arg-type]
    assert fingerprint(model) == before


def test_a_model_without_values_raises() -> None:
    with pytest.raises(ValueError, match="on the meta device"):
        tp_amp.measure(toy().to("meta"), [images(2)])


def test_without_labels_the_cosine_of_the_outputs_is_measured() -> None:
    """Over all batches, image by image, as torch has it."""
    dense, cut = toy(), toy(seed=1)
    batches = [images(4), images(3, seed=2)]
    before, after = tp_amp.measure_both(dense, cut, batches, repeats=1, progress=False)
    x = torch.cat(batches)
    expected = torch.nn.functional.cosine_similarity(dense(x), cut(x)).mean()
    assert before.cosine == pytest.approx(1.0)
    assert after.cosine == pytest.approx(float(expected.detach()), abs=1e-6)
    assert before.accuracy is None
    labels = torch.zeros(4, dtype=torch.long)
    labelled = [(images(4), labels)]
    for measured in tp_amp.measure_both(dense, cut, labelled, repeats=1, progress=False):
        assert measured.cosine is None
    assert tp_amp.measure(dense, batches, repeats=1, progress=False).cosine is None


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_another_runtime_is_timed_and_its_graph_counted(
    runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("onnx", "onnxscript", runtime):
        pytest.importorskip(package)
    model = toy()
    x, y = labelled(1)[0]
    calls, accuracy = 0, tp_amp.measure(model, [(x, y)], repeats=1).accuracy

    def seconds(run: Any, inputs: Any, device: torch.device) -> float:
        nonlocal calls
        calls += 1
        assert not isinstance(run, nn.Module)
        return 0.5

    monkeypatch.setattr(measuring, "seconds", seconds)
    before = fingerprint(model.train())
    measured = tp_amp.measure(model, [(x, y)], repeats=2, runtime=runtime)
    assert fingerprint(model) == before
    assert calls == measuring.WARM_UP + 2
    assert measured.images_per_second == 6 / 0.5
    assert measured.exported_parameters == measured.parameters
    assert measured.attentions == 2
    assert measured.conditions.endswith(f", {runtime}")
    assert measured.accuracy == accuracy


def test_further_batch_sizes_repeat_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    x, seen = images(3), []

    def seconds(run: Any, inputs: Any, device: torch.device) -> float:
        seen.append(inputs.args[0])
        return 0.25

    monkeypatch.setattr(measuring, "seconds", seconds)
    found = tp_amp.measure(toy(), [x], repeats=1, batch_sizes=(1, 7))
    assert found.speeds == ((1, 4.0), (7, 28.0))
    assert torch.equal(seen[-1], torch.cat([x, x, x[:1]]))
    assert found.batch_size == 3
    with pytest.raises(ValueError, match="batch_sizes must be an integer of at least 1, found 0"):
        tp_amp.measure(toy(), [x], batch_sizes=(8, 0))


def test_what_a_runtime_does_not_take_raises_before_anything_is_read() -> None:
    with pytest.raises(ValueError, match="runtime must be one of"):
        tp_amp.measure(toy(), [], runtime="tensorrt")
