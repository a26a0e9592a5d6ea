"""Code blocks of the documentation's pages, and what their Python blocks are run with.

    python tests/docs_blocks.py docs/tasks/prune.md   # or without arguments: all pages

A block that can't be run has `<!-- not run: REASON -->` on the line before its fence.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

DOCS = Path(__file__).parents[1] / "docs"
SIZE = 64  # pixels: the pages run in a fraction of the time that 224 take
_FENCE = re.compile(r"^(`{3,})(.*)$")
_MARK = re.compile(r"^<!-- not run: (.+) -->$")

Block = tuple[int, str, str | None]


def pages() -> list[Path]:
    """All pages in Markdown, but for those that include a file from elsewhere."""
    found = sorted(DOCS.rglob("*.md"))
    return [page for page in found if "{include}" not in page.read_text()]


def blocks(page: Path, language: str) -> list[Block]:
    """Blocks of one language: the line of the fence, the source, and why it is not run, if so."""
    found: list[Block] = []
    lines = page.read_text().splitlines()
    opened: tuple[int, str, str] | None = None
    for number, line in enumerate(lines, start=1):
        fence = _FENCE.match(line)
        if fence is None:
            continue
        if opened is None:
            opened = number, fence[1], fence[2].strip()
            continue
        start, ticks, kind = opened
        if fence[1] != ticks or fence[2]:
            continue
        opened = None
        if kind == language:
            mark = _MARK.match(lines[start - 2]) if start > 1 else None
            source = "\n".join(lines[start : number - 1]) + "\n"
            found.append((start, source, mark[1] if mark else None))
    if opened is not None:
        raise ValueError(f"{page}: the fence of line {opened[0]} is not closed")
    return found


def python_blocks(page: Path) -> list[Block]:
    """The page's Python blocks: the line of the fence, the source, and why it is not run."""
    return blocks(page, "python")


def shell_blocks(page: Path) -> list[Block]:
    """The page's shell blocks, whose fences name no language; as `python_blocks`."""
    return blocks(page, "")


def commands(source: str) -> list[str]:
    """The commands of a shell block, one a line, without comments."""
    joined = source.replace("\\\n", " ")
    lines = [line.split("  #")[0].strip() for line in joined.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def namespace() -> dict[str, Any]:
    """What the pages take for granted: a small ViT with random weights, and random images."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=SIZE, depth=2, num_classes=10).eval()

    def batches(count: int) -> list[Tensor]:
        return [torch.randn(8, 3, SIZE, SIZE) for _ in range(count)]

    def labelled(count: int) -> list[tuple[Tensor, Tensor]]:
        return [(batch, torch.randint(10, (len(batch),))) for batch in batches(count)]

    return {
        "__name__": "__page__",
        "model": model,
        "example_inputs": torch.randn(1, 3, SIZE, SIZE),
        "images": batches(2),
        "loader": labelled(4),
        "test_loader": labelled(2),
    }


def run_python(page: Path) -> int:
    """Run the page's Python blocks one after the other in one namespace; tell how many.

    The working directory is where their files go.
    """
    names, count = namespace(), 0
    for line, source, reason in python_blocks(page):
        if reason is None:
            code = compile("\n" * line + source, str(page), "exec")
            exec(code, names)
            count += 1
    return count


def main() -> None:
    """Run the Python blocks of the pages that are named, each in a folder of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path)
    for page in parser.parse_args().pages or pages():
        path, start, before = page.resolve(), time.perf_counter(), Path.cwd()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                count = run_python(path)
            finally:
                os.chdir(before)
        print(f"{path.relative_to(DOCS)}: {count} blocks, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
