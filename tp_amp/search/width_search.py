"""AMP's search over all MLPs and attentions of a model, last to first, on the model as cut."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from tp_amp.compensation.recipe import apply
from tp_amp.plan.cutting import narrowed
from tp_amp.reports.numbers import Probe
from tp_amp.running.batches import bar
from tp_amp.running.checkpoint import Checkpoint
from tp_amp.running.distributed import check_same
from tp_amp.running.timing import Estimate, Stopwatch, check_estimate, tell_estimate
from tp_amp.search.bisection import accepted, search_width
from tp_amp.search.compensated_probes import Compensator, most_bytes
from tp_amp.search.prefix_cache import Prefix
from tp_amp.search.search_estimate import Profile, estimate_search, over_passes, profiled
from tp_amp.search.sequential_test import STORED, SequentialTest
from tp_amp.search.tried_widths import TriedWidths
from tp_amp.search.verdicts import Verdicts
from tp_amp.structure.model_structure import Site

logger = logging.getLogger(__name__)


class Found:
    """What a search found: kept channels or heads, and the probes, by `down`; and the orders."""

    def __init__(self) -> None:
        self.orders: dict[str, list[int]] = {}
        self.keep: dict[str, list[int]] = {}
        self.probes: dict[str, list[Probe]] = {}

    @property
    def widths(self) -> dict[str, int]:
        """How much is kept, by `down`."""
        return {name: len(kept) for name, kept in self.keep.items()}

    def best(self, widths: Mapping[str, int]) -> dict[str, list[int]]:
        """What is kept at other widths."""
        return {name: sorted(self.orders[name][:width]) for name, width in widths.items()}

    def tell(self, site: Site, smallest: int, max_increase: float) -> None:
        """Log what is kept of a site, or why all of it is.

        Args:
            site: one that was searched.
            smallest: the smallest width that was to be tried.
            max_increase: the allowed increase of the entropy (nats).
        """
        probes, kept = self.probes[site.down], len(self.keep[site.down])
        if accepted(probes) or kept < site.width:
            entropy = [f", entropy {p.entropy:.4f}" for p in probes if p.width == kept]
            values = site.down, kept, site.width, site.units, "".join(entropy[-1:])
            logger.info("%s: %d of %d %s%s", *values)
        else:
            logger.warning(
                "%s keeps all %d %s: of %d widths tried from %d up, none was within %g nats",
                site.down,
                site.width,
                site.units,
                len(probes),
                smallest,
                max_increase,
            )


class Accepted(NamedTuple):
    """The last accepted model: the name of its state, and its entropy (nats)."""

    state: str
    entropy: float


class Widths(NamedTuple):
    """The widths of a site to choose from: its order, the best first, and the widths before."""

    site: Site
    order: list[int]
    before: tuple[int, ...]

    def kept(self, width: int) -> list[int]:
        """What is kept at a width."""
        return sorted(self.order[:width])

    def state(self, width: int) -> str:
        """The name of the model as cut so far, and the site to a width."""
        return ",".join(map(str, (*self.before, width)))


class WidthSearch:
    """The search on one model, with entropies kept so that another tolerance costs less.

    Args:
        graph: the `tp.DependencyGraph`.
        sites: in the order of the search.
        rank: orders the channels or heads of some sites, the best first, on the model as it is.
        rescore: whether to rank each site again on the model as cut so far.
        entropy: of the model as it is (nats).
        tried: which widths may be tried.
        compensator: corrects a cut layer before it is judged.
        test: measures on as few images as verdicts need, in place of `entropy`.
        prefix: what comes before a site, kept from probe to probe.
        checkpoint: where rankings and entropies are kept, for a run that goes on after a kill.
        passes: how often it is run at most, with other tolerances, for the estimate.
        progress: show a progress bar on a terminal.
    """

    def __init__(
        self,
        graph: Any,
        sites: Sequence[Site],
        rank: Callable[[Sequence[Site]], dict[Site, list[int]]],
        entropy: Callable[[], float],
        *,
        rescore: bool,
        tried: TriedWidths,
        compensator: Compensator,
        test: SequentialTest | None,
        prefix: Prefix,
        checkpoint: Checkpoint | None,
        passes: int,
        progress: bool,
    ) -> None:
        self.graph, self.sites, self.rank, self.tried = graph, sites, rank, tried
        self.compensator, self.progress = compensator, progress
        self._entropy, self._test, self._rescore = entropy, test, rescore
        self.prefix, self._checkpoint = prefix, checkpoint
        # Entropies by widths, orders by site and the widths before: what a killed run goes on from.
        self._known: dict[str, float] = {}
        self._orders: dict[str, list[int]] = {}
        self._pending: list[tuple[Site, list[int]]] = []
        self._pruned = ExitStack()
        self._verdicts: Verdicts | None = None
        if checkpoint is not None:
            self._known = dict(checkpoint.facts)
            self._orders = {
                name: order.tolist()
                for name, order in checkpoint.tensors.items()
                if not name.startswith(STORED)
            }
        if not rescore and not self._orders:
            self._orders = self._ranked(sites)
            self._write()
        with profiled(self.graph.model, prefix.steps) as profile:
            timed = not self._is_known("")
            self.dense_entropy = self._measured("")
        self._profile: Profile | None = profile if timed else None
        self._watch = Stopwatch()
        self._made = dict.fromkeys(self.sites, 0.0)  # probes, or parts of them
        if not timed:
            logger.info("no estimate of the time: the dense entropy comes from the checkpoint")
        self._passes = 0
        one = self._estimate([tried.most_probes(site) for site in self.sites])
        if one is not None:
            tell_estimate("the search", over_passes(one, profile, passes))

    def run(self, max_increase: Mapping[str, float]) -> Found:
        """Find every width; whatever happens, the model is afterwards as it was.

        Args:
            max_increase: `down` -> allowed increase of the entropy (nats).
        """
        found, reference = Found(), Accepted("", self.dense_entropy)
        self._pending.clear()
        self.prefix.reset()
        self._verdicts = None if self._test is None else Verdicts(self._test)
        self._passes += 1
        with ExitStack() as self._pruned:
            steps = self.tried.steps
            every = range(len(self.sites) * steps)
            bars = bar(every, description="search", progress=self.progress)
            for site in self.sites:
                before = tuple(len(kept) for kept in found.keep.values())
                order = self._order(site, before)
                widths = Widths(site, order, before)
                probes = self._bisect(widths, reference, max_increase[site.down], bars.update)
                # Fewer widths may be left to try.
                bars.update(max(0, steps - len(probes)))
                best = accepted(probes)
                kept = widths.kept(best.width) if best else list(range(site.width))
                if best:
                    reference = Accepted(widths.state(best.width), best.entropy)
                    self._pending.append((site, kept))
                found.keep[site.down], found.probes[site.down] = kept, probes
                found.orders[site.down] = order
            bars.close()
        self.prefix.reset()
        return found

    def end(self) -> None:
        """All passes are done: log what they took beside what was foreseen for their probes."""
        # Fewer probes than foreseen are made where some are known, or a sequential test is certain.
        needed = self._estimate([self._made[site] / self._passes for site in self.sites])
        if needed is not None:
            needed = replace(needed, seconds=needed.seconds * self._passes)
            size = self.prefix.most + most_bytes(self.compensator.recipe, self.sites)
            check_estimate("the search", needed, Estimate(self._watch.seconds, size))

    def _bisect(
        self, widths: Widths, reference: Accepted, max_increase: float, advance: Callable[[], Any]
    ) -> list[Probe]:
        """Find the width of one site."""
        site = widths.site
        if self._verdicts is not None:
            step = max(self.tried.step(site), site.width / 2**self.tried.steps)
            self._verdicts.begin(*reference, max_increase, site.width, step)

        def entropy(width: int) -> float:
            advance()
            return self._probe(widths, width)

        return search_width(
            entropy,
            site.width,
            reference=reference.entropy,
            max_increase=max_increase,
            steps=self.tried.steps,
            minimum=self.tried.minimum(site),
            round_to=self.tried.step(site),
            first=self.tried.first(site, max_increase),
        )

    def _estimate(self, probes: Sequence[float]) -> Estimate | None:
        """What one pass takes, with some probes of each site; None if no pass was timed."""
        if self._profile is None:
            return None
        places = [self.prefix.place(site) for site in self.sites]
        found = estimate_search(self._profile, places, probes, self.prefix.limit)
        return Estimate(
            found.seconds + self.compensator.seconds(self.sites, probes),
            found.bytes + most_bytes(self.compensator.recipe, self.sites),
        )

    def judge(self, keep: Mapping[str, Sequence[int]]) -> float:
        """The entropy of the model cut to `keep`, which no pass has tried."""
        state = f"whole {[len(keep[site.down]) for site in self.sites]}"
        with ExitStack() as stack:
            if not self._is_known(state):
                for site in self.sites:
                    if len(keep[site.down]) < site.width:
                        self._cut(stack, site, list(keep[site.down]))
            return self._measured(state)

    def _probe(self, widths: Widths, width: int) -> float:
        """The entropy with a site cut, on the model as cut so far."""
        state, verdicts = widths.state(width), self._verdicts
        if self._test is None or verdicts is None:
            if state not in self._known:
                with self._watch, self._as_cut(widths, width):
                    self.prefix.run(widths.site, lambda: self._measured(state))
                self._made[widths.site] += 1
            return self._known[state]
        while (value := verdicts.judge(state, width)) is None:
            wanted = verdicts.wanted(state)
            start = self._test.measured(wanted)
            cut = width if wanted == state else widths.site.width
            with self._watch, self._as_cut(widths, cut):
                self.prefix.run(widths.site, lambda: verdicts.measure(state, width), start)
            batches = self._test.measured(wanted) - start
            self._made[widths.site] += batches / len(self._test.sizes())
            self._write()
        return value

    @contextmanager
    def _as_cut(self, widths: Widths, width: int) -> Iterator[None]:
        """The model as cut so far, and one more site cut, unless all its width is left."""
        self._settle()
        self.prefix.prepare(widths.site)
        with ExitStack() as stack:
            if width < widths.site.width:
                self._cut(stack, widths.site, widths.kept(width))
            yield

    def _settle(self) -> None:
        """Cut what was accepted; not before it matters, for all that follows may be known."""
        for site, kept in self._pending:
            self._cut(self._pruned, site, kept)
            self.prefix.changed(site)
        self._pending.clear()

    def _measured(self, state: str) -> float:
        """The entropy of the model as it is, which `state` names."""
        if self._test is not None:
            if not self._test.complete(state):
                self._test.measure(state)
                self._write()
            return self._test.mean(state)
        if state not in self._known:
            self._known[state] = self._entropy()
            self._write()
        return self._known[state]

    def _is_known(self, state: str) -> bool:
        return state in self._known if self._test is None else self._test.complete(state)

    def _order(self, site: Site, before: tuple[int, ...]) -> list[int]:
        if not self._rescore:
            return self._orders[site.down]
        name = ",".join([site.down, *map(str, before)])
        if name not in self._orders:
            self._settle()
            self._orders[name] = self._ranked([site])[site.down]
            self._write()
        return self._orders[name]

    def _ranked(self, sites: Sequence[Site]) -> dict[str, list[int]]:
        orders = {site.down: order for site, order in self.rank(sites).items()}
        advice = "collect under the process group, or all-reduce the gradients that it reads"
        check_same("the importance's rankings", orders, advice)
        return orders

    def _write(self) -> None:
        if self._checkpoint is not None:
            orders = {name: torch.tensor(order) for name, order in self._orders.items()}
            values = self._test.stored if self._test is not None else {}
            self._checkpoint.write({**orders, **values}, self._known)

    def _cut(self, stack: ExitStack, site: Site, kept: list[int]) -> None:
        correction = self.compensator.correction(site, kept)
        stack.enter_context(narrowed(self.graph, {site: kept}))
        if correction is not None:
            apply(self.graph.model.get_submodule(site.down), correction, site.first)
