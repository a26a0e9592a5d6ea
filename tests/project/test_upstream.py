"""Torch-Pruning's bugs: each is still there, and each fix in examples/upstream mends it.

Where a test here fails with "is fixed", the installed Torch-Pruning no longer has the bug: drop its
script, its line in UPSTREAM.md, and what works around it.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from toys import narrow_heads

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples" / "upstream").glob("*.py"))
NAMES = [script.stem for script in SCRIPTS]

# Runs each script on the Torch-Pruning beside its name, or on the installed one. One process for
# all: PyTorch takes long to import, Torch-Pruning does not.
RUNNER = """
import contextlib, io, json, runpy, sys, warnings
warnings.simplefilter("ignore")
outcomes = {}
for script, folder in json.load(sys.stdin):
    for name in [name for name in sys.modules if name.split(".")[0] == "torch_pruning"]:
        del sys.modules[name]
    sys.path[:0] = [folder] if folder else []
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            outcome = bool(runpy.run_path(script)["reproduces"]())
        except Exception as error:
            outcome = repr(error)
    origin = sys.modules["torch_pruning"].__file__
    outcomes[script] = [outcome, printed.getvalue(), origin]
    sys.path.remove(folder) if folder else None
print(json.dumps(outcomes))
"""


def run_all(folders: dict[Path, str]) -> dict[str, tuple[bool | str, str, str]]:
    jobs = json.dumps([(str(script), folder) for script, folder in folders.items()])
    result = subprocess.run(
        [sys.executable, "-c", RUNNER], input=jobs, capture_output=True, text=True, check=True
    )
    outcomes = json.loads(result.stdout)
    return {Path(script).stem: tuple(outcome) for script, outcome in outcomes.items()}


@pytest.fixture(scope="module")
def installed() -> dict[str, tuple[bool | str, str, str]]:
    return run_all(dict.fromkeys(SCRIPTS, ""))


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bool | str, str, str]]:
    if shutil.which("git") is None:
        pytest.skip("git applies the fixes")
    folders = {}
    for script in SCRIPTS:
        folder = tmp_path_factory.mktemp(script.stem)
        apply_fix(script, folder)
        folders[script] = str(folder)
    return run_all(folders)


def apply_fix(script: Path, folder: Path) -> None:
    """Copy the installed Torch-Pruning into the folder and apply the diff in the docstring."""
    package = find_spec("torch_pruning")
    assert package is not None
    assert package.origin is not None
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(package.origin).parent, folder / "torch_pruning", ignore=ignored)
    documentation = ast.get_docstring(ast.parse(script.read_text()), clean=False) or ""
    diff = documentation[documentation.index("--- a/") :].rstrip("\n") + "\n"
    # Not as part of a repository that the folder may lie in.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    command = ["git", "apply", "--ignore-whitespace", "--unidiff-zero", "-"]
    subprocess.run(command, input=diff, cwd=folder, env=environment, text=True, check=True)
    changed = re.search(r"^\+\+\+ b/(.*)$", diff, flags=re.MULTILINE)
    assert changed is not None
    original = Path(package.origin).parent.parent / changed[1]
    assert (folder / changed[1]).read_text() != original.read_text()


# Bugs that need what old releases don't have.
LATER = {
    "load_refuses_own_files": pytest.mark.skipif(
        Version(torch.__version__) < Version("2.6"), reason="torch 2.4 loads all that is pickled"
    ),
    "timm_attention_macs": narrow_heads,
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=LATER.get(n, ())) for n in NAMES])
def test_bug_is_still_there(name: str, installed: dict[str, tuple[bool | str, str, str]]) -> None:
    outcome, printed, _ = installed[name]
    assert outcome is True, f"{name} is fixed, or its script fails: {outcome}, {printed}"
    assert printed  # says what is wrong


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_fix_mends_it(name: str, fixed: dict[str, tuple[bool | str, str, str]]) -> None:
    outcome, printed, origin = fixed[name]
    assert name in origin  # the patched copy ran
    assert outcome is False, f"{outcome}, {printed}"


def test_every_bug_is_listed() -> None:
    text = (ROOT / "UPSTREAM.md").read_text()
    assert set(re.findall(r"`examples/upstream/(\w+)\.py`", text)) == set(NAMES)


@pytest.mark.parametrize(
    ("module", "others"),
    [
        ("importance.gram_schmidt", set()),
        ("importance.dimap", {"numpy"}),
        ("importance.entropy_taylor", {"numpy", "safetensors", "tqdm"}),
        ("importance.objectives", {"numpy", "tqdm"}),
        ("structure.groups", set()),
        ("search.bisection", set()),
    ],
)
def test_what_would_go_upstream_imports_little(module: str, others: set[str]) -> None:
    assert imported(module) - {"torch", "torch_pruning"} == others


def imported(module: str) -> set[str]:
    """Names of the packages outside of the standard library that a module of ours needs."""
    packages: set[str] = set()
    seen, left = set(), [module]
    while left:
        seen.add(name := left.pop())
        path = ROOT / "tp_amp" / f"{name.replace('.', '/')}.py"
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for found in names:
                first, _, rest = found.partition(".")
                if first == "tp_amp":
                    left += [rest] if rest and rest not in seen else []
                elif first not in sys.stdlib_module_names:
                    packages.add(first)
    return packages
