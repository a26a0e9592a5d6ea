"""The preflight: what of a model will be pruned, what not and why, and what it holds."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tp_amp.structure.attention.heads import Attention
from tp_amp.structure.macs import macs_of
from tp_amp.structure.mlps import MLP
from tp_amp.structure.model_structure import ModelStructure, Site
from tp_amp.structure.proofs.adapters import wrapped
from tp_amp.structure.residual import outside_blocks
from tp_amp.structure.streams.residual_stream import Stream


@dataclass(frozen=True)
class Share:
    """Parameters, and multiply-accumulates on the example inputs, of a part of a model."""

    parameters: float
    macs: float


# Lines of one section at most, where there may be very many.
_MOST = 6


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found; `print` it for a report.

    Attributes:
        model: name of the model's class.
        mlps: the MLPs that can be pruned, in the order of the forward pass.
        attentions: the attentions that can lose heads.
        kept_attentions: module path of each other attention -> why it keeps its heads.
        kept_layers: module path of each Linear that belongs to no group, and of each module that
            holds experts in tensors of three dimensions -> why.
        outside_blocks: `down` of each MLP whose output is not added to what it reads: hidden layers
            of heads (boxes, masks), of embeddings and of projections.
        streams: the residual streams that may be rotated by their structure; `rotate` proves each
            on a copy, which takes time and memory, and tells which can be cut.
        kept_streams: what writes another one first -> why it keeps its coordinates.
        shares: `"total"`, and what of it is in `"MLPs"`, `"attention"` and `"rest"`.

    Example:
        >>> import timm, torch, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
        >>> found = tp_amp.inspect(model, torch.randn(1, 3, 224, 224))
        >>> [mlp.name for mlp in found.mlps], found.kept_layers
        (['blocks.0.mlp'], {'head': 'no layer reads its channels'})
        >>> round(found.shares["MLPs"].macs / found.shares["total"].macs, 3)
        0.443
    """

    model: str
    mlps: list[MLP]
    attentions: list[Attention]
    kept_attentions: dict[str, str] = field(default_factory=dict)
    kept_layers: dict[str, str] = field(default_factory=dict)
    shares: dict[str, Share] = field(default_factory=dict)
    outside_blocks: list[str] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)
    kept_streams: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        total = self.shares["total"]
        lines = [
            f"{self.model}: {total.parameters / 1e6:.2f} M parameters, {total.macs / 1e9:.3f} GMACs"
        ]
        for part in ("MLPs", "attention", "rest"):
            share = self.shares[part]
            parameters = share.parameters / max(total.parameters, 1)
            macs = share.macs / max(total.macs, 1)
            lines.append(f"  {part:<10}{parameters:>6.1%} of parameters  {macs:>6.1%} of MACs")
        sites: dict[str, Sequence[MLP | Attention]] = {
            "MLPs that can be pruned": self.mlps,
            "attentions that can lose heads": self.attentions,
        }
        for title, found in sites.items():
            lines += _section(title, [(site.name, _describe(site)) for site in found])
        lines += _section(
            "of the MLPs not in a residual block, but of a head, an embedding or a projection",
            [(down, f"ignored_layers=[{down!r}] leaves it out") for down in self.outside_blocks],
        )
        lines += _section("attentions that keep all heads", self.kept_attentions.items())
        lines += _section(
            "residual streams that may be rotated",
            [(stream.name, _of_stream(stream)) for stream in self.streams],
        )
        stay = _section("residual streams that stay as they are", self.kept_streams.items())
        lines += stay[:_MOST]
        if len(stay) > _MOST:  # a detector's decoder has a number of them in each block
            lines.append(f"  and {len(stay) - _MOST} lines more, see kept_streams")
        others = [  # an attention's own layers were told with it
            (name, reason)
            for name, reason in self.kept_layers.items()
            if name.rpartition(".")[0] not in self.kept_attentions
        ]
        lines += _section("Linears in no group, which stay whole", others)
        return "\n".join(lines)


def inspect(
    model: nn.Module,
    example_inputs: Any,
    forward_fn: Callable[..., Any] | None = None,
    *,
    num_heads: Mapping[nn.Module, int] | None = None,
) -> Inspection:
    """Tell what of a model will be pruned, what will not and why; the model is left as it was.

    Args:
        model: any module that Torch-Pruning can trace.
        example_inputs: as for `find_mlps`; MACs are those of one forward pass on them.
        forward_fn: calls the model on the example inputs, as Torch-Pruning's argument does.
        num_heads: as for `find_attentions`.

    Raises:
        ValueError: the model fails on `example_inputs`, `num_heads` does not fit it, or layers of
            an MLP have low-rank adapters (LoRA).

    Example:
        >>> import timm, torch, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
        >>> print(tp_amp.inspect(model, torch.randn(1, 3, 224, 224)))
        VisionTransformer: 0.82 M parameters, 0.131 GMACs
          MLPs       35.9% of parameters   44.3% of MACs
          attention  18.0% of parameters   33.5% of MACs
          rest       46.1% of parameters   22.2% of MACs
        MLPs that can be pruned: 1
          blocks.0.mlp: 768 channels, fc1 -> fc2
        attentions that can lose heads: 1
          blocks.0.attn: 3 heads, qkv -> proj
        residual streams that may be rotated: 1
          patch_embed.proj: 192 channels, read through 3 norms
        Linears in no group, which stay whole: 1
          head: no layer reads its channels
    """
    structure = ModelStructure(model, example_inputs, forward_fn, num_heads=num_heads, tell=False)
    mlps, (attentions, kept_attentions) = structure.mlps, structure.attentions
    sites: list[Site] = [*mlps, *attentions]
    in_group = {name for site in sites for name in (*site.up, site.down)}
    kept_layers = {
        name: structure.reasons.get(module) or wrapped(model, name) or _unread(module, structure)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in in_group
    }
    for name, module in model.named_modules():
        if experts := _experts(module):
            kept_layers[name] = (
                f"it holds the weights of {experts} experts in tensors of three dimensions, of "
                "which no layer is made; experts of Linears of their own can be cut"
            )
    holders = [attention.name for attention in attentions] + list(kept_attentions)
    macs = macs_of(model, structure.inputs, forward_fn)
    shares = _shares(model, macs, mlps, holders)
    return Inspection(
        type(model).__name__,
        mlps,
        attentions,
        kept_attentions,
        kept_layers,
        shares,
        outside_blocks(model, mlps, structure.traced),
        *structure.possible_streams,
    )


