"""Mistakes in calls from Python: each is told before an image is read, and the model unchanged."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from torch import Tensor, nn
from toys import fingerprint, images, toy

import tp_amp

DOWN = "blocks.1.mlp.second"
RANDOM = {"params": 0.8}


class Loader:
    """Batches, and how many of them were read."""

    def __init__(self, batches: list[Any] | None = None) -> None:
        self.batches = list(images(8).split(4)) if batches is None else batches
        self.read = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.read += 1
            yield batch

    def __len__(self) -> int:
        return len(self.batches)


class Place(NamedTuple):
    """What a call may use."""

    model: nn.Module
    loader: Loader
    folder: Path

    x = images(1)

    def plan_for(self, target: Any = RANDOM, importance: Any = None, **options: Any) -> Any:
        scored = importance or tp_amp.ReconstructionImportance(data=self.loader)
        return tp_amp.plan_for_target(self.model, self.x, scored, target, **options)

    def pruner(self, importance: Any = None, calibration: Any = None, **options: Any) -> Any:
        scored = importance or tp_amp.DIMAPImportance()
        batches = self.loader if calibration is None else calibration
        return tp_amp.AdaptiveMLPPruner(self.model, self.x, scored, batches, **options)

    def ranked(self, widths: Any, importance: Any = None) -> Any:
        scored = importance or tp_amp.DIMAPImportance()
        return tp_amp.plan_from_importance(self.model, self.x, scored, widths)

    def compensated(self, plan: Any = None, **options: Any) -> Any:
        known = tp_amp.PruningPlan({DOWN: [0, 1]}) if plan is None else plan
        return tp_amp.compensate(self.model, known, self.loader, **options)

    def compared(self, importances: Any = None, **options: Any) -> Any:
        scored = [tp_amp.DIMAPImportance()] if importances is None else importances
        return tp_amp.compare(self.model, self.x, scored, self.loader, **options)

    def distilled(self, **options: Any) -> Any:
        return tp_amp.distill(self.model, copy.deepcopy(self.model), self.loader, **options)

    def applied(self, keep: Any) -> Any:
        return tp_amp.apply_plan(self.model, tp_amp.PruningPlan(keep), self.x)

    def other_plan(self) -> tp_amp.PruningPlan:
        """A plan that knows its layers, of a wider model."""
        with torch.random.fork_rng():
            model = toy(hidden=24)
        return tp_amp.plan_from_importance(model, self.x, tp_amp.DIMAPImportance(), 0.5)


class Named(nn.Module):
    """Takes images by name, as models of transformers do, or a mask behind them, as timm's ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 4, 4)

    def forward(self, pixel_values: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens = self.embed(pixel_values).flatten(2)
        return tokens if mask is None else tokens.masked_fill(mask, 0)


NAMED = Named()
PERCEPTRON = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.GELU(), nn.Linear(12, 5))
Call = Callable[[Place], Any]
# What is called, the error, and what its message says.
MISTAKES: dict[str, tuple[Call, type[Exception], str]] = {
    # What is no dict, text, measurement or sequence.
    "numbers of heads for no module": (
        lambda p: tp_amp.find_attentions(p.model, p.x, num_heads=3),
        TypeError,
        r"num_heads must be a dict from modules to their numbers of heads, found a int",
    ),
    "a plan of a dict": (
        lambda p: tp_amp.PruningPlan.from_json({}),
        TypeError,
        r"a plan is read from the text of its file, found a dict",
    ),
    "a report of numbers": (
        lambda p: tp_amp.PruningPlan({}).report(1, 2),
        TypeError,
        r"before must be what tp_amp\.measure returns, found a int",
    ),
    "one batch size": (
        lambda p: tp_amp.measure(p.model, p.loader, batch_sizes=8),
        TypeError,
        r"batch_sizes must be some sizes, such as \(1, 8\), found 8",
    ),
    # A size to prune to.
    "target of an unknown kind": (
        lambda p: p.plan_for({"flops": 0.7}),
        ValueError,
        r"target must name one of \('params', 'macs', 'latency'\), found \{'flops': 0\.7\}",
    ),
    "target is a number": (
        lambda p: p.plan_for(0.7),
        TypeError,
        r'target must be a dict such as \{"params": 0\.6\}, found 0\.7',
    ),
    "target is a text": (
        lambda p: p.plan_for({"params": "0.7"}),
        ValueError,
        r"target must be a positive number, found \{'params': '0\.7'\}",
    ),
    "target of nothing": (lambda p: p.plan_for({"params": 0}), ValueError, r"positive number"),
    "target below zero": (lambda p: p.plan_for({"macs": -1}), ValueError, r"positive number"),
    "target is NaN": (lambda p: p.plan_for({"macs": math.nan}), ValueError, r"positive number"),
    "target is true": (lambda p: p.plan_for({"macs": True}), ValueError, r"positive number"),
    "two targets": (lambda p: p.plan_for({"params": 0.7, "macs": 0.7}), ValueError, r"name one of"),
    "no target": (lambda p: p.plan_for({}), ValueError, r"target must name one of"),
    "target out of reach": (
        lambda p: p.plan_for({"params": 0.01}),
        ValueError,
        r"can't be met: reachable are .* to 2661, fractions 0\.\d+ to 1",
    ),
    "target above the model": (lambda p: p.plan_for({"params": 1e9}), ValueError, r"can't be met"),
    "searched target of an unknown kind": (
        lambda p: p.pruner(target={"speed": 2}),
        ValueError,
        r"target must name one of",
    ),
    "searched target is a number": (lambda p: p.pruner(target=0.5), TypeError, r"must be a dict"),
    "searched target above the model": (
        lambda p: p.pruner(target={"params": 2e9}),
        ValueError,
        r"the target of 2e\+09 params can't be met: reachable are .* to 2661",
    ),
    "searched target out of reach": (
        lambda p: p.pruner(target={"params": 0.001}),
        ValueError,
        r"can't be met: reachable are .*, fractions 0\.\d+ to 1",
    ),
    # Widths.
    "round_to of zero": (
        lambda p: p.plan_for(round_to=0),
        ValueError,
        r"round_to must be an integer of at least 1, found 0",
    ),
    "round_to with a fraction": (lambda p: p.plan_for(round_to=2.5), ValueError, r"found 2\.5"),
    "round_to is a text": (lambda p: p.plan_for(round_to="8"), ValueError, r"found '8'"),
    "round_to above all widths": (
        lambda p: p.plan_for(round_to=64),
        ValueError,
        r"with round_to=64 the smallest width is 64, so that 2 of 2 MLPs stay whole: .*\(20\).*; "
        "nothing could be pruned, take less",
    ),
    "searched round_to above all widths": (
        lambda p: p.pruner(round_to=64),
        ValueError,
        r"with round_to=64 the smallest width is 64",
    ),
    "min_width above all widths": (
        lambda p: p.pruner(min_width=3, round_to=20),
        ValueError,
        r"with round_to=20 and min_width=3 the smallest width is 20, so that 2 of 2 MLPs stay",
    ),
    "min_width is true": (lambda p: p.pruner(min_width=True), ValueError, r"min_width must be an"),
    "widths are a text": (lambda p: p.ranked("0.5"), ValueError, r"or a dict of widths, found '0"),
    "widths of nothing": (lambda p: p.ranked(0.0), ValueError, r"a fraction above 0, 1 at most"),
    "widths above all": (lambda p: p.ranked(1.5), ValueError, r"widths must be a fraction above 0"),
    "widths in a list": (lambda p: p.ranked([0.5, 0.5]), ValueError, r"or a dict of widths"),
    "a width with a fraction": (
        lambda p: p.ranked({DOWN: 0.5}),
        ValueError,
        rf"the width of {DOWN} must be a whole number, found 0\.5",
    ),
    "a width below nothing": (
        lambda p: p.ranked({DOWN: -1}),
        ValueError,
        r"can't keep -1 channels",
    ),
    "a width above the layer's": (lambda p: p.ranked({DOWN: 21}), ValueError, r"which has 20"),
    "widths of no layer": (lambda p: p.ranked({"mlp": 3}), ValueError, r"mlp is neither an MLP of"),
    "widths by modules": (
        lambda p: p.ranked({p.model.get_submodule(DOWN): 3}),
        TypeError,
        r"widths are named by the module path of each down layer, found Linear",
    ),
    "a ratio of nothing": (
        lambda p: tp_amp.mlp_ratio_widths(p.model, p.x, 0),
        ValueError,
        r"ratio must be a number above 0, found 0",
    ),
    "a ratio above the layer's": (
        lambda p: tp_amp.mlp_ratio_widths(p.model, p.x, 4),
        ValueError,
        r"pass a ratio above 0, up to 1\.66667",
    ),
    "ratios of a number": (
        lambda p: tp_amp.pruning_ratio_dict(p.model, p.x, 0.5),  # type: ignore[arg-type]
        TypeError,
        r"widths must be a dict of module paths and numbers, found 0\.5",
    ),
    # Importances.
    "an importance not made": (
        lambda p: p.plan_for(importance=tp_amp.ReconstructionImportance),
        TypeError,
        r"the importance is the class ReconstructionImportance; make one of it: Reconstruction",
    ),
    "an importance that foresees nothing": (
        lambda p: p.plan_for(importance=tp_amp.GramSchmidtImportance()),
        TypeError,
        r"foreseen errors of a ReconstructionImportance, found GramSchmidtImportance; Adaptive",
    ),
    "an importance by name": (lambda p: p.ranked(0.5, "taylor"), TypeError, r"found 'taylor'"),
    "a searched importance not made": (
        lambda p: p.pruner(tp_amp.DIMAPImportance),
        TypeError,
        r"make one of it: DIMAPImportance\(\.\.\.\)",
    ),
    "an importance without data": (
        lambda p: p.plan_for(importance=tp_amp.ReconstructionImportance()),
        ValueError,
        r"the importance has not seen .*; call importance\.collect",
    ),
    "a temperature of nothing": (
        lambda p: tp_amp.EntropyTaylorImportance(temperature=0),
        ValueError,
        r"temperature must be positive, found 0",
    ),
    "a temperature in words": (
        lambda p: tp_amp.EntropyTaylorImportance(temperature="warm"),  # type: ignore[arg-type]
        ValueError,
        r"temperature must be positive, found 'warm'",
    ),
    "an unknown objective": (
        lambda p: tp_amp.EntropyTaylorImportance("accuracy"),
        ValueError,
        r"objective must be 'auto', 'prediction', 'similarity' or a callable, found 'accuracy'",
    ),
    "scores of unknown layers": (
        lambda p: tp_amp.EntropyTaylorImportance().collect(p.model, p.loader, layers=["mlp"]),
        ValueError,
        r"\['mlp'\] are no Linears or convolutions of the model",
    ),
    "scores of one layer": (
        lambda p: tp_amp.EntropyTaylorImportance().collect(p.model, p.loader, layers=DOWN),
        TypeError,
        rf"layers must be a list of module paths, found '{DOWN}'",
    ),
    "scores of no layer": (
        lambda p: tp_amp.ReconstructionImportance().collect(p.model, p.loader, layers=[]),
        ValueError,
        r"layers names no layer; leave it out to take all",
    ),
    "moments of a norm": (
        lambda p: tp_amp.ReconstructionImportance().collect(p.model, p.loader, layers=["norm"]),
        ValueError,
        r"\['norm'\] are no Linears or 1x1 convolutions",
    ),
    "data of one tensor": (
        lambda p: tp_amp.ReconstructionImportance(data=images(8)),
        TypeError,
        r"found one tensor of shape \(8, 1, 8, 8\); pass \[images\] or images\.split\(64\)",
    ),
    "data read once": (
        lambda p: tp_amp.ReconstructionImportance(data=iter(p.loader)),
        TypeError,
        r"found a one-shot generator; pass a DataLoader or a list",
    ),
    "a sparsity of all": (
        lambda p: tp_amp.dimap_masks(p.model, 1.0),
        ValueError,
        r"sparsity must be a share from 0 up to below 1, found 1\.0",
    ),
    "a share in words": (
        lambda p: tp_amp.dimap_scopes(p.model, "half", 0.5),  # type: ignore[arg-type]
        ValueError,
        r"attention must be a share from 0 up to below 1, found 'half'",
    ),
    # The search.
    "no step": (lambda p: p.pruner(steps=0), ValueError, r"steps must be an integer of at least 1"),
    "an increase below zero": (lambda p: p.pruner(max_increase=-1), ValueError, r"zero or more"),
    "an increase in words": (lambda p: p.pruner(max_increase="0.1"), ValueError, r"found '0\.1'"),
    "an error too probable": (
        lambda p: p.pruner(error_probability=0.5),
        ValueError,
        r"error_probability must be a number between 0 and 0\.5, found 0\.5",
    ),
    "a cache below zero": (lambda p: p.pruner(cache_bytes=-1), ValueError, r"cache_bytes must be"),
    "rescore in words": (lambda p: p.pruner(rescore="no"), TypeError, r"must be True or False"),
    "an unknown compensation": (
        lambda p: p.pruner(compensation="linear"),
        ValueError,
        r"compensation must be one of \('none', 'mean', 'affine'\), found 'linear'",
    ),
    "calibration of one tensor": (
        lambda p: p.pruner(calibration=images(8)),
        TypeError,
        r"found one tensor",
    ),
    "calibration of a folder": (
        lambda p: p.pruner(calibration="photos"),
        TypeError,
        r"an iterable of batches, found 'photos'; pass a DataLoader or a list of batches",
    ),
    "calibration of a dict": (
        lambda p: p.pruner(calibration={"x": images(8)}),
        TypeError,
        r"an iterable of batches, found one dict with the keys \['x'\]; pass \[batch\]",
    ),
    "data of a folder": (
        lambda p: tp_amp.ReconstructionImportance(data="photos"),
        TypeError,
        r"an iterable of batches, found 'photos'",
    ),
    "data at a path": (
        lambda p: tp_amp.EntropyTaylorImportance(data=p.folder),
        TypeError,
        r"an iterable of batches, found .*Path",
    ),
    "one batch in a dict": (
        lambda p: tp_amp.compensate(p.model, tp_amp.PruningPlan({DOWN: [0]}), {"x": images(8)}),
        TypeError,
        r"found one dict with the keys \['x'\]",
    ),
    "calibration read once": (
        lambda p: p.pruner(calibration=iter(p.loader)),
        TypeError,
        r"one-shot generator",
    ),
    "images for two": (
        lambda p: p.pruner(tp_amp.EntropyTaylorImportance(data=p.loader)),
        ValueError,
        r"scores on the calibration batches; pass other images",
    ),
    "ignored path of nothing": (
        lambda p: p.pruner(ignored_layers=["block.0"]),
        ValueError,
        r"ignored_layers: 'block\.0' matches no module of ToyViT; near are blocks\.0",
    ),
    "only a number": (
        lambda p: p.plan_for(only_layers=3),
        TypeError,
        r"only_layers must be a list",
    ),
    "ignored module of another model": (
        lambda p: p.plan_for(ignored_layers=[toy().blocks[0]]),
        ValueError,
        r"ignored_layers holds a Block that is no part of the model",
    ),
    # Plans, and what is rebuilt.
    "a plan in a dict": (
        lambda p: p.compensated({DOWN: [0]}),
        TypeError,
        r"the plan must be a PruningPlan, found a dict; make one of it",
    ),
    "a plan of another model": (
        lambda p: p.compensated(p.other_plan()),
        ValueError,
        r"has 20 input channels, the dense model had 24",
    ),
    "an unknown method": (lambda p: p.compensated(method="ridge"), ValueError, r"must be one of"),
    "a ridge below zero": (lambda p: p.compensated(ridge=-1), ValueError, r"ridge must be zero or"),
    "a ridge in words": (lambda p: p.compensated(ridge="small"), ValueError, r"found 'small'"),
    "passes with a fraction": (
        lambda p: p.compensated(every_linear=True, refine=0.5),
        ValueError,
        r"refine must be an integer of at least 0, found 0\.5",
    ),
    "refining a few layers": (
        lambda p: p.compensated(refine=3),
        ValueError,
        r"refine=3 goes on from every Linear solved for; pass every_linear=True",
    ),
    "every linear in words": (
        lambda p: p.compensated(every_linear="False"),
        TypeError,
        r"every_linear must be True or False, found 'False'",
    ),
    "weights of no tokens": (
        lambda p: p.compensated(token_weights=torch.ones(4)),
        ValueError,
        r'token_weights must be "sensitivity", a callable or None',
    ),
    "a plan of fractions": (
        lambda p: p.applied({DOWN: [0.5, 1.0]}),
        TypeError,
        rf"the plan must keep a list of whole numbers of {DOWN}, found \[0\.5, 1\.0\]",
    ),
    "a plan of a list": (
        lambda p: tp_amp.PruningPlan(["a"]),  # type: ignore[arg-type]
        TypeError,
        r"a plan keeps a dict of module paths and lists of whole numbers, found a list",
    ),
    "a plan of nothing": (
        lambda p: tp_amp.PruningPlan(None),  # type: ignore[arg-type]
        TypeError,
        r"found a NoneType",
    ),
    "a plan of a width": (lambda p: p.applied({DOWN: 10}), TypeError, r"list of whole numbers"),
    "a plan of a channel twice": (lambda p: p.applied({DOWN: [0, 0]}), ValueError, r"be distinct"),
    "a plan beyond the layer": (lambda p: p.applied({DOWN: [20]}), ValueError, r"within 0\.\.19"),
    "no plan": (
        lambda p: tp_amp.apply_plan(p.model, p.x),  # type: ignore[call-overload]
        TypeError,
        r"takes a model, a PruningPlan and maybe example inputs, found \['Tensor'\]",
    ),
    # Example inputs.
    "example inputs of a loader": (
        lambda p: tp_amp.find_mlps(p.model, p.loader),
        TypeError,
        r"example inputs must be a tensor .*, found a Loader; pass one batch of images",
    ),
    "no example inputs": (lambda p: tp_amp.inspect(p.model, None), TypeError, r"found a NoneType"),
    "example inputs of an array": (
        lambda p: tp_amp.inspect(p.model, p.x.numpy()),
        TypeError,
        r"found a ndarray",
    ),
    "whole numbers": (
        lambda p: tp_amp.inspect(p.model, torch.zeros(1, 1, 8, 8, dtype=torch.uint8)),
        ValueError,
        r"the images are uint8; pass images\.float\(\) / 255, normalised",
    ),
    "another dtype": (
        lambda p: tp_amp.inspect(p.model, p.x.double()),
        ValueError,
        r"the inputs are float64; pass inputs\.to\(torch\.float32\)",
    ),
    "channels last": (
        lambda p: tp_amp.inspect(p.model, p.x.permute(0, 2, 3, 1)),
        ValueError,
        r"have their channels last; pass images\.permute\(0, 3, 1, 2\)",
    ),
    "one image": (
        lambda p: tp_amp.inspect(toy(), p.x[0].expand(3, 8, 8)),
        ValueError,
        r"an image stands without a batch; pass images\[None\]",
    ),
    "one image by name": (
        lambda p: tp_amp.inspect(NAMED, {"pixel_values": p.x[0].expand(3, 8, 8)}),
        ValueError,
        r"an image stands without a batch; pass images\[None\]",
    ),
    "labels beside the images": (
        lambda p: tp_amp.inspect(NAMED, (images(4), torch.arange(4))),
        ValueError,
        r"what stands behind the images are labels; pass the images alone",
    ),
    "labels for images": (
        lambda p: tp_amp.inspect(p.model, torch.arange(4)),
        ValueError,
        r"int64 numbers in one row are labels, no images",
    ),
    "a mask for indices": (
        lambda p: p.applied({DOWN: [True, False]}),
        TypeError,
        rf"whole numbers of {DOWN}, found truth values; pass the places where the mask is true",
    ),
    "heads of a model that shows none": (
        lambda p: tp_amp.AdaptiveMLPPruner(
            PERCEPTRON, p.x, tp_amp.DIMAPImportance(), p.loader, prune_num_heads=True
        ),
        ValueError,
        r"no attention was found in Sequential; num_heads=\{layer: heads\} tells the Linears",
    ),
    "a dict for a tensor": (
        lambda p: tp_amp.inspect(p.model, {"pixel_values": p.x}),
        ValueError,
        r"its forward takes \(x.*\).*, found the keys \['pixel_values'\]",
    ),
    "no image at all": (
        lambda p: tp_amp.find_mlps(p.model, p.x[:0]),
        ValueError,
        r"example inputs hold no images, found shape \(0, 1, 8, 8\); pass one image",
    ),
    "a list in a list": (
        lambda p: tp_amp.find_mlps(p.model, [[p.x]]),
        ValueError,
        r"inputs without a tensor \(list\): [\s\S]*; pass a tensor of images, or a tuple or a dict",
    ),
    "a text in a tuple": (
        lambda p: tp_amp.inspect(p.model, ("x",)),
        ValueError,
        r"inputs without a tensor \(str\): [\s\S]*; pass a tensor of images",
    ),
    "nothing in a tuple": (
        lambda p: tp_amp.inspect(p.model, (None,)),
        ValueError,
        r"inputs without a tensor \(NoneType\)",
    ),
    "nothing under a key": (
        lambda p: tp_amp.inspect(p.model, {"x": None}),
        ValueError,
        r"inputs without a tensor \(x: NoneType\)",
    ),
    "a list under a key": (
        lambda p: tp_amp.inspect(p.model, {"x": [p.x]}),
        ValueError,
        r"inputs without a tensor \(x: list\)",
    ),
    "labels too": (
        lambda p: tp_amp.inspect(p.model, (p.x, torch.zeros(1))),
        ValueError,
        r"its forward takes \(x.*\).*, found 2 inputs; labels are none of them",
    ),
    # What is measured and taught.
    "one importance to compare": (
        lambda p: p.compared(tp_amp.DIMAPImportance()),
        TypeError,
        r"importances must be a list, or a dict by name, found one DIMAPImportance",
    ),
    "nothing to compare": (lambda p: p.compared([]), ValueError, r"at least one importance and"),
    "one fraction": (lambda p: p.compared(fractions=0.5), TypeError, r"fractions must be a list"),
    "a fraction of nothing": (lambda p: p.compared(fractions=[0]), ValueError, r"above 0, 1 at"),
    "a metric by name": (lambda p: p.compared(metric="top1"), TypeError, r"metric must take a mo"),
    "a comparison compensated in words": (
        lambda p: p.compared(compensation="full"),
        ValueError,
        r"compensation must be one of",
    ),
    "no repeats": (
        lambda p: tp_amp.measure(p.model, p.loader, repeats=0),
        ValueError,
        r"repeats must be an integer of at least 1",
    ),
    "a share of images in words": (
        lambda p: tp_amp.split_batches(p.loader, "half"),  # type: ignore[arg-type]
        ValueError,
        r"calibration must be a share between 0 and 1, found 'half'",
    ),
    "no epoch": (lambda p: p.distilled(epochs=0), ValueError, r"epochs must be an integer of at"),
    "a rate in words": (lambda p: p.distilled(learning_rate="1e-4"), ValueError, r"found '1e-4'"),
    "weights of a number": (
        lambda p: p.distilled(weights=1.0),
        TypeError,
        r"weights must be a dict",
    ),
    "one weight decay": (
        lambda p: p.distilled(weight_decay=0.1),
        TypeError,
        r"must be two numbers",
    ),
    "a student as its own teacher": (
        lambda p: tp_amp.distill(p.model, p.model, [p.x]),
        ValueError,
        r"student and teacher share parameters",
    ),
    # Folders.
    "a library that is unknown": (
        lambda p: tp_amp.save_pruned(p.model, p.folder, p.other_plan(), library="keras"),
        ValueError,
        r"library must be one of",
    ),
    "no plan to save": (
        lambda p: tp_amp.save_pruned(p.model, p.folder, {DOWN: [0]}),  # type: ignore[arg-type]
        TypeError,
        r"the plan must be a PruningPlan, found a dict",
    ),
    "a file for a folder": (
        lambda p: tp_amp.save_pruned(p.model, p.folder / "file", p.other_plan()),
        ValueError,
        r"file is a file; name a folder",
    ),
    "an empty folder": (
        lambda p: tp_amp.load_pruned(p.model, p.folder / "nothing"),
        ValueError,
        r"holds no plan\.json; it is no folder of save_pruned",
    ),
}


