"""Ways to prune from the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from command_line import (
    DOWNS,
    MODEL,
    PRUNE,
    SAMPLE,
    arguments,
    record,
)

import tp_amp
from tp_amp.cli import help_texts
from tp_amp.cli.main import main
from tp_amp.importance import recomputing as recomputing_module
from tp_amp.importance.objectives import Objective
from tp_amp.running.runtimes import building

pytestmark = pytest.mark.usefixtures("here")


@pytest.mark.parametrize(
    "further",
    [
        ("--importance", "entropy", "--max-increase", "0.01"),
        ("--importance", "magnitude", "--target", "macs=0.8", "--compensation", "none"),
        ("--importance", "reconstruction", "--max-increase", "0.01", "--round-to", "8"),
        ("--target", "params=0.8", "--prune-num-heads"),
        ("--target", "params=0.9", "--min-width", "40", "--compensation", "mean"),
        ("--target", "params=0.8", "--widths", "mlp", "qk", "vo"),
        ("--target", "params=0.7", "--widths", "mlp", "qk", "vo", "stream"),
        ("--target", "macs=0.9", "--widths", "heads", "mlp", "--round-to", "4"),
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
        step = int(further[further.index("--round-to") + 1])
        assert all(widths[name] % step == 0 for name in DOWNS)
    if "--min-width" in further:
        assert min(widths.values()) >= 40
    if "--dtype" in further:
        assert next(model.parameters()).dtype == torch.float64
    assert ("blocks.0.attn.proj" in widths) == bool(
        {"--prune-num-heads", "vo", "heads"} & {*further}
    )
    assert ("blocks.0.attn.qkv" in widths) == ("qk" in further)
    assert ("patch_embed.proj" in widths) == ("stream" in further)


@pytest.mark.parametrize("size", [("--target", "params=0.8"), ("--max-increase", "0.01")])
def test_refining_changes_both_layers_of_the_same_widths(
    capsys: pytest.CaptureFixture[str], size: tuple[str, ...]
) -> None:
    command = ("prune", *MODEL, *SAMPLE, "--images", "256", *size)
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


def test_whole_mlps_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one channel takes nearly as long as all: the target can't be met otherwise."""

    def milliseconds(model: Any) -> float:
        widths = [model.get_submodule(name).in_features for name in DOWNS]
        return 1.0 + sum(5 + width / 100 for width in widths if width)

    monkeypatch.setattr(
        "tp_amp.budget.latency.seconds", lambda model, *_: milliseconds(model) / 1000
    )
    target = ("--target", "latency=0.75")
    assert main([*PRUNE, *target]) == 2
    assert main([*PRUNE, *target, "--min-width", "0"]) == 0
    pruned = tp_amp.create_model("small")
    widths = [pruned.get_submodule(name).in_features for name in DOWNS]
    assert widths.count(0) == 1
    assert bool(torch.isfinite(pruned(torch.zeros(1, 3, 32, 32))).all())


@pytest.mark.parametrize("slow", [0.0, 5.0])
@pytest.mark.parametrize("further", [(), ("--min-width", "8")], ids=["foreseen", "searched"])
def test_a_latency_off_its_target_is_told_once(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    further: tuple[str, ...],
    slow: float,
) -> None:
    """Where the model at the widths that were planned takes longer than a table of others says."""

    def milliseconds(model: Any) -> float:
        widths = [model.get_submodule(name).in_features for name in DOWNS]
        tabled = len(set(widths)) == 1 and widths[0] in (1, 19, 38, 58, 77, 96)
        return 5.0 + sum(widths) / 20 + (0 if tabled else slow)

    monkeypatch.setattr(
        "tp_amp.budget.latency.seconds", lambda model, *_: milliseconds(model) / 1000
    )
    assert main([*PRUNE, "--target", "latency=0.7", *further]) == 0
    output = capsys.readouterr()
    told = [line for line in output.err.splitlines() if "latency" in line]
    assert len(told) == (slow > 0)
    assert all(line.startswith("warning: the latency is ") for line in told)
    found = json.loads(Path("small/prune.json").read_text())
    dense = timm.create_model("vit_tiny_patch16_224", **arguments())
    for model, side in ((dense, "before"), (tp_amp.create_model("small"), "after")):
        assert found[side]["latency"] == pytest.approx(milliseconds(model))
    reached = found["after"]["latency"] / found["before"]["latency"]
    assert f"target: latency=0.7, reached {reached:.4g}\n" in output.out


