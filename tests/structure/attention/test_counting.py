"""Attentions of custom models, which tell their heads under names of their own or in their code."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_models import snapshot
from head_cuts import prune, random_keep, zeroed
from torch import Tensor, nn
from toys import perturbed, relative

import tp_amp
from tp_amp.structure.attention.fitting_reshapes import FittingReshapes
from tp_amp.structure.graph import build_graph


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


class Named(nn.Module):
    """The number of heads as `h`, and the width of the input for that of the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.h, self.qkv, self.proj = 4, nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.h, c // self.h).permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v).transpose(1, 2).reshape(b, n, c))


class Literal(Named):
    """The number of heads in the code alone."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v).transpose(1, 2).reshape(b, n, 24))


class Rest(Named):
    """The width of a head as what is left, and all heads of a batch side by side."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, 4, -1).permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class Unflattened(Named):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 6)).permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class Divided(Named):
    """Channels divided by the number of heads, as einops does it."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        heads = [part.reshape(b, n, 4, part.shape[-1] // 4) for part in self.qkv(x).chunk(3, -1)]
        q, k, v = (part.transpose(1, 2) for part in heads)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class BatchedHeads(Named):
    """Images times heads as one dimension."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, 6).permute(2, 0, 3, 1, 4)
        q, k, v = (part.reshape(b * 4, n, 6) for part in (q, k, v))
        hidden = attend(q, k, v).view(b, 4, n, 6).transpose(1, 2)
        return self.proj(hidden.reshape(b, n, 24))


class Apart(nn.Module):
    """Projections with names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.out = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = (f(x).view(b, n, 4, 6).transpose(1, 2) for f in (self.a, self.b, self.c))
        return self.out(attend(q, k, v).transpose(1, 2).reshape(b, n, c))


class HeadWidth(Apart):
    """Tells the width of a head, not how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.head_dim = self.a, self.b, self.c, 6

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], -1, self.head_dim)
        parts = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in parts)
        return self.out(attend(q, k, v).transpose(1, 2).flatten(2))


class Body(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(24), attention

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))


def whole(model: Any) -> dict[nn.Module, int]:
    return {model.attn: 4}


def packed(model: Any) -> dict[nn.Module, int]:
    return {model.attn.qkv: 4}


def apart(model: Any) -> dict[nn.Module, int]:
    return {model.attn.c: 4, model.attn.a: 4, model.attn.b: 4}


CASES: list[tuple[type[nn.Module], Callable[[Any], dict[nn.Module, int]]]] = [
    *((kind, told) for kind in (Named, Literal, Rest, Unflattened) for told in (whole, packed)),
    (Divided, packed),
    (Apart, apart),
    (HeadWidth, lambda _: {}),
]


@pytest.mark.parametrize(("kind", "told"), CASES)
@pytest.mark.parametrize("images", [1, 4])
def test_cut_is_zeroed(
    kind: type[nn.Module], told: Callable[[Any], dict[nn.Module, int]], images: int
) -> None:
    """Also where as many images or tokens as heads could take their place in a reshape."""
    torch.manual_seed(0)
    model = perturbed(Body(kind()))
    x = torch.randn(images, 5, 24)
    before = snapshot(model)
    num_heads = told(model)
    given = dict(num_heads)
    found = tp_amp.find_attentions(model, x, num_heads=num_heads)
    assert snapshot(model) == before
    assert num_heads == given
    [attention] = found
    assert (attention.width, attention.head_width) == (4, 6)
    keep = random_keep(found)
    reference = zeroed(model, found, keep)
    with torch.no_grad():
        prune(build_graph(model, x).graph, found, keep)
        again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        for batch, tokens in ((1, 5), (4, 5), (4, 4), (2, 24), (4, 24), (6, 4)):
            other = torch.randn(batch, tokens, 24)
            assert relative(model(other), reference(other)) < 1e-5
            assert torch.equal(again(other), model(other))
    # Cut again, it knows how many are left.
    [left] = tp_amp.find_attentions(model, x, num_heads=dict.fromkeys(told(model), 2))
    assert left.width == 2


def test_a_literal_forward_is_exported_and_compiled() -> None:
    torch.manual_seed(0)
    model, x = perturbed(Body(Literal())).eval(), torch.randn(2, 5, 24)
    found = tp_amp.find_attentions(model, x, num_heads={model.attn: 4})
    prune(build_graph(model, x).graph, found, {found[0].down: [0, 3]})
    expected = model(x)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), expected)


