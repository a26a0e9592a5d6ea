"""The command line as a user has it: what it prints, writes, and says to mistakes."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from safetensors import SafetensorError

import tp_amp
from tp_amp.cli.main import main
from tp_amp.cli.pruning import composed
from tp_amp.data import sources
from tp_amp.data.images import open_images
from tp_amp.importance import recomputing as recomputing_module

SMALL = ("img_size=32", "embed_dim=24", "depth=2", "num_heads=2", "num_classes=4")
MODEL = ("timm:vit_tiny_patch16_224", "--model-args", *SMALL)
SAMPLE = ("--data", "sample", "--images", "16", "--search-images", "8")
PRUNE = ("prune", *MODEL, *SAMPLE, "--target", "params=0.8", "--output", "small")
COMPARE = ("compare", *MODEL, *SAMPLE)
DOWNS = ["blocks.0.mlp.fc2", "blocks.1.mlp.fc2"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "small"
    assert main([*PRUNE[:-1], str(folder), "--json"]) == 0
    return folder


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def record(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    return json.loads(told(capsys, *arguments, "--json"))


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


def photos(folder: Path, classes: int = 1, each: int = 6) -> None:
    for number in range(classes * each):
        place = folder / f"class{number % classes}" if classes > 1 else folder
        place.mkdir(parents=True, exist_ok=True)
        open_images("sample").read(number)[0].save(place / f"{number}.png")


def test_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, "inspect", *MODEL)
    assert text.startswith("VisionTransformer: 0.03 M parameters")
    assert "blocks.*.mlp (2 times): 96 channels, fc1 -> fc2" in text
    found = record(capsys, "inspect", *MODEL)
    assert [mlp["down"] for mlp in found["mlps"]] == DOWNS
    model = timm.create_model("vit_tiny_patch16_224", **arguments())
    assert found["shares"]["total"]["parameters"] == sum(p.numel() for p in model.parameters())


def test_no_arguments_print_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert "usage: tp-amp" in told(capsys)


def test_an_answer_that_nobody_reads_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `tp-amp ... | head`: the pipe is closed before the answer is printed."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["inspect", *MODEL, "--device", "cpu"]) == 0


def test_arguments_of_the_model_may_be_words(capsys: pytest.CaptureFixture[str]) -> None:
    found = record(capsys, "inspect", *MODEL, "global_pool=avg")
    assert [mlp["down"] for mlp in found["mlps"]] == DOWNS


def test_a_checkpoint_that_nothing_needs_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PRUNE, "--checkpoint", "run"]) == 0
    assert "--checkpoint is left out: nothing is searched" in capsys.readouterr().err
    assert not os.path.exists("run")


def arguments() -> dict[str, int]:
    return {name: int(value) for name, value in (text.split("=") for text in SMALL)}


def test_prune_says_and_saves_what_it_did(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    found = record(capsys, *PRUNE)
    assert sorted(os.listdir("small")) == [
        "model.safetensors", "plan.json", "prune.json", "report.json", "source.json"
    ]  # fmt: skip
    assert os.listdir(here) == ["small"]
    model = tp_amp.create_model("small")
    parameters = sum(p.numel() for p in model.parameters())
    dense = timm.create_model("vit_tiny_patch16_224", **arguments())
    before, after = found["before"], found["after"]
    assert before["parameters"] == sum(p.numel() for p in dense.parameters())
    assert after["parameters"] == parameters
    assert 0.78 < parameters / before["parameters"] <= 0.8
    assert after["macs"] < before["macs"]
    widths = {name: model.get_submodule(name).in_features for name in DOWNS}
    assert {name: width["kept"] for name, width in found["widths"].items()} == widths
    assert json.loads(Path("small/prune.json").read_text()) == found
    report = tp_amp.Report.from_json(Path("small/report.json").read_text())
    assert report.after.parameters == parameters
    assert report.after.macs == after["macs"]
    assert before["cosine to the dense model"] == pytest.approx(1)
    assert 0 < after["cosine to the dense model"] < 1


def test_prune_tells_the_next_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, *PRUNE)
    following = re.search(r"next: tp-amp (.*)", text)
    assert following is not None
    again = told(capsys, *following[1].split())
    assert all(down in again for down in DOWNS)
    assert re.search(r"parameters: 0\.0\d\d M -> 0\.0\d\d M \((79\.\d|80\.0)%\)", text)
    assert re.search(r"blocks\.0\.mlp\.fc2 +96 +\d+ +\d+%", text)
    assert "cosine to the dense model: 1.0000 -> " in text


def test_the_same_command_gives_the_same_plan(saved: Path) -> None:
    assert main(PRUNE) == 0
    assert main([*PRUNE[:-1], "other", "--seed", "1"]) == 0
    for name in ("plan.json", "model.safetensors"):
        first, again, other = (
            (folder / name).read_bytes() for folder in (saved, Path("small"), Path("other"))
        )
        assert first == again != other


@pytest.mark.parametrize(
    "further",
    [
        ("--importance", "entropy", "--max-increase", "0.01"),
        ("--importance", "magnitude", "--target", "macs=0.8", "--compensation", "none"),
        ("--importance", "reconstruction", "--max-increase", "0.01", "--round-to", "8"),
        ("--target", "params=0.8", "--prune-num-heads"),
        ("--target", "params=0.9", "--min-width", "40", "--compensation", "mean"),
        ("--importance", "random", "--max-increase", "0.1"),
        ("--importance", "activation", "--max-increase", "0.1"),
        ("--importance", "gram-schmidt", "--target", "params=0.8", "--dtype", "float64"),
    ],
)
def test_ways_to_prune(capsys: pytest.CaptureFixture[str], further: tuple[str, ...]) -> None:
    command = ("prune", *MODEL, *SAMPLE, "--output", "small", *further)
    found = record(capsys, *command)
    widths = {name: width["kept"] for name, width in found["widths"].items()}
    model = tp_amp.create_model("small")
    assert all(model.get_submodule(name).in_features == widths[name] for name in DOWNS)
    assert found["after"]["parameters"] < found["before"]["parameters"]
    if "--target" in further:
        kind, share = further[further.index("--target") + 1].split("=")
        size = "parameters" if kind == "params" else "macs"
        assert found["after"][size] <= float(share) * found["before"][size]
    if "--round-to" in further:
        assert all(width % 8 == 0 for width in widths.values())
    if "--min-width" in further:
        assert min(widths.values()) >= 40
    if "--dtype" in further:
        assert next(model.parameters()).dtype == torch.float64
    assert ("blocks.0.attn.proj" in widths) == ("--prune-num-heads" in further)


@pytest.mark.parametrize("size", [("--target", "params=0.8"), ("--max-increase", "0.01")])
def test_refining_changes_both_layers_of_the_same_widths(
    capsys: pytest.CaptureFixture[str], size: tuple[str, ...]
) -> None:
    command = ("prune", *MODEL, *SAMPLE, *size)
    plain = record(capsys, *command, "--output", "plain")
    better = record(capsys, *command, "--output", "better", "--refine", "30")
    assert (plain["refine"], better["refine"]) == (0, 30)
    assert better["widths"] == plain["widths"]
    one, other = (tp_amp.create_model(folder) for folder in ("plain", "better"))
    for name in DOWNS:
        for layer in (name, name.replace("fc2", "fc1")):
            weights = (model.get_submodule(layer).weight for model in (one, other))
            assert not torch.equal(*weights)


@pytest.mark.parametrize("further", [(), ("--min-width", "8"), ("--round-to", "8")])
def test_latency_is_a_size_too(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    further: tuple[str, ...],
) -> None:
    def milliseconds(model: Any) -> float:
        return 1.0 + sum(model.get_submodule(name).in_features for name in DOWNS) / 100

    monkeypatch.setattr(
        "tp_amp.budget.latency.seconds", lambda model, *_: milliseconds(model) / 1000
    )
    assert main([*PRUNE, "--target", "latency=0.7", *further]) == 0
    assert re.search(
        r"latency of one image: \d+\.\d+ ms -> \d+\.\d+ ms \(", capsys.readouterr().out
    )
    found = json.loads(Path("small/prune.json").read_text())
    assert found["target"] == {"latency": 0.7}
    assert found["before"]["latency"] > 0
    dense = timm.create_model("vit_tiny_patch16_224", **arguments())
    share = milliseconds(tp_amp.create_model("small")) / milliseconds(dense)
    assert 0.5 < share <= 0.7 + 1e-9


@pytest.mark.parametrize("importance", ["entropy", "reconstruction"])
def test_activation_checkpointing_gives_the_same_model(
    importance: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In scoring, and in the backward passes of --refine."""
    prepared: list[str] = []
    recomputing = recomputing_module.recomputing
    monkeypatch.setattr(
        recomputing_module,
        "recomputing",
        lambda *given: prepared.append("once") or recomputing(*given),
    )
    command = [*PRUNE[:-1], "plain", "--importance", importance, "--refine", "1"]
    assert main(command) == 0
    assert not prepared
    command[command.index("plain")] = "again"
    assert main([*command, "--activation-checkpointing"]) == 0
    assert len(prepared) == 2
    for file in ("plan.json", "model.safetensors"):
        assert (here / "plain" / file).read_bytes() == (here / "again" / file).read_bytes()


