"""The one place that cuts: for a while, to try a width, or for good."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch_pruning.dependency import Group
from torch_pruning.pruner import function

from tp_amp.running.checks import remade
from tp_amp.running.snapshot import Snapshot, given_back
from tp_amp.structure.attention.adapting import FORWARDS
from tp_amp.structure.attention.heads import Attention, head_group
from tp_amp.structure.constant_linear import ConstantLinear
from tp_amp.structure.mlp_cuts import MLP, mlp_group, whole_reason
from tp_amp.structure.model_structure import Site
from tp_amp.structure.nodes import outputs
from tp_amp.structure.ranks.head_ranks import HeadRanks, rank_group
from tp_amp.structure.streams.residual_stream import Stream
from tp_amp.structure.streams.stream_cuts import held, stream_group


def site_group(graph: Any, site: Site, units: Sequence[int]) -> Group:
    """Make Torch-Pruning's group of some hidden channels of an MLP, or heads of an attention.

    Or of some channels of each of its heads, or of a residual stream.
    """
    if isinstance(site, Stream):
        return stream_group(graph, site, units)
    if isinstance(site, HeadRanks):
        return rank_group(graph, site, units)
    if isinstance(site, Attention):
        return head_group(graph, site, units)
    return mlp_group(graph, site, units)


def least_reason(model: nn.Module, site: Site) -> str | None:
    """Why one channel or head of a site has to stay at least; None where all may go.

    Of queries and keys they may where those of values do: then all of the attention goes.
    """
    if isinstance(site, MLP):
        return whole_reason(model, site)
    if isinstance(site, Stream):
        return "all of the model goes through it"
    if not isinstance(site, HeadRanks):
        return 'no attention goes by its heads; see the widths "vo", by which it may'
    if site.pair == "qk":
        return f"they go with the values of {site.name} alone"
    if site.values is None:
        return f"{site.name} gives more than its output, or another one without its values"
    return None


def site_layers(site: Site) -> set[str]:
    """Paths of the layers that are cut with a site."""
    if isinstance(site, Stream):
        return {*held(site)}
    return {*site.up, *site.inner, site.down}


def check_fits(model: nn.Module, site: Site) -> None:
    """Check that a model has the dense layers that a site names.

    Raises:
        ValueError: one is missing or of another width.
    """
    layers = dict(model.named_modules(remove_duplicate=False))
    other = "build the same dense model, or the plan is damaged"
    if isinstance(site, Stream):
        _check_stream_fits(model, site, other)
        return
    names = [site.down, *site.up, *site.inner]
    missing = [name for name in (*names, site.name) if name not in layers]
    if missing:
        raise ValueError(f"{type(model).__name__} has no layer {missing[0]}; {other}")
    if len(set(names)) < len(names) and not isinstance(site, HeadRanks):
        raise ValueError(f"{site.down} is cut with {names[1:]}, a layer of them twice; {other}")
    for name in names:
        if reason := remade(layers[name]):
            raise ValueError(f"{name} can't be cut: {reason}")
    if isinstance(site, HeadRanks):
        _check_ranks_fit(layers, site, other)
        return
    found = _size(layers[site.down], "weight", 1)
    expected = site.width * site.unit_width + site.first
    if found != expected:
        raise ValueError(
            f"{site.down} has {found} input channels, the dense model had {expected}; {other}"
        )
    fits = _mlp_fits(layers, site) if isinstance(site, MLP) else _attention_fits(layers, site)
    if not (fits and site.up):
        raise ValueError(
            f"{site.down} reads {expected} channels, other than {names[1:]} have; {other}"
        )


def _check_stream_fits(model: nn.Module, stream: Stream, other: str) -> None:
    """Check that a model has all channels of a stream, where it is written and read."""
    if stream.whole:
        raise ValueError(f"the stream of {stream.name} can't be cut: {stream.whole}")
    for blocks in stream.blocks:
        listed: Any = dict(model.named_modules()).get(blocks.path, ())
        if len(listed) != blocks.number:
            raise ValueError(
                f"{blocks.path or type(model).__name__} has {len(listed)} blocks, of which the "
                f"stream of {stream.name} runs through {blocks.number}; {other}"
            )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for holder, parts in held(stream).items():
        for leaf, dim in parts:
            path = f"{holder}.{leaf}" if holder else leaf
            found = parameters.get(path)
            if found is None and leaf == "bias":
                continue
            size = 0 if found is None else _size(model.get_submodule(holder), leaf, dim)
            if size == 0 or size % stream.width:
                raise ValueError(
                    f"{path} has {size} channels of the stream of {stream.name}, the dense model "
                    f"had {stream.width}; {other}"
                )


def _check_ranks_fit(layers: dict[str, nn.Module], site: HeadRanks, other: str) -> None:
    """Check that an attention has all channels of its heads in one of its two widths."""
    channels = site.heads * site.width
    for name in site.up:
        layer = layers[name]
        held = site.held(layer) if isinstance(layer, nn.Linear) else ()
        cut = [part for part, own in zip(held, site.cuts(name), strict=False) if own]
        if len(held) != len(site.cuts(name)) or any(part.channels != channels for part in cut):
            raise ValueError(
                f"{name} does not make {site.heads} heads of {site.width} channels; {other}"
            )
    if site.pair == "vo" and (found := _size(layers[site.projection], "weight", 1)) != channels:
        raise ValueError(
            f"{site.projection} has {found} input channels, the dense model had {channels}; {other}"
        )


def _mlp_fits(layers: dict[str, nn.Module], mlp: MLP) -> bool:
    ups = [outputs(layers[name]) for name in mlp.up]
    if mlp.fused:
        ups = [int(getattr(layers[mlp.name], "in_split", [0])[0])]
    inner = [mlp.packed * outputs(layers[name]) for name in mlp.inner]
    return {*ups, *inner} == {mlp.packed * mlp.width}


def _attention_fits(layers: dict[str, nn.Module], attention: Attention) -> bool:
    linears = [layer for name in attention.up if isinstance(layer := layers[name], nn.Linear)]
    parts = [(linear.out_features, attention.head_width) for linear in linears]
    for tensor in attention.tensors:
        holder, _, leaf = tensor.path.rpartition(".")
        parts.append((_size(layers.get(holder), leaf, tensor.dim), tensor.block))
    prefix = f"{attention.name}." if attention.name else ""
    return (
        attention.forward in FORWARDS
        and all(f"{name}.".startswith(prefix) for name in (attention.down, *attention.up))
        and all(
            size > 0 and block > 0 and size % (attention.width * block) == 0
            for size, block in parts
        )
    )


def _size(module: nn.Module | None, name: str, dim: int) -> int:
    """Size of a module's tensor in one dimension, 0 if it has none."""
    values = getattr(module, name, None)
    if not isinstance(values, Tensor) or not -values.dim() <= dim < values.dim():
        return 0
    return int(values.shape[dim])


