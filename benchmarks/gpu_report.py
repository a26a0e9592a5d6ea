"""The tables of benchmarks/gpu.py."""

from __future__ import annotations

from typing import Any

from pages import NOT_RUN

STAGES = "| | stage | s | GB |\n|---|---|---|---|"
VARIANTS = "| | MLPs | mean width | M parameters | images/s | to dense |\n|---|---|---|---|---|---|"


def report(record: dict[str, Any] | None) -> str:
    """What a person reads, in Markdown."""
    if record is None:
        return NOT_RUN
    size = f", {record['memory_gb']:.0f} GB" if "memory_gb" in record else ""
    known = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    parts = [f"**{record['device']}**{size}; {known}", of_tests(record["tests"])]
    stages, variants = [], []
    for name, part in record["timings"].items():
        for stage, values in part["stages"].items():
            if stage != "model":
                cells = values.get("failed") or f"{values['seconds']:.2f}", gigabytes(values)
                stages.append(row(name, stage, *cells))
            variants += [
                row(
                    name,
                    variant,
                    f"{entry['mean_width']:.0f}",
                    f"{entry['parameters'] / 1e6:.1f}",
                    f"{entry['images_per_second']:.0f}",
                    f"{entry['times_dense']:.2f}",
                )
                for variant, entry in values.get("variants", {}).items()
            ]
        if part["outcome"] != "done":
            stages.append(row(name, "the rest", part["outcome"], ""))
    batch = f"In {record['dtype']}, a batch of {record['batch_size']} images"
    if stages:
        parts += [f"{batch}:", "\n".join([STAGES, *stages])]
    if variants:
        parts += [
            f"Medians of {record['repeats']} passes that take turns:",
            "\n".join([VARIANTS, *variants]),
        ]
    return "\n\n".join(parts)


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def gigabytes(values: dict[str, Any]) -> str:
    return "" if "failed" in values else f"{values['peak_gb']:.2f}"


def of_tests(tests: dict[str, Any] | None) -> str:
    """What the tests gave."""
    if tests is None:
        return "Tests: not run."
    if "passed" not in tests:
        return f"Tests: {tests['outcome']}."
    lines = [f"Tests: {tests['passed']} passed, {len(tests['failed'])} failed."]
    lines += [f"- failed: `{name}`" for name in tests["failed"]]
    lines += [f"- left out: {count}, {reason}" for reason, count in tests["left_out"].items()]
    return "\n".join(lines)
