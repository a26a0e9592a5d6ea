"""Run only what comes after the layer that a search cuts: the rest is what it was."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tp_amp.running.batches import stream
from tp_amp.running.distributed import RankError
from tp_amp.running.fingerprints import some_values
from tp_amp.running.inputs import Inputs, one_image
from tp_amp.running.restoring import Stop, evaluating, replaced_forward, seeded
from tp_amp.running.watching import all_tensors
from tp_amp.search.replaying import Kept, announced, giving, stored, telling
from tp_amp.structure.model_structure import ModelStructure, Site

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Prefix:
    """Keeps what the modules before a cut layer gave on every batch, and gives it again.

    The search cuts from the last block to the first, so what comes before the block at hand stays
    as it is from probe to probe. Where the blocks are a chain of modules, each run of the model
    starts at the block at hand; its attention, which runs before the MLP, is kept too. The results
    are the same bit for bit.

    Args:
        structure: what was read of the model that is searched.
        sites: what is cut.
        batches: of the search; the same ones in the same order each time, else all is run.
        limit: bytes that may be kept, in host memory. Beyond it, what earlier blocks gave is
            dropped, and computed when the search comes there; 0 keeps nothing.
    """

    def __init__(
        self, structure: ModelStructure, sites: Sequence[Site], batches: Iterable[Any], limit: int
    ) -> None:
        self.model, self.batches, self.limit = structure.model, batches, limit
        self.most = 0  # bytes that were kept at one time
        self.steps: list[str] = []
        if limit > 0:
            with self.passes() as passes:
                first = one_image(next(passes), 2)
            chain = structure.chain(first, [site.name for site in sites])
            # The model's own code reads all values of a step that gives several: it runs each time.
            several = [i for i, step in enumerate(chain[:-1]) if not step.plain]
            chain = chain[several[-1] + 1 :] if several else chain
            self.steps = [step.name for step in chain if step.name]
            self.reset()
            if several and len(chain) == 1:
                self._give_up("the blocks return more than a tensor", logging.INFO)
            elif self._read_elsewhere(sites, first):
                self._give_up("what blocks give is read at the model's end too", logging.WARNING)
        self.reset()

    def reset(self) -> None:
        """Forget everything, for a model that is another."""
        self._given: dict[str, list[Any]] = {}  # what steps gave, one entry for each batch
        self._inside: tuple[str, dict[str, list[Any]]] = ("", {})  # and modules of one step
        self._first: list[bytes] = []  # a few values of what the first step read

    def changed(self, site: Site) -> None:
        """A site was cut for good: what its step and those after it gave holds no longer."""
        for name in self.steps[self.place(site) or 0 :]:
            self._given.pop(name, None)
        self._inside = ("", {})

    def prepare(self, site: Site) -> None:
        """Keep what comes before a site that is not cut yet."""
        place = self.place(site)
        if place is None:
            return
        try:
            if place and self.steps[place - 1] not in self._given:
                self._collect(place)
            if self.steps and self._inside[0] != site.down:
                self._look_inside(site, place)
        except _OtherBatch:
            self._give_up("the batches are others each time", logging.WARNING)

    def run(self, site: Site, function: Callable[[], T], start: int = 0) -> T:
        """Call a function that runs the model, cut at `site`, on the batches from `start` on."""
        place = self.place(site)
        whole = place is None or self._inside[0] != site.down
        try:
            with nullcontext() if whole else self._replayed(place or 0, start):
                return function()
        except (_OtherBatch, RankError) as error:
            # Where one rank starts again, all do.
            if isinstance(error, RankError) and error.kinds != {_OtherBatch.__name__}:
                raise
            self._give_up("the batches are others each time", logging.WARNING)
            return function()

    def _read_elsewhere(self, sites: Sequence[Site], inputs: Inputs) -> bool:
        """Whether the model reads what a step gives other than by the next step."""
        place = max((self.place(site) or 0 for site in sites), default=0)
        if not place:
            return False
        name = self.steps[place - 1]
        given: list[Any] = []
        with torch.no_grad(), evaluating(self.model, trainable=False):
            with telling(self.model.get_submodule(name), given.append):
                output = inputs.call(self.model)
            self._given = {name: [stored(given[0])]}
            try:
                with seeded(0), self._replayed(place):
                    again = inputs.call(self.model)
            except ValueError:
                return True
        values, others = all_tensors(output), all_tensors(again)
        pairs = zip(values, others, strict=False)
        same = len(values) == len(others) > 0 and all(torch.equal(a, b) for a, b in pairs)
        return not same

    def place(self, site: Site) -> int | None:
        """The step that a site lies in, of `steps`; None where every probe runs the whole model."""
        name = f"{site.name}."
        return next((i for i, s in enumerate(self.steps) if name.startswith(f"{s}.")), None)

    def _give_up(self, reason: str, level: int) -> None:
        logger.log(level, "%s: every probe runs the whole model", reason)
        self.steps = []
        self.reset()

    @contextmanager
    def passes(self) -> Iterator[Iterator[Any]]:
        """The batches, with the model as the search's objective runs it."""
        with torch.no_grad(), evaluating(self.model, trainable=False):
            yield stream(self.batches, self.model, description="prefix", progress=False)

    def _collect(self, place: int) -> None:
        """Run all batches up to a step; keep what the steps before it give, the last that fit."""
        self._given, self._first = {name: [] for name in self.steps[:place]}, []
        self._size = 0  # bytes in them
        with self.passes() as passes, ExitStack() as stack:
            stack.enter_context(self._first_seen())
            for name in self.steps[:place]:
                keep = partial(self._keep, name)
                stack.enter_context(telling(self.model.get_submodule(name), keep))
            stack.enter_context(self._stopped(self.steps[place]))
            for inputs in passes:
                with suppress(Stop):
                    inputs.call(self.model)
        self.most = max(self.most, _bytes(self._given))
        last = self._given.get(self.steps[place - 1], [])
        if not last:
            self._give_up("what one block gives is above the limit", logging.INFO)

    def _keep(self, name: str, output: Any) -> None:
        if name not in self._given:  # it did not fit
            return
        self._given[name].append(stored(output))
        self._size += _bytes({name: self._given[name][-1:]})
        while self._given and self._size > self.limit:
            earliest = next(iter(self._given))
            self._size -= _bytes({earliest: self._given.pop(earliest)})

    def _look_inside(self, site: Site, place: int) -> None:
        """Keep what the modules of a step give that are done before the site's first layer runs."""
        self._inside = ("", {})  # of another block, where nothing was cut for good since
        block = self.model.get_submodule(self.steps[place])
        done: dict[str, list[Any]] = {}
        calls: dict[str, int] = {}
        started: list[bool] = []
        wanted: set[str] | None = None

        def keep(name: str, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            if not started and (wanted is None or name in wanted):
                done.setdefault(name, []).append(stored(output))

        names = [name for name, module in block.named_modules() if name and _is_large(module)]
        with self.passes() as passes, ExitStack() as stack:
            if not place:
                self._first = []
                stack.enter_context(self._first_seen())
            for name in names:
                stack.enter_context(telling(block.get_submodule(name), partial(keep, name)))
            for name in site.up:
                up = self.model.get_submodule(name)
                stack.enter_context(replaced_forward(up, announced(lambda _: started.append(True))))
            stack.enter_context(self._replayed(place))
            # The first batch runs to the end, to see which modules are called again.
            inputs = next(passes)
            inputs.call(self.model)
            once = {n for n in done if started and calls[n] == 1 and isinstance(done[n][0], Kept)}
            wanted = {n for n in once if not any(n.startswith(f"{other}.") for other in once)}
            done = {name: done[name] for name in wanted}
            for name in site.up:
                stack.enter_context(self._stopped(name))
            for inputs in passes if wanted else ():
                started.clear()
                with suppress(Stop):
                    inputs.call(self.model)
        if not wanted and not place:
            self._first = []  # of the first batch alone; nothing is given again
        whole = all(len(outputs) == len(self._first) for outputs in done.values())
        fits = _bytes(self._given) + _bytes(done) <= self.limit
        self._inside = (site.down, done if whole and fits else {})
        self.most = max(self.most, _bytes(self._given) + _bytes(self._inside[1]))

    def _stopped(self, name: str) -> Any:
        """A pass that ends where a module would run."""

        def stop(_: Any) -> None:
            raise Stop

        return replaced_forward(self.model.get_submodule(name), announced(stop))

    def _first_seen(self) -> Any:
        """Remember what the first step reads, to know the batches again."""
        first = self.model.get_submodule(self.steps[0])
        return replaced_forward(
            first, announced(lambda state: self._first.append(some_values(state)))
        )

    @contextmanager
    def _replayed(self, place: int, start: int = 0) -> Iterator[None]:
        """Let the modules before a site give what they gave, batch after batch."""
        modules = [self.model.get_submodule(name) for name in self.steps[: place + 1]]
        with ExitStack() as stack:
            for module in modules[: max(0, place - 1)]:
                stack.enter_context(
                    replaced_forward(module, lambda _: lambda state, *_a, **_k: state)
                )
            if place:
                outputs = self._given[self.steps[place - 1]]
                stack.enter_context(giving(modules[place - 1], outputs[start:]))
            for name, outputs in self._inside[1].items():
                stack.enter_context(giving(modules[place].get_submodule(name), outputs[start:]))
            if self._first:
                first = iter(self._first[start:])
                stack.enter_context(
                    replaced_forward(modules[0], announced(lambda x: _check(x, first)))
                )
            yield


class _OtherBatch(Exception):
    """A batch is not the one that was seen before."""


def _check(state: Tensor, first: Iterator[bytes]) -> None:
    if next(first, b"") != some_values(state):
        raise _OtherBatch


def _is_large(module: nn.Module) -> bool:
    """Whether a module holds a matrix, which makes it worth keeping what it gives."""
    return any(parameter.dim() > 1 for parameter in module.parameters())


def _bytes(kept: dict[str, list[Any]]) -> int:
    entries = (entry for outputs in kept.values() for entry in outputs)
    return sum(entry.values.nbytes for entry in entries if isinstance(entry, Kept))
