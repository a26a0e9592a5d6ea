"""All tests that need a GPU, and timings on one, in under ten minutes: `make cuda`.

    python benchmarks/gpu.py

Runs the tests that are marked `cuda`, then times scoring, AMP's search and pruned models in
bfloat16 with random weights, and the two greedy orders. Each part runs in a process of its own,
which is stopped when `--minutes` are over; what was left out is told. Exits with 1 where anything
failed or there is no GPU. Writes results/gpu.json, and the tables into docs/results/gpu.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import gpu_timings
import torch
from gpu_report import report
from gpu_timings import LAYERS, MODELS, TINY
from pages import PAGES, fill
from reference import RESULTS, versions, write_json
from round_to import SETTINGS

ROOT = Path(__file__).parents[1]
TESTS = "tests"
MARK = "mark.cuda"
TEST_MINUTES = 4  # of all, at most: the timings need some too


class Clock:
    """The seconds that are left."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def left(self, at_most: float = float("inf")) -> float:
        return max(0.1, min(at_most, self.end - time.monotonic()))


def started(command: Sequence[str], seconds: float) -> tuple[int | None, str, str]:
    """Run a command; its exit code, None where it was stopped, and what it wrote."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        environment = {**os.environ, "PYTHONPATH": paths}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=errors)
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            process.kill()
            process.wait()
        for file in (output, errors):
            file.seek(0)
        return code, output.read(), errors.read()


def last_line(*texts: str) -> str:
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def files_with_tests() -> list[str]:
    """Those that hold tests for a GPU."""
    files = sorted((ROOT / TESTS).rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if MARK in path.read_text()]


def run_tests(files: Sequence[str], seconds: float) -> dict[str, Any]:
    """Run the tests that are marked; how many did what, and which failed or were left out."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "tests.xml"
        # Another machine's libraries may warn of other things.
        options = ["-q", "-m", "cuda", "-W", "default", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", *options, f"--junitxml={listed}", *files]
        code, output, errors = started(command, seconds)
        found: dict[str, Any] = {"seconds": time.monotonic() - start, "failed": []}
        if not listed.is_file():
            stopped = (
                f"stopped after {seconds:.0f} s" if code is None else last_line(output, errors)
            )
            return {**found, "outcome": stopped}
        cases = list(ElementTree.parse(listed).getroot().iter("testcase"))
    left_out: dict[str, int] = {}
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            found["failed"].append(name)
        skipped = case.find("skipped")
        if skipped is not None:
            reason = str(skipped.get("message"))
            left_out[reason] = left_out.get(reason, 0) + 1
    passed = len(cases) - len(found["failed"]) - sum(left_out.values())
    outcome = "done" if code == 0 else f"pytest ended with {code}"
    return {**found, "outcome": outcome, "passed": passed, "left_out": left_out}


def run_timings(part: str, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Time one part; the stages that were done, and how it ended."""
    script = str(Path(gpu_timings.__file__).resolve())
    further = ["--batch-size", str(options.batch_size), "--repeats", str(options.repeats)]
    start = time.monotonic()
    code, output, errors = started(
        [sys.executable, script, part, "--device", options.device, *further], seconds
    )
    lines = (json.loads(line) for line in output.splitlines() if line.startswith("{"))
    stages = {line.pop("stage"): line for line in lines}
    outcome = "done" if code == 0 else last_line(errors)
    if code is None:
        outcome = f"stopped after {seconds:.0f} s, when the time was over"
    return {"outcome": outcome, "seconds": time.monotonic() - start, "stages": stages}


def is_sound(record: dict[str, Any]) -> bool:
    """Whether everything ran and passed, but for what a smaller GPU has no memory for."""
    tests, parts = record["tests"], record["timings"].values()
    stages = [stage for part in parts for stage in part["stages"].values()]
    failed = [stage["failed"] for stage in stages if "failed" in stage]
    return (
        (tests is None or (tests["outcome"] == "done" and not tests["failed"]))
        and all(part["outcome"] == "done" for part in parts)
        and all(text.startswith("OutOfMemoryError") for text in failed)
    )


def describe(device: str) -> dict[str, Any]:
    """The device and what runs on it."""
    if device == "cpu":
        return {"device": f"CPU, {platform.machine()}", "versions": versions()}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "memory_gb": properties.total_memory / 1e9,
        "devices": torch.cuda.device_count(),
        "versions": {**versions(), "cuda": torch.version.cuda},
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    real = [name for name in (*MODELS, LAYERS) if name != TINY]
    parser.add_argument("--parts", nargs="*", choices=[*MODELS, LAYERS], default=real)
    parser.add_argument("--no-tests", action="store_true", help="only time")
    parser.add_argument("--device", choices=list(SETTINGS), default="cuda")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=10, help="forward passes that are timed")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--page", type=Path, default=PAGES / "gpu.md", help="for the tables")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, test and time, print and write."""
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU that PyTorch can use, so nothing was run")
    clock = Clock(options.minutes)
    record = {
        **describe(options.device),
        "dtype": str(SETTINGS[options.device][0]).removeprefix("torch."),
        "batch_size": options.batch_size,
        "repeats": options.repeats,
        "tests": None,
        "timings": {},
    }
    path = options.output / "gpu.json"
    if not options.no_tests:
        print("tests", flush=True)
        record["tests"] = run_tests(files_with_tests(), clock.left(60 * TEST_MINUTES))
        write_json(record, path)
    for part in options.parts:
        print(f"timings: {part}", flush=True)
        record["timings"][part] = run_timings(part, options, clock.left())
        write_json(record, path)
    text = report(record)
    fill(options.page, "gpu", text)
    print(text)
    if not is_sound(record):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
