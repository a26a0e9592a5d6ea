"""`tp-amp distill` as a user has it: what it trains, writes, and says to mistakes."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from accelerate.state import AcceleratorState
from toys import perturbed

import tp_amp
import tp_amp.evaluation.fidelity
from tp_amp.cli.main import main
from tp_amp.data.images import open_images
from tp_amp.data.sources import load_teacher
from tp_amp.distillation import run as distillation_run

SMALL = ("img_size=32", "embed_dim=24", "depth=2", "num_heads=2", "num_classes=4")
ARGUMENTS = {name: int(value) for name, value in (text.split("=") for text in SMALL)}
NAME = "vit_tiny_patch16_224"
SAMPLE = ("--data", "sample", "--images", "24", "--search-images", "8", "--batch-size", "8")
DISTILL = ("distill", "small", *SAMPLE, "--epochs", "2", "--device", "cpu", "--output", "better")
FILES = ["README.md", "config.json", "model.safetensors", "plan.json", "prune.json", "report.json"]
FILES += ["source.json"]
METRIC = "cosine to the dense model"


def dense() -> Any:
    torch.manual_seed(3)
    return perturbed(timm.create_model(NAME, **ARGUMENTS))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the dense weights and a model cut from them."""
    folder = tmp_path_factory.mktemp("made")
    safetensors.torch.save_file(dense().state_dict(), folder / "dense.safetensors")
    command = ["prune", f"timm:{NAME}", "--model-args", *SMALL, *SAMPLE, "--device", "cpu"]
    weights = ["--weights", str(folder / "dense.safetensors")]
    size = ["--max-increase", "10", "--compensation", "none", "--importance", "magnitude"]
    assert main([*command, *weights, *size, "--output", str(folder / "small"), "--json"]) == 0
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(True)  # of tests that ran before
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


WEIGHTS = ("--weights", "dense.safetensors")