def test_heads_are_told_wherever_attentions_are_found() -> None:
    torch.manual_seed(0)
    model, x = Body(Named()), torch.randn(2, 5, 24)
    model.mlp = nn.Sequential(nn.Linear(24, 8), nn.GELU(), nn.Linear(8, 24))
    model.forward = lambda x: Body.forward(model, x) + model.mlp(x)
    [reason] = tp_amp.inspect(model, x).kept_attentions.values()
    assert "pass num_heads={module: n}" in reason
    told = {model.attn.qkv: 4}
    assert tp_amp.inspect(model, x, num_heads=told).attentions[0].width == 4
    importance = tp_amp.GramSchmidtImportance()
    plan = tp_amp.plan_from_importance(model, x, importance, {"attn.proj": 2}, num_heads=told)
    tp_amp.apply_plan(model, plan)
    assert model.attn.proj.in_features == 12
    assert model(x).shape == x.shape


def test_there_may_be_none() -> None:
    assert tp_amp.find_attentions(nn.Linear(4, 4), torch.randn(2, 4)) == []


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (lambda m: {nn.Linear(2, 2): 4}, "num_heads names a Linear that is no module of this Body"),
        (lambda m: {m.attn: 0}, r"num_heads\[attn\] must be a positive integer, found 0"),
        (lambda m: {m.attn.qkv: 4.0}, r"num_heads\[attn\.qkv\] must be a positive integer"),
    ],
)
def test_what_does_not_fit_is_refused(told: Any, message: str) -> None:
    model = Body(Named())
    with pytest.raises(ValueError, match=message):
        tp_amp.find_attentions(model, torch.randn(2, 5, 24), num_heads=told(model))


def test_a_wrong_number_is_found_out() -> None:
    model = Body(Named())
    found = tp_amp.inspect(model, torch.randn(2, 5, 24), num_heads={model.attn: 3})
    assert found.attentions == []
    found = tp_amp.inspect(model, torch.randn(2, 5, 24), num_heads={model.attn: 5})
    assert "don't fall into 5 heads" in found.kept_attentions["attn"]


@pytest.mark.parametrize("tokens", [4, 5, 8, 24])
@pytest.mark.parametrize("images", [1, 4])
def test_heads_whose_place_could_be_mistaken_stay(images: int, tokens: int) -> None:
    """A number of tokens that equals that of heads would be changed in their place."""
    model = perturbed(Body(BatchedHeads()))
    x = torch.randn(images, tokens, 24)
    found = tp_amp.inspect(model, x, num_heads={model.attn: 4})
    assert found.attentions == []
    assert "with " in found.kept_attentions["attn"]


def test_only_sizes_that_do_not_fit_are_changed() -> None:
    with FittingReshapes(dense=4, kept=3, block=6):
        assert torch.zeros(4, 24).view(4, 24).shape == (4, 24)
        assert torch.zeros(4, 5, 18).view(4, 5, 4, 6).shape == (4, 5, 3, 6)
        assert torch.zeros(5, 18).reshape(5, 24).shape == (5, 18)
        assert torch.zeros(4, 6).reshape(24).shape == (24,)
        assert torch.zeros(2, 5, 18).view(2, 5, 4, -1).shape == (2, 5, 3, 6)
        assert torch.zeros(2, 5, 7).view(2, 5, 1, -1).shape == (2, 5, 1, 7)
        assert torch.zeros(2, 4, 18).unflatten(2, (4, 6)).shape == (2, 4, 3, 6)
        assert torch.zeros(2, 54).view(2, 3, 24).shape == (2, 3, 18)
        assert torch.zeros(2).view(torch.int32).shape == (2,)
        with pytest.raises(RuntimeError, match="invalid"):
            torch.zeros(5, 7).view(5, 8)


class Grouped(nn.Module):
    """Query heads of four channels share keys and values, in three layers or packed in one."""

    def __init__(self, heads: int, shared: int, *, packed: bool) -> None:
        super().__init__()
        self.num_heads, self.shared = heads, shared
        widths = [4 * heads, 4 * shared, 4 * shared]
        if packed:
            self.qkv = nn.Linear(24, sum(widths))
        else:
            self.q, self.k, self.v = (nn.Linear(24, width) for width in widths)
        self.proj, self.widths = nn.Linear(4 * heads, 24), widths

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "qkv"):
            parts = self.qkv(x).split(self.widths, -1)
        else:
            parts = (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in parts)
        k, v = (part.repeat_interleave(self.num_heads // self.shared, 1) for part in (k, v))
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("heads", "shared"), [(4, 2), (4, 1), (6, 2), (6, 3)])
def test_grouped_queries_are_told(heads: int, shared: int, packed: bool) -> None:
    torch.manual_seed(0)
    model, x = perturbed(Body(Grouped(heads, shared, packed=packed))), torch.randn(2, 5, 24)
    for told in (None, {model.attn: heads}):
        found = tp_amp.inspect(model, x, num_heads=told)
        assert found.attentions == []
        assert found.kept_attentions["attn"] == (
            f"qkv makes {4 * heads + 8 * shared} channels and proj reads {4 * heads}, not a third "
            "of them: queries share heads of keys and values, keys are narrower than values, or "
            "queries come from elsewhere; such heads are not cut"
            if packed
            else f"its {heads} query heads share {shared} heads of keys and values (grouped "
            "queries), which are not cut"
        )