def test_a_latency_is_measured_at_each_width_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table takes eight turns of five widths beside the dense one, what is planned eight."""
    timed: list[Any] = []

    def seconds(model: Any, *_: Any) -> float:
        timed.append(model)
        return sum(model.get_submodule(name).in_features for name in DOWNS) / 1000

    monkeypatch.setattr("tp_amp.budget.latency.seconds", seconds)
    command = ("prune", *MODEL, *SAMPLE, "--target", "latency=0.7")
    foreseen = record(capsys, *command, "--dry-run")
    assert len(timed) == 8 * (1 + 5) + 8 * (1 + 1)
    found = record(capsys, *command, "--output", "small")
    assert len(timed) == 2 * (8 * (1 + 5) + 8 * (1 + 1))
    assert found["widths"] == foreseen["widths"]
    for side in ("before", "after"):
        assert found[side]["latency"] == foreseen[side]["latency"]


DENSE = ("prune", *MODEL, "num_classes=0", "global_pool=", *SAMPLE, "--target", "params=0.8")


def test_a_model_of_dense_output_is_pruned_by_what_its_layers_give(
    capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    command = (*DENSE, "--refine", "1", "--output")
    assert main([*command, "auto"]) == 0
    output = capsys.readouterr()
    assert "output is neither classes nor features, so all errors of a layer count" in output.err
    assert main([*command, "named", "--objective", "reconstruction"]) == 0
    output = capsys.readouterr()
    assert "neither classes nor features" not in output.err
    for file in ("plan.json", "model.safetensors"):
        assert (here / "auto" / file).read_bytes() == (here / "named" / file).read_bytes()
    # The cosine of all that the model gives, token by token.
    assert re.search(r"cosine to the dense model: 1\.0000 -> 0\.9\d+, on 8 images", output.out)
    assert json.loads((here / "named" / "prune.json").read_text())["objective"] == "reconstruction"
    model = tp_amp.create_model("named")
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5, 24)


@pytest.mark.parametrize(
    "further",
    [
        ("--target", "params=0.8"),
        ("--max-increase", "0.02", "--importance", "magnitude"),
        ("--max-increase", "0.02", "--importance", "entropy"),
    ],
    ids=["foreseen", "searched", "scored"],
)
def test_the_objective_decides_the_plan(here: Path, further: tuple[str, ...]) -> None:
    command = ["prune", *MODEL, *SAMPLE, *further, "--output"]
    plans = {}
    for objective in ("auto", "prediction", "similarity"):
        assert main([*command, objective, "--objective", objective]) == 0
        plans[objective] = (here / objective / "plan.json").read_bytes()
    assert plans["auto"] == plans["prediction"] != plans["similarity"]


@pytest.mark.parametrize("size", [("--target", "params=0.8"), ("--max-increase", "0.02")])
def test_one_objective_goes_to_all_that_ask_for_one(
    monkeypatch: pytest.MonkeyPatch, size: tuple[str, ...]
) -> None:
    """Scores, the search, what tokens weigh, and what errors cost."""
    kinds: list[Any] = []
    call = Objective.__init__

    def made(self: Objective, kind: Any = "auto", *rest: Any, **named: Any) -> None:
        kinds.append(kind)
        call(self, kind, *rest, **named)

    monkeypatch.setattr(Objective, "__init__", made)
    command = ["prune", *MODEL, *SAMPLE, *size, "--refine", "1", "--output", "small"]
    assert main([*command, "--objective", "similarity"]) == 0
    assert len(kinds) >= 3
    assert set(kinds) == {"similarity"}


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
    # Scoring, and one pass for what tokens weigh and what errors cost; a search weighs tokens too.
    assert len(prepared) == {"entropy": 3, "reconstruction": 2}[importance]
    for file in ("plan.json", "model.safetensors"):
        assert (here / "plain" / file).read_bytes() == (here / "again" / file).read_bytes()


def test_a_dry_run_tells_the_widths_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    command = ("prune", *MODEL, *SAMPLE, "--target", "params=0.8")
    foreseen = record(capsys, *command, "--dry-run")
    assert list(here.iterdir()) == []
    assert main([*command, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "a dry run: nothing was cut or written" in text
    assert re.search(r"target: params=0\.8, reached 0\.(79\d*|8)\n", text)
    found = record(capsys, *command, "--output", "small")
    assert found["widths"] == foreseen["widths"]
    assert found["after"]["parameters"] == foreseen["after"]["parameters"]


def test_a_dry_run_of_a_search_tells_what_and_how_long(
    capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    command = ("prune", *MODEL, *SAMPLE, "--max-increase", "0.01", "--dry-run")
    assert main([*command, "--importance", "entropy"]) == 0
    text = capsys.readouterr().out
    assert f"{DOWNS[1]}: 96 channels" in text
    assert "the forward passes of the search take at most about" in text
    assert record(capsys, *command)["searched"] == DOWNS
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("search", [(), ("--min-width", "8")], ids=["foreseen", "searched"])
@pytest.mark.parametrize(
    ("chosen", "left"),
    [
        (("--ignore", "blocks.0"), DOWNS[1:]),
        (("--ignore", "*.attn", "--ignore", "blocks.1.*"), DOWNS[:1]),
        (("--only", "blocks.0-0"), DOWNS[:1]),
        (("--only", "*.mlp", "--ignore", DOWNS[0]), DOWNS[1:]),
    ],
)
def test_layers_are_left_out_or_chosen_by_name(
    capsys: pytest.CaptureFixture[str],
    chosen: tuple[str, ...],
    left: list[str],
    search: tuple[str, ...],
) -> None:
    command = ("prune", *MODEL, *SAMPLE, "--target", "params=0.95", "--output", "small")
    assert list(record(capsys, *command, *chosen, *search)["widths"]) == left


def test_every_linear_is_the_default_and_the_recipe_of_python(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ("prune", *MODEL, *SAMPLE, "--images", "128", "--target", "params=0.8")
    every = record(capsys, *command, "--output", "every")
    assert every["every_linear"] is True
    record(capsys, *command, "--output", "few", "--no-every-linear")
    record(capsys, *command, "--output", "mean", "--compensation", "mean")
    uncut = "blocks.1.attn.proj"
    fitted, plain, mean = (
        tp_amp.create_model(folder).get_submodule(uncut).weight
        for folder in ("every", "few", "mean")
    )
    assert not torch.equal(fitted, plain)
    assert torch.equal(mean, plain)  # as it was


def test_the_speed_is_measured_in_another_runtime(capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    options = ("--target", "params=0.8", "--runtime", "onnxruntime", "--batch-sizes", "3")
    found = record(capsys, "prune", *MODEL, *SAMPLE, "--output", "small", *options)
    assert found["runtime"] == "onnxruntime"
    report = tp_amp.Report.from_json(Path("small/report.json").read_text())
    for side, sizes in ((report.before, found["before"]), (report.after, found["after"])):
        assert side is not None
        assert side.runtime == "onnxruntime"
        assert [size for size, _ in side.speeds] == [3]
        assert side.exported_parameters == side.parameters == sizes["parameters"]


def test_the_help_names_all_runtimes() -> None:
    assert help_texts.RUNTIMES == building.RUNTIMES