@contextmanager
def undone_after_errors(model: nn.Module) -> Iterator[None]:
    """Whatever stops what cuts a model for good, Ctrl-C too, the model has back what it held."""
    held = Snapshot(model)
    try:
        yield
    except BaseException:
        held.restore()
        raise


@contextmanager
def narrowed(graph: Any, keep: Mapping[Site, Sequence[int]]) -> Iterator[None]:
    """Let MLPs run with only the channels to keep, and attentions with those heads, in the block.

    Torch-Pruning cuts the layers; on exit the model gets back what it held: the same parameters
    with their gradients, hooks and optimizer state, the same buffers, attributes and classes.

    Raises:
        ValueError: no head of an attention is kept.
    """
    with given_back(graph.model):
        for site, kept in keep.items():
            group = _cutting_group(graph, site, _dropped(site, kept))
            required = _required(group)
            for item in group.items:
                item.dep(item.idxs)
            _require(required)
        yield


def cut(graph: Any, site: Site, keep: Sequence[int]) -> Iterator[Group]:
    """Yield the Torch-Pruning group that cuts an MLP or attention down to `keep`, if anything goes.

    Whoever takes the group prunes it; asked for the next one, `requires_grad` of the cut
    parameters is put right, which Torch-Pruning sets to True.

    Raises:
        ValueError: no head of an attention is kept.
    """
    drop = _dropped(site, keep)
    if not drop:
        return
    group = _cutting_group(graph, site, drop)
    required = _required(group)
    yield group
    _require(required)


def cut_all(graph: Any, sites: Mapping[str, Site], keep: Mapping[str, Sequence[int]]) -> None:
    """Cut for good: each site, by its `down`, to what `keep` names under the same name.

    Raises:
        ValueError: no head of an attention is kept; wrap it in `undone_after_errors`.
    """
    for down, kept in keep.items():
        for group in cut(graph, sites[down], kept):
            group.prune(record_history=False)


def _cutting_group(graph: Any, site: Site, units: Sequence[int]) -> Group:
    group = site_group(graph, site, units)
    for item in group.items:
        if item.dep.handler == function.prune_layernorm_out_channels:
            item.dep.handler = _LayerNormPruner().prune_out_channels
        elif item.dep.handler == function.prune_linear_in_channels:
            item.dep.handler = _LinearPruner().prune_in_channels
    return group


class _LinearPruner(function.LinearPruner):  # type: ignore[misc]
    """Lets a Linear that reads nothing any more be a constant."""

    def prune_in_channels(self, layer: nn.Linear, idxs: Sequence[int]) -> nn.Linear:
        super().prune_in_channels(layer, idxs)
        if not layer.in_features:
            layer.__class__ = ConstantLinear
        return layer


class _LayerNormPruner(function.LayernormPruner):  # type: ignore[misc]
    """Cuts in order; Torch-Pruning 1.6.1 leaves the kept channels in the order of a set."""

    def prune_out_channels(self, layer: nn.LayerNorm, idxs: Sequence[int]) -> nn.LayerNorm:
        keep = sorted(set(range(layer.normalized_shape[-1])) - set(idxs))
        for name, parameter in list(layer.named_parameters(recurse=False)):
            layer._parameters[name] = self._prune_parameter_and_grad(parameter, keep, -1)
        layer.normalized_shape = (*layer.normalized_shape[:-1], len(keep))
        return layer


def _dropped(site: Site, keep: Sequence[int]) -> list[int]:
    if isinstance(site, Attention) and not set(keep) & set(range(site.width)):
        raise ValueError(
            f"{site.name} must keep at least one of its {site.width} heads, found keep={list(keep)}"
        )
    return sorted(set(range(site.width)) - set(keep))


def _required(group: Group) -> list[tuple[nn.Module, str, bool]]:
    """Which parameters that a group may cut require a gradient; of an attention, all it holds."""
    return [
        (module, name, parameter.requires_grad)
        for item in group.items
        for module in item.dep.target.module.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]


def _require(required: list[tuple[nn.Module, str, bool]]) -> None:
    for module, name, flag in required:
        module._parameters[name].requires_grad_(flag)  # type: ignore[union-attr]