def test_there_are_enough() -> None:
    assert len(MISTAKES) >= 60


@pytest.mark.parametrize(("call", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_before_an_image_is_read_and_changes_nothing(
    call: Call, error: type[Exception], message: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    place = Place(toy(), Loader(), tmp_path)
    before = fingerprint(place.model)
    with pytest.raises(error, match=message):
        call(place)
    assert place.loader.read == 0
    assert fingerprint(place.model) == before


# Only a batch can tell these; no more than the first is read.
BATCHES: dict[str, tuple[list[Any], type[Exception], str]] = {
    "no batch": ([], ValueError, r"no batch"),
    "whole numbers": (
        [torch.zeros(2, 1, 8, 8, dtype=torch.uint8)] * 3,
        ValueError,
        r"the images are uint8; pass images\.float\(\) / 255",
    ),
    "channels last": (
        [images(4).permute(0, 2, 3, 1)] * 3,
        ValueError,
        r"have their channels last",
    ),
    "texts": (["a.png", "b.png"], TypeError, r"a batch is a str without image tensors"),
    "no images": ([images(4)[:0]] * 3, ValueError, r"a batch holds no images"),
    "keys that the model does not take": (
        [{"pixel_values": images(4)}] * 3,
        ValueError,
        r"found the keys \['pixel_values'\]",
    ),
}


@pytest.mark.parametrize(("batches", "error", "message"), BATCHES.values(), ids=BATCHES)
def test_batches_of_another_kind_are_told_by_the_first(
    batches: list[Any], error: type[Exception], message: str
) -> None:
    model, before = toy(), fingerprint(toy())
    plan = tp_amp.plan_from_importance(model, images(1), tp_amp.DIMAPImportance(), 0.5)
    calls: list[Callable[[Loader], Any]] = [
        lambda loader: tp_amp.EntropyTaylorImportance().collect(model, loader, progress=False),
        lambda loader: tp_amp.ReconstructionImportance().collect(model, loader, progress=False),
        lambda loader: tp_amp.measure(model, loader, progress=False),
    ]
    for call in calls:
        loader = Loader(batches)
        with pytest.raises(error, match=message):
            call(loader)
        assert loader.read <= 1
    loader = Loader(batches)
    with pytest.raises(error, match=message.replace("no batch", "no batches")):
        tp_amp.compensate(model, plan, loader, progress=False)
    assert {**fingerprint(model), "objects": 0} == {**before, "objects": 0}


def test_widths_of_a_part_that_stays_whole_are_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = toy()
    wide: Any = model.get_submodule("blocks.1.mlp")
    wide.first, wide.second = nn.Linear(12, 80), nn.Linear(80, 12)
    data: list[Tensor] = [images(8)]
    importance = tp_amp.ReconstructionImportance(data=data)
    plan = tp_amp.plan_for_target(model, images(1), importance, {"params": 0.9}, round_to=32)
    assert plan.widths["blocks.0.mlp.second"] == 20
    told = "with round_to=32 the smallest width is 32, so that 1 of 2 MLPs stay whole: blocks.0"
    assert sum(told in message for message in caplog.messages) == 1


# Of a model with one attention, what an attention can't have.
HEADS: dict[str, tuple[Callable[[nn.Module], Any], type[Exception], str]] = {
    "a list": (lambda m: [3], TypeError, r"must be a dict from modules .*, found a list"),
    "a path": (
        lambda m: {"blocks.0.attn": 3},
        ValueError,
        r"num_heads names (the text 'blocks\.0\.attn'|a str) that is no module of this Vis.*; take",
    ),
    "of another model": (lambda m: {nn.Linear(2, 2): 3}, ValueError, r"names a Linear that is no"),
    "none": (
        lambda m: {m.get_submodule("blocks.0.attn"): 0},
        ValueError,
        r"num_heads\[blocks\.0\.attn\] must be a positive integer, found 0",
    ),
    "a float": (
        lambda m: {m.get_submodule("blocks.0.attn"): 3.0},
        ValueError,
        r"must be a positive integer, found 3\.0",
    ),
    "what does not divide": (
        lambda m: {m.get_submodule("blocks.0.attn"): 5},
        ValueError,
        r"num_heads\[blocks\.0\.attn\] is 5, which divides none of the channels \[24, 72\] of",
    ),
}


@pytest.mark.parametrize(("told", "error", "message"), HEADS.values(), ids=HEADS)
def test_numbers_of_heads_are_checked_by_all_that_take_them(
    told: Callable[[nn.Module], Any], error: type[Exception], message: str
) -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=24, num_heads=2, num_classes=4
    ).eval()
    x, loader = torch.zeros(1, 3, 32, 32), Loader([torch.zeros(4, 3, 32, 32)])
    heads = told(model)
    before = fingerprint(model)
    scores = tp_amp.DIMAPImportance()
    errors = tp_amp.ReconstructionImportance(data=loader)
    calls: dict[str, Callable[[], Any]] = {
        "find": lambda: tp_amp.find_attentions(model, x, num_heads=heads),
        "inspect": lambda: tp_amp.inspect(model, x, num_heads=heads),
        "rank": lambda: tp_amp.plan_from_importance(model, x, scores, 0.5, num_heads=heads),
        "search": lambda: tp_amp.AdaptiveMLPPruner(model, x, scores, loader, num_heads=heads),
        "target": lambda: tp_amp.plan_for_target(model, x, errors, RANDOM, num_heads=heads),
        "rotate": lambda: tp_amp.rotate_heads(model, x, loader, num_heads=heads),
    }
    for name, call in calls.items():
        if "divides" in message and name in ("find", "inspect"):
            continue  # they say of each attention why it stays
        with pytest.raises(error, match=message):
            call()
    assert loader.read == 0
    assert fingerprint(model) == before
