"""The AMP pruner: finds each MLP's width by binary search on the entropy."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning import dependency

from tp_amp.algebra.closed_form import Correction, Method
from tp_amp.budget.budget import Budget, check_target
from tp_amp.budget.mlp_widths import check_narrowable
from tp_amp.compensation.recipe import Recipe, apply
from tp_amp.compensation.routing import check_called_once
from tp_amp.compensation.walk import fit
from tp_amp.importance.objectives import Objective, mean_objective, resolve_on
from tp_amp.plan.cutting import cut
from tp_amp.plan.pruning_plan import PruningPlan
from tp_amp.running.arguments import check_flags, check_importance, check_whole
from tp_amp.running.batches import check_batches, stream
from tp_amp.running.checkpoint import Checkpoint, describe, first_digest, model_digest
from tp_amp.running.checks import check_heads, check_model
from tp_amp.running.distributed import check_same_weights, together
from tp_amp.running.inputs import example
from tp_amp.running.runtimes.building import EAGER
from tp_amp.running.timing import Estimate
from tp_amp.search.argument_checks import check_data, check_numbers
from tp_amp.search.compensated_probes import Compensator, most_bytes
from tp_amp.search.prefix_cache import Prefix
from tp_amp.search.ranked_sites import ranked_sites
from tp_amp.search.search_estimate import estimate_search, over_passes, profiled
from tp_amp.search.sequential_test import Forwards, SequentialTest
from tp_amp.search.target_search import PASSES, search_target
from tp_amp.search.tried_widths import TriedWidths
from tp_amp.search.width_search import WidthSearch
from tp_amp.structure.attention.heads import Attention
from tp_amp.structure.mlps import MLP
from tp_amp.structure.model_structure import ModelStructure, Site
from tp_amp.structure.observing import observing
from tp_amp.structure.selection import Layers, matched, selected
from tp_amp.structure.tolerant_graph import TolerantGraph

logger = logging.getLogger(__name__)


class AdaptiveMLPPruner(tp.pruner.MetaPruner):  # type: ignore[misc]
    """Prune the MLPs of a vision transformer, each to its own width (AMP, arXiv 2603.08100).

    From the last MLP to the first, on the model as cut so far: bisect for the smallest width with
    which the entropy over the calibration images is at most `max_increase` above that of the last
    accepted model. Neurons are ranked once, on the dense model. Nothing else is pruned, and
    Torch-Pruning enumerates no other group.

    With `compensation` each width is judged after what was cut is rebuilt from what is kept, in
    closed form; when all widths are found, one pass from the first layer to the last fits every
    layer again on the model as cut. With `target` the tolerance is found that meets a size.

    With `prune_num_heads` the attentions follow, from the last to the first, with heads for
    channels. That is an argument and no pruner of its own, because the search, the model as cut
    so far and the plan are the same.

    With `ReconstructionImportance` and `compensation="affine"` the bisection starts at the width
    whose foreseen loss is the allowed one.

    Other widths, inside heads and of residual streams, are no part of AMP's search: for a target
    `plan_for_target(widths=...)` finds them.

    Under an initialised `torch.distributed` process group all ranks do the same on their own share
    of the images, and find the same plan.

    Args:
        model: any model whose MLPs `find_mlps` finds.
        example_inputs: as for `find_mlps`.
        importance: `EntropyTaylorImportance` or any of Torch-Pruning's; it must be ready to score
            (collected, given `data`, or with the gradients it needs).
        calibration: batches for the search, read at each probe; not the images that scored (see
            `split_batches`).
        objective: as for `EntropyTaylorImportance`; by default the importance's own, else
            `"auto"`.
        max_increase: allowed increase of the entropy for each MLP, in nats.
        target: size to prune to instead, `{"params": 0.6}`, `{"macs": 0.6}` or
            `{"latency": 0.6}`: a fraction of the dense model, or above 1 an absolute number. Then
            `max_increase` is where the search for the tolerance starts, of three passes at most,
            and each MLP is allowed its share of it by what it costs; what no tolerance meets, the
            widths between two of them do. The latency is that of one forward pass on the
            example inputs, in milliseconds above 1; its table is measured here, on the model's
            device, and so anew for a search that goes on from a checkpoint.
        runtime: where that latency is measured, as for `plan_for_target`.
        compensation: `"none"`, `"mean"`, `"affine"`, or a `Recipe` with further settings; see
            `compensate`.
        compensation_data: batches that the compensation is fitted on; by default the importance's
            `data`, else the calibration batches, on which the search then flatters itself a bit.
        steps: widths tried for each MLP at most.
        rescore: rank the neurons of each MLP again on the model as cut so far.
        prune_num_heads: search the number of heads of each attention too, as Torch-Pruning calls
            it; a head's score is the sum over its channels. At least one head stays.
        num_heads: as for `find_attentions`, where an attention does not tell them; it is read, not
            changed.
        round_to: kept widths of MLPs are multiples of it.
        min_width: smallest width of an MLP.
        max_pruning_ratio: largest fraction of the channels or heads that an MLP or attention may
            lose.
        ignored_layers: what is not pruned, nor the MLPs and attentions that hold a layer of it:
            modules, or patterns of module paths, as `"blocks.0.mlp"`, `"*.attn"`, `"blocks.0-3"`.
        only_layers: named in the same ways; MLPs and attentions without a layer in it stay whole.
        cache_bytes: how much of what the blocks before the one at hand give may be kept in host
            memory, pinned for a model on CUDA. Probes then run only the rest of the model, with the
            same result; what does not fit is computed again on the way. 0 runs the whole model for
            every probe.
        error_probability: stop a probe as soon as it is accepted or rejected with at most this
            probability of another verdict than on all calibration images, 0.05 say, unless that
            moves its layer's width by one step of the bisection only; see `Verdicts`. Entropies
            in the plan are then estimates. The batches must be drawn at random, the same ones
            each time, and small (verdicts come after a batch), and many images save a larger
            share. Needs `tp-amp[sequential]`. None runs all images.
        checkpoint: a folder where the search writes rankings and the entropy of every probe, and
            the scoring its sums after every batch. Killed at any moment and started again with
            the same arguments, `step` goes on from there and finds the same plan, at the cost of
            the probe or batch that was in flight (with compensation, also of the moments of the
            layers cut so far). Other arguments, another model or calibration
            images are refused. The folder may be deleted afterwards.
        progress: show a progress bar on a terminal.
        forward_fn: as for `tp.pruner.MetaPruner`, and so are `output_transform`,
            `unwrapped_parameters` and `customized_pruners`.

    Attributes:
        mlps: the MLPs it prunes, in the order of the forward pass.
        attentions: the attentions it prunes; none without `prune_num_heads`.
        plan: after `step`, names, kept channels, widths, and the entropy at every probe.
        corrections: after `step`, what compensation adds to each layer.
        forwards: after `step` with `error_probability`, the images that the search ran the model
            on, and how many all of its probes take on all images.

    Raises:
        ValueError: no MLP is found, or no attention that can lose heads where that is asked, an
            argument is out of range, weights are not finite, or `step` can't meet the target.
        ImportError: `error_probability` is given, and scipy is missing.
        RuntimeError: in `step`, another rank failed, with its message, or is gone.
        TypeError: `calibration` or `compensation_data` can be read only once.

    Example:
        >>> import timm, torch, tp_amp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=10)
        >>> images = torch.randn(4, 3, 224, 224)
        >>> pruner = tp_amp.AdaptiveMLPPruner(
        ...     model, images[:1], tp_amp.EntropyTaylorImportance(data=[images[:2]]), [images[2:]]
        ... )
        >>> pruner.step()
        >>> pruner.plan.widths["blocks.0.mlp.fc2"] == model.blocks[0].mlp.fc1.out_features
        True
    """

    plan: PruningPlan
    corrections: dict[str, Correction]
    forwards: Forwards

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        importance: Callable[[Any], Tensor | None],
        calibration: Iterable[Any],
        *,
        objective: str | Callable[[Any], Tensor] | None = None,
        max_increase: float = 1e-2,
        target: Mapping[str, float] | None = None,
        runtime: str = EAGER,
        compensation: Method | Recipe = "none",
        compensation_data: Iterable[Any] | None = None,
        steps: int = 6,
        rescore: bool = False,
        prune_num_heads: bool = False,
        num_heads: Mapping[nn.Module, int] | None = None,
        round_to: int = 1,
        min_width: int = 1,
        max_pruning_ratio: float = 1.0,
        ignored_layers: Layers | None = None,
        only_layers: Layers | None = None,
        cache_bytes: int = 2**30,
        error_probability: float | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: bool = True,
        forward_fn: Callable[..., Any] | None = None,
        output_transform: Callable[..., Any] | None = None,
        unwrapped_parameters: list[Any] | None = None,
        customized_pruners: dict[Any, Any] | None = None,
    ) -> None:
        if target is not None:
            check_target(target, runtime)
        elif runtime != EAGER:
            raise ValueError(
                f"runtime={runtime!r} is where the latency of a target is measured, and there is "
                "no target; leave it out"
            )
        check_importance(importance)
        check_whole(0, cache_bytes=cache_bytes)
        check_flags(rescore=rescore, prune_num_heads=prune_num_heads, progress=progress)
        check_numbers(
            max_increase, steps, round_to, min_width, max_pruning_ratio, error_probability
        )
        check_data(importance, calibration, rescore)
        self.recipe = compensation if isinstance(compensation, Recipe) else Recipe(compensation)
        if compensation_data is not None:
            check_batches(compensation_data, repeatable=True)
        data = getattr(importance, "data", None) if compensation_data is None else compensation_data
        self.compensation_data = calibration if data is None else data
        if self.recipe.method != "none":
            check_batches(self.compensation_data, repeatable=True)
        known = getattr(importance, "objective", None)
        if objective is None and isinstance(known, Objective):
            self.objective = known
        else:
            self.objective = Objective("auto" if objective is None else objective)
        check_model(model, values=True)
        check_heads(model, num_heads)
        ignored = matched(model, ignored_layers, "ignored_layers")
        own_pruners = dict(customized_pruners or {})

        def build(inputs: Any, customized_pruners: dict[Any, Any]) -> Any:
            # No root module type: TP enumerates every group otherwise, which hangs on some models.
            # Fresh dicts: TP's default ones are shared by all pruners.
            with mock.patch.object(dependency, "DependencyGraph", TolerantGraph):
                super(AdaptiveMLPPruner, self).__init__(
                    model,
                    inputs,
                    importance,
                    root_module_types=[],
                    ignored_layers=list(ignored),
                    max_pruning_ratio=max_pruning_ratio,
                    round_to=round_to,
                    in_channel_groups={},
                    out_channel_groups={},
                    num_heads={},
                    forward_fn=None
                    if forward_fn is None
                    else lambda model, given: forward_fn(model, example(given).raw()),
                    output_transform=output_transform,
                    unwrapped_parameters=list(unwrapped_parameters or []),
                    customized_pruners={**customized_pruners, **own_pruners},
                )
            return self.DG

        # The parameters that the script names must be the ones in the graph.
        meta = not unwrapped_parameters
        self._structure = ModelStructure(
            model,
            example_inputs,
            forward_fn,
            num_heads=num_heads,
            build=build,
            on_meta_device=meta,
        )
        if not self._structure.mlps:
            raise ValueError(
                f"no MLP was found in {type(model).__name__}; tp_amp.inspect tells for each layer "
                "why"
            )
        chosen = ignored_layers, only_layers
        found = self._structure.some_attentions() if prune_num_heads else []
        every: list[Site] = [*self._structure.mlps, *found]
        sites = selected(model, every, *chosen, self._structure.adapters)
        self.mlps = [site for site in sites if isinstance(site, MLP)]
        self.attentions = [site for site in sites if isinstance(site, Attention)]
        check_narrowable(self.mlps, round_to=round_to, min_width=min_width)
        # In the order of the search.
        self._sites: list[Site] = [*reversed(self.mlps), *reversed(self.attentions)]
        if self.recipe.method != "none":
            check_called_once({site.down: self._structure.calls(site.down) for site in self._sites})
        self.budget: Budget | None = None
        if target is not None:
            self.budget = Budget(target, self._structure, self._sites, round_to, runtime)
        self.runtime = runtime
        self.calibration = calibration
        self.max_increase, self.steps, self.rescore = max_increase, steps, rescore
        self.min_width, self.progress = min_width, progress
        self.cache_bytes, self.error_probability = cache_bytes, error_probability
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self._pruned = False
        if self.budget:
            self.budget.check(self._tried.smallest(self._sites))

    @property
    def _tried(self) -> TriedWidths:
        foreseen = self.recipe.method == "affine"  # what is lost once it is rebuilt
        errors = getattr(self.importance, "errors", {}) if foreseen else {}
        return TriedWidths(
            self.steps, self.min_width, self.round_to, self.max_pruning_ratio, errors
        )

    @torch.inference_mode(False)  # parameters made in inference mode could not be trained
    def step(self, interactive: bool = False) -> Any:
        """Search every width and cut, or with `interactive` yield the groups to prune."""
        return super().step(interactive=interactive)

    @torch.inference_mode(False)
    def estimate(self) -> Estimate:
        """Tell what the search takes at most, by the time of one batch, before `step`.

        These are its forward passes, of all tolerances that a target may take; scoring and the work
        of the compensation come on top. `step` tells it by a pass over all batches, with the
        compensation, and at its end what it took.

        Raises:
            ValueError: the model fails on the images.
        """
        prefix = Prefix(self._structure, self._sites, self.calibration, self.cache_bytes)
        with prefix.passes() as passes:
            first = next(passes)
            first.call(self.model)  # what is slow for the first time only
            with profiled(self.model, prefix.steps) as profile:
                first.call(self.model)
            if isinstance(self.calibration, Sized):
                count = len(self.calibration)
            else:
                count = 1 + sum(1 for _ in passes)
        places = [prefix.place(site) for site in self._sites]
        probes = [self._tried.most_probes(site) for site in self._sites]
        whole = profile.times(count)
        one = estimate_search(whole, places, probes, self.cache_bytes)
        found = over_passes(one, whole, PASSES if self.budget else 1)
        return Estimate(
            found.seconds + whole.seconds,  # of the dense model
            found.bytes + most_bytes(self.recipe, self._sites),
        )

    def _prune(self) -> Iterator[Any]:
        if self._pruned:
            logger.warning("the model was pruned by step() before; nothing more is pruned")
            return
        with together("the search"):
            check_same_weights(self.model)
            plan = self._search()
        self.corrections = fit(
            self._structure,
            self._sites,
            plan.keep,
            self.compensation_data,
            self.recipe,
            progress=self.progress,
        )
        # Not before: what fails above can be tried again.
        self.plan, self._pruned = plan, True
        for site in self._sites:
            for group in cut(self.DG, site, self.plan.keep[site.down]):
                yield group
                self._correct(site)
        for name in self.corrections.keys() - {site.down for site in self._sites}:
            apply(self.model.get_submodule(name), self.corrections[name])

    def _correct(self, site: Site) -> None:
        fitted = self.corrections.get(site.down)
        if fitted is None:
            return
        down: Any = self.model.get_submodule(site.down)
        width = site.first + fitted.weight.shape[1]
        if down.weight.shape[1] != width:
            raise ValueError(
                f"the group of {site.down} was not pruned before the next one was asked for, so "
                "that its compensation does not fit; prune each group as it comes"
            )
        apply(down, fitted, site.first)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _search(self) -> PruningPlan:
        """Find every width; whatever happens, the model is afterwards as it was."""
        objective = resolve_on(self.objective, self.model, self.calibration)
        checkpoint = self._checkpoint()
        test = None
        if self.error_probability is not None:
            stored = checkpoint.tensors if checkpoint else {}
            test = SequentialTest(
                self.model, self.calibration, objective, self.error_probability, stored
            )
        search = WidthSearch(
            self.DG,
            self._sites,
            partial(
                ranked_sites,
                self.importance,
                self.DG,
                rescore=self.rescore,
                checkpoint=self.checkpoint,
                progress=self.progress,
            ),
            lambda: mean_objective(self.model, self.calibration, objective),
            rescore=self.rescore,
            tried=self._tried,
            compensator=Compensator(
                self.DG, self.compensation_data, self.recipe, [site.down for site in self._sites]
            ),
            prefix=Prefix(self._structure, self._sites, self.calibration, self.cache_bytes),
            test=test,
            checkpoint=checkpoint,
            passes=PASSES if self.budget else 1,
            progress=self.progress,
        )
        if self.budget:
            found, self.max_increase = search_target(search, self.budget, self.max_increase or 1e-2)
        else:
            found = search.run({site.down: self.max_increase for site in self._sites})
        search.end()
        for site in self._sites:
            found.tell(site, self._tried.minimum(site), self.max_increase)
        if test is not None:
            self.forwards = test.forwards
            logger.info(
                "the search ran the model on %d images; on all images its probes take %d",
                *self.forwards,
            )
        if all(len(found.keep[site.down]) == site.width for site in self._sites):
            logger.warning(
                "nothing is pruned: no width of any MLP keeps the entropy within %g nats of the "
                "dense model's; raise max_increase or steps",
                self.max_increase,
            )
        sites = {site.down: site for site in self._sites}
        widths = {mlp.down: mlp.width for mlp in self.mlps}
        widths |= {attention.down: attention.width for attention in self.attentions}
        return PruningPlan(
            {name: found.keep[name] for name in widths},
            widths,
            {name: found.probes[name] for name in widths},
            search.dense_entropy,
            {name: sites[name] for name in widths},
        )

    def _checkpoint(self) -> Checkpoint | None:
        if self.checkpoint is None:
            return None
        with observing(self.model, gradients=False):
            batches = stream(self.calibration, self.model, description="", progress=False)
            first = next(batches)
        names = ["max_increase", "steps", "rescore", "min_width", "round_to", "max_pruning_ratio"]
        names.append("error_probability")
        where = {} if self.runtime == EAGER else {"runtime": self.runtime}
        identity = {
            "model": model_digest(self.model),
            "importance": describe(self.importance),
            "objective": describe(self.objective),
            "target": None if self.budget is None else self.budget.target | where,
            # A run goes on with and without activation checkpointing, which changes no number.
            "compensation": describe(asdict(replace(self.recipe, activation_checkpointing=False))),
            "layers": [site.down for site in self._sites],
            "calibration": first_digest(first.tensors()),
            **{name: describe(getattr(self, name)) for name in names},
        }
        return Checkpoint(self.checkpoint / "search.safetensors", identity)
