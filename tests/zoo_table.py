"""Measure every model of the zoo and write the table into docs/models.md: `make zoo`."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from head_cuts import prune, random_keep, zeroed
from torch import nn
from toys import perturbed, relative
from tqdm import tqdm
from zoo import TIMM
from zoo_checks import GROUPS, MIXING, check, run
from zoo_dense import further_models

from tp_amp.structure.attention.finding import read_attentions
from tp_amp.structure.graph import build_graph

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
MARK = "<!-- zoo -->"
HEADER = (
    "| model | MLPs | difference | attentions | difference | attentions that keep their heads |\n"
    "|---|---|---|---|---|---|\n"
)


def measure_heads(model: nn.Module, inputs: Any) -> tuple[str, str, str]:
    """Count the attentions that can lose heads, compare, and tell why the others can't."""
    model = perturbed(model)
    found, reasons = read_attentions(model, inputs)
    counts = Counter(map(short, reasons.values()))
    kept = "; ".join(f"{count}: {reason}" for reason, count in counts.items())
    if not found:
        return "0", "", kept
    keep = random_keep(found)
    graph = build_graph(model, inputs).graph
    with torch.no_grad():
        expected = run(zeroed(model, found, keep), inputs)
        prune(graph, found, keep)
        difference = relative(run(model, inputs), expected)
    return str(len(found)), f"{difference:.0e}", kept


def short(reason: str) -> str:
    """A reason without its numbers and names."""
    if "with the others' channels zeroed" in reason:
        return "not what it gives with heads zeroed"
    if "its number of heads as none" in reason:
        return "its number of heads has another name"
    if "don't fall into" in reason:
        return "its heads have no one width"
    if "its forward pass fails" in reason:
        return "its forward pass fixes the number of heads"
    return "q, k and v have another layout" if "has no Linears named" in reason else reason


def measure(name: str, make: Any, inputs: Any, count: int) -> str:
    """One row of the table."""
    torch.manual_seed(0)
    model = make()
    heads = measure_heads(copy.deepcopy(model), inputs)
    difference = check(name, model, inputs, count)
    reference = " (cut by hand)" if name in MIXING else ""
    return f"| `{name}`{reference} | {count} | {difference:.0e} | " + " | ".join(heads) + " |"


def main() -> None:
    """Measure all models, then replace what stands between the marks."""
    warnings.simplefilter("ignore")
    entries = {**TIMM}
    for group in GROUPS.values():
        entries |= group()
    entries |= further_models()
    rows = [measure(name, *entry) for name, entry in tqdm(entries.items(), disable=None)]
    before, _, after = PAGE.read_text().split(MARK)
    table = HEADER + "\n".join(rows)
    PAGE.write_text(f"{before}{MARK}\n{table}\n{MARK}{after}")


if __name__ == "__main__":
    main()
