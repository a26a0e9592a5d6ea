"""Cutting heads equals zeroing the heads' channels at the output projection of the dense model."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
import timm
import torch
import torch_pruning as tp
from head_cuts import prune, random_keep, zeroed
from packaging.version import Version
from torch import Tensor, nn
from toys import perturbed, relative
from zoo import TIMM, hugging_face_models, image, open_clip_models, torchvision_models
from zoo_checks import run

import tp_amp.structure.attention.heads
from tp_amp.importance.entropy_taylor import EntropyTaylorImportance
from tp_amp.plan.cutting import cut, narrowed, site_group
from tp_amp.plan.ranking import rank_channels
from tp_amp.structure.attention.adapting import exposing
from tp_amp.structure.attention.finding import find_attentions, read_attentions
from tp_amp.structure.attention.heads import Attention
from tp_amp.structure.graph import build_graph

# Family: attentions that can lose heads, and those with one head.
COUNTS = {
    **dict.fromkeys(("vit", "vit_qk_norm", "deit_distilled", "deit3", "dinov2"), (2, 0)),
    **dict.fromkeys(("dinov2_reg4", "dinov2_giant", "dinov3", "dinov3_qkvb", "eva02"), (2, 0)),
    **dict.fromkeys(("eva02_clip", "eva_giant", "beit", "beitv2", "beit3"), (2, 0)),
    **dict.fromkeys(("vit_rope_mixed", "samvit", "dwee"), (2, 0)),
    **{"siglip": (3, 0), "pe_core": (3, 0), "swin": (6, 2), "swinv2": (6, 2), "xcit": (4, 0)},
    **{"davit": (8, 0), "swin_s3": (3, 1), "mobilevit": (9, 0)},
}
OTHER_COUNTS = {
    **{"open_clip": (2, 0), "open_clip_full": (3, 0), "torchvision_vit": (2, 0)},
    **{"torchvision_swin": (2, 2), "torchvision_swinv2": (2, 2), "hf_swin": (2, 2)},
    **{"hf_swinv2": (2, 2), "hf_vit": (2, 0), "hf_deit": (2, 0), "hf_dinov2": (2, 0)},
    **{"hf_dinov3": (2, 0), "hf_beit": (2, 0), "hf_beit_bias": (2, 0), "hf_beit_shared": (2, 0)},
    **{"hf_clip": (2, 0), "hf_siglip": (3, 0)},
}


def small(name: str = "vit_tiny_patch16_224", **arguments: Any) -> nn.Module:
    sizes = {"img_size": 32, "embed_dim": 32, "num_heads": 4, "depth": 1, "num_classes": 5}
    torch.manual_seed(0)
    return perturbed(timm.create_model(name, **{**sizes, **arguments}))


def snapshot(model: nn.Module) -> list[object]:
    """Every module's class, attributes, parameters and buffers, as objects."""
    return [
        (
            type(module),
            *({key: id(value) for key, value in part.items()} for part in parts),
            [
                tensor._version
                for tensor in (*parts[1].values(), *parts[2].values())
                if tensor is not None
            ],
        )
        for module in model.modules()
        for parts in [(vars(module), module._parameters, module._buffers)]
    ]


def check(model: nn.Module, inputs: Any, counts: tuple[int, int]) -> None:
    warnings.filterwarnings("ignore", category=UserWarning, module="(timm|transformers|open_clip)")
    model = perturbed(model)
    before = snapshot(model)
    found, reasons = read_attentions(model, inputs)
    assert snapshot(model) == before
    assert (len(found), len(reasons)) == counts, reasons
    assert set(reasons.values()) <= {"it has one head"}
    keep = random_keep(found)
    graph = build_graph(model, inputs).graph
    with torch.no_grad():
        dense = run(model, inputs)
        before = snapshot(model)
        with narrowed(graph, found[0], keep[found[0].down]):
            once = run(model, inputs)
        assert snapshot(model) == before
        assert torch.equal(run(model, inputs), dense)
        assert relative(once, run(zeroed(model, found[:1], keep), inputs)) < 1e-5
        expected = run(zeroed(model, found, keep), inputs)
        prune(graph, found, keep)
        pruned = run(model, inputs)
    assert relative(pruned, expected) < 1e-5
    assert relative(dense, expected) > 1e-4  # the masks matter
    check_life(model, inputs, found, pruned)


def check_life(model: nn.Module, inputs: Any, found: list[Attention], output: Tensor) -> None:
    """It is a model like any other: fused or not, copied, saved, trained, pruned again."""
    again = copy.deepcopy(model)
    for module in again.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = not module.fused_attn
    again.load_state_dict(model.state_dict())
    assert relative(run(again, inputs), output) < 1e-5
    assert relative(run(pickle.loads(pickle.dumps(model)), inputs), output) < 1e-5
    run(again, inputs).sum().backward()
    for attention in found:
        weight = again.get_submodule(attention.down).weight
        assert weight.grad.shape == weight.shape
    left, reasons = read_attentions(model, inputs)
    assert set(reasons.values()) <= {"it has one head"}
    if left:
        keep = {attention.down: [attention.width - 1] for attention in left}
        with torch.no_grad():
            expected = run(zeroed(model, left, keep), inputs)
            prune(build_graph(model, inputs).graph, left, keep)
            assert relative(run(model, inputs), expected) < 1e-5


