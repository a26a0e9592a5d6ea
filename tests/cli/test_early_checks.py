"""Paths and pairs of options are refused before torch is imported, in a blink."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import COMPARE, MODEL, PRUNE, SAMPLE, tells_the_mistake, without

import tp_amp

pytestmark = pytest.mark.usefixtures("here")

MISTAKES: dict[str, tuple[list[str], str]] = {
    "no weights": ([*PRUNE, "--weights", "w.pt"], r"no such file: w\.pt; --weights takes"),
    "no such folder": (
        ["inspect", "./small/"],
        r"\./small/ is no folder; see tp-amp inspect --help",
    ),
    "no photographs": ([*without("--data", *PRUNE), "--data", "photos"], r"folder: photos; --data"),
    "a full folder": ([*without("--output", *PRUNE), "--output", "full"], r"full is not empty"),
    "a file": ([*without("--output", *PRUNE), "--output", "full/a.txt"], r"is a file; pass a fol"),
    "a picture of text": ([*COMPARE, "--plot", "a.txt"], r"must end in \.png, \.svg or \.pdf"),
    "no such report": (["report", "small"], r"small holds no plan\.json; pass the --output"),
    "no such student": (
        ["distill", "small", "--data", "sample", "--output", "b", "--pretrained"],
        r"small holds no source\.json; the student is a folder",
    ),
    "no output": (without("--output", *PRUNE), r"required: --output \(or --dry-run, which wr"),
    "refining a mean": (
        [*PRUNE, "--compensation", "mean", "--refine", "3"],
        r"--refine goes on from --compensation affine, found mean",
    ),
    "refining a few": (
        [*PRUNE, "--no-every-linear", "--refine", "3"],
        r"--refine goes on from --every-linear; leave --no-every-linear out",
    ),
    "fitting nothing": (
        [*PRUNE, "--every-linear", "--compensation", "none"],
        r"--every-linear is a compensation, and --compensation none is asked for",
    ),
    **{
        f"no entropy, {' '.join(further)}": (
            [*PRUNE, "--objective", "reconstruction", *further],
            r"reconstruction is no entropy, by which --importance entropy scores and widths are se",
        )
        for further in (
            ["--importance", "entropy"],
            ["--importance", "magnitude"],
            ["--prune-num-heads"],
            ["--min-width", "8"],
        )
    },
    "no entropy for a tolerance": (
        [*without("--target", *PRUNE), "--max-increase", "0.1", "--objective", "reconstruction"],
        r"reconstruction is no entropy, .* --importance reconstruction with --target, without",
    ),
    "nothing to run again": (
        [*PRUNE, "--objective", "reconstruction", "--activation-checkpointing"],
        r"reconstruction takes no backward pass; leave --activation-checkpointing out",
    ),
    "whole MLPs by a search": (
        [*PRUNE, "--min-width", "0", "--prune-num-heads"],
        r"--min-width 0 lets whole MLPs and attentions go .* which no search tries: .* --prune-num",
    ),
    "widths that are searched": (
        [*PRUNE, "--widths", "mlp", "qk", "--min-width", "8"],
        r"--widths mlp qk is priced by what is foreseen, not searched: .* and --min-width",
    ),
    "heads and channels inside them": (
        [*PRUNE, "--widths", "heads", "qk"],
        r"no one plan cuts whole heads and the channels inside them",
    ),
    "no entropy to compare": (
        [*COMPARE, "--objective", "reconstruction"],
        r"by which --importance entropy scores; name the others, as in --importance reconst",
    ),
    "an objective that nobody asks for": (
        [*COMPARE, "--objective", "similarity", "--importance", "lamp", "dimap"],
        r"--objective is for --importance reconstruction and entropy; leave it out, lamp and dimap",
    ),
}


@pytest.fixture
def full(here: Path) -> Path:
    (here / "full").mkdir()
    (here / "full/a.txt").write_text("")
    return here


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_one_line(
    name: str, full: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tells_the_mistake(*MISTAKES[name], full, capsys)


def test_nothing_heavy_is_imported_before(full: Path) -> None:
    """All of them in one process, at whose end there is no torch yet."""
    code = (
        "import sys\nfrom tp_amp.cli.main import main\n"
        f"print([main(command) for command in {[command for command, _ in MISTAKES.values()]!r}])\n"
        "print({'torch', 'timm'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(tp_amp.__file__).parents[1])}
    called = [sys.executable, "-c", code]
    result = subprocess.run(called, capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.splitlines() == [str([2] * len(MISTAKES)), "set()"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--ignore", "block.0"), r"--ignore: 'block\.0' matches no module .*; near are blocks\.0"),
        (("--ignore", "blocks.1-30"), r"--ignore: 'blocks\.1-30' .*the last blocks\.1$"),
        (("--only", "*.mpl"), r"--only: '\*\.mpl' matches no module"),
        (("--ignore", "blocks"), r"all 2 MLPs are ignored layers"),
        (("--round-to", "200"), r"with round_to=200 the smallest width is 200, so that 2 of 2"),
        (("--ignore", "blocks.0", "--target", "params=0.5"), r"can't be met: reachable are"),
    ],
)
def test_a_choice_of_layers_is_checked_before_images_are_read(
    option: tuple[str, ...], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prune", *MODEL, *SAMPLE, "--target", "params=0.9", "--dry-run", *option]
    tells_the_mistake(command, message, here, capsys)
