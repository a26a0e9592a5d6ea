"""Where images may be, checked before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path

SAMPLE, DATASETS = "sample", "datasets:"
KINDS = (
    "a folder of images, a .parquet file or a folder of them, datasets:NAME, "
    "or sample (drawn shapes, no photographs)"
)


def check_place(data: str) -> None:
    """Raise ValueError where `--data` names a path that is not there, or a file of another kind."""
    if data == SAMPLE or data.startswith(DATASETS):
        return
    path = Path(data)
    if not path.exists():
        raise ValueError(f"no such file or folder: {data}; --data takes {KINDS}")
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(f"{data} is a single file and not .parquet; --data takes {KINDS}")
