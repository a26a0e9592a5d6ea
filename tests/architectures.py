"""Random small architectures for the property tests: a description, and the model built from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from toys import perturbed

TOKENS, CHANNELS = 4, 3  # of the inputs; 2 x 2 places where the model is convolutional
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu,
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class MLPSpec:
    """One MLP: `up` (and `gate`, or both packed in one layer), activation, `inner`, `down`."""

    kind: str = "plain"
    hidden: int = 6
    bias: bool = True
    activation: str = "gelu"
    inner: str = "none"


@dataclass(frozen=True)
class BlockSpec:
    """A norm and one or more MLPs beside each other; `reuse` takes those of the block before.

    `shared`: the same modules, called again. `tied`: other modules that hold the same parameters.
    """

    mlps: tuple[MLPSpec, ...] = (MLPSpec(),)
    norm: str = "layer"
    residual: bool = True
    mixing: bool = False
    reuse: str = "none"


@dataclass(frozen=True)
class Spec:
    """A model: embedding, blocks, final norm or none, mean over places, classifier or none."""

    width: int = 4
    convolutional: bool = False
    classes: int = 3
    final_norm: bool = True
    blocks: tuple[BlockSpec, ...] = (BlockSpec(),)
    seed: int = 0


class Scale(nn.Module):
    """One factor for each channel, of which Torch-Pruning knows nothing."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def projection(convolutional: bool, inputs: int, outputs: int, bias: bool = True) -> nn.Module:
    return (
        nn.Conv2d(inputs, outputs, 1, bias=bias)
        if convolutional
        else nn.Linear(inputs, outputs, bias=bias)
    )


def per_channel(kind: str, convolutional: bool, channels: int) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    if kind == "scale":
        return Scale(channels, 1, 1) if convolutional else Scale(channels)
    if kind == "depthwise" and convolutional:
        return nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
    if convolutional:
        return nn.BatchNorm2d(channels)
    return nn.RMSNorm(channels) if kind == "rms" else nn.LayerNorm(channels)


