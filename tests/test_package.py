import builtins
import doctest
import subprocess
import symtable
import sys

import tp_amp


def test_import_is_light() -> None:
    heavy = {"accelerate", "timm", "open_clip", "peft", "scipy", "matplotlib", "pyarrow"}
    code = f"import sys, tp_amp; print(sorted({heavy!r} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


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
