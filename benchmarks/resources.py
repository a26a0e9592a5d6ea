"""Peak memory and time of every public call on vision transformers of usual size.

    python benchmarks/resources.py

Real sizes, random weights, few random images. Each call of each model runs in a process of its own,
which is stopped after `--timeout` seconds or when it holds `--memory-gb`; the table says so. Peaks
are those of the resident set from the call's begin, over what stood before it (the model, images,
libraries, and what the call is given) and in all. Writes results/resources.json after every row and
the table into docs/results/resources.md. What is measured already is not measured again, unless it
failed, or was stopped at a limit that is higher now. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import resource_calls
from pages import PAGES, fill
from reference import RESULTS, versions, write_json
from resource_calls import CALLS, MODELS, TINY
from resource_report import report
from tqdm import tqdm

POLL = 0.02  # seconds between two looks at a process
KEY = ("model", "call", "images", "threads", "processor")
LIMITS = {"time": "timeout", "memory": "memory_gb"}


def peak_of(process: int) -> int:
    """Bytes of a process's peak since it was set back; 0 once the process has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def processor() -> str:
    """Name of the processor, and how many cores it has."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown processor'}, {os.cpu_count()} cores"


def busy_seconds() -> tuple[float, float]:
    """CPU seconds so far: of all programs, and of this one with its children that have ended."""
    every = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    ticks = sum(int(every[place]) for place in (0, 1, 2, 5, 6))  # no idle, iowait, steal, guests
    return ticks / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


def run(model: str, call: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one call in a process of its own, within the limits."""
    script = str(Path(resource_calls.__file__).resolve())
    arguments = ["--images", str(options.images), "--threads", str(options.threads)]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        start, (every, own) = time.monotonic(), busy_seconds()
        process = subprocess.Popen(
            [sys.executable, script, model, call, *arguments],
            stdout=output,
            stderr=errors,
            env={**os.environ, "OMP_NUM_THREADS": str(options.threads)},
        )
        try:
            outcome, peak = watch(process, start, options)
        finally:
            process.kill()
            process.wait()
        taken, (every_now, own_now) = time.monotonic() - start, busy_seconds()
        others = max(0.0, every_now - every - (own_now - own)) / taken
        row: dict[str, Any] = {"outcome": outcome, "parameters": None, "before_bytes": None}
        row |= {"seconds": None, "cpu_seconds": None, "peak_bytes": peak, "message": None}
        for line in text_of(output):
            if line.startswith("{"):
                row |= json.loads(line)
        if outcome == "failed":
            lines = [line for line in text_of(errors) if line.strip()]
            row["message"] = lines[-1] if lines else f"exit code {process.returncode}"
        return row | {"process_seconds": taken, "other_cores": others}


def watch(
    process: subprocess.Popen[bytes], start: float, options: argparse.Namespace
) -> tuple[str, int]:
    """Wait for a process, at most up to its limits; how it ended, and its peak."""
    peak = 0
    while process.poll() is None:
        peak = peak_of(process.pid) or peak
        if peak > 1e9 * options.memory_gb:
            return "memory", peak
        if time.monotonic() - start > options.timeout:
            return "time", peak
        time.sleep(POLL)
    return ("failed" if process.returncode else "done"), peak


def text_of(file: IO[str]) -> list[str]:
    file.seek(0)
    return file.read().splitlines()


def is_settled(row: dict[str, Any], options: argparse.Namespace) -> bool:
    """Whether another run can tell nothing new."""
    if row["outcome"] in LIMITS:
        limit = LIMITS[row["outcome"]]
        return bool(getattr(options, limit) <= row[limit])
    return bool(row["outcome"] == "done")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    real = [name for name in MODELS if name != TINY]
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=real)
    parser.add_argument("--calls", nargs="+", choices=list(CALLS), default=list(CALLS))
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for each process")
    parser.add_argument("--memory-gb", type=float, default=16, help="for each process")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--page", type=Path, default=PAGES / "resources.md", help="for the table")
    options = parser.parse_args(arguments)
    if sys.platform != "linux":
        parser.error("reads /proc, which Linux has alone")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, measure what is missing, print and write."""
    options = parse(arguments)
    path = options.output / "resources.json"
    record = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    common = {
        "images": options.images,
        "threads": options.threads,
        "processor": processor(),
        "timeout": options.timeout,
        "memory_gb": options.memory_gb,
        "versions": versions(),
    }
    wanted = [(model, call) for model in options.models for call in options.calls]
    for model, call in tqdm(wanted, disable=None):
        row = {"model": model, "call": call, **common}
        same = [x for x in record["rows"] if all(x[name] == row[name] for name in KEY)]
        if any(is_settled(x, options) for x in same):
            continue
        row |= run(model, call, options)
        record["rows"] = [x for x in record["rows"] if x not in same] + [row]
        write_json(record, path)
    text = report(record)
    fill(options.page, "resources", text)
    print(text)


if __name__ == "__main__":
    main()
