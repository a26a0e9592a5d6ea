"""Cutting heads equals zeroing the heads' channels at the output projection of the dense model."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
import timm
import torch
from attention_models import PerHead, small, snapshot
from head_cuts import prune, random_keep, zeroed
from packaging.version import Version
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toys import perturbed, relative
from zoo import TIMM, hugging_face_models, image, open_clip_models, torchvision_models
from zoo_checks import run
from zoo_more import MODELS

from tp_amp.importance.entropy_taylor import EntropyTaylorImportance
from tp_amp.plan.cutting import narrowed
from tp_amp.plan.ranking import rank_channels
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
    **{"davit": (8, 0), "swin_s3": (3, 1), "mobilevit": (9, 0), "pvt_v2": (6, 2), "mvitv2": (9, 1)},
}
OTHER_COUNTS = {
    **{"open_clip": (2, 0), "open_clip_full": (3, 0), "torchvision_vit": (2, 0)},
    **{"torchvision_swin": (2, 2), "torchvision_swinv2": (2, 2), "hf_swin": (2, 2)},
    **{"hf_swinv2": (2, 2), "hf_vit": (2, 0), "hf_deit": (2, 0), "hf_dinov2": (2, 0)},
    **{"hf_dinov3": (2, 0), "hf_beit": (2, 0), "hf_beit_bias": (2, 0), "hf_beit_shared": (2, 0)},
    **{"hf_clip": (2, 0), "hf_siglip": (3, 0)},
    **{"hf_blip": (2, 0), "hf_internvl": (2, 0)},
    **{"hf_detr": (3, 0), "hf_blip2_vision": (2, 0), "hf_timesformer": (4, 0)},
}


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
        with narrowed(graph, {found[0]: keep[found[0].down]}):
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
        **{name: (tiny.make, tiny.inputs, tiny.count) for name, tiny in MODELS.items()},
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


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("levit_128s", {}, r"stages\.0\.blocks\.0\.attn, .*: Attention has no Linears named qkv"),
        (
            "convit_tiny",
            {"depth": 2},
            r"blocks\.0\.attn, blocks\.1\.attn: GPSA has no Linears named",
        ),
    ],
)
def test_what_cannot_lose_heads_is_named_with_the_reason(
    name: str, arguments: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert find_attentions(timm.create_model(name, **arguments), image(224)) == []
    [message] = caplog.messages
    assert message.startswith("these attentions keep all heads: ")
    assert re.search(reason, message)


def test_an_attention_that_does_not_tell_its_heads_is_named() -> None:
    attention = PerHead()
    del attention.num_heads
    attention.count = 4
    attention.forward = lambda x: x
    _, reasons = read_attentions(nn.Sequential(attention), torch.randn(2, 5, 8))
    assert "has its number of heads as none of ('num_heads'," in reasons["0"]


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


def test_half_precision() -> None:
    model = small("beit_base_patch16_224").bfloat16()
    images = image(32).bfloat16()
    [attention] = find_attentions(model, images)
    prune(build_graph(model, images).graph, [attention], {attention.down: [1]})
    assert model(images).dtype is torch.bfloat16


class RecomputingAttention(nn.Module):
    """Keeps no activations for the backward pass, and has a norm as wide as all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.norm = 4, nn.LayerNorm(16)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def _inside(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT).softmax(-1)
        return x + self.proj((weights @ v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        given: Tensor = checkpoint(self._inside, x, use_reentrant=False)
        return given


def test_an_attention_that_computes_its_activations_again_can_lose_heads() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), RecomputingAttention(), nn.Linear(16, 3))
    assert [a.down for a in find_attentions(model, torch.randn(2, 5, 4))] == ["1.proj"]


class NormInFloat(nn.LayerNorm):
    """As in OpenAI's CLIP: computed in float32, whatever the model's type is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.type(torch.float32)).type(x.dtype)


class InFloat(nn.Module):
    def __init__(self, cast: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.num_heads, self.cast = 4, cast
        self.norm, self.qkv, self.proj = NormInFloat(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = (self.cast(part) for part in parts.permute(2, 0, 3, 1, 4))
        weights = (q @ k.mT).softmax(-1, dtype=torch.float32)
        return x + self.proj((weights @ v).transpose(1, 2).flatten(2))


CASTS: dict[str, Callable[[Tensor], Tensor]] = {
    "float": Tensor.float,
    "to": lambda x: x.to(torch.float32),
    "to by name": lambda x: x.to(dtype=torch.float32),
    "type": lambda x: x.type(torch.float32),
}


@pytest.mark.parametrize("name", CASTS)
def test_an_attention_that_computes_in_float32_whatever_comes_can_lose_heads(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), InFloat(CASTS[name]), nn.Linear(16, 3)).eval()
    x = torch.randn(2, 5, 4)
    found = find_attentions(model, x)
    assert [attention.down for attention in found] == ["1.proj"]
    keep = {"1.proj": [0, 3]}
    expected = zeroed(model, found, keep)(x)
    prune(build_graph(model, x).graph, found, keep)
    assert relative(model(x), expected) < 1e-5
