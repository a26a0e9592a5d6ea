"""What every importance of the package must do; another one is another entry in `ENTRIES`."""

from __future__ import annotations

import copy
import logging
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy
import pytest
import timm
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.pruner import function
from toys import fingerprint, masked, narrow_heads, perturbed, relative, toy

import tp_amp

# The models, and the groups of channels in them that the references know.


@dataclass(frozen=True)
class Site:
    """Channels that belong together: the layers that make them and those that read them.

    A layer may make or read several of its own channels for one of these: all first parts stand
    before all second parts in a maker (q, k, v), and next to each other in a reader (pixels).
    """

    channels: int
    makers: tuple[str, ...]
    readers: tuple[str, ...]
    root: str
    handler: Any = function.prune_linear_out_channels
    prunable: bool = True


@dataclass(frozen=True)
class Case:
    """A model, and what `tp.pruner.MetaPruner` must leave alone so that it cuts the sites only."""

    build: Callable[[], Any]
    shape: tuple[int, ...]
    sites: dict[str, Site]
    ignored: tuple[str, ...]

    def images(self, count: int = 6, seed: int = 1) -> Tensor:
        return torch.randn(count, *self.shape, generator=torch.Generator().manual_seed(seed))

    def batches(self) -> list[Tensor]:
        """Two batches of unequal size."""
        return list(self.images(6).split(4))

    def pruned(self) -> list[Site]:
        return [site for site in self.sites.values() if site.prunable]


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20)
        self.second, self.norm2 = nn.Conv2d(20, 10, 3), nn.BatchNorm2d(10)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(10 * 2 * 2, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.first(x)).relu()
        x = self.norm2(self.second(x)).relu()
        return self.head(self.dropout(x.flatten(1)))


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    model = perturbed(Convolutions())
    for norm in (model.norm1, model.norm2):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.bias.data.add_(1.5)  # no channel that is dead after the ReLU
    return model


def vit() -> Any:
    torch.manual_seed(0)
    arguments = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, mlp_ratio=2, **arguments)
    for block in model.blocks:
        block.attn.fused_attn = False  # else the scale follows the head dimension
    return perturbed(model)


def toy_sites(gated: bool) -> dict[str, Site]:
    sites = {}
    for block in ("blocks.0", "blocks.1"):
        ups = (f"{block}.mlp.gate", f"{block}.mlp.value") if gated else (f"{block}.mlp.first",)
        down = f"{block}.mlp.out" if gated else f"{block}.mlp.second"
        sites[f"{block}.mlp"] = Site(20, ups, (down,), ups[0])
    readers = ("query", "key", "value", *(("mlp.gate", "mlp.value") if gated else ("mlp.first",)))
    writers = ("project", "mlp.out" if gated else "mlp.second")
    sites["residual"] = Site(
        12,
        ("embed", *(f"blocks.{i}.{layer}" for i in (0, 1) for layer in writers)),
        (*(f"blocks.{i}.{layer}" for i in (0, 1) for layer in readers), "head"),
        "embed",
        function.prune_conv_out_channels,
        prunable=False,
    )
    return sites


TOY_IGNORED = (
    "embed",
    "head",
    *(f"blocks.{i}.{layer}" for i in (0, 1) for layer in ("query", "key", "value", "project")),
)

CASES = {
    "plain": Case(toy, (1, 8, 8), toy_sites(False), TOY_IGNORED),
    "gated": Case(lambda: toy(gated=True), (1, 8, 8), toy_sites(True), TOY_IGNORED),
    "convolutions": Case(
        convolutions,
        (3, 6, 6),
        {
            "first": Site(20, ("first",), ("second",), "first", function.prune_conv_out_channels),
            "second": Site(10, ("second",), ("head",), "second", function.prune_conv_out_channels),
        },
        ("head",),
    ),
    "vit": Case(
        vit,
        (3, 16, 16),
        {
            "attention": Site(
                24,
                ("blocks.1.attn.qkv",),
                ("blocks.1.attn.proj",),
                "blocks.1.attn.proj",
                function.prune_linear_in_channels,
                prunable=False,
            ),
            "mlp 0": Site(48, ("blocks.0.mlp.fc1",), ("blocks.0.mlp.fc2",), "blocks.0.mlp.fc1"),
            "mlp 1": Site(48, ("blocks.1.mlp.fc1",), ("blocks.1.mlp.fc2",), "blocks.1.mlp.fc1"),
        },
        ("patch_embed", "head", "blocks.0.attn", "blocks.1.attn"),
    ),
}
SITES = [(name, site) for name, case in CASES.items() for site in case.sites]

# The scores, from their definitions.


def rows_of(model: nn.Module, site: Site) -> Tensor:
    """The weights that make each channel, side by side."""
    parts = [torch.empty(site.channels, 0, dtype=torch.float64)]
    for name in site.makers:
        weight: Any = model.get_submodule(name).weight
        parts += weight.detach().double().flatten(1).split(site.channels)
    return torch.cat(parts, 1)


