from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from toys import PlainMLP, fingerprint, images, perturbed, toy
from zoo import TIMM

import tp_amp
from tp_amp.running.inputs import Inputs
from tp_amp.running.watching import first_tensor
from tp_amp.structure.chain import find_chain


def names(model: nn.Module, inputs: Tensor, layers: list[str]) -> list[str]:
    return [step.name for step in find_chain(model, Inputs((inputs,)), layers)]


def walked(model: nn.Module, batch: Tensor, layers: list[str]) -> tuple[Tensor, Tensor]:
    """The state after the chain walked by hand, and what the last step gives in the model."""
    steps = find_chain(model, Inputs((batch[:2],)), layers)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        model.get_submodule(step.name).register_forward_hook(
            lambda _m, args, out, name=step.name: seen.update({name: (args[0], first_tensor(out))})
        )
        for step in steps
    ]
    with torch.no_grad():
        model(batch)
    for handle in handles:
        handle.remove()
    state = seen[steps[0].name][0]
    with torch.no_grad():
        for step in steps:
            module = model.get_submodule(step.name)
            state = first_tensor(module(state, *step.inputs.args, **step.inputs.kwargs))
    return state, seen[steps[-1].name][1]


def zoo_model(name: str) -> tuple[nn.Module, Tensor, list[str]]:
    make, example, _ = TIMM[name]
    torch.manual_seed(0)
    model = perturbed(make())
    batch = torch.randn(5, *example.shape[1:], generator=torch.Generator().manual_seed(2))
    return model, batch, [mlp.name for mlp in tp_amp.find_mlps(model, example)]


def test_blocks_of_a_vit_in_order() -> None:
    model, batch, layers = zoo_model("vit")
    found = names(model, batch[:2], layers)
    assert [name for name in found if name.startswith("blocks")] == ["blocks.0", "blocks.1"]


def test_blocks_and_downsampling_of_a_swin_in_order() -> None:
    model, batch, layers = zoo_model("swin")
    expected = []
    for i in range(4):
        expected += [f"layers.{i}.downsample"] * (i > 0)
        expected += [f"layers.{i}.blocks.0", f"layers.{i}.blocks.1"]
    assert [n for n in names(model, batch[:2], layers) if n.startswith("layers")] == expected


@pytest.mark.parametrize("name", ["vit", "swin", "eva02", "dinov3", "pvt_v2", "convnext", "beit"])
def test_walking_the_steps_gives_the_models_own_state(name: str) -> None:
    model, batch, layers = zoo_model(name)
    state, expected = walked(model, batch, layers)
    assert torch.equal(state, expected)
    assert not torch.equal(state[0], state[1])


def test_position_tables_are_the_same_for_all_batches() -> None:
    model, batch, layers = zoo_model("eva02")
    steps = [s for s in find_chain(model, Inputs((batch[:2],)), layers) if "block" in s.name]
    assert [step.name for step in steps] == ["blocks.0", "blocks.1"]
    tables = [v for s in steps for v in [*s.inputs.args, *s.inputs.kwargs.values()]]
    assert sum(isinstance(table, Tensor) for table in tables) == 2


def test_name_is_in_one_step() -> None:
    found = names(toy(depth=3), images(2), ["blocks.1.mlp"])
    assert len([name for name in found if "blocks.1.mlp".startswith(name)]) == 1
    assert not [name for name in found if name.startswith("blocks.1.mlp.")]


class Net(nn.Module):
    """Two MLPs, called as a function says."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two = PlainMLP(6, 8), PlainMLP(6, 8)
        self.with_extra = nn.ModuleList([Extra(), Extra()])
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Extra(nn.Module):
    """An MLP that takes another argument."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = PlainMLP(6, 8)

    def forward(self, x: Tensor, extra: Tensor | float) -> Tensor:
        return x + self.mlp(x) * extra


