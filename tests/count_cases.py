"""Add up the cases in logs of `pytest --hypothesis-show-statistics`.

python tests/count_cases.py build/cases.log
"""

from __future__ import annotations

import collections
import re
import sys
from pathlib import Path


def count(text: str) -> dict[str, tuple[int, int]]:
    """Test -> cases that passed, cases that failed, over all runs in a log."""
    totals: dict[str, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))
    for name, statistics in re.findall(
        r"^\S+::(\w+):\n(.*?)Stopped", text, re.DOTALL | re.MULTILINE
    ):
        for passed, failed in re.findall(r"(\d+) passing, (\d+) failing", statistics):
            before = totals[name]
            totals[name] = (before[0] + int(passed), before[1] + int(failed))
    return dict(totals)


def main(paths: list[str]) -> None:
    totals = count("\n".join(Path(path).read_text() for path in paths))
    for name, (passed, failed) in sorted(totals.items()):
        print(f"{passed:7d} passed, {failed:3d} failed  {name}")
    print(f"{sum(passed for passed, _ in totals.values()):7d} passed in all")


if __name__ == "__main__":
    main(sys.argv[1:])
