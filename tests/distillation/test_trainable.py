"""Which parameters are trained, how they are held meanwhile, and the way back."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import timm
import torch
import transformers
from distillations import TOKENS, cut, distill, pair, same, timm_pair, weights
from torch import Tensor, nn
from toys import fingerprint, images, toy

import tp_amp
from tp_amp.distillation.trainable import Average, adapted, checkpointed, cut_modules


def test_half_precision_students_have_float32_masters() -> None:
    student, teacher = pair()
    half = student.bfloat16()
    wide = copy.deepcopy(half).float()
    distill(half, teacher, images(24).split(6))
    distill(wide, teacher, images(24).split(6))
    for name, value in weights(half).items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, weights(wide)[name].bfloat16())


def test_what_was_never_cut_is_frozen_if_asked() -> None:
    student, teacher = pair()
    before = weights(student)
    distill(student, teacher, images(8).split(4), train="cut")
    after = weights(student)
    for name, value in before.items():
        assert torch.equal(value, after[name]) != (".mlp." in name), name


def test_what_is_frozen_stays_so() -> None:
    student, teacher = pair()
    student.embed.requires_grad_(False)
    before = weights(student)
    distill(student, teacher, images(8).split(4))
    assert torch.equal(student.embed.weight, before["embed.weight"])
    assert not torch.equal(student.blocks[0].query.weight, before["blocks.0.query.weight"])
    assert not student.embed.weight.requires_grad
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        distill(student, teacher, images(8).split(4))


def test_average_is_that_of_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = (model.double() for model in pair())
    seen: list[list[Tensor]] = []
    update = Average.update

    def record(average: Average) -> None:
        seen.append([p.detach().clone() for p in average.parameters])
        update(average)

    monkeypatch.setattr(Average, "update", record)
    started = [p.detach().clone() for p in student.parameters()]
    used = [i for i, (name, _) in enumerate(student.named_parameters()) if name.startswith(TOKENS)]
    distill(student, teacher, images(12).split(4), ema=0.8)
    assert len(seen) == 6
    ended = [p.detach() for p in student.parameters()]
    for place, i in enumerate(used):
        expected = 0.8**6 * started[i]
        for step, values in enumerate(seen):
            expected += 0.2 * 0.8 ** (5 - step) * values[place]
        torch.testing.assert_close(ended[i], expected)


def test_adapters_are_folded_into_plain_layers(tmp_path: Path) -> None:
    teacher = toy()
    student, plan = cut(teacher)
    before, text = weights(student), repr(student)
    distill(student, teacher, images(24).split(6), train="lora", rank=2, epochs=3)
    assert repr(student) == text
    assert vars(student).keys() == vars(teacher).keys()
    for name, value in weights(student).items():
        change = (value - before[name]).double()
        if ".mlp." in name and name.endswith("weight"):
            singular = torch.linalg.svdvals(change)
            assert float(singular[1]) > 1e-4
            assert float(singular[2]) < 1e-6
        else:
            assert not change.any()
    tp_amp.save_pruned(student, tmp_path, plan)
    again = toy(seed=3)
    tp_amp.load_pruned(again, tmp_path)
    assert same(weights(student), weights(again))


class Failing(list):
    def __iter__(self):
        yield from list.__iter__(self)
        raise RuntimeError("the disk is gone")


@pytest.mark.parametrize("train", ["all", "lora"])
def test_flags_and_layers_come_back_after_a_failure(train: str) -> None:
    student, teacher = pair()
    student.train()
    before = [fingerprint(model) for model in (student, teacher)]
    with pytest.raises(RuntimeError, match="the disk is gone"):
        distill(student, teacher, Failing([images()]), train=train)
    after = [fingerprint(model) for model in (student, teacher)]
    assert after[1] == before[1]
    for key in before[0].keys() - ({"values"} if train == "all" else set()):
        assert after[0][key] == before[0][key], key


def test_other_terms_train_what_they_depend_on() -> None:
    student, teacher = pair()
    before = weights(student)
    distill(student, teacher, images(16).split(8), weights={"logits": 1}, epochs=4)
    assert not torch.equal(student.head.weight, before["head.weight"])
    assert not torch.equal(student.norm.weight, before["norm.weight"])
    student, teacher = pair()
    distill(student, teacher, images(16).split(8), weights={"similarity": 1, "tokens": 0.1})
    assert torch.equal(student.head.weight, before["head.weight"])
    assert not torch.equal(student.embed.weight, before["embed.weight"])


def test_checkpointing_gives_the_same_weights() -> None:
    student, teacher = timm_pair()
    again, pictures = copy.deepcopy(student), images(8, size=16, channels=3)
    calls = []
    for model in (student, again):
        model.blocks[0].mlp.act.register_forward_hook(lambda m, *_: calls.append(m))
    distill(student, teacher, [pictures], epochs=3)
    distill(again, teacher, [pictures], epochs=3, checkpointing=True)
    assert calls.count(again.blocks[0].mlp.act) == calls.count(student.blocks[0].mlp.act) + 3
    assert not again.grad_checkpointing
    for name, value in weights(student).items():
        torch.testing.assert_close(weights(again)[name], value)
    student, teacher = pair()
    with pytest.raises(ValueError, match="ToyViT has neither set_grad_checkpointing"):
        distill(student, teacher, [images()], checkpointing=True)


def test_transformers_are_checkpointed_in_their_own_way() -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=3,
    )
    teacher = transformers.ViTForImageClassification(config)
    student = cut(teacher, images(2, size=16, channels=3))[0]
    other, pictures = copy.deepcopy(student), images(4, size=16, channels=3)
    batches = [{"pixel_values": pictures, "labels": torch.zeros(4)}]
    terms = {"cls": 1, "tokens": 1, "logits": 1}
    distill(student, teacher, batches, weights=terms)
    distill(other, teacher, batches, weights=terms, checkpointing=True)
    for name, value in weights(student).items():
        torch.testing.assert_close(weights(other)[name], value)
    assert not other.is_gradient_checkpointing


def test_a_student_with_a_layer_more_than_its_teacher_is_refused() -> None:
    teacher = toy()
    student = copy.deepcopy(teacher)
    student.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="the teacher has no layer extra"):
        cut_modules(student, teacher)


def test_adapters_need_a_layer_that_can_have_one(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    with (
        pytest.raises(ValueError, match="none of the cut layers is a Linear or Conv2d"),
        adapted(model, ["1"], 2),
    ):
        pass
    with caplog.at_level(logging.WARNING), adapted(model, ["0", "1"], 2):
        pass
    assert "no adapters on ['1'], which stay as they are" in caplog.text


def test_a_timm_model_that_has_no_checkpointing_is_told() -> None:
    model = timm.create_model("pit_ti_224")
    with (
        pytest.raises(ValueError, match="PoolingVisionTransformer can't"),
        checkpointed(model, True),
    ):
        pass