class Adding(nn.Module):
    """An MLP that adds to its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = PlainMLP(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        x += 1
        return self.mlp(x) + y


def with_extra(extra: Callable[[Tensor], Tensor | float]) -> Callable[[Net, Tensor], Tensor]:
    def forward(net: Net, x: Tensor) -> Tensor:
        given = extra(x)
        for part in net.with_extra:
            x = part(x, given)
        return x

    return forward


ONE_TWO = ["one", "two"]
EXTRA = ["with_extra.0", "with_extra.1"]


def between(net: Net, x: Tensor) -> Tensor:
    x = net.one(x)
    x += 1
    return net.two(x)


# What breaks a chain, and which layers the chain has to cover.
BROKEN = {
    "called twice": (lambda net, x: net.two(net.one(net.one(x))), ONE_TWO),
    "parallel branches": (lambda net, x: net.one(x) + net.two(x), ONE_TWO),
    "an operation between": (lambda net, x: net.two(net.one(x) * 2), ONE_TWO),
    "an operation between, in place": (between, ONE_TWO),
    "extra from the images": (with_extra(lambda x: x.mean()), EXTRA),
    "extra from the images, detached": (with_extra(lambda x: x.detach().mean()), EXTRA),
    "mask of the images": (with_extra(lambda x: x[:, :1] > 0), EXTRA),
    "mask of the images in floats": (with_extra(lambda x: (x[:, :1] > 0).float()), EXTRA),
    "number from the images": (with_extra(lambda x: float(x.detach().mean())), EXTRA),
    "table for each image": (with_extra(lambda x: torch.arange(6.0).expand(len(x), 6)), EXTRA),
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", BROKEN)
def test_no_chain_is_one_step_of_the_whole_model(kind: str, count: int) -> None:
    forward, layers = BROKEN[kind]
    batch = images(count, size=6)[:, 0, 0]
    assert names(Net(forward), batch, layers) == [""]


WHOLE = {
    "modules": (lambda net, x: net.two(net.one(x)), ONE_TWO, ONE_TWO),
    "a number": (with_extra(lambda x: 2.0), EXTRA, EXTRA),
    "a table": (with_extra(lambda x: torch.arange(6.0)), EXTRA, EXTRA),
    "a table of as many rows as images": (
        with_extra(lambda x: torch.arange(12.0).view(2, 1, 6)),
        EXTRA,
        EXTRA,
    ),
}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", WHOLE)
def test_modules_one_after_another_are_a_chain(kind: str, count: int) -> None:
    forward, layers, expected = WHOLE[kind]
    assert names(Net(forward), images(count, size=6)[:, 0, 0], layers) == expected


def test_module_that_changes_its_input_is_no_step() -> None:
    model = nn.Sequential(nn.Linear(6, 6), Adding(), nn.Linear(6, 6), Adding())
    assert names(model, images(2, size=6)[:, 0, 0], ["1.mlp", "3.mlp"]) == [""]


def test_layer_outside_every_candidate_gives_the_whole_model() -> None:
    model = Net(lambda net, x: net.two(net.one(x)))
    assert names(model, images(2, size=6)[:, 0, 0], [*ONE_TWO, *EXTRA]) == [""]
    assert names(model, images(2, size=6)[:, 0, 0], []) == [""]


def test_model_is_left_as_it_was() -> None:
    model = toy().train()
    model.head.weight.requires_grad_(False)
    batch = images(2)
    before = fingerprint(model)
    find_chain(model, Inputs((batch,)), ["blocks.0.mlp"])
    assert fingerprint(model) == before
    assert not batch.requires_grad


def test_model_is_left_as_it_was_after_a_failure() -> None:
    model = toy().train()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="the model failed on inputs of shape"):
        find_chain(model, Inputs((images(2, channels=3),)), ["blocks.0.mlp"])
    assert fingerprint(model) == before


def test_keyword_images_are_walked_too() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=2)
    steps = find_chain(model, Inputs(kwargs={"x": torch.randn(2, 3, 32, 32)}), ["blocks.1.mlp"])
    assert {"blocks.0", "blocks.1"} <= {step.name for step in steps}
