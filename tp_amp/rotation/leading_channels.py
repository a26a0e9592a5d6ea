"""Cut a rotated stream by any Torch-Pruning pruner: keep what leads, then put the norms right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from tp_amp.plan.pruning_plan import PruningPlan
from tp_amp.rotation.rotating_streams import RotatedStream, leading_values
from tp_amp.rotation.telling import check_rotated, leading_widths
from tp_amp.running.arguments import check_number, check_whole
from tp_amp.structure.groups import root_name
from tp_amp.structure.model_structure import Site
from tp_amp.structure.streams.residual_stream import Stream

_ROUNDING = 2**-8  # of bfloat16


class LeadingChannels(tp.importance.Importance):  # type: ignore[misc]
    """Scores for a Torch-Pruning pruner that keep the leading channels of rotated streams.

    All other groups get no score, so that the pruner leaves them whole. Afterwards `rescale_norms`
    gives the norms the scale of the dense model.

    Args:
        rotated: of `rotate`, for the model that is pruned.

    Raises:
        TypeError: `rotated` is no list of `rotate`.
        ValueError: when called, if Torch-Pruning's group holds a part of a stream only, since its
            graph does not see some layer, so that a cut would leave a broken model.

    Example:
        >>> import timm, torch, torch_pruning as tp, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
        >>> images = torch.randn(4, 3, 224, 224)
        >>> rotated = tp_amp.rotate(model, images[:1], [images])
        >>> importance = tp_amp.LeadingChannels(rotated)
        >>> tp.pruner.MetaPruner(model, images[:1], importance=importance, pruning_ratio=0.5).step()
        >>> tp_amp.rescale_norms(model, rotated)
        >>> model.patch_embed.proj.out_channels, model(images).shape
        (96, torch.Size([4, 1000]))
    """

    def __init__(self, rotated: Sequence[RotatedStream]) -> None:
        check_rotated(rotated, RotatedStream, "rotate")
        self.streams = [found.stream for found in rotated]

    @torch.no_grad()
    def __call__(self, group: Any) -> Tensor | None:
        """The scores of a group of all channels of a stream, the first one's the highest."""
        root = root_name(group)
        for stream in self.streams:
            if any(written.path.rpartition(".")[0] == root for written in stream.written):
                _check_whole(group, stream)
                channels = torch.tensor(group[0].idxs, dtype=torch.float)
                return 1 - channels / stream.width
        return None


def _check_whole(group: Any, stream: Stream) -> None:
    graph = group._DG
    held = set()
    for item in group.items:
        module = item.dep.target.module
        if isinstance(module, nn.MultiheadAttention):
            raise ValueError(
                f"Torch-Pruning cuts the heads of {graph._module2name[module]}, an "
                "nn.MultiheadAttention, together with the stream that it reads; such a stream can "
                "be rotated, not cut"
            )
        held |= {graph._param_to_name.get(module)} if isinstance(module, nn.Parameter) else set()
        if isinstance(module, nn.Module):
            name = graph._module2name.get(module)
            held |= {f"{name}.{leaf}" for leaf, _ in module.named_parameters(recurse=False)}
    missing = [path for path in stream.paths if path not in held]
    if missing:
        raise ValueError(
            f"Torch-Pruning's graph does not see that {', '.join(missing[:3])} belongs to the "
            f"stream of {stream.name}, so that a cut would break the model"
        )