class RandomMLP(nn.Module):
    def __init__(self, spec: MLPSpec, width: int, convolutional: bool) -> None:
        super().__init__()
        self.spec, self.dim = spec, 1 if convolutional else -1
        rows = 2 * spec.hidden if spec.kind == "packed" else spec.hidden
        self.up = projection(convolutional, width, rows, spec.bias)
        if spec.kind == "gated":
            self.gate = projection(convolutional, width, rows, spec.bias)
        self.inner = per_channel(spec.inner, convolutional, spec.hidden)
        self.down = projection(convolutional, spec.hidden, width, spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        activation = ACTIVATIONS[self.spec.activation]
        if self.spec.kind == "packed":
            gate, value = self.up(x).chunk(2, self.dim)
            hidden = activation(gate) * value
        elif self.spec.kind == "gated":
            hidden = activation(self.gate(x)) * self.up(x)
        else:
            hidden = activation(self.up(x))
        return self.down(self.inner(hidden))


class Mixing(nn.Module):
    """Something between the places: attention, or a depthwise convolution."""

    def __init__(self, width: int, convolutional: bool) -> None:
        super().__init__()
        self.convolutional = convolutional
        if convolutional:
            self.mix = nn.Conv2d(width, width, 3, padding=1, groups=width)
        else:
            self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
            self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.convolutional:
            return x + self.mix(x)
        attention = (self.query(x) @ self.key(x).transpose(1, 2)).softmax(-1)
        return x + self.project(attention @ self.value(x))


class RandomBlock(nn.Module):
    def __init__(self, spec: BlockSpec, width: int, convolutional: bool) -> None:
        super().__init__()
        self.residual = spec.residual
        self.mixing = Mixing(width, convolutional) if spec.mixing else nn.Identity()
        self.norm = per_channel(spec.norm, convolutional, width)
        self.mlps = nn.ModuleList(RandomMLP(mlp, width, convolutional) for mlp in spec.mlps)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixing(x)
        normed = self.norm(x)
        outputs = [mlp(normed) for mlp in self.mlps]
        return sum(outputs, x) if self.residual else sum(outputs[1:], outputs[0])


class RandomModel(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.convolutional = spec.convolutional
        self.embed = projection(spec.convolutional, CHANNELS, spec.width)
        self.blocks = nn.ModuleList()
        for block in effective(spec).blocks:
            made = RandomBlock(block, spec.width, spec.convolutional)
            if block.reuse == "shared":
                made.mlps = self.blocks[-1].mlps
            elif block.reuse == "tied":
                for own, other in zip(made.mlps, self.blocks[-1].mlps, strict=True):
                    own.up.weight, own.down.weight = other.up.weight, other.down.weight
            self.blocks.append(made)
        kind = "layer" if spec.final_norm else "none"
        self.norm = per_channel(kind, spec.convolutional, spec.width)
        self.head = nn.Linear(spec.width, spec.classes) if spec.classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x.mean((2, 3)) if self.convolutional else x.mean(1))


def effective(spec: Spec) -> Spec:
    """The description with what a block reuses written out."""
    blocks: list[BlockSpec] = []
    for block in spec.blocks:
        if not blocks or block.reuse == "none":
            blocks.append(replace(block, reuse="none"))
        else:
            blocks.append(replace(block, mlps=blocks[-1].mlps))
    return replace(spec, blocks=tuple(blocks))


def build(spec: Spec, dtype: torch.dtype = torch.float64) -> RandomModel:
    torch.manual_seed(spec.seed)
    model = RandomModel(spec)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    perturbed(model, spec.seed)
    return model.to(dtype).eval()


def inputs(spec: Spec, images: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    # The same first image however many there are: which MLPs are found may hang on it.
    shape = (16, CHANNELS, 2, 2) if spec.convolutional else (16, TOKENS, CHANNELS)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)[:images]


def own_downs(spec: Spec) -> set[str]:
    """The MLPs that must be found: each one, once; of one channel there is nothing to cut.

    Where gradients must tell halves of packed rows apart, look through an RMS norm of several
    operations or tell a scale's dimension, a dead ReLU leaves nothing to judge by.
    """
    found = set()
    blocks = effective(spec).blocks
    starts = [max(i for i in range(n + 1) if blocks[i].reuse == "none") for n in range(len(blocks))]
    # Blocks that hold the same parameters as another of the same start are left whole.
    apart = {start for start, block in zip(starts, blocks, strict=True) if block.reuse == "tied"}
    tied = {place for place, start in enumerate(starts) if start in apart}
    for place, block in enumerate(blocks):
        for index, mlp in enumerate(block.mlps):
            places = 2 if spec.convolutional else TOKENS
            judged = mlp.kind == "packed" or mlp.inner == "rms"
            judged |= mlp.inner == "scale" and mlp.hidden == places
            dead = judged and mlp.activation == "relu"
            if block.reuse != "shared" and place not in tied and mlp.hidden > 1 and not dead:
                found.add(f"blocks.{place}.mlps.{index}.down")
    return found


def masked_forward(model: nn.Module, sites: dict[str, Any], keep: dict[str, list[int]]) -> Any:
    """Run the dense model with all other channels zero, norms of the kept channels alone."""

    def mask(module: nn.Module, kept: list[int]) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            values = args[0]
            dim = 1 if isinstance(module, nn.Conv2d) else values.dim() - 1
            shape = [1] * values.dim()
            shape[dim] = -1
            factor = torch.zeros(values.shape[dim], dtype=values.dtype)
            factor[kept] = 1
            return (torch.where(factor.bool().view(shape), values, 0.0),)

        return module.register_forward_pre_hook(hook)

    def norm(module: Any, kept: list[int]) -> Any:
        def hook(own: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = args[0][..., kept]
            if isinstance(own, nn.LayerNorm):
                x = x - x.mean(-1, keepdim=True)
                few = x / (x.square().mean(-1, keepdim=True) + own.eps).sqrt()
                few = few * own.weight[kept] + own.bias[kept]
            else:
                eps = torch.finfo(x.dtype).eps if own.eps is None else own.eps
                few = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * own.weight[kept]
            whole = torch.zeros_like(output)
            whole[..., kept] = few
            return whole

        return module.register_forward_hook(hook)

    def forward(x: Tensor) -> Tensor:
        handles = []
        for name, kept in keep.items():
            handles.append(mask(model.get_submodule(name), kept))
            for inner in sites[name].inner:
                module = model.get_submodule(inner)
                if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                    handles.append(norm(module, kept))
        try:
            with torch.no_grad():
                return model(x)
        finally:
            for handle in handles:
                handle.remove()

    return forward


def mlp_specs() -> st.SearchStrategy[MLPSpec]:
    return st.builds(
        MLPSpec,
        kind=st.sampled_from(["plain", "gated", "packed"]),
        hidden=st.integers(1, 9),
        bias=st.booleans(),
        activation=st.sampled_from(sorted(ACTIVATIONS)),
        inner=st.sampled_from(["none", "none", "scale", "layer", "rms", "depthwise"]),
    )


def block_specs() -> st.SearchStrategy[BlockSpec]:
    return st.builds(
        BlockSpec,
        mlps=st.lists(mlp_specs(), min_size=1, max_size=2).map(tuple),
        norm=st.sampled_from(["layer", "rms", "none"]),
        residual=st.booleans(),
        mixing=st.booleans(),
        reuse=st.sampled_from(["none", "none", "none", "shared", "tied"]),
    )


def specs(max_depth: int = 3) -> st.SearchStrategy[Spec]:
    return st.builds(
        Spec,
        width=st.integers(2, 6),
        convolutional=st.booleans(),
        classes=st.sampled_from([3, 2, 0]),
        final_norm=st.booleans(),
        blocks=st.lists(block_specs(), min_size=1, max_size=max_depth).map(tuple),
        seed=st.integers(0, 2**20),
    )