@pytest.mark.parametrize("name", COUNTS)
def test_timm(name: str) -> None:
    make, inputs, _ = TIMM[name]
    torch.manual_seed(0)
    check(make(), inputs, COUNTS[name])


def others() -> dict[str, tuple[Callable[[], nn.Module], Any, int]]:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"image_size": 32, "patch_size": 8, "intermediate_size": 80}

    def beit(option: str) -> Callable[[], nn.Module]:
        return lambda: transformers.BeitModel(transformers.BeitConfig(**sizes, **{option: True}))

    pixels = {"pixel_values": image(32)}
    return {
        **torchvision_models(),
        **open_clip_models(),
        **hugging_face_models(),
        "hf_beit_bias": (beit("use_relative_position_bias"), pixels, 2),
        "hf_beit_shared": (beit("use_shared_relative_position_bias"), pixels, 2),
    }


@pytest.mark.parametrize("name", OTHER_COUNTS)
def test_other_libraries(name: str) -> None:
    make, inputs, _ = others()[name]
    if name == "hf_beit_shared" and Version(version("transformers")) < Version("5"):
        pytest.skip("transformers 4.57 runs with no head less where BEiT's bias is shared")
    torch.manual_seed(0)
    check(make(), inputs, OTHER_COUNTS[name])


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


WRONG = "it does not give what it gives with the others' channels zeroed"


@pytest.mark.parametrize(
    ("name", "arguments", "path"),
    [
        ("beit_base_patch16_224", {}, "q_bias"),
        ("beit_base_patch16_224", {}, "relative_position_bias_table"),
        ("eva02_base_patch16_clip_224", {}, "norm.bias"),
        ("swinv2_tiny_window8_256", {"depths": (1,)}, "logit_scale"),
        ("swinv2_tiny_window8_256", {"depths": (1,)}, "cpb_mlp.2.weight"),
    ],
)
def test_a_tensor_cut_at_another_head_is_caught(
    monkeypatch: pytest.MonkeyPatch, name: str, arguments: dict[str, Any], path: str
) -> None:
    torch.manual_seed(0)
    if arguments:
        sizes = {"img_size": 32, "window_size": 4, "embed_dim": 32, "num_heads": (4,)}
        model = perturbed(timm.create_model(name, **sizes, **arguments))
    else:
        model = small(name)
    assert len(find_attentions(model, image(32))) == 1
    own = tp_amp.structure.attention.heads.HeadPruner._cut

    def shifted(self: Any, layer: nn.Module, tensor: Any, kept: list[int]) -> None:
        other = [(head + 1) % 4 for head in kept]
        own(self, layer, tensor, other if tensor.path == path else kept)

    monkeypatch.setattr(tp_amp.structure.attention.heads.HeadPruner, "_cut", shifted)
    with pytest.raises(ValueError, match=WRONG):
        find_attentions(model, image(32))