def record(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


def test_it_comes_nearer_to_the_teacher(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    student = files(here / "small")
    further = ("--learning-rate", "0.05", "--epochs", "8", "--seed", "1")
    found = record(capsys, *DISTILL, *WEIGHTS, *further)
    assert sorted(os.listdir("better")) == FILES
    assert sorted(os.listdir(here)) == ["better", "dense.safetensors", "small"]
    assert files(here / "small") == student
    told = found["distillation"]
    assert told["before"][METRIC] < told["after"][METRIC] < 1
    assert (told["images_trained"], told["images_judged"], told["epochs"]) == (24, 8, 8)
    assert json.loads(Path("better/prune.json").read_text()) == found
    earlier = json.loads(Path("small/prune.json").read_text())
    assert {key: found[key] for key in ("spec", "before", "after", "importance")} == {
        key: earlier[key] for key in ("spec", "before", "after", "importance")
    }
    before, after = tp_amp.create_model("small"), tp_amp.create_model("better")
    for name, weight in before.state_dict().items():
        kept = after.state_dict()[name]
        assert kept.shape == weight.shape
        # The loss stands before the final norm.
        assert torch.equal(kept, weight) == name.startswith(("norm.", "head."))
    report = tp_amp.Report.from_json(Path("better/report.json").read_text())
    assert report.before.parameters == sum(p.numel() for p in dense().parameters())
    assert report.after.parameters == sum(p.numel() for p in after.parameters())


def test_the_agreement_is_that_of_images_that_did_not_train(
    capsys: pytest.CaptureFixture[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[torch.Tensor] = []
    step = distillation_run.Run._step

    def seen(self: Any, group: Any) -> Any:
        trained.extend(image for inputs in group for image in inputs.args[0])
        return step(self, group)

    judged: list[torch.Tensor] = []
    metric = "tp_amp.cli.distill_command.default_metric"
    default = tp_amp.evaluation.fidelity.default_metric
    monkeypatch.setattr(distillation_run.Run, "_step", seen)
    monkeypatch.setattr(
        metric,
        lambda model, batches: (judged.extend(torch.cat(batches)), default(model, batches))[1],
    )
    found = record(capsys, *DISTILL, *WEIGHTS)
    assert len(trained) == 2 * 24
    assert len(judged) == 8
    assert not any(torch.equal(one, other) for one in trained for other in judged)
    orders = [[image.sum().item() for image in part] for part in (trained[:24], trained[24:])]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]
    student, teacher = tp_amp.create_model("better").eval(), dense().eval()
    with torch.no_grad():
        images = torch.stack(judged)
        cosine = torch.nn.functional.cosine_similarity(student(images), teacher(images)).mean()
    assert found["distillation"]["after"][METRIC] == pytest.approx(float(cosine), abs=1e-5)


def test_it_tells_the_next_command_and_a_metric_that_fell(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*DISTILL, *WEIGHTS, "--learning-rate", "100", "--overwrite"]) == 0
    output = capsys.readouterr()
    assert re.search(rf"{METRIC}: 0\.\d+ -> -?0\.\d+, on 8 images that did not train", output.out)
    assert re.search(rf"warning: the {METRIC} did not rise .* another --learning-rate", output.err)
    following = re.search(r"next: tp-amp (.*)", output.out)
    assert following is not None
    assert main(following[1].split()) == 0


def test_labels_of_the_models_classes_judge_and_do_not_train(
    capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    for number in range(24):
        place = here / "photos" / f"class{number % 4}"
        place.mkdir(parents=True, exist_ok=True)
        open_images("sample").read(number)[0].save(place / f"{number}.png")
    command = [*DISTILL, *WEIGHTS, "--data", "photos", "--images", "16"]
    found = record(capsys, *command)["distillation"]
    assert set(found["before"]) == {"accuracy"}
    assert (found["images_trained"], found["images_judged"]) == (16, 8)


def test_only_cut_layers_are_trained(capsys: pytest.CaptureFixture[str]) -> None:
    record(capsys, *DISTILL, *WEIGHTS, "--train", "cut")
    before, after = (tp_amp.create_model(name).state_dict() for name in ("small", "better"))
    changed = {name for name, weight in before.items() if not torch.equal(after[name], weight)}
    assert changed
    assert all(".mlp." in name for name in changed)


def test_the_teacher_has_the_librarys_weights(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    create = timm.create_model

    def fetched(name: str, pretrained: bool = False, **arguments: Any) -> Any:
        return dense() if pretrained else create(name, **arguments)

    monkeypatch.setattr(timm, "create_model", fetched)
    found = record(capsys, *DISTILL, "--pretrained")
    other = record(capsys, *DISTILL[:-1], "other", *WEIGHTS)
    assert found["distillation"]["after"] == other["distillation"]["after"]
    assert found["distillation"]["teacher"] == "pretrained"
    assert (
        Path("better/model.safetensors").read_bytes()
        == Path("other/model.safetensors").read_bytes()
    )


def test_a_killed_run_goes_on(
    capsys: pytest.CaptureFixture[str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*DISTILL, *WEIGHTS, "--epochs", "3", "--checkpoint", "run"]
    whole = record(capsys, *DISTILL[:-1], "whole", *WEIGHTS, "--epochs", "3")
    epoch = distillation_run.Run._epoch

    def killed(self: Any, shown: Any) -> None:
        if self.epoch == 2:
            raise KeyboardInterrupt
        epoch(self, shown)

    with monkeypatch.context() as patch:
        patch.setattr(distillation_run.Run, "_epoch", killed)
        assert main(command) == 130
    assert not Path("better").exists()
    assert {"losses.json", "losses.png", "epoch-0002"} <= set(os.listdir("run"))
    again = record(capsys, *command)
    assert again["distillation"] == whole["distillation"]
    shutil.rmtree("better")
    assert main([*command, "--images", "16"]) == 2
    assert re.search(r"is of another run: images was 24, now 16", capsys.readouterr().err)
    assert main([*command, "--epochs", "4"]) == 2
    assert re.search(r"other settings .*'epochs': \(3, 4\)", capsys.readouterr().err)
    assert not Path("better").exists()


def test_a_saved_precision_stays(capsys: pytest.CaptureFixture[str]) -> None:
    record(capsys, *DISTILL, *WEIGHTS, "--dtype", "bfloat16")
    assert next(tp_amp.create_model("better").parameters()).dtype == torch.bfloat16
    record(capsys, "distill", "better", *DISTILL[2:-1], "again", *WEIGHTS)
    assert next(tp_amp.create_model("again").parameters()).dtype == torch.bfloat16


def half(name: str) -> Callable[[Path], None]:
    def prepare(here: Path) -> None:
        content = (here / "small" / name).read_bytes()
        (here / "small" / name).write_bytes(content[: len(content) // 2])

    return prepare


def by_hand(here: Path) -> None:
    """As save_pruned writes it without a library."""
    path = here / "small" / "source.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "library": None}))


def of_open_clip(here: Path) -> None:
    path = here / "small" / "source.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "library": "open_clip"}))


def wider(here: Path) -> None:
    state = timm.create_model(NAME, **{**ARGUMENTS, "embed_dim": 48}).state_dict()
    safetensors.torch.save_file(state, here / "wider.safetensors")


def no_number(here: Path) -> None:
    state = dense().state_dict()
    state["blocks.0.mlp.fc1.weight"][0, 0] = torch.nan
    safetensors.torch.save_file(state, here / "nan.safetensors")


BOTH = (*DISTILL, *WEIGHTS)
# What is typed, what the one line must say, and how the folder is made before.
MISTAKES: dict[str, tuple[tuple[str, ...], str, Callable[[Path], Any] | None]] = {
    "no teacher": (DISTILL, r"random weights teaches nothing; pass --pretrained, or --we", None),
    "two teachers": ((*BOTH, "--pretrained"), r"not allowed with argument", None),
    "no student": (("distill", *BOTH[2:]), r"required: FOLDER; see tp-amp distill --help", None),
    "no such student": (
        ("distill", "smal", *BOTH[2:]),
        r"smal holds no source\.json; the student is a folder that tp-amp prune made",
        None,
    ),
    "a dense model": (("distill", f"timm:{NAME}", *BOTH[2:]), r"folder that tp-amp prune", None),
    "no plan": (
        BOTH,
        r"small holds no plan\.json",
        lambda here: (here / "small/plan.json").unlink(),
    ),
    "damaged plan": (BOTH, r"plan is not JSON", half("plan.json")),
    "damaged record": (BOTH, r"prune\.json is damaged .*; prune again", half("prune.json")),
    "damaged weights": (BOTH, r"does not fit the model or is dam", half("model.safetensors")),
    "no library": (BOTH, r"does not say where its model came from", by_hand),
    "no weights file": ((*DISTILL, "--weights", "w.pt"), r"no such file: w\.pt", None),
    "the student as its teacher": (
        (*DISTILL, "--weights", "small/model.safetensors"),
        r"small/model\.safetensors does not fit VisionTransformer",
        None,
    ),
    "another teacher": (
        (*DISTILL, "--weights", "wider.safetensors"),
        r"wider\.safetensors does not fit VisionTransformer: .* of another shape",
        wider,
    ),
    "weights not finite": (
        (*DISTILL, "--weights", "nan.safetensors"),
        r"blocks\.0\.mlp\.fc1\.weight holds NaN",
        no_number,
    ),
    "no data": ((*BOTH, "--data", "photos"), r"no such file or folder: photos", None),
    "epochs": ((*BOTH, "--epochs", "0"), r"--epochs.*'0' is no whole number", None),
    "rate": ((*BOTH, "--learning-rate", "0"), r"'0' is no number above zero, such as 2e-5", None),
    "rate too low": (
        (*BOTH, "--learning-rate", "1e-7"),
        r"learning rate .* lies below the minimum",
        None,
    ),
    "what to train": ((*BOTH, "--train", "head"), r"choose from .*lora", None),
    "output taken": ((*BOTH[:-3], "small", *WEIGHTS), r"small is not empty; .*--overwrite", None),
    "device": ((*BOTH, "--device", "gpu"), r"--device gpu is not there", None),
    "no accelerate": (BOTH, r"install tp-amp\[distill\]", None),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_one_line(
    name: str,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command, message, prepare = MISTAKES[name]
    if name == "no accelerate":
        monkeypatch.setitem(sys.modules, "accelerate", None)
    if prepare:
        prepare(here)
    before = files(here)
    assert main(command) == 2
    output = capsys.readouterr()
    assert output.out == ""
    lines = [line for line in output.err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, output.err
    assert lines[0].startswith("tp-amp: error: ")
    assert re.search(message, lines[0]), lines[0]
    assert files(here) == before


def test_weights_that_are_not_known_are_asked_for(here: Path) -> None:
    """What open_clip's tag or the hub's name was stands in prune.json alone."""
    of_open_clip(here)
    with pytest.raises(ValueError, match=r"which of open_clip's weights .* pass --weights FILE"):
        load_teacher(here / "small", pretrained=True, origin="small")


def test_the_teachers_of_open_clip_and_hugging_face(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40
    )
    expected = transformers.ViTModel(config)
    expected.save_pretrained("hub")
    source = {"library": "transformers", "name": "ViTModel", "arguments": {}}
    (here / "small" / "source.json").write_text(json.dumps({**source, "config": config.to_dict()}))
    found = load_teacher(here / "small", origin="hf:./hub", pretrained=True)
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)
    asked: list[Any] = []
    source = {"library": "open_clip", "name": "ViT-B-32", "arguments": {"cache_dir": "x"}}
    (here / "small" / "source.json").write_text(json.dumps(source))
    monkeypatch.setattr(
        "tp_amp.data.sources.load", lambda *args, **kwargs: [asked.append((args, kwargs)), dense][1]
    )
    monkeypatch.setattr(dense, "model", "teacher", raising=False)
    spec = "open_clip:ViT-B-32/openai"
    assert load_teacher(here / "small", origin=spec, pretrained=True) == "teacher"
    assert asked == [((spec,), {"arguments": {"cache_dir": "x"}, "pretrained": True})]
