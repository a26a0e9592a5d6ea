"""An output folder that is written as a whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def check_output(output: Path, overwrite: bool) -> None:
    """Raise ValueError unless an output folder may be written."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; pass a folder that is not there yet")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ValueError(
            f"--output {output} is not empty; pass another folder, or --overwrite to replace the "
            "files of an earlier run"
        )


@contextmanager
def staging(output: Path, model: nn.Module) -> Iterator[Path]:
    """Write beside the output; what was written moves there at the end, all of it or nothing."""
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    needed = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ValueError(
            f"--output {output} may need {needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free "
            "there; free some or choose another folder"
        )
    folder = parent / f".{output.name}.{os.getpid()}.part"
    try:
        folder.mkdir()
    except OSError as error:
        raise ValueError(
            f"--output {output} can't be written ({error.strerror}); choose another folder"
        ) from error
    try:
        yield folder
        output.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.iterdir()):
            os.replace(path, output / path.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
