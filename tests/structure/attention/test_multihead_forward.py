"""`nn.MultiheadAttention` with its projection called, and with fewer heads."""

from __future__ import annotations

import pytest
import torch
import torch_pruning as tp
from head_cuts import prune, zeroed
from torch import Tensor, nn
from toys import perturbed, relative

from tp_amp.importance.entropy_taylor import EntropyTaylorImportance
from tp_amp.plan.ranking import rank_channels
from tp_amp.structure.attention.finding import find_attentions
from tp_amp.structure.graph import build_graph


class TinyMultihead(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.head = nn.Linear(8, 3)

    def hidden(self, x: Tensor) -> Tensor:
        """The heads' channels `(images, tokens, 8)`, from the formula."""
        qkv = nn.functional.linear(
            self.embed(x), self.attention.in_proj_weight, self.attention.in_proj_bias
        )
        q, k, v = qkv.reshape(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        return ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(self.attention.out_proj(hidden).mean(1))

    def forward(self, x: Tensor) -> Tensor:
        first = self.attention.batch_first
        y = self.embed(x) if first else self.embed(x).transpose(0, 1)
        y, _ = self.attention(y, y, y, need_weights=False)
        return self.head(y.mean(1 if first else 0))


@pytest.mark.parametrize("batch_first", [False, True])
def test_scores_of_the_heads_equal_brute_force(batch_first: bool) -> None:
    torch.manual_seed(0)
    model = perturbed(TinyMultihead(batch_first))
    images = torch.randn(4, 4, 4)  # As many images as tokens: only the right layout fits.
    importance = EntropyTaylorImportance("prediction").collect(model, images.split(2))
    expected = torch.zeros(8)
    for single in images.split(1):
        hidden = model.hidden(single).detach().requires_grad_()
        probabilities = model.logits(hidden).softmax(-1)
        entropy = -(probabilities * probabilities.log()).sum()
        (gradient,) = torch.autograd.grad(entropy, hidden)
        expected += (hidden * gradient).sum((0, 1)).abs().detach() / 4 / 2  # a batch's mean
    assert relative(importance.scores["attention.out_proj"], expected) < 1e-4
    assert type(model.attention) is nn.MultiheadAttention
    graph = build_graph(model, images[:1]).graph
    [attention] = find_attentions(model, images[:1])
    sums = expected.view(2, 4).sum(1)
    assert rank_channels(importance, graph, attention) == sums.argsort(descending=True).tolist()


def test_transformer_encoder_layer_keeps_to_the_narrow_forward() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = perturbed(nn.Sequential(nn.TransformerEncoder(layer, 1)))
    tokens = torch.randn(2, 5, 16)
    [attention] = find_attentions(model, tokens)
    graph = build_graph(model, tokens).graph
    keep = {attention.down: [0, 3]}
    with torch.no_grad():  # where the layer would go round the attention's forward
        expected = zeroed(model, [attention], keep)(tokens)
        order = rank_channels(tp.importance.MagnitudeImportance(), graph, attention)
        prune(graph, [attention], keep)
        assert relative(model(tokens), expected) < 1e-5
    assert sorted(order) == [0, 1, 2, 3]