def _unread(module: nn.Module, structure: ModelStructure) -> str:
    """Why nothing is known of a layer that the traced graph does not hold."""
    if module not in structure.traced.calls:
        return "it is not called as a module on the example inputs"
    if not structure.traced.with_values()[module].output.requires_grad:
        return "the model calls it without gradients (torch.no_grad, detach), which tracing needs"
    told = structure.unread_output
    return told or "what the model gives on the example inputs does not depend on it"


def _experts(module: nn.Module) -> int:
    """How many experts a module holds, the hidden width of which two of its tensors share; or 0."""
    own = module.named_parameters(recurse=False)
    shapes = [tuple(p.shape) for _, p in own if p.dim() == 3 and min(p.shape) > 1]
    for first, second in itertools.combinations(shapes, 2):
        # A gated up has gate and value side by side.
        widths = {*first[1:], *(size / 2 for size in first[1:])}
        halves = {*second[1:], *(size / 2 for size in second[1:])}
        if first[0] == second[0] and widths & halves:
            return first[0]
    return 0


def _shares(
    model: nn.Module, macs: dict[str, float], mlps: list[MLP], holders: list[str]
) -> dict[str, Share]:
    sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in model.named_modules()}
    total = Share(sizes[""], macs.get("", 0.0))
    fractions = {
        name: fraction for mlp in mlps for name, fraction in _hidden_fractions(model, mlp).items()
    }
    hidden = Share(
        sum(sizes[name] * fraction for name, fraction in fractions.items()),
        sum(macs.get(name, 0.0) * fraction for name, fraction in fractions.items()),
    )
    # What an attention and an MLP share is counted with the MLP.
    attention = Share(
        sum(sizes[name] for name in holders) - _inside(sizes, fractions, holders),
        sum(macs.get(name, 0.0) for name in holders) - _inside(macs, fractions, holders),
    )
    rest = Share(
        total.parameters - hidden.parameters - attention.parameters,
        total.macs - hidden.macs - attention.macs,
    )
    return {"total": total, "MLPs": hidden, "attention": attention, "rest": rest}


def _hidden_fractions(model: nn.Module, mlp: MLP) -> dict[str, float]:
    """The MLP's layers, and what fraction of each is its own; parallel blocks share theirs."""
    fractions = dict.fromkeys((*mlp.up, *mlp.inner, mlp.down), 1.0)
    if mlp.fused:
        for name, dim in ((mlp.up[0], 0), (mlp.down, 1)):
            weight: Any = model.get_submodule(name).weight
            fractions[name] = mlp.width / weight.shape[dim]
    return fractions


def _inside(amounts: dict[str, Any], fractions: dict[str, float], holders: Iterable[str]) -> float:
    return math.fsum(
        amounts.get(name, 0.0) * fraction
        for name, fraction in fractions.items()
        if any(name.startswith(f"{holder}.") for holder in holders)
    )


def _describe(site: MLP | Attention) -> str:
    path = f"{site.name}." if site.name else ""
    # An nn.MultiheadAttention makes q, k and v itself.
    up = ["in_proj" if name == site.name else name.removeprefix(path) for name in site.up]
    inner = [name.removeprefix(path) for name in site.inner]
    layers = " -> ".join([" + ".join(up), *inner, site.down.removeprefix(path)])
    return f"{site.width} {site.units}, {layers}"


def _of_stream(stream: Stream) -> str:
    count = len(stream.norms)
    norms = f"{count} norm{'s' * (count != 1)}" if count else "no norm"
    return f"{stream.width} channels, read through {norms}"


def _section(title: str, texts: Iterable[tuple[str, str]]) -> list[str]:
    """A list under a title, with one line for those that differ in their numbers only."""
    lines: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for path, text in texts:
        alike = re.sub(r"\b\d+\b", "*", path), re.sub(r"(?<=\.)\d+(?=\.)", "*", text)
        lines.setdefault(alike, []).append((path, text))
    listed = [
        f"  {found[0][0] or 'the model'}: {found[0][1]}"
        if len(found) == 1
        else f"  {pattern} ({len(found)} times): {text}"
        for (pattern, text), found in lines.items()
    ]
    return [f"{title}: {sum(map(len, lines.values()))}", *listed] if lines else []
