"""Plan to meet a size with the smallest loss that is foreseen."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from tp_amp.budget.budget import Budget, check_target
from tp_amp.budget.joint_widths import joint_widths, smallest
from tp_amp.budget.mlp_widths import check_narrowable
from tp_amp.budget.width_arguments import RoundTo, check_kinds
from tp_amp.budget.width_kinds import sites_of
from tp_amp.importance.reconstruction import ReconstructionImportance
from tp_amp.plan.pruning_plan import PruningPlan
from tp_amp.running.arguments import check_importance, check_whole
from tp_amp.running.checks import check_heads, check_model
from tp_amp.running.runtimes.building import EAGER
from tp_amp.structure.model_structure import ModelStructure, Site
from tp_amp.structure.selection import Layers, selected
from tp_amp.structure.streams.residual_stream import Stream

TRIES = 3  # sets of widths whose latency is measured


def plan_for_target(
    model: nn.Module,
    example_inputs: Any,
    importance: ReconstructionImportance,
    target: Mapping[str, float],
    *,
    widths: Collection[str] = ("mlp",),
    round_to: RoundTo = 1,
    min_width: int = 1,
    runtime: str = EAGER,
    ignored_layers: Layers | None = None,
    only_layers: Layers | None = None,
    num_heads: Mapping[nn.Module, int] | None = None,
) -> PruningPlan:
    """Plan to meet a size with the smallest loss that `importance` foresees; nothing is cut.

    The widths that `compensate` is at its best with: no search, no more forward passes than the
    importance has made and a latency needs to be measured. All kinds of widths have one price:
    losses are in the same unit, and each is set against what it saves.

    Args:
        model: the dense model. Where channels inside heads are to be cut, `rotate_heads` was called
            first: a plan keeps the leading ones, and before they hold the most little is cut there.
        example_inputs: as for `find_mlps`.
        importance: collected on the model, or with `data`, which attentions need.
        target: `{"params": 0.6}`, `{"macs": 0.6}` or `{"latency": 0.6}`: a fraction of the dense
            model, or above 1 an absolute number. The latency is that of one forward pass on the
            example inputs, in milliseconds above 1; it is measured on the model's device.
        widths: what may be cut: hidden channels of MLPs (`"mlp"`), in each head channels of queries
            and keys (`"qk"`) and of values and the projection (`"vo"`), or whole `"heads"`, and
            channels of the residual `"stream"`, for which `rotate` was called first.
        round_to: widths are multiples of it, but for heads, which are counted; or a number for each
            kind, `{"mlp": 64, "qk": 8}`.
        min_width: the smallest width of MLPs; with 0 whole ones may go where that is cheapest, and
            with `"vo"` whole attentions, of which the mean stays, as the bias of their last layer.
            Those whose layers are convolutions, or that have no such bias, keep a channel, which
            is logged.
        runtime: where the latency is measured: `"eager"` (PyTorch), `"compile"` (torch.compile),
            `"onnxruntime"` (needs `tp-amp[export]`) or `"openvino"` (needs `tp-amp[openvino]`).
            All but the first build the model three to five times, each for seconds to minutes.
        ignored_layers: what stays as it is: modules, or patterns of module paths, as
            `"blocks.0.mlp"`, `"*.mlp"`, `"blocks.0-3"`.
        only_layers: named in the same ways; what has no layer in it stays as it is.
        num_heads: as for `find_attentions`.

    Raises:
        ValueError: nothing of a kind is found, the target is out of reach (its range is told), an
            MLP shares its `down` with the attention (timm's parallel blocks with one projection),
            or the runtime fails on the model.
        TypeError: the importance is another one, or `widths` are no names.
        ImportError: the runtime is not installed.

    Example:
        >>> import timm, torch, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=10)
        >>> images = [torch.randn(4, 3, 224, 224)]
        >>> importance = tp_amp.ReconstructionImportance(data=images)
        >>> plan = tp_amp.plan_for_target(model, images[0][:1], importance, {"params": 0.7})
        >>> fitted = tp_amp.compensate(model, plan, images)
    """
    check_target(target, runtime)
    check_kinds(widths, round_to)
    check_whole(0, min_width=min_width)
    check_importance(importance)
    if not isinstance(importance, ReconstructionImportance):
        raise TypeError(
            "plan_for_target needs the foreseen errors of a ReconstructionImportance, found "
            f"{type(importance).__name__}; AdaptiveMLPPruner(target=...) meets a size with any"
        )
    check_model(model, values=True)
    check_heads(model, num_heads)
    structure = ModelStructure(model, example_inputs, num_heads=num_heads)
    every = sites_of(structure, widths)
    sites = selected(
        model, every, ignored_layers, only_layers, structure.adapters if "mlp" in widths else ()
    )
    check_narrowable(sites, round_to=round_to, min_width=min_width)
    fused = [site.down for site in sites if site.first]
    if fused:
        raise ValueError(
            f"{fused} read attention and MLP side by side, whose losses are not foreseen apart; "
            "add them to ignored_layers, or use plan_from_importance or AdaptiveMLPPruner"
        )
    budget = Budget(target, structure, sites, round_to, runtime, min_width)
    return plan_within(budget, structure, sites, importance)


def plan_within(
    budget: Budget,
    structure: ModelStructure,
    sites: Sequence[Site],
    importance: ReconstructionImportance,
) -> PruningPlan:
    """`plan_for_target` where all is read: the widths within a budget of the smallest loss.

    Args:
        budget: what the widths cost, and how much they may.
        structure: what was read of the model.
        sites: what of it is to be cut.
        importance: has seen what their `down` layers read, or has `data`.

    Raises:
        ValueError: the budget is out of reach, or a layer was not seen and there is no `data`.
    """
    streams = [site.down for site in sites if isinstance(site, Stream)]
    least = smallest(budget, streams)
    budget.check(least)
    foreseen = importance.foreseen(structure.model, sites)
    errors = {name: found.errors.clone() for name, found in foreseen.items()}
    for queries in budget.together.values():
        errors[queries][0] = 0  # they go with all of their attention, whose loss is the values'
    tried: list[dict[str, list[int]]] = []
    for _ in range(TRIES):
        widths = joint_widths(budget, errors, streams)
        tried.append({n: sorted(foreseen[n].order[:w].tolist()) for n, w in widths.items()})
        # The last try is measured by `confirm`; a corrected table may say that none is fast enough.
        if len(tried) == TRIES or not budget.correct(tried[-1]):
            break
        if budget.cost(least) > budget.amount:
            break
    keep = tried[-1]
    budget.confirm(keep)
    dense = {site.down: site.width for site in sites}
    return PruningPlan(keep, dense, sites={site.down: site for site in sites})
