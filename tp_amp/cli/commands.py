"""What each command of `tp-amp` does."""

from __future__ import annotations

import copy
import json
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import tp_amp
from tp_amp.cli.command_parts import (
    REPORT,
    Answer,
    count_images,
    draw_batches,
    load_model,
    size_of,
    write_model,
)
from tp_amp.cli.describing import described, widths
from tp_amp.cli.distill_command import distill
from tp_amp.cli.help_texts import IMPORTANCES
from tp_amp.cli.output_folder import staging
from tp_amp.cli.pruning import LABELLED, Pruning, make_importance
from tp_amp.data.images import open_images
from tp_amp.evaluation.comparing import compare as compare_importances
from tp_amp.evaluation.fidelity import default_metric
from tp_amp.plan.file_names import PLAN
from tp_amp.plan.pruning_plan import PruningPlan
from tp_amp.reports.report import Report
from tp_amp.running.restoring import seeded


def run(options: Namespace) -> Answer:
    """Run the command that was parsed, with everything random seeded."""
    commands = {
        "inspect": inspect,
        "compare": compare,
        "prune": prune,
        "distill": distill,
        "report": report,
    }
    with seeded(getattr(options, "seed", 0)):
        return commands[options.command](options)


def inspect(options: Namespace) -> Answer:
    """Tell what can be cut."""
    loaded = load_model(options)
    found = tp_amp.inspect(loaded.model, loaded.blank())
    return Answer(str(found), {"spec": options.model, **asdict(found)})


def compare(options: Namespace) -> Answer:
    """Measure importances side by side."""
    images = open_images(options.data, options.split)
    loaded = load_model(options)
    labelled, (scoring, judging) = draw_batches(options, images, loaded)
    names = options.importance or [n for n in IMPORTANCES if labelled or n not in LABELLED]
    found = compare_importances(
        loaded.model,
        loaded.blank(),
        {name: make_importance(name, options) for name in names},
        scoring,
        evaluation=judging,
        fractions=options.keep,
        compensation=options.compensation,
        seed=options.seed,
    )
    lines = [str(found)]
    if options.plot:
        found.plot(options.plot)
        lines.append(f"drawn: {options.plot}")
    lines.append(f"next: tp-amp prune {options.model} ... --importance NAME --target params=0.6")
    return Answer("\n".join(lines), {"spec": options.model, **asdict(found)})


def prune(options: Namespace) -> Answer:
    """Cut a model, compensate, and write it whole or not at all."""
    images = open_images(options.data, options.split)
    loaded = load_model(options)
    model, inputs = loaded.model, loaded.blank()
    pruning = Pruning(model, inputs, options)

    def drawn() -> list[list[Any]]:
        labelled, batches = draw_batches(options, images, loaded)
        if options.importance in LABELLED and not labelled:
            raise ValueError(
                f"--importance {options.importance} needs labels, and {options.data} has none of "
                "this model's classes; take another (entropy and reconstruction need none)"
            )
        return batches

    if options.dry_run:
        return _dry_run(pruning, *drawn())
    output = Path(options.output)
    with staging(output, model) as folder:
        scoring, judging = drawn()
        metric, measure = default_metric(model, judging)
        before = {**size_of(model, inputs), metric: measure(model)}
        dense = copy.deepcopy(model)
        plan = pruning.prune(scoring, judging)
        after = {**size_of(model, inputs), metric: measure(model)}
        for sizes, latency in zip((before, after), pruning.latencies(), strict=True):
            sizes |= latency
        both = tp_amp.measure_both(
            dense, model, judging, runtime=options.runtime, batch_sizes=options.batch_sizes
        )
        if loaded.plan is not None:
            plan = loaded.plan.then(plan)
        record = {
            "spec": options.model,
            "output": options.output,
            **{key: getattr(options, key) for key in _SETTINGS},
            "images_scored": count_images(scoring),
            "images_judged": count_images(judging),
            "before": before,
            "after": after,
            "widths": widths(plan),
            "versions": {"tp_amp": tp_amp.__version__, "torch": torch.__version__},
        }
        write_model(loaded, plan, plan.report(*both), record, folder)
    files = ", ".join(sorted(path.name for path in output.iterdir()))
    saved = f"saved in {output}: {files}\nnext: tp-amp report {output}"
    return Answer(f"{described(record)}\n{saved}", record)


def report(options: Namespace) -> Answer:
    """Show a saved plan."""
    folder = Path(options.folder)
    plan = PruningPlan.from_json((folder / PLAN).read_text())
    found = plan.report()
    if (folder / REPORT).is_file():
        try:
            found = Report.from_json((folder / REPORT).read_text())
        except ValueError as error:
            raise ValueError(f"{folder / REPORT} is damaged ({error}); prune again") from error
    following = f"next: tp-amp inspect {folder}, or tp_amp.create_model({str(folder)!r}) in Python"
    if options.html:
        found.save(options.html)
        following = f"drawn: {options.html}\n{following}"
    return Answer(f"{found}\n{following}", json.loads(found.to_json()))


_SETTINGS = (
    "importance",
    "objective",
    "compensation",
    "every_linear",
    "refine",
    "ignore",
    "only",
    "target",
    "runtime",
    "max_increase",
    "prune_num_heads",
    "widths",
    "round_to",
    "min_width",
    "seed",
)


def _dry_run(pruning: Pruning, scoring: list[Any], judging: list[Any]) -> Answer:
    """Tell what would be cut, or searched; the model is a copy, and nothing is written."""
    model, inputs, options = pruning.model, pruning.inputs, pruning.options
    shared = {
        "spec": options.model,
        "dry_run": True,
        "target": options.target,
        "runtime": options.runtime,
    }
    plan = pruning.foreseen(scoring)
    nothing = "a dry run: nothing was cut or written"
    if plan is None:
        estimate = pruning.searching(scoring, judging).estimate()
        names = [f"  {site.down}: {site.width} {site.units}" for site in pruning.sites]
        lines = ["these would be searched:", *names]
        lines.append(f"the forward passes of the search take at most about {estimate}")
        record = {**shared, "searched": [site.down for site in pruning.sites]} | asdict(estimate)
        return Answer("\n".join([*lines, nothing]), record)
    cut = copy.deepcopy(model)
    tp_amp.apply_plan(cut, plan)
    before, after = (
        size_of(each, inputs) | latency
        for each, latency in zip((model, cut), pruning.latencies(), strict=True)
    )
    record = {**shared, "before": before, "after": after, "widths": widths(plan)}
    return Answer(f"{described(record)}\n{nothing}", record)
