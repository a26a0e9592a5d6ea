"""Groups of heads, and what a module owns once heads are cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_pruning as tp
from attention_models import small
from head_cuts import prune, zeroed
from toys import relative
from zoo import image

from tp_amp.plan.cutting import cut, site_group
from tp_amp.plan.ranking import rank_channels
from tp_amp.structure.attention.finding import find_attentions
from tp_amp.structure.graph import build_graph


def test_numbers_of_the_module_follow() -> None:
    model = small()
    graph = build_graph(model, image(32)).graph
    [attention] = find_attentions(model, image(32))
    prune(graph, [attention], {attention.down: [0, 3, 1]})
    module = model.blocks[0].attn
    assert (module.num_heads, module.head_dim, module.scale) == (3, 8, 8**-0.5)
    assert getattr(module, "attn_dim", 24) == 24  # timm 1.0.17 keeps none
    assert (module.qkv.out_features, module.proj.in_features) == (72, 24)


@pytest.mark.parametrize("importance", [tp.importance.MagnitudeImportance(p=1, normalizer=None)])
def test_heads_are_ranked_by_the_sum_over_their_channels(importance: Any) -> None:
    model = small()
    graph = build_graph(model, image(32)).graph
    [attention] = find_attentions(model, image(32))
    with torch.no_grad():
        for layer in (model.blocks[0].attn.qkv, model.blocks[0].attn.proj):
            layer.weight.fill_(1)
            layer.bias.fill_(0)
        factors = torch.tensor([2.0, 4.0, 1.0, 3.0]).repeat_interleave(8)
        model.blocks[0].attn.proj.weight.mul_(factors)
    assert rank_channels(importance, graph, attention) == [1, 3, 0, 2]
    # q, k and v count as well as the projection, each at its own head.
    with torch.no_grad():
        model.blocks[0].attn.proj.weight.fill_(1)
        model.blocks[0].attn.qkv.weight[32 + 16 : 32 + 24] = 5
    assert rank_channels(importance, graph, attention) == [2, 0, 1, 3]


def test_group_is_rooted_at_the_projections_input() -> None:
    model = small()
    graph = build_graph(model, image(32)).graph
    [attention] = find_attentions(model, image(32))
    group = site_group(graph, attention, [1])
    assert group[0].dep.handler == tp.prune_linear_in_channels
    assert group[0].idxs == list(range(8, 16))
    assert group[1].idxs == [*range(8, 16), *range(40, 48), *range(72, 80)]
    assert group[1].root_idxs == list(range(8, 16)) * 3


def test_requires_grad_and_flags_are_given_back() -> None:
    model = small("beit_base_patch16_224").train()
    for parameter in model.blocks[0].attn.parameters():
        parameter.requires_grad_(False)
    state = torch.get_rng_state()
    graph = build_graph(model, image(32)).graph
    [attention] = find_attentions(model, image(32))
    prune(graph, [attention], {attention.down: [2]})
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.blocks[0].attn.parameters())
    with pytest.raises(ValueError, match=r"blocks\.0\.attn must keep at least one of its 4 heads"):
        next(cut(graph, attention, []))


def test_torch_prunings_interactive_mode_prunes_heads() -> None:
    model = small()
    images = image(32)
    [attention] = find_attentions(model, images)
    graph = build_graph(model, images).graph
    expected = zeroed(model, [attention], {attention.down: [0, 2]})(images)
    for group in cut(graph, attention, [0, 2]):
        for dep, indices in group:
            dep(indices)
    assert relative(model(images), expected) < 1e-5