def test_activation_checkpointing_is_refused_where_nothing_would_be_done(
    capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    assert main([*PRUNE, "--importance", "taylor", "--activation-checkpointing"]) == 2
    assert "is for --importance reconstruction and entropy" in capsys.readouterr().err
    assert not list(here.iterdir())


def test_how_long_a_run_takes_is_told_without_being_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tp_amp.running.timing.LONG", 0.0)
    command = [*without("--target", *PRUNE), "--importance", "entropy", "--max-increase", "0.1"]
    assert main(command) == 0
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("info: scoring takes at most about ") for line in lines)
    assert any(line.startswith("info: the search takes at most about ") for line in lines)
    assert any(" the search took " in line for line in lines)
    assert not any("'auto' took" in line for line in lines)  # that is for --verbose


def test_a_saved_model_is_a_model(capsys: pytest.CaptureFixture[str], saved: Path) -> None:
    plan = tp_amp.PruningPlan.from_json((saved / "plan.json").read_text())
    found = record(capsys, "inspect", str(saved))
    assert {mlp["down"]: mlp["width"] for mlp in found["mlps"]} == plan.widths
    command = ("prune", str(saved), *SAMPLE, "--target", "params=0.95", "--output", "smaller")
    smaller = record(capsys, *command)
    again = tp_amp.PruningPlan.from_json(Path("smaller/plan.json").read_text())
    for name, kept in again.keep.items():
        assert set(kept) <= set(plan.keep[name])
    assert smaller["widths"][DOWNS[0]]["dense"] == 96
    model = tp_amp.create_model("smaller")
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == smaller["after"]["parameters"] < smaller["before"]["parameters"]
    assert DOWNS[0] in told(capsys, "report", "smaller")


