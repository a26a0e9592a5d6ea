"""Further classes: half of every MLP cut equals masking, and heads that are found can be cut."""

from __future__ import annotations

import pytest
import torch
from zoo_checks import check
from zoo_more import MODELS

SLOW = {"hf_mask2former", "hf_upernet", "hf_levit", "hf_rt_detr"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MODELS],
)
def test_half_of_every_mlp_equals_masking(name: str) -> None:
    model = MODELS[name]
    torch.manual_seed(0)
    check(name, model.make(), model.inputs, model.count)
