"""What a search takes, foreseen from one pass."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from searches import pruner_of
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn
from toys import fingerprint, images, perturbed, toy

import tp_amp
from tp_amp.running import timing
from tp_amp.running.timing import Estimate
from tp_amp.search import search_estimate
from tp_amp.search.prefix_cache import Prefix
from tp_amp.search.search_estimate import Profile, estimate_search


def test_a_run_is_walked_by_hand() -> None:
    """Three steps of 1, 2 and 4 s and 0.5 s around them; a site in each; two probes each."""
    profile = Profile(7.5, [1.0, 2.0, 4.0], [10, 20, 40], batches=2)
    found = estimate_search(profile, [2, 1, 0], [2, 2, 2], 1000)
    collect = 0.5 + 1 + 2
    # Of two batches the first runs to the end, to see which modules are called again.
    inside = (0.5 + 4) + (0.5 + 2 + 4 / 2) + (0.5 + 1 + 6 / 2)
    probes = 2 * (0.5 + 4) + 2 * (0.5 + 6) + 2 * 7.5
    assert found == Estimate(collect + inside + probes, 30)
    # Room for what one step gives: what the first gave is computed when the search comes there.
    found = estimate_search(profile, [2, 1, 0], [2, 2, 2], 25)
    assert found == Estimate(collect + (0.5 + 1) + inside + probes, 20)
    # Nothing fits, or there are no steps: everything is run.
    whole = Estimate((0.5 + 1 + 2) + 2 * 7.5 + (0.5 + 1) + 2 * 7.5, 0)
    found = estimate_search(profile, [2, 1], [2, 2], 5)
    assert found == whole
    assert estimate_search(profile, [None, None], [2, 3], 1000) == Estimate(5 * 7.5, 0)
    assert estimate_search(profile, [2, 1, 0], [0, 0, 0], 1000) == Estimate(0, 0)


@pytest.mark.parametrize("target", [None, {"params": 0.8}])
@pytest.mark.parametrize("heads", [False, True])
def test_blocks_are_run_as_often_as_foreseen(
    monkeypatch: pytest.MonkeyPatch, target: dict[str, float] | None, heads: bool
) -> None:
    """The clock of a small Swin counts its blocks' calls on whole batches, of which most are cut.

    Without a target nearly every probe that may be made is made; with one, up to three passes are,
    in which some are known.
    """
    calls = 0
    own = SwinTransformerBlock.forward

    def counted(self: nn.Module, x: Tensor) -> Tensor:
        nonlocal calls
        calls += len(x) == 4  # fewer where the structure is read
        return own(self, x)  # type: ignore[no-any-return]

    monkeypatch.setattr(SwinTransformerBlock, "forward", counted)
    for module in (timing, search_estimate):
        monkeypatch.setattr(module, "clock", lambda: calls)
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "num_classes": 5}
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", depths=(2, 2), num_heads=(2, 4), **sizes
    )
    pictures = images(12, size=32, channels=3).split(4)
    pruner = tp_amp.AdaptiveMLPPruner(
        perturbed(model),
        pictures[0],
        tp_amp.DIMAPImportance(),
        pictures,
        target=target,
        prune_num_heads=heads,
        progress=False,
    )
    foreseen = pruner.estimate().seconds
    calls = 0
    pruner.step()
    probes = sum(map(len, pruner.plan.probes.values()))
    assert calls > 3 * probes  # each runs a block at least on three batches
    assert calls <= foreseen < (1.1 if target is None else 2) * calls


def test_the_cache_that_is_estimated_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five blocks' outputs of two batches of 4 images, 4 tokens, 12 channels; all, or three."""
    one_step = 2 * 4 * 4 * 12 * 4
    made: list[Prefix] = []
    start = Prefix.__init__

    def remember(self: Prefix, *arguments: Any) -> None:
        made.append(self)
        start(self, *arguments)

    monkeypatch.setattr(Prefix, "__init__", remember)
    for limit, steps in ((2**30, 5), (3 * one_step, 3), (one_step - 1, 0)):
        pruner = pruner_of(toy(depth=6), steps=1, cache_bytes=limit, progress=False)
        assert pruner.estimate().bytes == steps * one_step
        pruner.step()
        assert made[-1].most >= steps * one_step
        assert made[-1].most <= limit


def test_moments_count_where_something_is_compensated() -> None:
    plain = pruner_of(toy(depth=3)).estimate()
    compensated = pruner_of(toy(depth=3), compensation="affine").estimate()
    assert compensated.bytes - plain.bytes == 2 * 8 * 20**2  # of two halves of the images


def test_estimate_changes_nothing() -> None:
    model = toy(depth=3)
    before = fingerprint(model)
    pruner = pruner_of(model)
    pruner.estimate()
    assert fingerprint(model) == before
    assert not any("forward" in vars(module) for module in model.modules())