@pytest.mark.parametrize("parts", [1, 3])
def test_a_projection_cut_at_another_head_is_caught(
    monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    model, own = small(), tp_amp.structure.attention.heads.rows

    def shifted(heads: list[int], width: int, block: int, packed: int = 1) -> list[int]:
        return own([(h + (packed == parts)) % width for h in heads], width, block, packed)

    monkeypatch.setattr(tp_amp.structure.attention.heads, "rows", shifted)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn: .*" + WRONG):
        find_attentions(model, image(32))


def test_the_number_of_heads_left_behind_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tp_amp.structure.attention.heads, "_recount", lambda *_: None)
    with pytest.raises(ValueError, match="with 3 of 4 heads its forward pass fails"):
        find_attentions(small(), image(32))


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("levit_128s", {}, r"stages\.0\.blocks\.0\.attn: Attention has no Linears named qkv or"),
        ("convit_tiny", {"depth": 2}, r"blocks\.0\.attn: GPSA has no Linears named"),
    ],
)
def test_what_cannot_lose_heads_is_named_with_the_reason(
    name: str, arguments: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        find_attentions(timm.create_model(name, **arguments), image(224))


class PerHead(nn.Module):
    """q, k and v of one head lie together, which is not how this package cuts them."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.proj = nn.Linear(8, 96), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], self.num_heads, 3, 8).permute(3, 0, 2, 1, 4)
        hidden = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(hidden.transpose(1, 2).flatten(2))


def test_an_attention_that_does_not_tell_its_heads_is_named() -> None:
    attention = PerHead()
    del attention.num_heads
    attention.count = 4
    attention.forward = lambda x: x
    _, reasons = read_attentions(nn.Sequential(attention), torch.randn(2, 5, 8))
    assert "has its number of heads as none of ('num_heads'," in reasons["0"]


def test_another_layout_is_left_out_and_other_attentions_are_not_called() -> None:
    torch.manual_seed(0)
    found, reasons = read_attentions(nn.Sequential(PerHead()), torch.randn(2, 5, 8))
    assert not found
    assert "it does not give what it gives" in reasons["0"]
    _, inputs, _ = open_clip_models()["open_clip_full"]
    model = open_clip_models()["open_clip_full"][0]()
    found, reasons = read_attentions(model, {"image": inputs[0]})
    assert [attention.name for attention in found] == [
        "visual.transformer.resblocks.0.attn",
        "visual.transformer.resblocks.1.attn",
    ]
    assert reasons == {"transformer.resblocks.0.attn": "it is not called on the example inputs"}


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mask", ["none", "float", "bool", "heads"])
@pytest.mark.parametrize(
    "arguments", [{}, {"need_weights": False}, {"average_attn_weights": False}]
)
def test_exposed_attention_gives_the_same(
    batch_first: bool, mask: str, arguments: dict[str, bool]
) -> None:
    torch.manual_seed(0)
    options = {"kdim": 6, "vdim": 10} if mask == "float" else {}
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options).eval()
    sizes = [(5, 8), (7, options.get("kdim", 8)), (7, options.get("vdim", 8))]
    q, k, v = (torch.randn(3, tokens, width, requires_grad=True) for tokens, width in sizes)
    masks = {"float": torch.randn(5, 7), "bool": torch.rand(5, 7) < 0.3, "none": None}
    padding = torch.arange(7).expand(3, -1) >= torch.tensor([[7], [4], [5]])
    given = {**arguments, "attn_mask": masks.get(mask, torch.randn(6, 5, 7))}
    given["key_padding_mask"] = padding if mask in ("none", "bool") else None
    inputs = [x if batch_first else x.transpose(0, 1) for x in (q, k, v)]
    expected = attention(*inputs, **given)
    before = snapshot(attention)
    with exposing(attention):
        found = attention(*inputs, **given)
        single = attention(q[0], k[0], v[0])
    assert snapshot(attention) == before
    assert relative(found[0], expected[0]) < 1e-5
    assert relative(single[0], attention(q[0], k[0], v[0])[0]) < 1e-5
    assert (found[1] is None) == (expected[1] is None)
    if expected[1] is not None:
        assert relative(found[1], expected[1]) < 1e-5


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


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224"])
def test_as_many_heads_as_channels_tokens_and_images(name: str) -> None:
    model = small(name, embed_dim=25, num_heads=5)
    images = image(32) * torch.arange(1, 6).view(5, 1, 1, 1)
    [attention] = find_attentions(model, images)
    assert (attention.width, attention.head_width) == (5, 5)
    keep = {attention.down: [1, 2]}
    expected = zeroed(model, [attention], keep)(images)
    prune(build_graph(model, images).graph, [attention], keep)
    assert relative(model(images), expected) < 1e-5
    assert model.blocks[0].attn.num_heads == 2


def test_heads_of_torchvisions_swin_are_scored() -> None:
    make, images, _ = torchvision_models()["torchvision_swin"]
    torch.manual_seed(0)
    model = perturbed(make())
    before = snapshot(model)
    found, _ = read_attentions(model, images)
    importance = EntropyTaylorImportance("prediction").collect(model, [images])
    assert snapshot(model) == before
    graph = build_graph(model, images).graph
    for attention in found:
        scores = importance.scores[attention.down].view(4, -1).sum(1)
        assert (
            rank_channels(importance, graph, attention) == scores.argsort(descending=True).tolist()
        )


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


def test_half_precision() -> None:
    model = small("beit_base_patch16_224").bfloat16()
    images = image(32).bfloat16()
    [attention] = find_attentions(model, images)
    prune(build_graph(model, images).graph, [attention], {attention.down: [1]})
    assert model(images).dtype is torch.bfloat16


def test_multihead_attention_of_one_sequence_with_padding() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    q, k = torch.randn(5, 8), torch.randn(7, 8)
    padding = torch.arange(7) >= 4
    expected = attention(q, k, k, key_padding_mask=padding)
    with exposing(attention):
        found = attention(q, k, k, key_padding_mask=padding)
        with pytest.raises(ValueError, match="pass the causal attn_mask too"):
            attention(q, q, q, is_causal=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


class SharedBias(nn.Module):
    """An attention whose caller may pass a bias: one for each head, or one for all."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        heads = self.num_heads
        q, k, v = self.qkv(x).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


def test_an_argument_that_all_heads_share_is_left_whole() -> None:
    torch.manual_seed(0)
    model, x = SharedBias().eval(), torch.randn(2, 5, 16)
    each, shared = torch.randn(1, 4, 5, 5), torch.randn(1, 1, 5, 5)
    found = tp_amp.find_attentions(model, (x, each))
    keep = {found[0].down: [0, 2, 3]}
    reference = zeroed(model, found, keep)
    expected = [reference(x, bias) for bias in (each, shared)]
    tp_amp.apply_plan(model, (x, each), tp_amp.PruningPlan(keep, sites={s.down: s for s in found}))
    for bias, value in zip((each, shared), expected, strict=True):
        torch.testing.assert_close(model(x, bias), value)
