"""Activations times gradients as they are added up while batches run."""

from __future__ import annotations

import pytest
import torch
from entropies import entropy_of
from torch import Tensor, nn
from toys import images, relative, toy

import tp_amp
from tp_amp import EntropyTaylorImportance
from tp_amp.importance.recording import Recorder


def test_each_input_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    add = Recorder._add

    def count(self: Recorder, module: nn.Module, *values: Tensor) -> None:
        told.append(self.names[module])
        add(self, module, *values)

    monkeypatch.setattr(Recorder, "_add", count)
    model = toy(depth=4)
    runs: list[str] = []
    model.blocks[0].query.register_forward_hook(lambda *_: runs.append("query"))
    importance = EntropyTaylorImportance("prediction", activation_checkpointing=True)
    importance.collect(model, [images(4)])
    assert len(told) == len(set(told)) == len(importance.scores)
    # Twice to find the blocks, with values before that, once forward and once again in the backward
    # pass.
    assert len(runs) == 5


def test_scores_of_layers_that_share_an_input_are_their_own() -> None:
    """Query, key and value read one tensor; each gets the gradient that flows through it alone."""
    model, data = toy(), images(3)
    scores = EntropyTaylorImportance("prediction").collect(model, [data]).scores
    for layer in ("query", "key", "value"):
        module = model.get_submodule(f"blocks.0.{layer}")
        seen: dict[str, Tensor] = {}
        module.register_forward_hook(lambda _m, args, out, seen=seen: seen.update(x=args[0], y=out))
        value = entropy_of("prediction", model(data))
        (gradient,) = torch.autograd.grad(value, seen["y"])
        through = gradient @ module.weight
        expected = (seen["x"] * through).sum(1).abs().mean(0)
        assert relative(scores[f"blocks.0.{layer}"], expected) < 1e-5


def test_windows_of_an_image_are_summed_like_its_tokens() -> None:
    """Swin's attention sees (images * windows, tokens, channels)."""

    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:  # (images, 8, 3)
            windows = self.first(x).reshape(-1, 4, 4)
            return self.second(windows).reshape(len(x), 8, 5).mean(1)

    torch.manual_seed(0)
    model, data = Windows(), torch.randn(3, 8, 3)
    scores = EntropyTaylorImportance("prediction").collect(model, [data]).scores["second"]
    hidden = model.first(data)
    hidden.retain_grad()
    entropy_of("prediction", model.second(hidden).mean(1)).backward()
    torch.testing.assert_close(scores, (hidden * hidden.grad).sum(1).abs().mean(0).detach())


def test_layers_alone_have_the_same_scores() -> None:
    model, data = toy(), images(8)
    every = EntropyTaylorImportance().collect(model, [data]).scores
    names = ["blocks.0.mlp.second", "blocks.1.project"]
    some = EntropyTaylorImportance().collect(model, [data], layers=names).scores
    assert sorted(some) == names
    for name in names:
        torch.testing.assert_close(some[name], every[name])
    with pytest.raises(ValueError, match=r"\['blocks.0.norm1'\] are no Linears or convolutions"):
        EntropyTaylorImportance().collect(model, [data], layers=["blocks.0.norm1"])


def test_layer_that_reads_no_images_is_summed_as_a_whole(caplog: pytest.LogCaptureFixture) -> None:
    """Swin v2 makes its position bias from a table that all images share."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(5, 3))
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.second(self.first(self.table)).mean(0)

    torch.manual_seed(0)
    model, data = Table(), torch.randn(3, 6)
    scores = EntropyTaylorImportance("prediction").collect(model, [data]).scores["second"]
    hidden = model.first(model.table)
    hidden.retain_grad()
    entropy_of("prediction", data + model.second(hidden).mean(0)).backward()
    expected = (hidden * hidden.grad).sum(0).abs().detach()
    assert torch.corrcoef(torch.stack([scores, expected]))[0, 1] > 1 - 1e-6
    assert "second reads torch.Size([5, 4]), not images first" in caplog.text


def test_an_objective_of_no_layer_is_refused() -> None:
    importance = tp_amp.EntropyTaylorImportance(lambda output: output.detach().sum())
    with pytest.raises(ValueError, match="does not depend on any Linear's or convolution's input"):
        importance.collect(toy(), [images(2)])
