"""Models that put things on themselves in their first forward pass, and all that a model holds."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from toys import ToyViT, perturbed


class Hooking(ToyViT):
    """Installs hooks on its blocks and notes that on itself, as transformers 5 does."""

    def forward(self, x: Tensor) -> Tensor:
        if not getattr(self, "installed", False):
            for block in self.blocks:
                block.register_forward_hook(lambda _m, _a, output: 1.5 * output)
                block.mlp.register_forward_pre_hook(lambda _m, args: (args[0] + 0.5,))
            self.installed = True
        return super().forward(x)


class NotingElsewhere(ToyViT):
    """Notes it in a configuration that all of its modules share, and in a list inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vision=SimpleNamespace(installed=[]))
        self.blocks[0].config = self.config

    def forward(self, x: Tensor) -> Tensor:
        if not self.config.vision.installed:
            hook = self.blocks[1].register_forward_hook(
                lambda _m, _a, _k, output: 1.5 * output, with_kwargs=True
            )
            self.config.vision.installed.append(hook.id)
        return super().forward(x)


class Parametrizing(ToyViT):
    """Puts a parametrization on a layer, which changes its class and takes its weight away."""

    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    def forward(self, x: Tensor) -> Tensor:
        if not parametrize.is_parametrized(self.embed):
            parametrize.register_parametrization(self.embed, "weight", self.Double())
        return super().forward(x)


class Building(ToyViT):
    """Builds a layer and a table of positions for the size of what it is called with first."""

    def __init__(self) -> None:
        super().__init__()
        self.late: nn.Module | None = None
        self.register_buffer("positions", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.late is None:
            self.late = nn.Conv2d(1, 1, 1)
            nn.init.constant_(self.late.weight, 1.25)
            nn.init.zeros_(self.late.bias)
            self.positions = torch.linspace(-1, 1, x.shape[-1])
        return super().forward(self.late(x) + self.positions)


class Measuring(ToyViT):
    """Scales by the first images that it sees, and notes that in a buffer, as ActNorm does."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("initialised", torch.tensor(0))
        self.seen: dict[str, Any] = {"sizes": OrderedDict()}

    def forward(self, x: Tensor) -> Tensor:
        if not self.initialised:
            self.scale.data.fill_(1 / float(x.detach().std()))
            self.initialised.fill_(1)
        self.seen["sizes"].setdefault(tuple(x.shape), len(self.seen["sizes"]))
        return super().forward(self.scale * x)


class Note:
    """Without a dict of attributes."""

    __slots__ = ("installed",)

    def __init__(self) -> None:
        self.installed = False


class NotingInSlots(ToyViT):
    """Installs hooks, and notes that on an object whose attributes lie in slots."""

    def __init__(self) -> None:
        super().__init__()
        self.note = Note()

    def forward(self, x: Tensor) -> Tensor:
        if not self.note.installed:
            self.note.installed = True
            self.blocks[1].register_forward_hook(lambda _m, _a, output: 1.5 * output)
        return super().forward(x)


def noting_on_its_class() -> type[ToyViT]:
    """A new class, which installs hooks and notes that on itself, in two ways, for all its models.

    Its methods may change too: `scaled` is another one from the first call on.
    """

    class NotingOnItsClass(ToyViT):
        installed = False
        models: ClassVar[set[int]] = set()

        def scaled(self, x: Tensor) -> Tensor:
            return x

        def forward(self, x: Tensor) -> Tensor:
            kind = type(self)
            if not kind.installed:
                kind.installed = True
                kind.also_installed = True  # type: ignore[attr-defined]
                self.blocks[0].register_forward_hook(lambda _m, _a, output: 1.5 * output)
                own = kind.scaled
                kind.scaled = lambda self, x: 1.25 * own(self, x)  # type: ignore[method-assign]
            if id(self) not in kind.models:
                kind.models.add(id(self))
                self.blocks[1].register_forward_hook(lambda _m, _a, output: 1.5 * output)
            return super().forward(self.scaled(x))

    return NotingOnItsClass


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * self.inner(x)  # type: ignore[no-any-return]


class Wrapping(ToyViT):
    """Puts a block into another module."""

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.blocks[0], Wrapper):
            self.blocks[0] = Wrapper(self.blocks[0])
        return super().forward(x)


class Rebuilding(ToyViT):
    """Puts a layer of its own making in the place of a layer of an MLP."""

    built = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.built:
            self.blocks[1].mlp.first = nn.Linear(12, 20)
            self.built = True
        return super().forward(x)


class Removing(ToyViT):
    """Takes its embedding apart, which was there to say a size."""

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "embed"):
            weight, bias = self.embed.weight, self.embed.bias
            del self.embed
            self.embedding, self.shift = weight, bias
        x = nn.functional.conv2d(x, self.embedding, self.shift, 4)
        x = self.blocks(x.flatten(2).transpose(1, 2))
        return self.head(x.mean(1))  # type: ignore[no-any-return]


# What each replaces, by its path.
REPLACING = {Wrapping: "blocks.0", Rebuilding: "blocks.1.mlp.first", Removing: "embed"}

TOYS = (Hooking, NotingElsewhere, NotingInSlots, Parametrizing, Building, Measuring)


def lazy_toy(kind: type[ToyViT]) -> ToyViT:
    """One of them, never called before."""
    torch.manual_seed(0)
    return perturbed(kind())  # type: ignore[return-value]


def contents(model: nn.Module) -> dict[str, Any]:
    """All that modules hold, as text: hooks, attributes, parameters, values of buffers."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[name] = type(module), {key: described(value) for key, value in vars(module).items()}
    return found


def described(value: Any) -> Any:
    """What a value is: a module or parameter by itself, containers by what they hold."""
    if isinstance(value, (nn.Module, nn.Parameter)):
        return id(value)
    if isinstance(value, Tensor):
        return id(value), value.tolist()
    if isinstance(value, dict):
        return {key: described(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(held) for held in value]
    return described(vars(value)) if type(value) is SimpleNamespace else id(value)
