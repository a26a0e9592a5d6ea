"""What is collected together, kept, and refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import pictures, vit
from torch import nn

import tp_amp
from tp_amp.structure.model_structure import ModelStructure


def sites_of(model: nn.Module, pair: str) -> list[Any]:
    found, _ = ModelStructure(model, pictures(12)[0][:1]).ranks
    return [site for site in found if site.pair == pair]


def test_what_was_collected_is_known_until_weights_change() -> None:
    model, images = vit(16, 2, 0.4), pictures(12)
    reads = 0

    class Counted:
        def __iter__(self) -> Any:
            nonlocal reads
            reads += 1
            return iter(images)

    importance = tp_amp.ReconstructionImportance(data=Counted())
    sites = [*sites_of(model, "qk"), *sites_of(model, "vo")]
    first = importance.foreseen(model, sites)
    after = reads
    again = importance.foreseen(copy.deepcopy(model), sites)
    assert reads == after
    assert all(torch.equal(again[n].errors, first[n].errors) for n in first)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[0] += 1
    importance.foreseen(model, sites_of(model, "vo"))  # what values read has changed alone
    assert reads > after


def test_queries_and_keys_need_an_objective() -> None:
    model, images = vit(16, 2, 0.4), pictures(12)
    importance = tp_amp.ReconstructionImportance("reconstruction", data=images)
    with pytest.raises(
        ValueError, match=r"queries and keys lose \(blocks.0.attn.qkv\) .*objective="
    ):
        importance.foreseen(model, sites_of(model, "qk"))


def test_without_data_nothing_can_be_collected() -> None:
    model = vit(16, 2, 0.4)
    with pytest.raises(ValueError, match=r"has not seen \['blocks.0.attn.proj', .*; pass data="):
        tp_amp.ReconstructionImportance().foreseen(model, sites_of(model, "vo"))


def test_everything_is_collected_in_the_same_passes() -> None:
    """One for what layers read and one for gradients, be it of MLPs, heads or the stream."""
    model, images, reads = vit(), pictures(), []

    class Counted:
        def __iter__(self) -> Any:
            reads.append(1)
            return iter(images)

    structure = ModelStructure(model, images[0][:1])
    sites = [*structure.mlps, *structure.ranks[0], *structure.some_streams()]
    together = tp_amp.ReconstructionImportance(data=Counted())
    found = together.foreseen(model, sites)
    passes, reads[:] = len(reads), []
    of_mlps = tp_amp.ReconstructionImportance(data=Counted())
    of_mlps.foreseen(model, structure.mlps)
    assert passes == len(reads)
    for site in sites:
        alone = tp_amp.ReconstructionImportance(data=images).foreseen(model, [site])[site.down]
        torch.testing.assert_close(alone.errors, found[site.down].errors, rtol=1e-6, atol=1e-9)


def test_an_objective_that_sees_no_reader_is_refused() -> None:
    """Its gradients tell nothing of the stream, which would then be free."""
    model, images = vit(), pictures()

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.beside = model, nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"own": self.model(x), "beside": self.beside(x.mean((2, 3)))}

    both = Two().eval()
    importance = tp_amp.ReconstructionImportance(
        lambda output: output["beside"].square().mean(), data=images
    )
    streams = ModelStructure(both, images[0][:1]).some_streams()
    with pytest.raises(ValueError, match=r"depends on no layer that reads the streams of \['model"):
        importance.foreseen(both, streams)


def test_errors_are_known_until_a_reader_changes() -> None:
    model, images = vit(), pictures(12)
    importance = tp_amp.ReconstructionImportance(data=images)
    streams = ModelStructure(model, images[0][:1]).some_streams()
    first = importance.foreseen(model, streams)
    importance.data = None
    again = importance.foreseen(model, streams)
    assert torch.equal(first[streams[0].name].errors, again[streams[0].name].errors)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[0] += 1
    with pytest.raises(ValueError, match=r"has not seen \['patch_embed.proj'\]"):
        importance.foreseen(model, streams)
