"""The modelling file's text: whole, short, and without what nothing in it uses."""

from __future__ import annotations

import ast
import subprocess
import sys
from itertools import chain, combinations

import pytest
from torch import nn

from tp_amp.sharing.generated_code import FORMS, modelling_file

NAMES = {"pruned": "PrunedTower", "config": "PrunedTowerConfig", "model_type": "pruned_tower"}
EVERY = list(chain.from_iterable(combinations(FORMS, n) for n in range(len(FORMS) + 1)))


class Tower(nn.Module):
    pass


@pytest.mark.parametrize("used", EVERY, ids="+".join)
def test_every_name_is_bound_once_and_used(used: tuple[str, ...]) -> None:
    text = modelling_file(Tower, NAMES, used)
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F,E9", "-"]
    checked = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    bound = [getattr(node, "name", "") for node in ast.parse(text).body]
    bound = [name for name in bound if name]
    assert len(bound) == len(set(bound))
    assert "tp_amp" not in text.split('"""', 2)[2]


def test_narrower_mlps_need_few_lines() -> None:
    text = modelling_file(Tower, NAMES, ())
    assert len(text.splitlines()) < 85
    assert "head" not in text.lower()
    assert "from transformers import Tower\n" in text
    assert 'model_type = "pruned_tower"' in text