def columns_of(model: nn.Module, site: Site) -> Tensor:
    """The weights that read each channel, side by side."""
    parts = [torch.empty(site.channels, 0, dtype=torch.float64)]
    for name in site.readers:
        weight: Any = model.get_submodule(name).weight
        parts.append(weight.detach().double().transpose(0, 1).reshape(site.channels, -1))
    return torch.cat(parts, 1)


def mean_entropy(output: Any) -> Tensor:
    """Of the predicted classes, where the model gives several tensors in its first."""
    logits = output if isinstance(output, Tensor) else output[0]
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


def entropy_reference(
    model: nn.Module, site: Site, batches: list[Tensor], channels: list[int]
) -> Tensor:
    """Gradients of zeros that are added to the input of each reader."""
    model = copy.deepcopy(model).eval()
    for parameter in model.parameters():
        parameter.grad = None
    probes: dict[str, tuple[Tensor, Tensor]] = {}

    def added(name: str, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        probe = torch.zeros_like(args[0], requires_grad=True)
        probes[name] = (args[0].detach(), probe)
        return (args[0] + probe,)

    for name in site.readers:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, name=name: added(name, args)
        )
    total = torch.zeros(site.channels, dtype=torch.float64)
    dtype = next(model.parameters()).dtype
    for batch in batches:
        value = mean_entropy(model(batch.to(dtype)))
        gradients = torch.autograd.grad(value, [probe for _, probe in probes.values()])
        for (hidden, _), gradient in zip(probes.values(), gradients, strict=True):
            product = (hidden * gradient).double()
            if product.dim() == 4:
                product = product.permute(0, 2, 3, 1)
            per_image = product.reshape(len(batch), -1, product.shape[-1]).sum(1).abs().sum(0)
            total += per_image.reshape(site.channels, -1).sum(1)
    return total[channels] / sum(map(len, batches))


def greedy_order(rows: Tensor) -> list[int]:
    """Largest residual first; a new round on the rest once no residual is left."""
    left, order = list(range(len(rows))), []
    while left:
        residual, norms, picks = rows[left].clone(), rows[left].norm(dim=1), []
        while len(picks) < len(left):
            sizes = residual.norm(dim=1)
            sizes[sizes < 1e-6 * norms] = 0
            sizes[picks] = 0
            if not sizes.any():
                break
            picks.append(int(sizes.argmax()))
            direction = residual[picks[-1]] / residual[picks[-1]].norm()
            residual -= torch.outer(residual @ direction, direction)
        assert picks, "rows of zeros have no reference"
        order += [left[pick] for pick in picks]
        left = [row for row in left if row not in order]
    return order


def gram_schmidt_reference(
    model: nn.Module, site: Site, batches: list[Tensor], channels: list[int]
) -> Tensor:
    order = greedy_order(rows_of(model, site)[channels])
    scores = torch.zeros(len(order), dtype=torch.float64)
    for place, row in enumerate(order):
        scores[row] = (len(order) - place) / len(order)
    return scores


def dimap_reference(
    model: nn.Module, site: Site, batches: list[Tensor], channels: list[int]
) -> Tensor:
    weights = torch.cat([rows_of(model, site), columns_of(model, site)], 1)[channels]
    energies = weights.square().sum(1).tolist()
    standing = [sum(other for other in energies if other >= energy) for energy in energies]
    return torch.tensor(energies, dtype=torch.float64) / torch.tensor(standing)


# The importances.

Part = Literal["slice", "same order", "own"]


@dataclass(frozen=True)
class Entry:
    """An importance, and what is so by its design.

    Attributes:
        make: takes batches and an objective, of which it may use neither.
        reference: the scores by definition, of a model, site, batches and channels of the site.
        part: a group of some channels has that `slice` of the full group's scores; or others in
            the `same order`; or scores of its `own`, in which those channels alone count.
        refuses: whose values must be finite: a `maker`'s or `reader`'s weight, any `bias`.
        scores_makers: whether a group has scores that has makers but no readers.
        scores_readers: whether a group has scores that has readers but no makers.
        reads_data: whether it runs the model.
        agreement: in a bfloat16 model, the correlation with the float32 model of equal weights;
            1 where nothing but the weights is read, so that the scores must be the same.
    """

    make: Callable[..., Any]
    reference: Callable[[nn.Module, Site, list[Tensor], list[int]], Tensor]
    part: Part
    refuses: frozenset[str]
    scores_makers: bool
    scores_readers: bool
    reads_data: bool
    agreement: float