@torch.no_grad()
def rescale_norms(model: nn.Module, rotated: Sequence[RotatedStream]) -> None:
    """Give the norms of cut streams the scale that they had in the dense model.

    A norm over d channels gives a vector of squared length d. The k channels that are kept hold
    nearly all of it, but a norm over them gives k; so its weights become sqrt(d / k), and its
    readers see what they saw. To be called after each cut, before any training; once more changes
    nothing.

    Args:
        model: rotated by `rotate` and cut to leading channels; whole streams change nothing.
        rotated: of the last `rotate` of the model.

    Raises:
        ValueError: the weights of a norm differ from each other, so that it was trained since; the
            model was rotated once more since, with handles of its own; or it is another one. The
            model is as it was.
        TypeError: `rotated` is no list of `rotate`.

    Example:
        >>> import timm, torch, torch_pruning as tp, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
        >>> images = torch.randn(4, 3, 224, 224)
        >>> rotated = tp_amp.rotate(model, images[:1], [images])
        >>> importance = tp_amp.LeadingChannels(rotated)
        >>> tp.pruner.MetaPruner(model, images[:1], importance=importance, pruning_ratio=0.5).step()
        >>> tp_amp.rescale_norms(model, rotated)
        >>> model.norm.weight[:2]
        tensor([1.4142, 1.4142], grad_fn=<SliceBackward0>)
    """
    check_rotated(rotated, RotatedStream, "rotate")
    scales: dict[str, float] = {}
    for found in rotated:
        stream = found.stream
        first = stream.written[0]
        kept = _parameter(model, first.path).shape[first.dim]
        if found.leads and not _alike(found.leads, leading_values(model, stream)):
            raise ValueError(
                f"the stream of {stream.name} has other coordinates than rotate gave it; pass what "
                "the last rotate of this model gave, before the model is trained"
            )
        for path in stream.norms:
            weight = _parameter(model, f"{path}.weight")
            if not bool((weight == weight[0]).all()):
                raise ValueError(
                    f"the weights of the norm {path} differ from each other, after rotate they are "
                    "one; call rescale_norms before the model is trained"
                )
            scales[path] = (stream.width / kept) ** 0.5
    for path, scale in scales.items():
        _parameter(model, f"{path}.weight").fill_(scale)


def _alike(before: Sequence[float], after: Sequence[float]) -> bool:
    """Whether values are the same, but for a conversion to half precision."""
    apart = sum((a - b) ** 2 for a, b in zip(before, after, strict=True))
    return apart <= _ROUNDING**2 * sum(a**2 for a in before)


def _parameter(model: nn.Module, path: str) -> Tensor:
    try:
        return model.get_parameter(path)
    except AttributeError as error:
        raise ValueError(
            f"{type(model).__name__} has no parameter {path}; pass the model that was rotated"
        ) from error


def stream_plan(
    rotated: Sequence[RotatedStream], kept: float | Mapping[str, int], *, round_to: int = 1
) -> PruningPlan:
    """Plan to keep the leading channels of rotated streams.

    Args:
        rotated: of `rotate`, for the model that the plan is for.
        kept: the share of each stream that stays, above 0 and at most 1; or name of a stream ->
            how many channels of it stay.
        round_to: with a share, the widths are multiples of it; where that leaves all channels, it
            is logged.

    Raises:
        ValueError: a share or width is none, or a stream is unknown or can be rotated, not cut.
        TypeError: `rotated` is no list of `rotate`.

    Example:
        >>> import tp_amp
        >>> stream = tp_amp.Stream("embed", 8, True, (), ("norm",), ())
        >>> tp_amp.stream_plan([tp_amp.RotatedStream(stream, (0.0,) * 9)], 0.5).keep
        {'embed': [0, 1, 2, 3]}
    """
    check_rotated(rotated, RotatedStream, "rotate")
    streams = {found.stream.name: found.stream for found in rotated}
    check_whole(1, round_to=round_to)
    if isinstance(kept, Mapping):
        if unknown := kept.keys() - streams.keys():
            raise ValueError(f"{sorted(unknown)} are no rotated streams; those are {list(streams)}")
        widths = dict(kept)
    else:
        check_number("a share above 0 and at most 1", lambda share: 0 < share <= 1, kept=kept)
        dense = {name: stream.width for name, stream in streams.items()}
        widths = leading_widths(dense, dict.fromkeys(dense, kept), round_to)
    for name, width in widths.items():
        check_whole(2, **{f"the width of {name}": width})
        if width > streams[name].width:
            raise ValueError(f"{name} has {streams[name].width} channels, found a width of {width}")
        if streams[name].whole:
            raise ValueError(f"the stream of {name} can't be cut: {streams[name].whole}")
    keep = {name: list(range(width)) for name, width in widths.items()}
    sites: dict[str, Site] = {name: streams[name] for name in widths}
    return PruningPlan(keep, {name: streams[name].width for name in widths}, sites=sites)
