"""The scripts of examples/ as they are with Torch-Pruning alone.

A line of ours ends in `# tp_amp`, and the line that it replaces stands above it as a comment that
begins with `# tp_amp: was `. The original is made by turning these around.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any


def original(source: str) -> str:
    """Give an example as it is with Torch-Pruning alone."""
    theirs = re.sub(r"^.*  # tp_amp\n", "", source, flags=re.MULTILINE)
    return theirs.replace("# tp_amp: was ", "")


def changed_lines(source: str) -> int:
    """Count our lines in an example, the import included."""
    return len(re.findall(r"  # tp_amp$", source, flags=re.MULTILINE))


def load_script(source: str) -> Any:
    """Run the source of an example as a module."""
    module: dict[str, Any] = {"__name__": "example"}
    exec(compile(source, "example", "exec"), module)
    return SimpleNamespace(**module)
