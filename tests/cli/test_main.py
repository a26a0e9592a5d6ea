"""The command line as a user has it: what it prints, writes, and says to mistakes."""

from __future__ import annotations

import errno
import json
import logging
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
from command_line import (
    COMPARE,
    MODEL,
    PRUNE,
    SAMPLE,
    SIZE,
    SMALL,
    arguments,
    fails,
    files,
    photos,
    tells_the_mistake,
    told,
    without,
)
from safetensors import SafetensorError

import tp_amp
from tp_amp.cli import main as main_module
from tp_amp.cli.main import main
from tp_amp.data import sources

pytestmark = pytest.mark.usefixtures("here")


def test_no_arguments_print_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert "usage: tp-amp" in told(capsys)


def test_an_answer_that_nobody_reads_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `tp-amp ... | head`: the pipe is closed before the answer is printed."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["inspect", *MODEL, "--device", "cpu"]) == 0


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


# What is typed, what the one line must say, and how the folder is made before.
MISTAKES: dict[str, tuple[list[str], str, Callable[[Path, Path], Any] | None]] = {
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
    "target out of range": (
        [*PRUNE, "--target", "params=0.01"],
        r"reachable are .* fractions 0\.\d+ to 1",
        None,
    ),
    "latency out of range": (
        [*PRUNE, "--target", "latency=0.001"],
        r"ms of latency can't be met: reachable are .* fractions [01]\.\d+ to 1|no faster: it has",
        None,
    ),
    "no labels": ([*PRUNE, "--importance", "taylor"], r"needs labels, and sample has non", None),
    "refine": (
        [*PRUNE, "--compensation", "mean", "--refine", "3"],
        r"--refine goes on from --compensation affine, found mean",
        None,
    ),
    "device": ([*PRUNE, "--device", "gpu"], r"--device gpu is not there.*--device cpu", None),
    "device without values": ([*PRUNE, "--device", "meta"], r"--device meta is not there", None),
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
        r"no MLP was found in ResNet; tp_amp.inspect tells",
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
    tells_the_mistake(command, message, here, capsys)


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
    def half(_: Any, path: str, metadata: dict[str, str]) -> None:
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


def test_a_download_that_is_tried_again_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As the hub's client says it, for each try and each file."""
    hub = logging.getLogger("huggingface_hub.utils._http")
    with main_module._logging(False):
        for attempt in range(1, 6):
            for file in ("model.safetensors", "config.json"):
                hub.warning(
                    "'(MaxRetryError(Failed to resolve), '(Request ID: %s)')' thrown while "
                    "requesting HEAD https://hub/%s",
                    f"ab-{attempt}{file}",
                    file,
                )
                hub.warning("Retrying in %ds [Retry %d/5].", attempt, attempt)
    [line] = capsys.readouterr().err.splitlines()
    assert "Failed to resolve" in line