ENTRIES = {
    "entropy Taylor": Entry(
        make=lambda batches, objective="prediction": tp_amp.EntropyTaylorImportance(
            objective, data=batches
        ),
        reference=entropy_reference,
        part="slice",
        refuses=frozenset({"maker", "reader", "bias"}),  # any of them spoils the forward pass
        scores_makers=False,
        scores_readers=True,
        reads_data=True,
        agreement=0.999,
    ),
    "Gram-Schmidt": Entry(
        make=lambda batches, objective="prediction": tp_amp.GramSchmidtImportance(),
        reference=gram_schmidt_reference,
        part="own",
        refuses=frozenset({"maker"}),
        scores_makers=True,
        scores_readers=False,
        reads_data=False,
        agreement=1,
    ),
    "DIMAP": Entry(
        make=lambda batches, objective="prediction": tp_amp.DIMAPImportance(),
        reference=dimap_reference,
        part="same order",
        refuses=frozenset({"maker", "reader"}),
        scores_makers=True,
        scores_readers=True,
        reads_data=False,
        agreement=1,
    ),
}
every_importance = pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
every_site = pytest.mark.parametrize(("case", "site"), SITES, ids=lambda value: value)


weights_alone = pytest.mark.parametrize(
    "entry",
    [pytest.param(entry, id=name) for name, entry in ENTRIES.items() if not entry.reads_data],
)


def group_of(model: nn.Module, case: Case, site: Site, channels: Sequence[int] = ()) -> Any:
    inputs = case.images(1).to(next(model.parameters()).dtype)
    graph = tp.DependencyGraph().build_dependency(model, (inputs,), verbose=False)
    wanted = list(channels or range(site.channels))
    return graph.get_pruning_group(model.get_submodule(site.root), site.handler, wanted)


