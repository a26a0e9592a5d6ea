"""The benchmark on a random model: what it writes, and that the rivals are what they say."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import width_rival_cuts
import width_rivals
from random_data import random_images, random_labels, random_reference, write_parquet
from torch import Tensor, nn


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected")
def test_width_rivals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(width_rivals, "HALVINGS", 6)
    reference.save_reference(random_reference("vit"), "vit", {}, tmp_path)
    for split, count in (("train", 24), ("test", 40)):
        write_parquet(tmp_path, split, random_images(count, 0), random_labels(count, 0))
    arguments = ["--data", str(tmp_path), "--checkpoints", str(tmp_path), "--output", str(tmp_path)]
    command = [*arguments, "--seeds", "0", "--images", "16", "--sizes", "0.6"]
    width_rivals.main(command)
    record = json.loads((tmp_path / "width_rivals.json").read_text())
    table = width_rivals.report(record)
    assert table in capsys.readouterr().out
    assert list(record["rivals"]) == list(width_rivals.RIVALS)
    for row in record["rivals"].values():
        assert row["0.6"]["kept"] == pytest.approx([0.6], abs=0.03)
    monkeypatch.setattr(width_rivals, "at_size", None)  # nothing is measured again
    width_rivals.main(command)
    assert table in capsys.readouterr().out


class Attention(nn.Module):
    """Queries and keys of two heads, that are all it has."""

    num_heads = 2

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(6, 3 * 2 * 4)

    def heads(self, x: Tensor) -> Tensor:
        """Queries and keys, `(2, heads, tokens, channels)`."""
        parts = self.qkv(x).flatten(0, -2).view(-1, 3, 2, 4)[:, :2]
        return parts.permute(1, 2, 0, 3).detach()


class Model(nn.Module):
    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.blocks: Any = nn.ModuleList([nn.Module()])
        self.blocks[0].attn = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0].attn.qkv(x)


def moments_of(attention: Attention, x: Tensor) -> Tensor:
    [moments] = width_rival_cuts.products(Model(attention), [x]).values()
    return moments


def test_all_channels_kept_change_no_product() -> None:
    attention, x = Attention(), torch.randn(5, 7, 6)
    before = attention.heads(x).double()
    width_rival_cuts.choose_logits(attention, moments_of(attention, x), 4)
    after = attention.heads(x).double()
    for head in range(2):
        products = [pair[0, head] @ pair[1, head].T for pair in (before, after)]
        assert torch.allclose(*products, rtol=1e-3, atol=1e-3)


def test_no_other_products_of_the_kept_channels_are_nearer() -> None:
    """Over all pairs of a query and a key, whatever image they are of."""
    attention, x = Attention(), torch.randn(5, 7, 6)
    moments = moments_of(attention, x)
    dense = copy.deepcopy(attention).heads(x).double()
    width_rival_cuts.choose_logits(attention, moments, 2)
    queries, keys = attention.heads(x).double()[..., :2]
    for head in range(2):
        full = dense[0, head] @ dense[1, head].T
        found = (full - queries[head] @ keys[head].T).square().mean()
        # Least squares over the entries of X, by brute force, with the best two channels.
        energy = dense[:, head].square().mean(1).prod(0)
        chosen = energy.topk(2).indices
        q, k = dense[0, head][:, chosen], dense[1, head][:, chosen]
        pairs = torch.einsum("sa,tb->stab", q, k).reshape(-1, 4)
        fitted = pairs @ torch.linalg.lstsq(pairs, full.reshape(-1)).solution
        least = (full.reshape(-1) - fitted).square().mean()
        assert float(found) == pytest.approx(float(least), rel=1e-3)
        assert found < full.square().mean()


def test_squared_gradients_are_those_of_a_step_by_hand() -> None:
    """A classifier of one Linear: the gradient of its cross-entropy is known."""
    model, images = Classifier(), [torch.randn(3, 1, 1, 4), torch.randn(2, 1, 1, 4)]
    found = width_rival_cuts.self_supervised_fisher(model, images)
    weight, expected = model.linear.weight.detach(), torch.zeros(5, 4)
    for batch in images:
        x, flipped = batch.flatten(1), batch.flip(-1).flatten(1)
        scale = width_rival_cuts.TEMPERATURE
        wanted, given = ((part @ weight.T / scale).softmax(-1) for part in (x, flipped))
        expected += (weight * ((given - wanted).T @ flipped / scale / len(x))).square()
    assert torch.allclose(found["linear.weight"], expected, rtol=1e-4)
    assert model.linear.weight.grad is None


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 5, bias=False)

    def forward_features(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def forward_head(self, x: Tensor, pre_logits: bool) -> Tensor:
        return self.linear(x)


def test_scores_of_structures_add_up_what_belongs_to_them() -> None:
    fisher = {"up.weight": torch.rand(12, 5), "up.bias": torch.rand(12)}
    fisher["down.weight"] = torch.rand(5, 4)
    found = width_rival_cuts.structure_scores(fisher, "up", "down", 3)
    for channel in range(4):
        rows = [channel, channel + 4, channel + 8]
        expected = fisher["down.weight"][:, channel].sum()
        for row in rows:
            expected += fisher["up.weight"][row].sum() + fisher["up.bias"][row]
        assert found[channel] == pytest.approx(float(expected))


def test_the_best_over_all_layers_stay_and_one_of_each() -> None:
    scores = {"a": torch.tensor([5.0, 6.0, 7.0]), "b": torch.tensor([1.0, 2.0, 4.0])}
    assert width_rival_cuts.best(scores, 0.5) == {"a": [1, 2], "b": [2]}
    assert width_rival_cuts.best(scores, 0.0) == {"a": [2], "b": [2]}
    assert width_rival_cuts.best(scores, 1.0) == {"a": [0, 1, 2], "b": [0, 1, 2]}
