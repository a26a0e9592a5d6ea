"""Time and memory of scoring and compensating, next to a forward pass and Torch-Pruning's Taylor.

    python benchmarks/speed.py

Times are ratios to a forward pass over the same images in inference mode, medians over repeats
that take turns. On a CPU they are CPU seconds of one thread, which other load hardly disturbs;
memory is the growth of the resident set (Linux) in a process of its own. On CUDA they are seconds,
and PyTorch's allocated memory. Weights and images are random. Writes results/speed.json.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
import torch_pruning as tp
from reference import (
    RESULTS,
    add_cross_entropy_gradients,
    build_reference,
    table,
    versions,
    write_json,
)
from torch import Tensor, nn

import tp_amp
from tp_amp.algebra.closed_form import correct
from tp_amp.algebra.moments import Moments
from tp_amp.compensation.recipe import Recipe
from tp_amp.compensation.walk import fit
from tp_amp.importance.objectives import Objective, mean_objective
from tp_amp.plan.cutting import narrowed
from tp_amp.structure.mlp_cuts import mlp_group
from tp_amp.structure.model_structure import ModelStructure

BOUND = 2.5  # scoring may take this many times as long as the plain forward pass
# Model -> pixels of an image's side, images in a batch, batches.
CASES = {"vit": (32, 32, 4), "swin": (32, 32, 4), "vit_small_patch16_224": (224, 4, 2)}
BOTH_BOUND = 6  # scoring and compensating together, solves included
BASE, TAYLOR, COMPENSATION = "forward", "Taylor (TP)", "compensation, affine"
SOLVES = "solves of it alone"
SCORINGS = ("prediction", "similarity")


class Case:
    """One model with its images, and the jobs that are measured on them."""

    def __init__(self, name: str, device: str) -> None:
        torch.manual_seed(0)
        size, images, batches = CASES[name]
        if name in ("vit", "swin"):
            model = build_reference(name)
        else:
            model = timm.create_model(name, num_classes=10)
        self.model: nn.Module = model.to(device).eval()
        self.batches: list[tuple[Tensor, Tensor]] = [
            (torch.randn(images, 3, size, size), torch.randint(10, (images,)))
            for _ in range(batches)
        ]
        self.batches = [(x.to(device), y.to(device)) for x, y in self.batches]
        self.example = self.batches[0][0][:1]
        self.structure = ModelStructure(self.model, self.example)
        self.mlps, self.graph = self.structure.mlps, self.structure.graph
        self.downs = [mlp.down for mlp in self.mlps]
        self.moments = [random_moments(self.model, mlp) for mlp in self.mlps]
        self.jobs: dict[str, Callable[[], Any]] = {
            BASE: self.forward,
            "prediction": lambda: self.collect("prediction", self.downs),
            "similarity": lambda: self.collect("similarity", self.downs),
            "prediction, all layers": lambda: self.collect("prediction", None),
            TAYLOR: self.taylor,
            "search probe": self.probe,
            COMPENSATION: self.compensation,
            f"{COMPENSATION}, every Linear": lambda: self.compensation(every_linear=True),
            f"{COMPENSATION}, every Linear, 10 passes": lambda: self.compensation(
                every_linear=True, refine=10
            ),
            SOLVES: self.solves,
            "find_mlps": lambda: tp_amp.find_mlps(self.model, self.example),
        }

    @torch.inference_mode()
    def forward(self) -> None:
        for images, _ in self.batches:
            self.model(images)

    def collect(self, objective: str, layers: list[str] | None) -> None:
        importance = tp_amp.EntropyTaylorImportance(objective)
        importance.collect(self.model, self.batches, layers=layers, progress=False)

    def taylor(self) -> None:
        """Torch-Pruning's Taylor: gradients of all parameters, then the scores of all MLPs."""
        add_cross_entropy_gradients(self.model, self.batches)
        importance = tp.importance.TaylorImportance()
        for mlp in self.mlps:
            importance(mlp_group(self.graph, mlp, range(mlp.width)))
        self.model.zero_grad()

    def compensation(self, **further: Any) -> None:
        """Moments, solves and a walk through the depth, with half of every MLP kept."""
        keep = {mlp.down: list(range(mlp.width // 2)) for mlp in self.mlps}
        recipe = Recipe("affine", **further)
        fit(self.structure, self.mlps, keep, self.batches, recipe, progress=False)

    def solves(self) -> None:
        """What of the compensation solves for the corrections, given the moments."""
        for moments in self.moments:
            correct(moments, "affine")

    def probe(self) -> None:
        """One step of the width search: half of one MLP, over the same images."""
        mlp = self.mlps[0]
        with narrowed(self.graph, {mlp: range(mlp.width // 2)}):
            mean_objective(self.model, self.batches, Objective("prediction"))


def random_moments(model: nn.Module, mlp: tp_amp.MLP) -> Moments:
    """Moments as large as those of half of an MLP."""
    down: Any = model.get_submodule(mlp.down)
    tokens, outputs = 2 * mlp.width, len(down.weight)
    return Moments().add(
        torch.randn(tokens, mlp.width // 2).to(down.weight),
        torch.randn(tokens, outputs).to(down.weight),
    )


def seconds(job: Callable[[], Any], device: str) -> float:
    """Time one run: CPU seconds on a CPU, seconds elsewhere."""
    if device == "cpu":
        start = time.process_time()
        job()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    job()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_of_process(name: str, job: str) -> int:
    """Bytes by which a job on the CPU raises the resident set; for a process of its own."""
    torch.set_num_threads(1)
    case = Case(name, "cpu")
    ctypes.CDLL(None).malloc_trim(0)  # gives back what loading and tracing took
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident_peak()
    case.jobs[job]()
    return resident_peak() - before


def resident_peak() -> int:
    """Bytes of this process's resident set at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def peak_of_cuda(case: Case, job: str) -> int:
    """Bytes by which a job raises PyTorch's allocated memory."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    case.jobs[job]()
    return torch.cuda.max_memory_allocated() - before


def measure_memory(name: str, case: Case, device: str) -> dict[str, int]:
    """Peak memory of each job on the images; nothing where it can't be told."""
    jobs = (BASE, *SCORINGS, "prediction, all layers", TAYLOR)
    if device != "cpu":
        return {job: peak_of_cuda(case, job) for job in jobs}
    if platform.system() != "Linux":
        return {}
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["speed"])  # so that it imports torch once
    found = {}
    for job in jobs:
        with ProcessPoolExecutor(1, mp_context=server) as pool:
            found[job] = pool.submit(peak_of_process, name, job).result()
    return found


def measure(name: str, device: str, repeats: int) -> dict[str, Any]:
    """Everything about one model: all jobs take turns, after one run each that doesn't count."""
    case = Case(name, device)
    times: dict[str, list[float]] = {job: [] for job in case.jobs}
    for repeat in range(repeats + 1):
        for job, function in case.jobs.items():
            taken = seconds(function, device)
            if repeat:
                times[job].append(taken)
    ratios = {
        job: median(a / b for a, b in zip(times[job], times[BASE], strict=True)) for job in times
    }
    memory = measure_memory(name, case, device)
    return {
        "images": sum(len(images) for images, _ in case.batches),
        "batch_size": len(case.batches[0][0]),
        "mlps": len(case.mlps),
        "seconds": {job: median(values) for job, values in times.items()},
        "ratio_to_forward": {job: ratio for job, ratio in ratios.items() if job != "find_mlps"},
        "peak_memory_bytes": memory,
        "bounds": check_bounds(ratios, memory),
    }


def check_bounds(ratios: dict[str, float], memory: dict[str, int]) -> dict[str, bool]:
    """Tell which of the bounds on scoring hold, for both objectives."""
    time_taken = max(ratios[job] for job in SCORINGS)
    bounds = {
        f"at most {BOUND} forward passes": time_taken <= BOUND,
        "faster than Taylor": time_taken < ratios[TAYLOR],
        f"at most {BOTH_BOUND} with compensation": time_taken + ratios[COMPENSATION] <= BOTH_BOUND,
        f"at most {BOTH_BOUND} with compensation, plus the solves": (
            time_taken + ratios[COMPENSATION] - ratios[SOLVES] <= BOTH_BOUND
        ),
    }
    if memory:
        most = max(memory[job] for job in SCORINGS)
        bounds["less memory than Taylor"] = most < memory[TAYLOR]
    return bounds


def report(record: dict[str, Any]) -> str:
    """What a person reads."""
    rows = []
    for name, entry in record["models"].items():
        for job, taken in entry["seconds"].items():
            size = entry["peak_memory_bytes"].get(job)
            ratio = entry["ratio_to_forward"].get(job)
            rows.append(
                [
                    f"{name}: {job}",
                    f"{1e3 * taken:.0f}",
                    f"{ratio:.2f}" if ratio else "",
                    f"{size / 2**20:.0f}" if size is not None else "",
                ]
            )
    bounds = [
        f"{name}: {'holds' if good else 'FAILS'}: {bound}"
        for name, entry in record["models"].items()
        for bound, good in entry["bounds"].items()
    ]
    header = ["job", "time (ms)", "forward passes", "peak memory (MiB)"]
    return table(header, rows) + "\n\n" + "\n".join(bounds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    record = {
        "device": torch.cuda.get_device_name() if options.device != "cpu" else "CPU, one thread",
        "repeats": options.repeats,
        "versions": versions(),
        "models": {name: measure(name, options.device, options.repeats) for name in options.models},
    }
    print(report(record))
    write_json(record, options.output / "speed.json")


if __name__ == "__main__":
    main()
