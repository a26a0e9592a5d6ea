"""What each command of `tp-amp` does."""

from __future__ import annotations

import copy
import json
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tp_amp
from tp_amp.budget.budget import Budget
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
from tp_amp.cli.output_folder import check_output, staging
from tp_amp.cli.pruning import FACTORIES, LABELLED, RECOMPUTING, composed, prune_model
from tp_amp.data.images import open_images
from tp_amp.evaluation.comparing import compare as compare_importances
from tp_amp.evaluation.fidelity import default_metric
from tp_amp.plan.pruning_plan import PruningPlan
from tp_amp.plan.saving import PLAN
from tp_amp.reports.report import Report
from tp_amp.running.restoring import seeded
from tp_amp.structure.mlps import MLP
from tp_amp.structure.model_structure import ModelStructure, Site


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
    if options.plot:
        _check_plot(Path(options.plot))
    images = open_images(options.data, options.split)
    loaded = load_model(options)
    labelled, (scoring, judging) = draw_batches(options, images, loaded)
    names = options.importance or [n for n in IMPORTANCES if labelled or n not in LABELLED]
    found = compare_importances(
        loaded.model,
        loaded.blank(),
        {name: FACTORIES[name]() for name in names},
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
    if options.activation_checkpointing and options.importance not in RECOMPUTING:
        raise ValueError(
            f"--activation-checkpointing is for --importance {' and '.join(RECOMPUTING)}; leave it "
            f"out, {options.importance} runs without"
        )
    if options.refine and options.compensation != "affine":
        raise ValueError(
            f"--refine goes on from --compensation affine, found {options.compensation}; leave one "
            "of them out"
        )
    output = Path(options.output)
    check_output(output, options.overwrite)
    images = open_images(options.data, options.split)
    loaded = load_model(options)
    model, inputs = loaded.model, loaded.blank()
    mlps = _check_size(model, inputs, options)
    with staging(output, model) as folder:
        labelled, (scoring, judging) = draw_batches(options, images, loaded)
        if options.importance in LABELLED and not labelled:
            raise ValueError(
                f"--importance {options.importance} needs labels, and {options.data} has none of "
                "this model's classes; take another (entropy and reconstruction need none)"
            )
        metric, measure = default_metric(model, judging)
        before = {**size_of(model, inputs), metric: measure(model)}
        dense = copy.deepcopy(model)
        plan = prune_model(model, inputs, mlps, scoring, judging, options)
        after = {**size_of(model, inputs), metric: measure(model)}
        if "latency" in (options.target or {}):
            timed = tp_amp.measure_both(dense, model, [inputs])
            before["latency"], after["latency"] = (
                1000 / found.images_per_second for found in timed
            )
        both = tp_amp.measure_both(dense, model, judging)
        if loaded.plan is not None:
            plan = composed(loaded.plan, plan)
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
        write_model(loaded, plan, record, folder)
        plan.report(*both).save(folder / REPORT)
    files = ", ".join(sorted(path.name for path in output.iterdir()))
    saved = f"saved in {output}: {files}\nnext: tp-amp report {output}"
    return Answer(f"{described(record)}\n{saved}", record)


def report(options: Namespace) -> Answer:
    """Show a saved plan."""
    if options.html and not options.html.endswith(".html"):
        raise ValueError(f"--html {options.html} must end in .html")
    folder = Path(options.folder)
    if not (folder / PLAN).is_file():
        raise ValueError(
            f"{options.folder} holds no {PLAN}; pass the --output folder of tp-amp prune"
        )
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
    "compensation",
    "refine",
    "target",
    "max_increase",
    "prune_num_heads",
    "round_to",
    "min_width",
    "seed",
)


def _check_size(model: nn.Module, inputs: Any, options: Namespace) -> list[MLP]:
    """Find the MLPs, and refuse a target out of reach before any long work."""
    structure = ModelStructure(model, inputs)
    mlps = structure.mlps
    if not mlps:
        raise ValueError(
            f"{options.model} has no MLP that can be cut; tp-amp inspect tells for each layer why"
        )
    if options.target is not None and not options.prune_num_heads:
        sites: list[Site] = [*mlps]
        step = options.round_to
        budget = Budget(options.target, structure, sites, step)
        least = max(step, options.min_width)
        budget.check({mlp.down: min(mlp.width, least) for mlp in mlps})
    return mlps


def _check_plot(path: Path) -> None:
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {path} must end in .png, .svg or .pdf")
    if not path.parent.is_dir():
        raise ValueError(f"--plot {path}: there is no folder {path.parent}; make it first")
