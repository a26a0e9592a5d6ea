"""Real classes with outputs of every kind, from inspection to a loaded model."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from pipeline_checks import RECIPE, size_without_some, through_the_pipeline
from torch import nn
from toys import perturbed
from zoo_dense import DENSE
from zoo_more import MODELS

import tp_amp

ENTRIES = {**DENSE, **MODELS}
# One of each kind of output; the others are slow tests.
QUICK = {
    *("hf_clip_both", "hf_dinov2_taps", "hf_vit_mae", "hf_videomae", "hf_data2vec"),
    *("hf_blip", "hf_owlv2", "hf_eomt"),
}
MAPS = (
    *("hf_clip_both", "hf_dinov2_taps", "hf_dpt", "hf_mask2former", "hf_sam", "hf_segformer"),
    *("hf_swin2sr", "hf_vit_mae"),
)


def marked(name: str) -> object:
    return pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)


@pytest.mark.parametrize("name", map(marked, ENTRIES))
def test_from_inspection_to_a_loaded_model(name: str, tmp_path: Path) -> None:
    through_the_pipeline(name, ENTRIES[name], tmp_path)


@pytest.mark.parametrize("name", map(marked, MAPS))
def test_without_an_objective_errors_count_alike_and_that_is_said_once(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As by name: the plan is the same one, and so is every weight."""
    entry = ENTRIES[name]
    torch.manual_seed(0)
    dense = perturbed(entry.make())
    batches = [entry.batch(2, 1), entry.batch(2, 2)]
    target = {"params": size_without_some(tp_amp.inspect(dense, entry.inputs))}

    def recipe(**objective: str) -> tuple[tp_amp.PruningPlan, nn.Module, list[int]]:
        model, told = copy.deepcopy(dense), []
        importance = tp_amp.ReconstructionImportance(data=batches, **objective)
        for call in ("plan", "compensate"):
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                if call == "plan":
                    plan = tp_amp.plan_for_target(model, entry.inputs, importance, target)
                else:
                    tp_amp.compensate(model, plan, batches, **RECIPE, **objective)
            told.append(sum("errors of a layer count the same" in m for m in caplog.messages))
        return plan, model, told

    plan, model, told = recipe()
    same, other, silent = recipe(objective="reconstruction")
    assert told == [1, 0]
    assert silent == [0, 0]
    assert plan.keep == same.keep
    assert all(map(torch.equal, model.parameters(), other.parameters()))
