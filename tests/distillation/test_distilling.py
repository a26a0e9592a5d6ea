import copy
import json
import logging
import math
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import timm
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from toys import fingerprint, images, toy

import tp_amp
from tp_amp.distillation.run import _Share
from tp_amp.distillation.state import learning_rate
from tp_amp.distillation.trainable import Average, adapted, checkpointed, cut_modules

TOKENS = ("embed", "blocks")  # what the tokens of the toy depend on


def cut(teacher: nn.Module, example: Tensor | None = None) -> tuple[nn.Module, tp_amp.PruningPlan]:
    student, example = copy.deepcopy(teacher), images(2) if example is None else example
    plan = tp_amp.plan_from_importance(student, example, tp_amp.DIMAPImportance(), 0.5)
    tp_amp.apply_plan(student, example, plan)
    return student, plan


def pair(**arguments: object) -> tuple[nn.Module, nn.Module]:
    teacher = toy(**arguments)
    return cut(teacher)[0], teacher


def distill(student: nn.Module, teacher: nn.Module, batches: object, **options: object):
    options = {"epochs": 2, "warmup_epochs": 0.5, "learning_rate": 0.3, **options}
    precision = options.pop("precision", "no")
    AcceleratorState._reset_state(True)  # of the precision of a run before
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
    return tp_amp.distill(student, teacher, batches, accelerator=accelerator, **options)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def timm_pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    teacher = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=8,
        depth=2,
        embed_dim=16,
        num_heads=2,
        num_classes=3,
        drop_path_rate=0.3,
        proj_drop_rate=0.2,
    )
    return cut(teacher, images(2, size=16, channels=3))[0], teacher


def tokens(model: nn.Module, pictures: Tensor) -> Tensor:
    return model.blocks(model.embed(pictures).flatten(2).transpose(1, 2))


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


@pytest.mark.parametrize("sizes", [(4, 4), (6, 2), (3, 3, 2)])
def test_accumulated_batches_are_one_large_batch(sizes: tuple[int, ...]) -> None:
    student, teacher = (model.double() for model in pair())
    other = copy.deepcopy(student)
    pictures = images(8)
    distill(student, teacher, [pictures], learning_rate=0.1)
    # The rate goes by the size of the first batch.
    rate = 0.1 * 8 / (sizes[0] * len(sizes))
    distill(other, teacher, pictures.split(sizes), accumulate=len(sizes), learning_rate=rate)
    for name, value in weights(student).items():
        torch.testing.assert_close(weights(other)[name], value, rtol=1e-9, atol=1e-12)


def test_a_smaller_last_group_is_a_step_too() -> None:
    student, teacher = (model.double() for model in pair())
    other = copy.deepcopy(student)
    distill(student, teacher, [images(8)[:4], images(8)[4:6]], learning_rate=0.1)
    parts = images(8)[:6].split(2)
    distill(other, teacher, parts, accumulate=2, learning_rate=0.1)
    for name, value in weights(student).items():
        torch.testing.assert_close(weights(other)[name], value, rtol=1e-9, atol=1e-12)


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