def test_open_clip_and_warnings_that_are_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    vision = 'vision_cfg={"image_size":32,"layers":2,"width":128,"patch_size":8}'
    text = 'text_cfg={"layers":1,"width":32,"heads":2,"vocab_size":50,"context_length":8}'
    model = ("open_clip:ViT-B-32/openai", "--model-args", "embed_dim=16", vision, text)
    size = ("--max-increase", "0.01", "--prune-num-heads", "--output", "small")
    assert main(["prune", *model, *SAMPLE, *size]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(set(lines))
    assert [line for line in lines if "random" in line] == [lines[0]]
    again = ("--max-increase", "0.01", "--output", "smaller")
    assert main(["prune", "small", *SAMPLE, *again]) == 0
    assert "random" not in capsys.readouterr().err
    tp_amp.create_model("smaller")


def test_a_saved_model_keeps_its_precision(capsys: pytest.CaptureFixture[str]) -> None:
    told(capsys, *PRUNE, "--dtype", "bfloat16")
    again = ("prune", "small", *SAMPLE, "--max-increase", "0.1", "--output", "smaller")
    told(capsys, *again)
    assert next(tp_amp.create_model("smaller").parameters()).dtype == torch.bfloat16


@pytest.mark.slow
def test_the_walk_through_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    [block] = re.findall(r"<!-- cli -->\n```\n(.*?)```\n<!-- cli -->", readme, re.S)
    commands = block.replace("\\\n", "").splitlines()
    assert len(commands) == 5
    for command in commands:
        program, *arguments = command.split()
        assert program == "tp-amp"
        assert main(arguments) == 0, capsys.readouterr().err
    assert Path("criteria.png").is_file()


def test_two_plans_make_one() -> None:
    first = tp_amp.PruningPlan({"a": [1, 3, 5], "b": [0, 2]}, {"a": 6, "b": 3})
    second = tp_amp.PruningPlan({"a": [0, 2], "c": [1]}, {"a": 3, "c": 2})
    assert composed(first, second) == tp_amp.PruningPlan(
        {"a": [1, 5], "b": [0, 2], "c": [1]}, {"a": 6, "b": 3, "c": 2}
    )
    assert first.keep["a"] == [1, 3, 5]


def test_report(capsys: pytest.CaptureFixture[str], saved: Path, here: Path) -> None:
    found = record(capsys, "report", str(saved))
    assert found == json.loads((saved / "report.json").read_text())
    # A plan alone, as save_pruned leaves it.
    shutil.copy(saved / "plan.json", here)
    alone = record(capsys, "report", ".")
    assert alone["layers"] == found["layers"]
    assert alone["before"] is None
    assert "Parameters" not in told(capsys, "report", ".")
    assert "drawn: page.html" in told(capsys, "report", str(saved), "--html", "page.html")
    assert DOWNS[0] in Path("page.html").read_text().replace("<wbr>", "")


def test_compare(capsys: pytest.CaptureFixture[str]) -> None:
    command = (*COMPARE, "--keep", "0.5", "--importance", "entropy", "magnitude")
    found = record(capsys, *command, "--plot", "plot.png")
    assert [row["importance"] for row in found["rows"]] == ["entropy", "magnitude"]
    assert len({row["parameters"] for row in found["rows"]}) == 1
    with Image.open("plot.png") as picture:
        assert picture.size[0] > 100
    text = told(capsys, *command)
    assert f"{found['rows'][1]['value']:.4f}" in text


def test_labels_are_used_where_they_are_the_models(
    capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    photos(here / "four", classes=4)
    photos(here / "three", classes=3)
    command = ["compare", *MODEL, "--keep", "0.5", "--json", "--data"]
    found = record(capsys, *command, "four")
    names = [row["importance"] for row in found["rows"]]
    assert found["metric"] == "accuracy"
    assert {"taylor", "hessian", "entropy", "random"} <= set(names)
    assert not found["failures"]
    assert main([*command, "three"]) == 0
    output = capsys.readouterr()
    assert "the labels of three are left out: 3 classes, the model has 4" in output.err
    found = json.loads(output.out)
    assert found["metric"] == "cosine to the dense model"
    assert "taylor" not in [row["importance"] for row in found["rows"]]
    size = ("--importance", "taylor", "--max-increase", "0.1", "--output", "small")
    assert record(capsys, "prune", *MODEL, "--data", "four", *size)["importance"] == "taylor"


def test_weights_from_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(5)
    model = timm.create_model("vit_tiny_patch16_224", **arguments())
    safetensors.torch.save_file(model.state_dict(), "w.safetensors")
    assert main([*PRUNE, "--weights", "w.safetensors"]) == 0
    assert "random weights" not in capsys.readouterr().err
    assert torch.equal(tp_amp.create_model("small").head.weight, model.head.weight)
    assert main([*PRUNE, "--overwrite"]) == 0
    assert "has random weights, good for trying commands only" in capsys.readouterr().err


def test_corrupt_images_are_skipped_when_asked(
    capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    photos(here / "photos")
    (here / "photos" / "3.png").write_bytes(b"half")
    size = ("--max-increase", "0.01", "--output", "small", "--skip-corrupt")
    assert main(["prune", *MODEL, "--data", "photos", *size]) == 0
    assert "1 corrupt images are left out: photos/3.png" in capsys.readouterr().err


def test_overwrite_replaces_only_its_own_files(here: Path) -> None:
    (here / "small").mkdir()
    (here / "small" / "notes.txt").write_text("mine")
    (here / "small" / "plan.json").write_text("old")
    assert main([*PRUNE, "--overwrite"]) == 0
    assert (here / "small" / "notes.txt").read_text() == "mine"
    assert tp_amp.PruningPlan.from_json((here / "small" / "plan.json").read_text()).keep


def broken(name: str) -> Callable[[Path, Path], None]:
    """A saved folder, of which half a file is left."""

    def prepare(here: Path, saved: Path) -> None:
        shutil.copytree(saved, here / "broken")
        content = (saved / name).read_bytes()
        (here / "broken" / name).write_bytes(content[: len(content) // 2])

    return prepare


def corrupt(here: Path, _: Path) -> None:
    photos(here / "photos")
    (here / "photos" / "3.png").write_bytes(b"half")


def full(here: Path, _: Path) -> None:
    (here / "small").mkdir()
    (here / "small" / "thesis.txt").write_text("mine")


def no_number(here: Path, _: Path) -> None:
    state = timm.create_model("vit_tiny_patch16_224", **arguments()).state_dict()
    state["head.weight"][0, 0] = torch.nan
    safetensors.torch.save_file(state, here / "w.safetensors")


def write(name: str, content: str = "") -> Callable[[Path, Path], None]:
    return lambda here, _: [(here / name).write_text(content), None][1]


def without(option: str, *command: str) -> list[str]:
    place = command.index(option)
    return [*command[:place], *command[place + 2 :]]


SIZE = ("--target", "params=0.8", "--output", "small")
# What is typed, what the one line must say, and how the folder is made before.
MISTAKES: dict[str, tuple[list[str], str, Callable[[Path, Path], Any] | None]] = {
    "command": (["prun"], r"invalid choice: 'prun'.*see tp-amp --help", None),
    "option": ([*PRUNE, "--traget", "1"], r"unrecognized arguments: --traget.*--help", None),
    "no model": (["inspect"], r"required: MODEL; see tp-amp inspect --help", None),
    "no data": (["prune", *MODEL, *SIZE], r"required: --data; see tp-amp prune --help", None),
    "no output": (without("--output", *PRUNE), r"required: --output", None),
    "no size": (without("--target", *PRUNE), r"--target --max-increase is required", None),
    "two sizes": ([*PRUNE, "--max-increase", "0.1"], "not allowed with argument --target", None),
    "no library": (["inspect", "vit_tiny_patch16_224"], r"did you mean timm:vit_tiny", None),
    "library": (["inspect", "keras:vit"], r"library 'keras'.*timm:NAME, open_clip:NAME", None),
    "timm name": (["inspect", "timm:vit_tiny_patch16_242"], r"did you mean vit_tiny_pat", None),
    "open_clip name": (["inspect", "open_clip:ViT-B-23"], r"did you mean ViT-B-", None),
    "hf name": (["inspect", "hf:./nothing"], r"check the name, --model-args and the net", None),
    "not a saved folder": (["inspect", "."], r"holds no source\.json; a model is timm:", None),
    "damaged plan": (["inspect", "broken"], r"plan is not JSON", broken("plan.json")),
    "damaged source": (["inspect", "broken"], r"source.json is damaged", broken("source.json")),
    "damaged weights": (
        ["inspect", "broken"],
        r"does not fit the model or is damaged",
        broken("model.safetensors"),
    ),
    "damaged report": (["report", "broken"], r"is damaged.*prune again", broken("report.json")),
    "page of another kind": (["report", ".", "--html", "x.pdf"], r"must end in \.html", None),
    "report of nothing": (["report", "."], r"pass the --output folder of tp-amp prune", None),
    "no weights file": ([*PRUNE, "--weights", "w.pt"], r"no such file: w\.pt", None),
    "no weights inside": (
        [*PRUNE, "--weights", "w.pt"],
        r"w\.pt can't be read as weights",
        write("w.pt", "hello"),
    ),
    "weights twice": ([*PRUNE, "--weights", "w.pt", "--pretrained"], r"pass one of them", None),
    "weights not finite": (
        [*PRUNE, "--weights", "w.safetensors"],
        r"head\.weight.*load sound weights",
        no_number,
    ),
    "model argument": ([*COMPARE, "--model-args", "x"], r"'x' is not NAME=VALUE; MODEL", None),
    "unknown model argument": (
        ["inspect", MODEL[0], "--model-args", "widht=3"],
        r"widht.*check --model-args",
        None,
    ),
    "no such data": (
        ["compare", *MODEL, "--data", "photos"],
        r"no such file or folder: photos",
        None,
    ),
    "empty data": (
        ["compare", *MODEL, "--data", "photos"],
        r"photos holds no images: the folder is empty",
        lambda here, _: (here / "photos").mkdir(),
    ),
    "no images": (
        ["compare", *MODEL, "--data", "."],
        r"none of its 1 files is an image",
        write("a.txt"),
    ),
    "a single image": (
        ["compare", *MODEL, "--data", "a.png"],
        r"single file and not \.parquet",
        write("a.png"),
    ),
    "broken parquet": (
        ["compare", *MODEL, "--data", "a.parquet"],
        r"no Parquet file or",
        write("a.parquet", "x"),
    ),
    "corrupt image": (
        ["prune", *MODEL, "--data", "photos", *SIZE],
        r"photos/3\.png can't be decoded.*--skip-corrupt",
        corrupt,
    ),
    "too few images": (
        ["prune", *MODEL, "--data", "photos", *SIZE],
        r"1 readable images are too few.*pass more images",
        lambda here, _: photos(here / "photos", each=1),
    ),
    "no images to score": ([*PRUNE, "--images", "0"], r"whole number of 1 or more", None),
    "batch size": ([*PRUNE, "--batch-size", "-3"], r"--batch-size.*'-3' is no whole", None),
    "target out of range": (
        [*PRUNE, "--target", "params=0.01"],
        r"reachable are .* fractions 0\.\d+ to 1",
        None,
    ),
    "latency out of range": (
        [*PRUNE, "--target", "latency=0.001"],
        r"ms of latency can't be met: reachable are .* fractions [01]\.\d+ to 1",
        None,
    ),
    "target kind": (
        [*PRUNE, "--target", "flops=0.5"],
        r"write params=0\.6, macs=0\.6 or lat",
        None,
    ),
    "target number": ([*PRUNE, "--target", "params=-1"], r"write params=0\.6, macs", None),
    "increase": (
        [*without("--target", *PRUNE), "--max-increase", "-1"],
        r"zero or more, such as 0\.0",
        None,
    ),
    "increase is no number": (
        [*without("--target", *PRUNE), "--max-increase", "much"],
        r"zero or more, such as 0\.0",
        None,
    ),
    "importance": ([*PRUNE, "--importance", "entrop"], r"choose from .*entropy", None),
    "no labels": ([*PRUNE, "--importance", "taylor"], r"needs labels, and sample has non", None),
    "compensation": ([*PRUNE, "--compensation", "all"], r"choose from .*affine", None),
    "refine": (
        [*PRUNE, "--compensation", "mean", "--refine", "3"],
        r"--refine goes on from --compensation affine, found mean",
        None,
    ),
    "fraction": ([*COMPARE, "--keep", "1.5"], r"'1\.5' is no fraction above 0, 1 at", None),
    "device": ([*PRUNE, "--device", "gpu"], r"--device gpu is not there.*--device cpu", None),
    "device without values": ([*PRUNE, "--device", "meta"], r"--device meta is not there", None),
    "dtype": ([*PRUNE, "--dtype", "int8"], r"choose from .*bfloat16", None),
    "output taken": (list(PRUNE), r"small is not empty; .*--overwrite", full),
    "output is a file": (list(PRUNE), r"small is a file; pass a folder", write("small")),
    "output below a file": (
        [*PRUNE[:-1], "notes/small"],
        r"can't be written \(Not a dir.*another",
        write("notes"),
    ),
    "plot without a folder": ([*COMPARE, "--plot", "no/a.png"], r"no folder no; make it", None),
    "plot format": ([*COMPARE, "--plot", "a.txt"], r"must end in \.png, \.svg or \.pdf", None),
    "no extra": (
        ["inspect", "hf:x"],
        r"install tp-amp\[huggingface\]",
        None,
    ),
    "no MLP": (
        ["prune", "timm:resnet18", *SAMPLE, *SIZE],
        r"no MLP that can be cut; tp-amp insp",
        None,
    ),
    "no heads to cut": (
        [*PRUNE, "--prune-num-heads", "--model-args", *SMALL[:3], "num_heads=1"],
        r"head",
        None,
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_one_line(
    name: str,
    here: Path,
    saved: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command, message, prepare = MISTAKES[name]
    if name == "no extra":
        monkeypatch.setitem(sys.modules, "transformers", None)
    if prepare:
        prepare(here, saved)
    before = files(here)
    assert main(command) == 2
    output = capsys.readouterr()
    assert output.out == ""
    lines = [line for line in output.err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, output.err
    assert lines[0].startswith("tp-amp: error: ")
    assert re.search(message, lines[0]), lines[0]
    assert files(here) == before


def fails(capsys: pytest.CaptureFixture[str], command: tuple[str, ...]) -> str:
    assert main(command) == 2
    [line] = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("warning: ")]
    return line


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.parametrize("earlier", [False, True])
def test_a_full_disk(
    here: Path,
    saved: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    earlier: bool,
) -> None:
    def half(_: Any, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise error

    if earlier:
        shutil.copytree(saved, here / "small")
    before = files(here)
    monkeypatch.setattr("tp_amp.plan.saving.save_model", half)
    line = fails(capsys, (*PRUNE, "--overwrite"))
    assert re.search("error: no space left on device .*free some, or choose another", line)
    assert files(here) == before


def test_too_little_space_is_seen_before_the_work(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(here)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "may need 0.1 MB, and 0.0 MB are free there" in fails(capsys, PRUNE)
    assert not files(here)


def test_cuda_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, (*PRUNE, "--device", f"cuda:{torch.cuda.device_count()}"))
    assert re.search("is not there .*--device cpu", line)


def test_no_memory_and_no_network(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")

    def no_network(*_: Any, **__: Any) -> None:
        raise ConnectionError("Name or service not known")

    with monkeypatch.context() as patch:
        patch.setattr("tp_amp.cli.command_parts.draw", no_memory)
        told = fails(capsys, PRUNE)
        assert "out of memory; lower --batch-size" in told
        assert "--activation-checkpointing" in told
    monkeypatch.setattr(timm, "create_model", no_network)
    line = fails(capsys, ("inspect", MODEL[0], "--pretrained"))
    assert "(Name or service not known); check the name" in line


def test_an_interruption_leaves_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tp_amp.cli.command_parts.save_pruned", interrupted)
    assert main(PRUNE) == 130
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert not files(here)


def test_a_defect_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(*_: Any, **__: Any) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(sources, "load_weights", defect)
    monkeypatch.setattr("tp_amp.cli.command_parts.load", defect)
    with pytest.raises(KeyError, match="ours"):
        main(["inspect", *MODEL])


def test_verbose_shows_the_steps_and_the_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("prune", *MODEL, *SAMPLE, "--max-increase", "0.01", "--output", "small")
    assert main([*command, "--verbose"]) == 0
    assert "info: blocks.0.mlp.fc2: " in capsys.readouterr().err
    assert main([*command, "--verbose"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", "inspect", "compare", "prune", "distill", "report"])
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        main([*command.split(), "--help"])
    assert exit_code.value.code == 0
    text = capsys.readouterr().out
    assert "exit codes: 0 done" in text
    assert max(map(len, text.splitlines())) <= 100
    # Every command in it can be parsed.
    from tp_amp.cli.arguments import build_parser

    shown = re.findall(r"^  (?:\d\. )?tp-amp (.*?)(?:  +.*)?$", re.sub(r"\\\n +", "", text), re.M)
    assert shown
    for line in shown:
        build_parser().parse_args(re.sub(" +", " ", line).split())


def run(*command: str, **further: Any) -> subprocess.CompletedProcess[str]:
    called = [sys.executable, "-m", "tp_amp.cli", *command]
    environment = {**os.environ, "PYTHONPATH": str(Path(tp_amp.__file__).parents[1])}
    return subprocess.run(called, capture_output=True, text=True, env=environment, **further)


def test_as_a_process() -> None:
    result = run("inspect", *MODEL, "--json")
    assert result.returncode == 0
    assert json.loads(result.stdout)["mlps"]
    assert result.stderr == ""  # no progress bar: this is no terminal


@pytest.mark.parametrize(
    ("further", "message"),
    [
        (("--data", "nothing"), "no such file or folder: nothing; .*"),
        (("--target", "params=0.01"), "the target of .* can't be met: .*"),
        (("--traget", "params=0.01"), "unrecognized arguments: .*; see tp-amp --help"),
    ],
)
def test_a_mistake_as_a_process(here: Path, further: tuple[str, ...], message: str) -> None:
    result = run(*PRUNE, *further)
    assert result.returncode == 2
    assert result.stdout == ""
    assert re.fullmatch(f"tp-amp: error: {message}\n", result.stderr)
    assert not files(here)


def test_help_and_version_import_nothing_heavy() -> None:
    code = (
        "import sys\nfrom tp_amp.cli.main import main\n"
        "try:\n    main(['prune', '--help'])\n"
        "finally:\n    print({'torch', 'timm', 'numpy'} & set(sys.modules))"
    )
    called = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(Path(tp_amp.__file__).parents[1])}
    result = subprocess.run(called, capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.splitlines()[-1] == "set()"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_progress_bar_on_a_terminal() -> None:
    import fcntl
    import pty
    import struct
    import termios

    lead, follow = pty.openpty()
    fcntl.ioctl(follow, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(Path(tp_amp.__file__).parents[1])}
    called = [sys.executable, "-m", "tp_amp.cli", *PRUNE]
    process = subprocess.Popen(called, stderr=follow, stdout=subprocess.DEVNULL, env=environment)
    os.close(follow)
    seen = b""
    try:
        while part := os.read(lead, 4096):
            seen += part
    except OSError:  # the other end is closed
        pass
    os.close(lead)
    assert process.wait() == 0
    # Elapsed < left.
    assert re.search(rb"reading images: +\d+%\|.*\d+:\d+<", seen)
