"""What can be typed, what the help says, and what is said to what can't be read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import COMPARE, DOWNS, MODEL, PRUNE, SIZE, record, tells_the_mistake, without

import tp_amp
from tp_amp.cli.main import main

pytestmark = pytest.mark.usefixtures("here")


def test_arguments_of_the_model_may_be_words(capsys: pytest.CaptureFixture[str]) -> None:
    found = record(capsys, "inspect", *MODEL, "global_pool=avg")
    assert [mlp["down"] for mlp in found["mlps"]] == DOWNS


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


# What is typed, and what the one line must say.
MISTAKES: dict[str, tuple[list[str], str]] = {
    "command": (["prun"], r"invalid choice: 'prun'.*see tp-amp --help"),
    "option": ([*PRUNE, "--traget", "1"], r"unrecognized arguments: --traget.*--help"),
    "no model": (["inspect"], r"required: MODEL; see tp-amp inspect --help"),
    "no data": (["prune", *MODEL, *SIZE], r"required: --data; see tp-amp prune --help"),
    "no output": (without("--output", *PRUNE), r"required: --output"),
    "no size": (without("--target", *PRUNE), r"--target --max-increase is required"),
    "two sizes": ([*PRUNE, "--max-increase", "0.1"], "not allowed with argument --target"),
    "model argument": ([*COMPARE, "--model-args", "x"], r"'x' is not NAME=VALUE; MODEL"),
    "no images to score": ([*PRUNE, "--images", "0"], r"whole number of 1 or more"),
    "batch size": ([*PRUNE, "--batch-size", "-3"], r"--batch-size.*'-3' is no whole"),
    "target kind": (
        [*PRUNE, "--target", "flops=0.5"],
        r"write params=0\.6, macs=0\.6 or lat",
    ),
    "target number": ([*PRUNE, "--target", "params=-1"], r"write params=0\.6, macs"),
    "increase": (
        [*without("--target", *PRUNE), "--max-increase", "-1"],
        r"zero or more, such as 0\.0",
    ),
    "increase is no number": (
        [*without("--target", *PRUNE), "--max-increase", "much"],
        r"zero or more, such as 0\.0",
    ),
    "importance": ([*PRUNE, "--importance", "entrop"], r"choose from .*entropy"),
    "compensation": ([*PRUNE, "--compensation", "all"], r"choose from .*affine"),
    "fraction": ([*COMPARE, "--keep", "1.5"], r"'1\.5' is no fraction above 0, 1 at"),
    "dtype": ([*PRUNE, "--dtype", "int8"], r"choose from .*bfloat16"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_cannot_be_read_is_told_in_one_line(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tells_the_mistake(*MISTAKES[name], here, capsys)
