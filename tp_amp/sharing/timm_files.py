"""What makes a saved folder one that timm opens by itself, where its own arguments build it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from tp_amp.sharing.dense_models import dense_sizes
from tp_amp.sharing.recorded_sizes import recorded_sizes
from tp_amp.structure.attention.heads import Attention
from tp_amp.structure.mlps import MLP
from tp_amp.structure.model_structure import Site
from tp_amp.structure.streams.residual_stream import Stream

logger = logging.getLogger(__name__)

# Of what timm knows of a model: how its images are prepared, and where its first and last layers
# are.
_DESCRIBED = (
    *("input_size", "fixed_input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"),
    *("pool_size", "first_conv", "classifier", "num_classes"),
)


def timm_files(
    model: nn.Module,
    source: dict[str, Any],
    sites: Mapping[str, Site],
    widths: Mapping[str, int],
) -> dict[str, str]:
    """The text of config.json by its name, if arguments of timm build the pruned model.

    That is so where every MLP is as wide beside its input as every other, and no head was cut; or
    where as large a share of all heads is left as of the one residual stream.

    Args:
        model: pruned.
        source: as in source.json.
        sites: what was cut, by its path.
        widths: channels or heads that are left of each.
    """
    described: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    if "architecture" not in described:
        return {}
    arguments = {k: v for k, v in source["arguments"].items() if not k.startswith("pretrained")}
    for sizes in _sizes(model, sites, widths):
        given = {**arguments, **sizes}
        try:
            built = dense_sizes({**source, "arguments": given})
            plain = not recorded_sizes(built, model)
        # Each family's constructor refuses what it does not know in its own way.
        except Exception as error:
            logger.debug("%s build another model: %s", sizes, error)
            continue
        if plain:
            config = {
                "architecture": described["architecture"],
                "num_classes": getattr(model, "num_classes", described.get("num_classes")),
                "model_args": given,
                "pretrained_cfg": {k: described[k] for k in _DESCRIBED if k in described},
            }
            return {"config.json": json.dumps(config, indent=2) + "\n"}
    return {}


def _sizes(
    model: nn.Module, sites: Mapping[str, Site], widths: Mapping[str, int]
) -> Iterator[dict[str, Any]]:
    """Arguments that may build the pruned model."""
    narrower: dict[str, Any] = {}
    downs = [name for name, site in sites.items() if isinstance(site, MLP)]
    if streams := [site for site in sites.values() if isinstance(site, Stream)]:
        heads = {name: widths[name] for name, site in sites.items() if isinstance(site, Attention)}
        if len(streams) > 1 or len({*heads.values()}) != 1:
            return
        [stream] = streams
        narrower = {"embed_dim": widths[stream.down], "num_heads": next(iter(heads.values()))}
        # MLPs that were not cut have another ratio too: what else than heads writes the stream.
        writers = dict.fromkeys(w.path.rpartition(".")[0] for w in stream.written)
        linears = [n for n in writers if isinstance(model.get_submodule(n), nn.Linear)]
        downs = [name for name in linears if name not in heads]
    for ratio in _ratios(model, downs):
        yield {**narrower, "mlp_ratio": ratio}


def _ratios(model: nn.Module, downs: Sequence[str]) -> Iterator[float]:
    """Ratios of hidden channels to outputs that may build all MLPs; none where they differ."""
    sizes = []
    for down in downs:
        weight: Any = model.get_submodule(down).weight
        sizes.append((weight.shape[1], weight.shape[0]))
    if not sizes:
        return
    outputs, hidden = sizes[0][1], sizes[0][0]
    if all(abs(width / across - hidden / outputs) < 1 / across for width, across in sizes):
        # Whole channels of what the ratio gives are taken; a packed gated MLP has two for each.
        for rounded in (hidden, hidden + 0.5):
            yield rounded / outputs
            yield 2 * rounded / outputs
