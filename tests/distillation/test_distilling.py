import copy
import json
import logging
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from accelerate import Accelerator
from distillations import distill, pair, same, tokens, weights
from torch.utils.data import DataLoader, TensorDataset
from toys import fingerprint, images, toy

import tp_amp


def test_the_loss_is_that_of_the_papers_and_falls(tmp_path: Path) -> None:
    student, teacher = pair()
    batches = images(96).split(6)
    with torch.no_grad():
        found, expected = tokens(student, batches[0]), tokens(teacher, batches[0])
    cls = (found.mean(1) - expected.mean(1)).square().sum() / (6 * 12)
    every = (found - expected).square().sum() / (6 * 4 * 12)
    distill(student, teacher, batches, folder=tmp_path, epochs=1)
    history = json.loads((tmp_path / "losses.json").read_text())
    assert history["cls"][0] == pytest.approx(float(cls), rel=1e-5)
    assert history["tokens"][0] == pytest.approx(float(every), rel=1e-5)
    assert history["loss"][0] == pytest.approx(float(cls + every), rel=1e-5)
    assert len(history["loss"]) == 16
    assert (tmp_path / "losses.png").stat().st_size > 0
    with torch.no_grad():
        left = (tokens(student, batches[0]) - expected).square().mean()
    assert float(left) < 0.6 * float((found - expected).square().mean())


def test_everything_but_the_weights_is_given_back() -> None:
    student, teacher = pair()
    student.head.requires_grad_(False)
    student.embed.weight.grad = torch.ones_like(student.embed.weight)
    student.blocks.train()
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(TensorDataset(images(8)), 4, shuffle=True, generator=generator)
    state = generator.get_state()
    before = [fingerprint(model) for model in (student, teacher)]
    distill(student, teacher, loader)
    after = [fingerprint(model) for model in (student, teacher)]
    assert after[1] == before[1]
    assert after[0].pop("values") != before[0].pop("values")
    assert after[0] == before[0]
    assert torch.equal(generator.get_state(), state)


def test_other_shapes_raise_before_anything_changes() -> None:
    student, teacher = pair()[0], toy(width=16)
    before = fingerprint(student)
    shapes = r"\{'cls': \(6, 12\), 'tokens': \(6, 4, 12\)\} at the input of norm, the teacher's"
    with pytest.raises(ValueError, match=shapes):
        distill(student, teacher, [images()])
    assert fingerprint(student) == before


def test_a_teacher_that_is_the_student_raises_and_an_equal_one_is_fine(tmp_path: Path) -> None:
    model = toy()
    before = weights(model)
    with pytest.raises(ValueError, match="share parameters"):
        distill(model, model, [images()])
    distill(model, copy.deepcopy(model), [images()], weight_decay=(0, 0), folder=tmp_path)
    assert json.loads((tmp_path / "losses.json").read_text())["loss"] == [0, 0]
    assert same(weights(model), before)
    with pytest.raises(ValueError, match="no layer of the student is smaller"):
        distill(model, copy.deepcopy(model), [images()], train="cut")


def test_batches_of_every_form_are_the_same() -> None:
    start, teacher = pair()
    parts = images(8).split(4)
    forms = [parts, [(part, 1) for part in parts], [{"x": p, "labels": 1} for p in parts]]
    results = [weights(distill(copy.deepcopy(start), teacher, form)) for form in forms]
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_batches_need_a_length_and_more_than_one_reading() -> None:
    student, teacher = pair()
    with pytest.raises(TypeError, match="one-shot"):
        distill(student, teacher, iter([images()]))

    class Endless:
        def __iter__(self):
            return iter([images()])

    with pytest.raises(TypeError, match="Endless has no length"):
        distill(student, teacher, Endless())
    with pytest.raises(ValueError, match="no batch"):
        distill(student, teacher, [])


def test_open_clip_trains_its_image_tower_alone() -> None:
    torch.manual_seed(0)
    config = {"image_size": 16, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    text = {"context_length": 4, "vocab_size": 8, "width": 64, "heads": 2, "layers": 1}
    teacher, pictures = open_clip.CLIP(64, config, text), images(4, size=16, channels=3)
    student = copy.deepcopy(teacher)
    plan = tp_amp.plan_from_importance(
        student.visual,
        pictures,
        tp_amp.DIMAPImportance(),
        {"transformer.resblocks.1.mlp.c_proj": 9},
    )
    tp_amp.apply_plan(student.visual, pictures, plan)
    before = weights(student)
    distill(student, teacher, [pictures], checkpointing=True)
    changed = {name for name, value in weights(student).items() if not value.equal(before[name])}
    assert "visual.transformer.resblocks.1.mlp.c_proj.weight" in changed
    assert {name.split(".")[0] for name in changed} == {"visual"}
    assert not {"visual.proj", "visual.ln_post.weight"} & changed
    assert not student.visual.transformer.grad_checkpointing


def test_a_run_of_nothing_but_warm_up_is_told(caplog: pytest.LogCaptureFixture) -> None:
    student, teacher = pair()
    with caplog.at_level(logging.INFO):
        distill(student, teacher, [images()], epochs=1, warmup_epochs=1)
    assert "all 1 epochs are warm-up" in caplog.text
    assert (
        "stay as they are: ['norm.weight', 'norm.bias', 'head.weight', 'head.bias']" in caplog.text
    )


@pytest.mark.parametrize(
    ("package", "extra", "options"),
    [
        ("accelerate", "distill", {}),
        ("matplotlib", "distill", {"folder": "unused"}),
        ("peft", "lora", {"train": "lora"}),
    ],
)
def test_a_missing_package_names_its_extra(
    package: str, extra: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = pair()
    before = fingerprint(student)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"install tp-amp\[{extra}\]"):
        tp_amp.distill(student, teacher, [images()], **options)
    assert fingerprint(student) == before


def test_an_accelerator_that_accumulates_by_itself_is_refused() -> None:
    student, teacher = pair()
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    with pytest.raises(ValueError, match="use accumulate="):
        tp_amp.distill(student, teacher, [images(2)], accelerator=accelerator, progress=False)
