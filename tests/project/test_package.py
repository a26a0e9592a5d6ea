import builtins
import doctest
import re
import subprocess
import symtable
import sys
from pathlib import Path

from count_cases import count
from packaging.requirements import Requirement
from packaging.version import Version

import tp_amp


def test_import_is_light() -> None:
    heavy = {"accelerate", "timm", "open_clip", "peft", "scipy", "matplotlib", "pyarrow"}
    code = f"import sys, tp_amp; print(sorted({heavy!r} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_public_names_are_these() -> None:
    """A name that scripts import is neither lost nor added by chance."""
    assert set(tp_amp.__all__) == {
        "AdaptiveMLPPruner",
        "Attention",
        "Comparison",
        "DIMAPImportance",
        "EntropyTaylorImportance",
        "Estimate",
        "GramSchmidtImportance",
        "HeadRanks",
        "Inspection",
        "LeadingChannels",
        "MLP",
        "Measurement",
        "PruningPlan",
        "Recipe",
        "ReconstructionImportance",
        "Report",
        "RotatedHeads",
        "RotatedStream",
        "Stream",
        "apply_plan",
        "compare",
        "compensate",
        "create_model",
        "dimap_masks",
        "dimap_scopes",
        "dimap_sparsify",
        "distill",
        "find_attentions",
        "find_mlps",
        "gram_schmidt_order",
        "inspect",
        "load_pruned",
        "measure",
        "measure_both",
        "mlp_ratio_widths",
        "pick_inputs",
        "plan_for_target",
        "plan_from_importance",
        "pruning_ratio_dict",
        "push_to_hub",
        "rank_plan",
        "reconstruction_order",
        "rescale_norms",
        "rotate",
        "rotate_heads",
        "save_pruned",
        "split_batches",
        "stream_plan",
    }
    assert all(getattr(tp_amp, name) is not None for name in tp_amp.__all__)


def unbound(source: str) -> set[str]:
    """Names of the outermost level that code reads and nothing in it binds."""
    symbols = symtable.symtable(source, "example", "exec").get_symbols()
    bound = {s.get_name() for s in symbols if s.is_assigned() or s.is_imported()}
    return {s.get_name() for s in symbols if s.is_referenced()} - bound - set(dir(builtins))


def test_unbound() -> None:
    assert unbound("import torch, a.b\nx = torch.eye(2)\nprint(a, x, Plan(x).keep)") == {"Plan"}


def test_all_is_documented_with_an_example_that_can_be_copied() -> None:
    """The doctests run in their modules' names; a reader's script has only what it imports."""
    for name in tp_amp.__all__:
        documented = getattr(tp_amp, name).__doc__
        examples = doctest.DocTestParser().get_examples(documented or "")
        assert examples, f"{name} has no runnable example"
        assert not unbound("".join(example.source for example in examples)), name


def test_oldest_releases_are_the_lower_bounds() -> None:
    """What `make oldest` installs is what pyproject.toml allows."""
    here = Path(__file__).parents[1]
    project = (here.parent / "pyproject.toml").read_text()
    quoted = re.findall(r'"([\w-]+>=[^"]+)"', project)
    bounds = {
        requirement.name: Version(specifier.version)
        for requirement in map(Requirement, quoted)
        for specifier in requirement.specifier
        if specifier.operator == ">="
    }
    lines = (here / "oldest.txt").read_text().splitlines()
    lines = [line.split("==") for line in lines if not line.startswith("#")]
    pins = {name: Version(version) for name, version in lines}
    del bounds["setuptools"], bounds["sphinx"]  # to build the package and its pages
    assert set(bounds) == {"accelerate", "open_clip_torch", "timm", "torch", "torch-pruning"}
    assert {name: pins.get(name) for name in bounds} == bounds


def test_cases_are_counted() -> None:
    log = """
tests/project/test_properties.py::test_search:

  - during generate phase (9.58 seconds):
    - 9 passing, 1 failing, and 3 invalid test cases
  - Stopped because nothing left to do

tests/project/test_properties.py::test_search:

  - during generate phase (9.58 seconds):
    - 90 passing, 0 failing, and 3 invalid test cases
  - Stopped because settings.max_examples=90
"""
    assert count(log) == {"test_search": (99, 1)}
