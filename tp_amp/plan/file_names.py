"""What the files of a saved model are called, and which files of a folder are of one."""

from __future__ import annotations

import json
from pathlib import Path

WEIGHTS, PLAN, SOURCE, CARD = "model.safetensors", "plan.json", "source.json", "README.md"
PROCESSOR = "preprocessor_config.json"
# All but what says where the model is from; by the last ones other libraries open the folder.
FILES = (WEIGHTS, PLAN, CARD, "config.json", "modeling_pruned.py", PROCESSOR)


def written_files(folder: Path) -> set[str]:
    """The files in a folder that `save_pruned` wrote, as it noted them beside source.json."""
    try:
        noted = json.loads((folder / SOURCE).read_text(encoding="utf-8"))
        return {WEIGHTS, PLAN} | (set(noted.get("files", [])) & set(FILES))
    except (OSError, ValueError, AttributeError, TypeError):
        return set()