def test_steps_are_those_of_adamw() -> None:
    """One step by hand: AdamW with betas 0.9, 0.95, decay on matrices alone."""
    student, teacher = pair()
    before = weights(student)
    reference = copy.deepcopy(student)
    found, expected = tokens(reference, images(4)), tokens(teacher, images(4))
    mse = nn.functional.mse_loss
    (mse(found, expected) + mse(found.mean(1), expected.mean(1))).backward()
    distill(student, teacher, [images(4)], epochs=1, warmup_epochs=0, weight_decay=(0.3, 0.3))
    rate = 0.3 * 4 / 256
    for name, parameter in reference.named_parameters():
        if not name.startswith(TOKENS):
            assert torch.equal(weights(student)[name], before[name])
            continue
        decay = 0.3 if parameter.dim() > 1 else 0
        gradient = parameter.grad
        step = gradient / (gradient.abs() + 1e-8)  # both moments are those of one gradient
        value = before[name] * (1 - rate * decay) - rate * step
        torch.testing.assert_close(weights(student)[name], value, rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast_trains_float32_weights() -> None:
    student, teacher = pair()
    exact = copy.deepcopy(student)
    distill(exact, teacher, images(24).split(6))
    distill(student, teacher, images(24).split(6), precision="bf16")
    assert all(value.dtype == torch.float32 for value in weights(student).values())
    assert not same(weights(student), weights(exact))
    for name, value in weights(student).items():
        torch.testing.assert_close(value, weights(exact)[name], rtol=0.1, atol=0.05)
    assert "forward" not in vars(student)


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


def test_epochs_are_told_to_the_data() -> None:
    class Counted(list):
        def set_epoch(self, epoch: int) -> None:
            self.epochs = [*getattr(self, "epochs", []), epoch]

    student, teacher = pair()
    batches = Counted([images()])
    distill(student, teacher, batches, epochs=3)
    assert batches.epochs == [0, 1, 2]


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


def test_a_loss_that_is_not_finite_raises_before_it_does_harm() -> None:
    student, teacher = pair()
    before = fingerprint(student)
    with pytest.raises(ValueError, match=r"the loss is \{'cls': nan, 'tokens': nan\} in epoch 1"):
        distill(student, teacher, [images() * math.nan])
    assert fingerprint(student) == before


def test_a_wrong_length_is_told() -> None:
    class Short(list):
        def __len__(self) -> int:
            return 3

    student, teacher = pair()
    with pytest.raises(ValueError, match="length makes 3 steps, reading it gave 1"):
        distill(student, teacher, Short([images()]))


def test_a_run_of_nothing_but_warm_up_is_told(caplog: pytest.LogCaptureFixture) -> None:
    student, teacher = pair()
    with caplog.at_level(logging.INFO):
        distill(student, teacher, [images()], epochs=1, warmup_epochs=1)
    assert "all 1 epochs are warm-up" in caplog.text
    assert (
        "stay as they are: ['norm.weight', 'norm.bias', 'head.weight', 'head.bias']" in caplog.text
    )


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
        ({"ema": 1.0}, "ema must lie"),
        ({"minimum_learning_rate": 1.0}, "lies below the minimum"),
    ],
)
def test_bad_arguments_raise(options: dict[str, object], message: str) -> None:
    student, teacher = pair()
    before = fingerprint(student)
    with pytest.raises(ValueError, match=message):
        distill(student, teacher, [images()], **options)
    assert fingerprint(student) == before


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


TWO_PROCESSES = """
import copy, sys, torch, tp_amp
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from test_distilling import pair
from toys import images
from torch.utils.data import DataLoader, TensorDataset

folder, kind = sys.argv[1:]
accelerator = Accelerator(cpu=True)
if kind == "fsdp":  # accelerate's own settings take it on GPUs only
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        cpu_ram_efficient_loading=False,
    )
    for state in (accelerator.state.__dict__, PartialState._shared_state):
        state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
student, teacher = (model.double() for model in pair())
again = copy.deepcopy(student)
data = list(images(16).split(4))
if kind == "loader":
    data = DataLoader(TensorDataset(images(16)), 4)
options = {"warmup_epochs": 0.5, "learning_rate": 0.1, "ema": 0.5, "folder": folder}
for model, resume in ((student, False), (again, True)):
    tp_amp.distill(
        model, teacher, data, epochs=2, accelerator=accelerator, resume=resume, **options
    )
if accelerator.is_main_process:
    same = (torch.equal(p, q) for p, q in zip(student.parameters(), again.parameters()))
    assert all(same), "a finished run gives its weights again"
    save_file(student.state_dict(), f"{folder}/weights.safetensors")
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["list", "loader", "fsdp"])
def test_two_processes_are_one_with_batches_twice_as_large(kind: str, tmp_path: Path) -> None:
    student, teacher = (model.double() for model in pair())
    distill(student, teacher, images(16).split(8), learning_rate=0.1, ema=0.5)
    (tmp_path / "run.py").write_text(TWO_PROCESSES)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [sys.executable, *command, str(tmp_path / "run.py"), str(tmp_path / "out"), kind],
        check=True,
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
        timeout=300,
    )
    found = load_file(tmp_path / "out" / "weights.safetensors")
    for name, value in weights(student).items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-10)


class Told(list[int]):
    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def test_processes_share_batches_out_and_none_gets_more() -> None:
    batches = Told(range(8))
    shares = [_Share(batches, index, 3) for index in range(3)]
    assert [list(share) for share in shares] == [[0, 3], [1, 4], [2, 5]]
    assert [len(share) for share in shares] == [2, 2, 2]
    shares[1].set_epoch(4)
    assert batches.epoch == 4
    _Share([1, 2], 0, 2).set_epoch(1)  # a list has nothing to be told


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


def test_an_accelerator_that_accumulates_by_itself_is_refused() -> None:
    student, teacher = pair()
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    with pytest.raises(ValueError, match="use accumulate="):
        tp_amp.distill(student, teacher, [images(2)], accelerator=accelerator, progress=False)


def test_a_timm_model_that_has_no_checkpointing_is_told() -> None:
    model = timm.create_model("pit_ti_224")
    with (
        pytest.raises(ValueError, match="PoolingVisionTransformer can't"),
        checkpointed(model, True),
    ):
        pass