def assert_scores(actual: Tensor | None, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert actual is not None
    assert actual.shape == expected.shape
    assert actual.is_floating_point()
    assert not actual.requires_grad
    assert relative(actual.double(), expected) < tolerance


def spoil(parameter: Any, value: float) -> None:
    with torch.no_grad():
        parameter.view(-1)[-1] = value


# Scores and groups.


@every_importance
@every_site
def test_scores_are_the_definition(entry: Entry, case: str, site: str) -> None:
    known, model = CASES[case].sites[site], CASES[case].build()
    group = group_of(model, CASES[case], known)
    every = list(range(known.channels))
    expected = entry.reference(model, known, CASES[case].batches(), every)
    assert len(expected.unique()) == known.channels, "a reference that tells channels apart"
    scores = entry.make(CASES[case].batches())(group)
    assert_scores(scores, expected)
    assert scores.argsort().tolist() == expected.argsort().tolist()


@every_importance
@every_site
@pytest.mark.parametrize("channels", [[5], [7, 3, 9, 0], [1, 2, 4, 6, 8]], ids=str)
def test_a_part_of_a_group(entry: Entry, case: str, site: str, channels: list[int]) -> None:
    known, model = CASES[case].sites[site], CASES[case].build()
    batches = CASES[case].batches()
    importance = entry.make(batches)
    part = importance(group_of(model, CASES[case], known, channels))
    assert_scores(part, entry.reference(model, known, batches, channels))
    full = importance(group_of(model, CASES[case], known))
    if entry.part == "slice":
        torch.testing.assert_close(part, full[channels])
    if entry.part == "same order":
        assert part.argsort().tolist() == full[channels].argsort().tolist()


@every_importance
def test_whether_a_part_has_the_order_of_the_whole_is_as_documented(entry: Entry) -> None:
    """Over many parts; a rank of rows among themselves is the one that may turn around."""
    case, site = CASES["plain"], CASES["plain"].sites["blocks.0.mlp"]
    model = case.build()
    importance = entry.make(case.batches())
    full = importance(group_of(model, case, site))
    turned = 0
    for seed in range(10):
        channels = random.Random(seed).sample(range(20), 8)
        part = importance(group_of(model, case, site, channels))
        turned += part.argsort().tolist() != full[channels].argsort().tolist()
    assert (turned > 0) == (entry.part == "own")


def state_of(group: Any) -> list[Any]:
    return [
        (id(item), id(item.dep), id(item.idxs), list(item.idxs), list(item.root_idxs))
        for item in group.items
    ]


@every_importance
@every_site
def test_group_and_model_are_untouched(entry: Entry, case: str, site: str) -> None:
    model = CASES[case].build()
    data = CASES[case].images(6)
    model(data).square().sum().backward()
    group = group_of(model, CASES[case], CASES[case].sites[site], [4, 0, 7])
    model.train()
    next(module for name, module in model.named_modules() if "norm" in name).eval()
    list(model.parameters())[3].requires_grad_(False)
    list(model.parameters())[-1].grad = None
    own_hook = model.register_forward_hook(lambda *_: None)
    before, held = fingerprint(model), state_of(group)
    generators = repr(random.getstate()), repr(numpy.random.get_state())
    loader = torch.utils.data.DataLoader(data, batch_size=3, shuffle=True)
    with torch.enable_grad():
        scores = entry.make(loader)(group)
    assert scores.shape == (3,)
    assert state_of(group) == held
    assert fingerprint(model) == before
    assert (repr(random.getstate()), repr(numpy.random.get_state())) == generators
    assert list(model._forward_hooks) == [own_hook.id]
    assert group._DG._pruning_history == []
    assert torch.is_grad_enabled()


@every_importance
def test_untouched_after_an_error(entry: Entry) -> None:
    case, site = CASES["convolutions"], CASES["convolutions"].sites["first"]
    model = case.build()
    group = group_of(model, case, site)
    model.train()
    spoil(model.first.weight, math.inf)
    before, held = fingerprint(model), state_of(group)
    with pytest.raises(ValueError, match="first"):
        entry.make(case.batches())(group)
    assert fingerprint(model) == before
    assert state_of(group) == held


@every_importance
@every_site
def test_scores_are_the_same_each_time(entry: Entry, case: str, site: str) -> None:
    model, known = CASES[case].build(), CASES[case].sites[site]
    batches = CASES[case].batches()
    group = group_of(model, CASES[case], known)
    importance = entry.make(batches)
    first = importance(group)
    assert torch.equal(importance(group), first)
    torch.manual_seed(77)
    twin = copy.deepcopy(model)
    others = group_of(twin, CASES[case], known)
    twin.train()  # Torch-Pruning's tracing ends in eval mode
    assert torch.equal(entry.make(batches)(others), first)
    with torch.inference_mode():
        assert torch.equal(entry.make(batches)(group), first)
    with torch.no_grad():
        assert torch.equal(entry.make(batches)(group), first)


@every_importance
def test_the_model_runs_only_where_data_is_read_and_once(entry: Entry) -> None:
    case = CASES["vit"]
    model = case.build()
    groups = [group_of(model, case, site) for site in case.sites.values()]
    calls: list[int] = []
    model.register_forward_hook(lambda _m, args, _o: calls.append(len(args[0])))
    importance = entry.make(case.batches())
    for group in groups * 2:
        importance(group)
    assert calls == ([4, 2] if entry.reads_data else [])


# Bad weights, scores and shapes.


@every_importance
@every_site
@pytest.mark.parametrize(
    ("what", "value"),
    [("maker", math.nan), ("maker", math.inf), ("reader", -math.inf), ("bias", math.nan)],
)
def test_weights_that_are_not_finite(
    entry: Entry, case: str, site: str, what: str, value: float
) -> None:
    model, known = CASES[case].build(), CASES[case].sites[site]
    group = group_of(model, CASES[case], known)
    name = known.readers[-1] if what == "reader" else known.makers[-1]
    importance = entry.make(CASES[case].batches())
    sound = importance(group)
    layer: Any = model.get_submodule(name)
    spoil(layer.bias if what == "bias" else layer.weight, value)
    if what in entry.refuses:
        with pytest.raises(ValueError, match=re.escape(name)):
            importance(group)
    else:
        assert torch.equal(importance(group), sound), "what is not read can't matter"


@every_importance
def test_images_that_are_not_finite(entry: Entry) -> None:
    case, site = CASES["plain"], CASES["plain"].sites["blocks.0.mlp"]
    model = case.build()
    group = group_of(model, case, site)
    batches = [batch * math.nan for batch in case.batches()]
    if entry.reads_data:
        with pytest.raises(ValueError, match="check the images for NaN"):
            entry.make(batches)(group)
    else:
        assert_scores(
            entry.make(batches)(group), entry.reference(model, site, batches, list(range(20)))
        )


def test_gradients_that_are_not_finite() -> None:
    """Only the entropy Taylor importance has any: the script's, or its own of an objective."""
    case, site = CASES["convolutions"], CASES["convolutions"].sites["first"]
    model = case.build()
    group = group_of(model, case, site)

    def steep(output: Tensor) -> Tensor:
        return mean_entropy(output) + (0 * output).sum().sqrt()

    with pytest.raises(ValueError, match=r"scores of (second|head) are not finite"):
        tp_amp.EntropyTaylorImportance(steep, data=case.batches())(group)
    mean_entropy(model(case.images())).backward()
    spoil(model.second.weight.grad, math.nan)
    with pytest.raises(ValueError, match=r"scores of \['second'\] are not finite"):
        tp_amp.EntropyTaylorImportance()(group)


@weights_alone
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scores_of_tiny_and_huge_weights(entry: Entry, scale: float) -> None:
    """Where the model itself need not run on them."""
    case, site = CASES["plain"], CASES["plain"].sites["blocks.0.mlp"]
    model = case.build()
    with torch.no_grad():
        for name in (*site.makers, *site.readers):
            model.get_submodule(name).weight.mul_(scale)
    expected = entry.reference(model, site, case.batches(), list(range(20)))
    assert_scores(entry.make(case.batches())(group_of(model, case, site)), expected)


def outcome(importance: Any, group: Any) -> Tensor:
    """The scores, or none where the importance refuses."""
    try:
        scores: Tensor = importance(group)
    except ValueError:
        return torch.empty(0)
    return scores


@every_importance
def test_no_score_is_nan_where_a_sum_of_layers_overflows(entry: Entry) -> None:
    case, site = CASES["plain"], CASES["plain"].sites["blocks.0.mlp"]
    model = case.build()
    with torch.no_grad():
        model.blocks[0].mlp.first.weight[:, 0] = 1.5e19
        model.blocks[0].mlp.second.weight[0] = 1.5e19
    assert outcome(entry.make(case.batches()), group_of(model, case, site)).isfinite().all()


@every_importance
@pytest.mark.parametrize("case", ["plain", "convolutions"])
def test_after_a_cut_a_new_group_is_scored_at_its_new_width(entry: Entry, case: str) -> None:
    model, site = CASES[case].build(), CASES[case].pruned()[0]
    batches = CASES[case].batches()
    importance = entry.make(batches)
    importance(group_of(model, CASES[case], site))
    group_of(model, CASES[case], site, [3, 1, 12]).prune()
    narrow = replace(site, channels=17)
    scores = importance(group_of(model, CASES[case], narrow))
    assert_scores(scores, entry.reference(model, narrow, batches, list(range(17))))


def test_collected_scores_of_another_width() -> None:
    """The one importance that can be told its scores beforehand; it names the layer."""
    case, site = CASES["convolutions"], CASES["convolutions"].sites["first"]
    model = case.build()
    importance = tp_amp.EntropyTaylorImportance().collect(model, case.batches())
    group_of(model, case, site, [3, 1]).prune()
    group = group_of(model, case, replace(site, channels=18))
    with pytest.raises(ValueError, match="second has 18 input channels and 20 scores"):
        importance(group)


@every_importance
def test_a_group_made_before_a_cut(entry: Entry) -> None:
    """Its last channels are gone; a pruner of Torch-Pruning makes new groups at each step."""
    case, site = CASES["plain"], CASES["plain"].sites["blocks.0.mlp"]
    model = case.build()
    stale = group_of(model, case, site)
    group_of(model, case, site, [3, 1]).prune()
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.(first|second)"):
        entry.make(case.batches())(stale)


# Groups that lack layers.


class Branches(nn.Module):
    """`norm` is read and not made, `unread` is made and not read, `alone` is neither."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)
        self.unread, self.alone = nn.Linear(6, 7), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.head(self.norm(x)), self.unread(x), self.alone(x)


NORM = function.prune_layernorm_out_channels
BRANCHES = Case(
    lambda: perturbed(Branches()),
    (6,),
    {
        "readers": Site(6, (), ("head",), "norm", NORM),
        "makers": Site(7, ("unread",), (), "unread"),
        "neither": Site(6, (), (), "alone", NORM),
    },
    (),
)


def expects_scores(entry: Entry, kind: str) -> bool:
    return {
        "readers": entry.scores_readers,
        "makers": entry.scores_makers,
        "neither": False,
    }[kind]


def assert_lacking(entry: Entry, kind: str, warm: bool, text: Callable[[], str]) -> None:
    torch.manual_seed(0)
    model, site = BRANCHES.build(), BRANCHES.sites[kind]
    batches = BRANCHES.batches()
    importance = entry.make(batches, mean_entropy)
    if warm:
        known = "readers" if entry.scores_readers else "makers"
        assert importance(group_of(model, BRANCHES, BRANCHES.sites[known])) is not None
    scores = importance(group_of(model, BRANCHES, site))
    if expects_scores(entry, kind):
        every = list(range(site.channels))
        assert_scores(scores, entry.reference(model, site, batches, every))
        assert text() == ""
    else:
        assert scores is None
        assert f"no score for the group of {site.root}" in text()


@every_importance
@pytest.mark.parametrize("kind", BRANCHES.sites)
def test_groups_that_lack_layers(entry: Entry, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """They score by what there is, or give None and say so."""
    with caplog.at_level(logging.WARNING, logger="tp_amp"):
        assert_lacking(entry, kind, True, lambda: caplog.text)


@every_importance
@pytest.mark.parametrize("kind", BRANCHES.sites)
def test_groups_that_lack_layers_come_first(
    entry: Entry, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="tp_amp"):
        assert_lacking(entry, kind, False, lambda: caplog.text)


@every_importance
def test_pruner_that_ignores_no_layer(entry: Entry) -> None:
    """The outputs of the head, which nothing reads, are a group too."""
    case = CASES["plain"]
    model = case.build()
    tp.pruner.MetaPruner(
        model, (case.images(1),), entry.make(case.batches()), pruning_ratio=0.5
    ).step()
    assert [block.mlp.first.out_features for block in model.blocks] == [10, 10]
    assert model.head.out_features == (2 if entry.scores_makers else 5)


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8)
        self.second, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.depthwise(self.first(x).relu()).relu()).relu()
        return self.head(x.mean((2, 3)))


@every_importance
def test_depthwise_filters_count(entry: Entry) -> None:
    """One channel's filter as good as gone, another's a hundred times as large."""
    torch.manual_seed(0)
    case = Case(lambda: perturbed(Depthwise()), (3, 6, 6), {}, ())
    site = Site(8, ("first",), ("second",), "first", function.prune_conv_out_channels)
    model = case.build()
    group = group_of(model, case, site)
    importance = entry.make(case.batches())
    before = importance(group)
    with torch.no_grad():
        model.depthwise.weight[::2] *= 100
        model.depthwise.weight[1::2] *= 0.01
    assert not torch.equal(importance(group), before)


# Weights that change.


def assign_data(model: nn.Module, changed: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.data = changed[name]


def change_data(model: nn.Module, changed: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.data.copy_(changed[name])


def change_in_place(model: nn.Module, changed: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(changed[name])


def load(model: nn.Module, changed: dict[str, Tensor], assign: bool = False) -> None:
    model.load_state_dict(changed, assign=assign, strict=False)


def optimise(model: nn.Module, changed: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.grad = parameter.detach() - changed[name]
    torch.optim.SGD(model.parameters(), lr=1).step()


CHANGES = {
    "in place": change_in_place,
    "optimizer": optimise,
    "load": load,
    "assign": lambda model, changed: load(model, changed, assign=True),
}
HIDDEN_CHANGES = {"data in place": change_data, "data assigned": assign_data}


def assert_follows(entry: Entry, change: Callable[[nn.Module, dict[str, Tensor]], None]) -> None:
    case, site = CASES["plain"], CASES["plain"].sites["blocks.1.mlp"]
    model, other, every = case.build(), toy(seed=5), list(range(20))
    group = group_of(model, case, site)
    importance = entry.make(case.batches())
    first = importance(group)
    expected = entry.reference(other, site, case.batches(), every)
    assert relative(first.double(), expected) > 0.1, "the change matters"
    change(model, {name: p.detach().clone() for name, p in other.named_parameters()})
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()))
    assert_scores(importance(group), expected)


@every_importance
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_scored_anew(entry: Entry, change: str) -> None:
    assert_follows(entry, CHANGES[change])


@every_importance
@pytest.mark.parametrize("change", HIDDEN_CHANGES)
def test_weights_changed_through_data_are_scored_anew(entry: Entry, change: str) -> None:
    assert_follows(entry, HIDDEN_CHANGES[change])


@every_importance
def test_changed_buffers_are_scored_anew(entry: Entry) -> None:
    case, site = CASES["convolutions"], CASES["convolutions"].sites["first"]
    model, every = case.build(), list(range(20))
    group = group_of(model, case, site)
    importance = entry.make(case.batches())
    importance(group)
    model.norm1.running_mean.neg_()
    assert_scores(importance(group), entry.reference(model, site, case.batches(), every))


@every_importance
def test_one_importance_scores_two_models_in_turn(entry: Entry) -> None:
    case, site = CASES["plain"], CASES["plain"].sites["blocks.0.mlp"]
    importance = entry.make(case.batches())
    models = [toy(seed=0), toy(seed=5)]
    groups = [group_of(model, case, site) for model in models]
    for turn in (0, 1, 0):
        expected = entry.reference(models[turn], site, case.batches(), list(range(20)))
        assert_scores(importance(groups[turn]), expected)


# Torch-Pruning's pruner.


def weakest(scores: list[Tensor], lose: list[int] | int) -> list[list[int]]:
    """Channels that stay in each group: one count for all groups together, or one for each."""
    if isinstance(lose, int):
        limit = torch.cat(scores).sort().values[lose - 1]
        return [(s > limit).nonzero().flatten().tolist() for s in scores]
    return [sorted(s.argsort()[n:].tolist()) for s, n in zip(scores, lose, strict=True)]


def weights_of(model: nn.Module, case: Case) -> dict[str, Tensor]:
    names = {name for site in case.pruned() for name in (*site.makers, *site.readers)}
    return {name: model.get_parameter(f"{name}.weight").detach().clone() for name in names}


def cut_weights(model: nn.Module, case: Case, kept: list[list[int]]) -> dict[str, Tensor]:
    """Rows of makers and columns of readers, by indexing."""
    weights = weights_of(model, case)
    for site, chosen in zip(case.pruned(), kept, strict=True):
        width = len(weights[site.makers[0]])
        for name in site.readers:
            columns = weights[name].unflatten(1, (width, -1))
            weights[name] = columns[:, chosen].flatten(1, 2)
        for name in site.makers:
            weights[name] = weights[name][chosen]
    return weights


def assert_weights(model: nn.Module, case: Case, expected: dict[str, Tensor]) -> None:
    for name, actual in weights_of(model, case).items():
        assert torch.equal(actual, expected[name]), name


def disturb(model: nn.Module, case: Case, step: int) -> None:
    """Give every channel's weights another size."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for site in case.pruned():
            for name in site.makers:
                weight: Any = model.get_submodule(name).weight
                sizes = torch.rand(len(weight), generator=generator) * 3 + 0.1
                weight.mul_(sizes.view(-1, *[1] * (weight.dim() - 1)))


def current_scores(entry: Entry, model: nn.Module, case: Case) -> list[Tensor]:
    scores = []
    for site in case.pruned():
        width = len(model.get_submodule(site.makers[0]).weight)
        current = replace(site, channels=width)
        scores.append(entry.reference(model, current, case.batches(), list(range(width))))
    return scores


@every_importance
@pytest.mark.parametrize("global_pruning", [False, True], ids=["local", "global"])
@pytest.mark.parametrize("case", ["plain", "gated", "convolutions"])
def test_iterative_steps_score_the_weights_of_the_moment(
    entry: Entry, case: str, global_pruning: bool
) -> None:
    known = CASES[case]
    model = known.build()
    pruner = tp.pruner.MetaPruner(
        model,
        (known.images(1),),
        entry.make(known.batches()),
        pruning_ratio=0.6,
        iterative_steps=3,
        global_pruning=global_pruning,
        ignored_layers=[model.get_submodule(name) for name in known.ignored],
    )
    dense = [site.channels for site in known.pruned()]
    for step in (1, 2, 3):
        before = current_scores(entry, model, known)
        disturb(model, known, step)
        scores = current_scores(entry, model, known)
        lose: Any = [width // 5 for width in dense]
        lose = sum(lose) if global_pruning else lose
        kept = weakest(scores, lose)
        assert kept != weakest(before, lose), "scores of the weights before would show"
        expected = cut_weights(model, known, kept)
        pruner.step()
        assert_weights(model, known, expected)
        left = [len(model.get_submodule(site.makers[0]).weight) for site in known.pruned()]
        asked = [width * (5 - step) // 5 for width in dense]
        assert sum(left) == sum(asked)
        assert global_pruning or left == asked
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model(known.images()).shape == (6, 5)


def attention_scores(entry: Entry, model: nn.Module, case: Case, block: int) -> Tensor:
    """Of each head (rows) and head dimension (columns)."""
    attention = f"blocks.{block}.attn"
    site = Site(24, (f"{attention}.qkv",), (f"{attention}.proj",), f"{attention}.proj")
    return entry.reference(model, site, case.batches(), list(range(24))).view(3, 8)


@narrow_heads
@every_importance
@pytest.mark.parametrize("heads", [False, True], ids=["head dimensions", "heads"])
def test_pruner_cuts_the_attention_of_a_vit(entry: Entry, heads: bool) -> None:
    """The same dimensions of every head, or whole heads; and the MLPs."""
    case = CASES["vit"]
    model = case.build()
    attentions = [block.attn for block in model.blocks]
    qkv = [attention.qkv.weight.detach().clone() for attention in attentions]
    projections = [attention.proj.weight.detach().clone() for attention in attentions]
    kept = []
    for block in (0, 1):
        scores = attention_scores(entry, model, case, block)
        places = torch.arange(24).view(3, 8)
        if heads:
            places = places[scores.mean(1).argsort()[1:].sort().values]
        else:
            places = places[:, scores.mean(0).argsort()[2:].sort().values]
        kept.append(places.flatten().tolist())
    mlps = weakest(current_scores(entry, model, case), [12, 12])
    expected = cut_weights(model, case, mlps)
    pruner = tp.pruner.MetaPruner(
        model,
        (case.images(1),),
        entry.make(case.batches()),
        pruning_ratio=0.25,
        num_heads={attention.qkv: 3 for attention in attentions},
        prune_head_dims=not heads,
        prune_num_heads=heads,
        head_pruning_ratio=1 / 3 if heads else 0,
        ignored_layers=[
            model.patch_embed,
            model.head,
            *(layer for block in model.blocks for layer in (block.attn.proj, block.mlp.fc2)),
        ],
    )
    pruner.step()
    for place, attention in enumerate(attentions):
        rows = [part * 24 + channel for part in range(3) for channel in kept[place]]
        assert torch.equal(attention.qkv.weight, qkv[place][rows])
        assert torch.equal(attention.proj.weight, projections[place][:, kept[place]])
        attention.num_heads = pruner.num_heads[attention.qkv]
        attention.head_dim = attention.qkv.out_features // (3 * attention.num_heads)
        attention.attn_dim = attention.num_heads * attention.head_dim
        assert (attention.num_heads, attention.head_dim) == ((2, 8) if heads else (3, 6))
    assert_weights(model, case, expected)
    assert model(case.images()).isfinite().all()


@every_importance
@pytest.mark.parametrize("case", ["plain", "vit"])
def test_pruner_cuts_every_group_of_a_model(entry: Entry, case: str) -> None:
    """The residual stream too, as scripts do that ignore the head alone."""
    known = CASES[case]
    model = known.build()
    heads = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv")}
    tp.pruner.MetaPruner(
        model,
        (known.images(1),),
        entry.make(known.batches()),
        pruning_ratio=0.5,
        num_heads=heads,
        ignored_layers=[model.head],
    ).step()
    for module in model.modules():
        if hasattr(module, "qkv"):
            module.head_dim, module.attn_dim = 4, 12
    for site in known.pruned():
        assert len(model.get_submodule(site.makers[0]).weight) == site.channels // 2
    assert model.head.in_features == (6 if case == "plain" else 12)
    assert model(known.images()).shape == (6, 5)


# The package's own plans and pruner.

PLANNED = ["plain", "gated", "vit"]


@every_importance
@pytest.mark.parametrize("case", PLANNED)
def test_plans_keep_the_best_channels(entry: Entry, case: str) -> None:
    known = CASES[case]
    model = known.build()
    dense, before = copy.deepcopy(model), fingerprint(model)
    widths = {site.readers[0]: 7 + 4 * place for place, site in enumerate(known.pruned())}
    losses = [s.channels - widths[s.readers[0]] for s in known.pruned()]
    kept = weakest(current_scores(entry, model, known), losses)
    plan = tp_amp.plan_from_importance(model, known.images(1), entry.make(known.batches()), widths)
    assert plan.keep == dict(zip(widths, kept, strict=True))
    assert fingerprint(model) == before
    tp_amp.apply_plan(model, known.images(1), plan)
    with torch.no_grad():
        expected = masked(dense, plan.keep)(known.images())
        assert relative(model(known.images()), expected) < 1e-4


@every_importance
def test_plans_keep_the_best_heads(entry: Entry) -> None:
    case = CASES["vit"]
    model = case.build()
    best = [
        sorted(attention_scores(entry, model, case, block).sum(1).argsort()[-count:].tolist())
        for block, count in ((0, 1), (1, 2))
    ]
    plan = tp_amp.plan_from_importance(
        model,
        case.images(1),
        entry.make(case.batches()),
        {"blocks.0.attn.proj": 1, "blocks.1.attn.proj": 2},
    )
    assert list(plan.keep.values()) == best
    tp_amp.apply_plan(model, case.images(1), plan)
    assert [block.attn.proj.in_features for block in model.blocks] == [8, 16]
    assert model(case.images()).shape == (6, 5)


@every_importance
@pytest.mark.parametrize("case", PLANNED)
@pytest.mark.parametrize("rescore", [False, True])
def test_adaptive_pruner_keeps_the_best_channels(entry: Entry, case: str, rescore: bool) -> None:
    known = CASES[case]
    model = known.build()
    dense = copy.deepcopy(model)
    orders = dict(
        zip(
            [site.readers[0] for site in known.pruned()],
            [s.argsort(descending=True).tolist() for s in current_scores(entry, model, known)],
            strict=True,
        )
    )
    pruner = tp_amp.AdaptiveMLPPruner(
        model,
        known.images(1),
        entry.make(known.batches()),
        [known.images(8, seed=3)],
        max_increase=0.05,
        rescore=rescore,
        progress=False,
    )
    pruner.step()
    assert any(pruner.plan.widths[name] < len(order) for name, order in orders.items())
    for place, (name, kept) in enumerate(pruner.plan.keep.items()):
        # The search begins at the last MLP; scores of data follow what it cut before.
        if not (rescore and entry.reads_data) or place == len(orders) - 1:
            assert kept == sorted(orders[name][: len(kept)])
    with torch.no_grad():
        expected = masked(dense, pruner.plan.keep)(known.images())
        assert relative(model(known.images()), expected) < 1e-4


# Other precisions.


@every_importance
@every_site
def test_float64_models(entry: Entry, case: str, site: str) -> None:
    known, model = CASES[case].sites[site], CASES[case].build().double()
    expected = entry.reference(model, known, CASES[case].batches(), list(range(known.channels)))
    scores = entry.make(CASES[case].batches())(group_of(model, CASES[case], known))
    assert_scores(scores, expected, 1e-6)


@every_importance
@every_site
def test_bfloat16_models(entry: Entry, case: str, site: str) -> None:
    """The scores are those of the float32 model with the same, coarser weights."""
    known, model = CASES[case].sites[site], CASES[case].build().bfloat16()
    coarse = copy.deepcopy(model).float()
    expected = entry.reference(coarse, known, CASES[case].batches(), list(range(known.channels)))
    scores = entry.make(CASES[case].batches())(group_of(model, CASES[case], known))
    assert scores.dtype == torch.float32
    if entry.agreement == 1:
        assert_scores(scores, expected)
    correlation = torch.corrcoef(torch.stack([scores.double(), expected]))[0, 1]
    assert correlation >= entry.agreement - 1e-6


@every_importance
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["gated", "convolutions"])
def test_pruner_cuts_models_of_other_precisions(
    entry: Entry, case: str, dtype: torch.dtype
) -> None:
    known = CASES[case]
    model = known.build().to(dtype)
    tp.pruner.MetaPruner(
        model,
        (known.images(1).to(dtype),),
        entry.make(known.batches()),
        pruning_ratio=0.5,
        global_pruning=False,
        ignored_layers=[model.get_submodule(name) for name in known.ignored],
    ).step()
    for site in known.pruned():
        assert len(model.get_submodule(site.makers[0]).weight) == site.channels // 2
    output = model(known.images().to(dtype))
    assert output.dtype == dtype
    assert output.isfinite().all()
