"""Which MLPs and attentions are meant: by modules, or by patterns of their paths."""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from torch import nn

from tp_amp.structure.model_structure import Site
from tp_amp.structure.proofs.adapters import holder
from tp_amp.structure.streams.residual_stream import Stream

logger = logging.getLogger(__name__)

Layers = Iterable[nn.Module | nn.Parameter | str] | nn.Module | str
S = TypeVar("S", bound=Site)
_RANGE = re.compile(r"(\d+)-(\d+)")


def selected(
    model: nn.Module,
    sites: Sequence[S],
    ignored: Layers | None = None,
    only: Layers | None = None,
    adapters: Sequence[S] = (),
) -> list[S]:
    """The MLPs or attentions that are to be pruned: those in `only` that hold no ignored layer.

    Args:
        model: that they are of.
        sites: all there are.
        ignored: as for `matched`; the MLPs and attentions with a layer in it stay as they are.
        only: as for `matched`; all others stay as they are. None: all are meant.
        adapters: more of them, which are meant where `only` names them, not what they lie in.

    Raises:
        ValueError: none is left, or as `matched`.
        TypeError: as `matched`.
    """
    left = list(sites)
    if only is not None:
        named = _named(model, only, "only_layers")
        wanted = {module for part in named for module in part.modules()}
        left = [site for site in left if _layers(model, site) & wanted]
        for site in adapters:
            own = model.get_submodule(holder(model, site.name))
            left += [] if set(named).isdisjoint(own.modules()) else [site]
        if not left:
            names = [site.name or site.down for site in sites]
            raise ValueError(f"only_layers leaves nothing to prune; there are {names}")
    unwanted = matched(model, ignored, "ignored_layers")
    kept = [site for site in left if not _layers(model, site) & unwanted]
    if left and not kept:
        raise ValueError(f"all {len(left)} {type(left[0]).__name__}s are ignored layers")
    for site in set(left) - set(kept):
        logger.info("%s is not pruned: it is among the ignored layers", site.name)
    return kept


def matched(model: nn.Module, layers: Layers | None, argument: str) -> set[nn.Module]:
    """The modules that are named, with all that they hold.

    Args:
        model: that they are of.
        layers: modules of the model, their parameters, or patterns of module paths: a path
            (`blocks.0.mlp`), a glob (`*.mlp`), or with a range of numbers (`blocks.0-3`), both ends
            of which must be there. None: nothing is named.
        argument: its name, for the messages.

    Raises:
        ValueError: a pattern matches no module (the nearest paths are told), a range goes beyond
            those there are, or a module or parameter is none of the model's.
        TypeError: something else is among them.
    """
    named = [] if layers is None else _named(model, layers, argument)
    return {module for part in named for module in part.modules()}


def _named(model: nn.Module, layers: Layers, argument: str) -> list[nn.Module]:
    """The modules that are named."""
    given = [layers] if isinstance(layers, (str, nn.Module, nn.Parameter)) else layers
    if not isinstance(given, Iterable):
        raise TypeError(f"{argument} must be a list of modules or module paths, found {given!r}")
    named = dict(model.named_modules(remove_duplicate=False))
    owned = set(named.values())
    found: list[nn.Module] = []
    for layer in given:
        if isinstance(layer, str):
            holders: list[nn.Module] = [named[path] for path in _matching(layer, named, argument)]
        elif isinstance(layer, nn.Parameter):
            holders = [m for m in owned if any(layer is p for p in m.parameters(recurse=False))]
        elif isinstance(layer, nn.Module):
            holders = [layer] if layer in owned else []
        else:
            raise TypeError(f"{argument} must hold modules or module paths, found {layer!r}")
        if not holders:
            kind = type(layer).__name__
            raise ValueError(f"{argument} holds a {kind} that is no part of the model")
        found += holders
    return found


def _matching(pattern: str, named: dict[str, Any], argument: str) -> list[str]:
    """The module paths that a pattern matches."""
    parts = pattern.split(".")
    patterns = _without_ranges(parts)
    paths = [path for path in named if any(fnmatch.fnmatchcase(path, p) for p in patterns)]
    if not paths:
        near = difflib.get_close_matches(pattern, [path for path in named if path], 3, 0)
        raise ValueError(
            f"{argument}: {pattern!r} matches no module of {type(named['']).__name__}; near are "
            f"{', '.join(near)}"
        )
    for place, part in enumerate(parts):
        if span := _RANGE.fullmatch(part):
            there = _numbered(_without_ranges(parts[:place]), named)
            missing = [number for number in map(int, span.groups()) if number not in there]
            if missing:
                raise ValueError(
                    f"{argument}: {pattern!r} names number {missing[0]}, which is not there; the "
                    f"first is {there[min(there)]} and the last {there[max(there)]}"
                )
    return paths


def _without_ranges(parts: Sequence[str]) -> list[str]:
    """The patterns that one with ranges stands for."""
    numbers = [
        [str(i) for i in range(int(span[1]), int(span[2]) + 1)]
        if (span := _RANGE.fullmatch(part))
        else [part]
        for part in parts
    ]
    return [".".join(choice) for choice in itertools.product(*numbers)]


def _numbered(holders: Sequence[str], named: Iterable[str]) -> dict[int, str]:
    """The modules with a number for a name in what some patterns match, by their numbers."""
    return {
        int(path.rpartition(".")[2]): path
        for path in named
        if path.rpartition(".")[2].isdecimal()
        and any(fnmatch.fnmatchcase(path.rpartition(".")[0], holder) for holder in holders)
    }


def _layers(model: nn.Module, site: Site) -> set[nn.Module]:
    """The layers of a site; of an attention that makes q, k and v itself, all it holds."""
    names = {*site.up, *site.inner, site.down}
    if isinstance(site, Stream):  # whoever names a layer that it is cut with means it
        writers = {written.path.rpartition(".")[0] for written in site.written}
        names = {*site.readers, *writers} - {""}  # tokens that the model itself holds
    return {module for name in names for module in model.get_submodule(name).modules()}
