"""What the width search costs: plain, from the cut on only, and with the sequential test.

    python benchmarks/search.py --data path/to/cifar10

The same ranking and the same images each time. Forwards are images times probes (and the dense
model), as the sequential test saves them. Also counted are all images that the model is called on,
with those of the scoring and of passes that end at the cut, and the share of them in MLPs that are
run (a search that starts at the cut runs fewer MLPs for an image). Times are CPU seconds of one
thread. Differences between plans are in steps of the bisection, a 2**steps-th of a layer's width.
With several numbers of images all is done for each; above `--cached-from` only from the cut on,
which finds the same plans with the same forwards in a fraction of the time. Writes
results/search.json. `--data` is as for train_reference.py.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from cifar import load_split, normalize
from reference import (
    ARCHITECTURES,
    load_reference,
    reference_parser,
    table,
    versions,
    write_json,
)
from torch import Tensor, nn

import tp_amp

CACHE = 2**30
# Name -> arguments of the pruner; "sequential" ones once for each error probability.
PLAIN, PREFIX = "plain", "from the cut on"
STEPS = 6


def search(
    model: nn.Module, importance: Any, images: Sequence[Tensor], **options: Any
) -> dict[str, Any]:
    """Search once; widths, CPU seconds, images and runs of MLPs."""
    model = copy.deepcopy(model)
    pruner = tp_amp.AdaptiveMLPPruner(
        model, images[0][:1], importance, images, steps=STEPS, progress=False, **options
    )
    called, run = [], []
    handles = [model.register_forward_pre_hook(lambda _, args: called.append(len(args[0])))]
    for mlp in pruner.mlps:
        up = model.get_submodule(mlp.up[0])
        # Windows and tokens in front differ: a batch counts once.
        handles.append(up.register_forward_pre_hook(lambda *_: run.append(called[-1])))
    start = time.process_time()
    pruner.step()
    seconds = time.process_time() - start
    for handle in handles:
        handle.remove()
    return {
        "widths": {name: len(kept) for name, kept in pruner.plan.keep.items()},
        "dense": {mlp.down: mlp.width for mlp in pruner.mlps},
        "seconds": seconds,
        "forwards": forwards(pruner, images),
        "images": sum(called),
        "mlp_runs": sum(run) / len(pruner.mlps),
    }


def forwards(pruner: Any, images: Sequence[Tensor]) -> int:
    """Images that the dense model and the probes ran on."""
    if pruner.error_probability is not None:
        used: int = pruner.forwards.used
        return used
    probes = sum(len(tried) for tried in pruner.plan.probes.values())
    return (1 + probes) * sum(len(batch) for batch in images)


def compare(model: str, count: int, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Search a reference model in every way, on that many images."""
    module = load_reference(model, options.checkpoints)
    images, _ = load_split(options.data, "train")
    generator = torch.Generator().manual_seed(options.seed)
    chosen = torch.randperm(len(images), generator=generator)[: options.scoring + count]
    scoring, searched = normalize(images[chosen]).split([options.scoring, count])
    importance = tp_amp.EntropyTaylorImportance(objective="prediction")
    importance.collect(module, scoring.split(64))
    batches = searched.split(options.batch_size)
    ways: dict[str, dict[str, Any]] = {PLAIN: {"cache_bytes": 0}, PREFIX: {"cache_bytes": CACHE}}
    for error in options.error_probability:
        ways[f"sequential, {error:g}"] = {"cache_bytes": 0, "error_probability": error}
        both = {"cache_bytes": CACHE, "error_probability": error}
        ways[f"sequential, {error:g}, from the cut on"] = both
    if count > options.cached_from:
        ways = {name: way for name, way in ways.items() if way["cache_bytes"]}
    found = {}
    for name, arguments in ways.items():
        arguments["max_increase"] = options.max_increase
        found[name] = search(module, importance, batches, **arguments)
        print(model, count, name, f"{found[name]['seconds']:.1f} s", flush=True)
    plain = found.get(PLAIN, found[PREFIX])
    for entry in found.values():
        for key in ("seconds", "forwards", "images", "mlp_runs"):
            entry[f"{key}_to_plain"] = entry[key] / plain[key]
        entry["steps_off"] = steps_off(entry["widths"], plain["widths"], plain["dense"])
    return found


def steps_off(widths: dict[str, int], plain: dict[str, int], dense: dict[str, int]) -> float:
    """The largest difference of two plans, in steps of the bisection."""
    return max(abs(widths[n] - plain[n]) * 2**STEPS / width for n, width in dense.items())


def report(record: dict[str, Any]) -> str:
    """What a person reads."""
    rows = [
        [
            model,
            count,
            way,
            f"{entry['seconds']:.1f}",
            f"{entry['forwards']}",
            f"{entry['forwards_to_plain']:.2f}",
            f"{entry['mlp_runs_to_plain']:.2f}",
            f"{entry['steps_off']:.1f}",
        ]
        for model, counts in record["models"].items()
        for count, ways in counts.items()
        for way, entry in ways.items()
    ]
    heads = ["", "images", "", "s", "forwards", "to plain", "MLPs run, to plain", "steps off"]
    return table(heads, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the arguments, measure, print and write."""
    parser = reference_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--scoring", type=int, default=256, help="images")
    parser.add_argument("--images", type=int, nargs="+", default=[256, 2048], help="of the search")
    parser.add_argument("--cached-from", type=int, default=256, help="images; see above")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-increase", type=float, default=1e-2)
    parser.add_argument("--error-probability", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    settings = ("scoring", "images", "batch_size", "max_increase", "seed")
    record = {
        **{name: getattr(options, name) for name in settings},
        "versions": versions(),
        "models": {
            model: {str(count): compare(model, count, options) for count in options.images}
            for model in options.models
        },
    }
    print(report(record))
    write_json(record, options.output / "search.json")


if __name__ == "__main__":
    main()
