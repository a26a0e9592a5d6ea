"""An attention that repeats another is checked once; one that differs in what matters is not."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from attention_models import small
from torch import Tensor, nn
from toys import perturbed
from zoo import image

from tp_amp.running.inputs import Inputs
from tp_amp.structure.attention import finding
from tp_amp.structure.attention.finding import read_attentions
from tp_amp.structure.comparing.repeats import call_form


class Mixing(nn.Module):
    """Its heads' channels lie in the order of a buffer; `apart` says how q, k and v lie."""

    def __init__(self, apart: bool = False, order: Any = range(32), turn: str = "none") -> None:
        super().__init__()
        self.num_heads, self.apart, self.turn = 4, apart, turn
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.register_buffer("order", torch.tensor(list(order)))

    def forward(self, x: Tensor, places: Any = None) -> Tensor:
        qkv = self.qkv(x)
        if self.apart:  # q, k and v of one head lie together
            q, k, v = qkv.unflatten(-1, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
        else:
            q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        hidden = ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2)
        order = self.order if places is None else places
        hidden = hidden[..., order[order < hidden.shape[-1]]]
        return self.proj(hidden if self.turn == "none" else hidden.flip(-1))


class Pair(nn.Module):
    """Two attentions, the second of which is made and called as told."""

    def __init__(self, places: Any = None, **changed: Any) -> None:
        super().__init__()
        self.first, self.second, self.places = Mixing(), Mixing(**changed), places

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x, None)
        return x + self.second(x, self.places)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Down layers of the attentions that are checked from now on."""
    own, calls = finding.checked, []

    def checked(owner: nn.Module, inputs: Inputs, guess: Any) -> Any:
        calls.append(guess.down)
        return own(owner, inputs, guess)

    monkeypatch.setattr(finding, "checked", checked)
    return calls


def tokens() -> Tensor:
    return torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))


REVERSED = torch.arange(31, -1, -1)


def test_attentions_that_differ_in_parameters_alone_are_checked_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = counted(monkeypatch)
    model = small(depth=3)
    model.blocks[1].attn.register_forward_hook(lambda *_: None)  # the copy has no hooks
    assert not torch.equal(model.blocks[0].attn.qkv.weight, model.blocks[1].attn.qkv.weight)
    found, reasons = read_attentions(model, image(32))
    assert [attention.name for attention in found] == [f"blocks.{i}.attn" for i in range(3)]
    assert len(calls) == 1
    assert not reasons
    calls.clear()
    assert len(read_attentions(perturbed(Pair()), tokens())[0]) == 2
    assert len(calls) == 1


@pytest.mark.parametrize(
    "changed",
    [{"apart": True}, {"order": REVERSED}, {"turn": "round"}, {"places": REVERSED}],
    ids=lambda changed: next(iter(changed)),
)
def test_one_that_differs_in_what_matters_is_refused(changed: dict[str, Any]) -> None:
    """By an attribute, a buffer or an argument."""
    found, reasons = read_attentions(perturbed(Pair(**changed)), tokens())
    assert [attention.name for attention in found] == ["first"]
    assert "it does not give what it gives" in reasons["second"]


@pytest.mark.parametrize(
    ("name", "checks"),
    [
        ("beit_base_patch16_224", 1),
        ("eva02_base_patch16_clip_224", 1),
        ("xcit_nano_12_p8_224", 2),  # over channels, and of the class token
        ("vit_base_patch16_rope_mixed_224", 3),  # each block is called with a rotation of its own
        ("swin_tiny_patch4_window7_224", 3),  # with windows, and shifted ones, and on a small map
    ],
)
def test_what_is_found_is_what_checks_of_each_find(
    monkeypatch: pytest.MonkeyPatch, name: str, checks: int
) -> None:
    if name.startswith("swin"):
        torch.manual_seed(0)
        sizes = {"img_size": 32, "window_size": 4, "embed_dim": 32, "num_heads": (2, 4)}
        model = perturbed(timm.create_model(name, depths=(4, 4), **sizes))
    else:
        model = small(name, depth=3)
    calls = counted(monkeypatch)
    found, reasons = read_attentions(model, image(32))
    assert len(calls) == checks
    monkeypatch.setattr(finding, "call_form", lambda *_: object())
    calls.clear()
    assert read_attentions(model, image(32)) == (found, reasons)
    assert len(calls) == len(found) > 1


def test_hooks_are_called_in_the_models_own_pass_alone() -> None:
    model, calls = small(), []
    model.blocks[0].attn.proj.register_forward_hook(lambda *_: calls.append("after"))
    model.blocks[0].attn.register_forward_pre_hook(lambda *_: calls.append("before"))
    assert len(read_attentions(model, image(32))[0]) == 1
    # Once as it is, once cut and once with zeros; a copy calls none.
    assert calls == ["before", "after"] * 3


def form(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return call_form(module, Inputs(args, kwargs))


def test_forms_differ_with_all_but_parameters_and_the_first_tensor() -> None:
    x, y = tokens(), tokens() + 1
    base = form(Mixing(), x, y, flag=True)
    assert base == form(Mixing(), x + 1, y.clone(), flag=True)
    assert hash(base) == hash(form(Mixing(), x + 1, y.clone(), flag=True))
    trained = Mixing()
    trained.qkv.weight.requires_grad_(False)
    assert base == form(trained, x, y, flag=True)
    nan = torch.tensor([float("nan")])
    assert form(Mixing(), x, nan) == form(Mixing(), x, nan.clone())

    other, typed, deeper, added = Mixing(), Mixing(), Mixing(), Mixing()
    typed.num_heads = 4.0
    deeper.proj.in_features = 16
    added.gate = nn.Parameter(torch.ones(1))
    other.forward = other.forward
    for module in (
        Mixing(apart=True),
        Mixing(order=range(31, -1, -1)),
        Mixing(turn="round"),
        Mixing().double(),
        Mixing().train(False),
        *(other, typed, deeper, added),
    ):
        assert form(module, x, y, flag=True) != base
    for args, kwargs in [
        ((x, y + 1), {"flag": True}),
        ((x, y), {"flag": False}),
        ((x, y), {"flag": 1}),
        ((x, y), {"mark": True}),
        ((x, y), {"flag": True, "more": None}),
        ((x, y, None), {"flag": True}),
        ((x,), {"flag": True}),
        ((x[:1], y), {"flag": True}),
        ((x.double(), y), {"flag": True}),
        ((x, [y]), {"flag": True}),
    ]:
        assert form(Mixing(), *args, **kwargs) != base


def test_what_is_shared_is_shared_in_the_other_too() -> None:
    x, y = tokens(), tokens() + 1
    assert form(Mixing(), x, x) == form(Mixing(), y, y)
    assert form(Mixing(), x, x) != form(Mixing(), x, y)
    tied, free, turned = Mixing(), Mixing(), Mixing()
    for module, name in ((tied, "qkv"), (turned, "proj")):
        module.mixer = nn.Linear(32, 96 if name == "qkv" else 32)
        module.mixer.weight = getattr(module, name).weight
    free.mixer = nn.Linear(32, 96)
    assert form(tied, x) != form(free, x)
    again = Mixing()
    again.mixer = nn.Linear(32, 96)
    assert form(free, x) == form(again, x)
    again.mixer.weight = again.qkv.weight
    assert form(tied, x) == form(again, x)
    assert form(tied, x) != form(turned, x)
    first, second = (nn.ModuleList(nn.Linear(2, 2) for _ in range(3)) for _ in range(2))
    first[2].weight, second[2].weight = first[0].weight, second[1].weight
    assert form(first, x) != form(second, x)


def test_what_cannot_be_compared_is_equal_to_itself_alone() -> None:
    x, size, other = tokens(), object(), object()
    assert form(Mixing(), x, size) == form(Mixing(), x, size)
    assert form(Mixing(), x, size) != form(Mixing(), x, other)
    meta = torch.empty(2, device="meta")
    sparse = torch.eye(2).to_sparse()
    for value in (meta, sparse):
        assert form(Mixing(), x, value) == form(Mixing(), x, value)
        assert form(Mixing(), x, value) != form(Mixing(), x, value.clone())


def test_attributes_that_sound_like_hooks_and_integer_parameters_are_no_obstacle() -> None:
    model = small(depth=2)
    for block in model.blocks:
        block.attn.use_hooks = True
        block.attn.index = nn.Parameter(torch.arange(3), requires_grad=False)
    assert len(read_attentions(model, image(32))[0]) == 2
    first, second = (block.attn for block in model.blocks)
    assert form(first, tokens()) == form(second, tokens())
    second.index.data += 1
    assert form(first, tokens()) != form(second, tokens())
    second.index.data -= 1
    second.use_hooks = False
    assert form(first, tokens()) != form(second, tokens())
