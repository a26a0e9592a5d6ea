"""timm's NaFlexViT: several blocks in the search, its own dict as input, padding without weight."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from toys import fingerprint, perturbed, relative
from zoo_checks import masked

import tp_amp
from tp_amp.distillation.features import read_features
from tp_amp.importance.hidden_moments import hidden_moments
from tp_amp.importance.outputs.features import pooled_features
from tp_amp.running.inputs import prepare
from tp_amp.running.padding import images_alone, valid_tokens
from tp_amp.search.prefix_cache import Prefix
from tp_amp.structure.model_structure import ModelStructure

LONG = 9  # places of an image, of which some are padding


def model_of(name: str = "naflexvit_base_patch16_gap", **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    small = {"embed_dim": 24, "num_heads": 2, "depth": 3, "mlp_ratio": 1.5, "num_classes": 4}
    return perturbed(timm.create_model(name, **{**small, **arguments}))


def batch(seed: int, padding: float | None = 0.0, images: int = 8) -> dict[str, Tensor]:
    """Six tokens of each image; with `padding`, three more that hold that."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.stack([torch.arange(6) // 3, torch.arange(6) % 3], -1)
    found = {
        "patches": 0.3 * torch.randn(images, 6, 768, generator=generator),
        "patch_coord": grid.expand(images, -1, -1),
        "patch_valid": torch.ones(images, 6, dtype=torch.bool),
    }
    if padding is not None:
        rest = LONG - 6
        noise = padding * torch.randn(images, rest, 768, generator=generator)
        found["patches"] = torch.cat([found["patches"], noise], 1)
        none = torch.zeros(images, rest, 2, dtype=torch.long)
        found["patch_coord"] = torch.cat([found["patch_coord"], none], 1)
        missing = torch.zeros(images, rest, dtype=torch.bool)
        found["patch_valid"] = torch.cat([found["patch_valid"], missing], 1)
    return found


FORMS = {
    "dict": lambda x: x,
    "tuple": lambda x: (x,),
    "by name": lambda x: {"x": x},
    "labelled": lambda x: (x, torch.arange(8) % 4),
}


@pytest.mark.parametrize("form", ["dict", "tuple", "by name"])
def test_its_own_dict_is_found_in_in_every_form(form: str) -> None:
    model, inputs = model_of(), FORMS[form](batch(1))
    mlps = tp_amp.find_mlps(model, inputs)
    assert len(mlps) == 3
    assert len(tp_amp.find_attentions(model, inputs)) == 3
    assert len(tp_amp.inspect(model, inputs).mlps) == 3
    plan = tp_amp.PruningPlan({mlp.down: list(range(0, mlp.width, 2)) for mlp in mlps})
    cut = copy.deepcopy(model)
    tp_amp.apply_plan(cut, plan, inputs)
    with torch.no_grad():
        assert relative(cut(batch(2)), masked(model, mlps, plan.keep)(batch(2))) < 1e-5


@pytest.mark.parametrize("pictures", [True, False])
def test_the_search_finds_the_same_with_and_without_what_it_keeps(pictures: bool) -> None:
    keep = []
    for cache in (0, 2**30):
        generator = torch.Generator().manual_seed(1)
        first: list[Any] = [torch.randn(8, 3, 32, 48, generator=generator) for _ in range(2)]
        data = first if pictures else [batch(1), batch(2)]
        model = model_of()
        dense = copy.deepcopy(model)
        pruner = tp_amp.AdaptiveMLPPruner(
            model,
            data[0],
            tp_amp.EntropyTaylorImportance(data=data[:1]),
            data[1:],
            max_increase=0.02,
            cache_bytes=cache,
            progress=False,
        )
        pruner.step()
        keep.append(pruner.plan.keep)
        expected = masked(dense, pruner.mlps, pruner.plan.keep)(data[1])
        assert relative(model(data[1]), expected) < 1e-5
    assert min(map(len, keep[0].values())) < 36
    assert keep[0] == keep[1]


def test_the_prefix_starts_after_what_gives_several_values() -> None:
    model, images = model_of(), torch.randn(4, 3, 32, 32)
    structure = ModelStructure(model, images)
    assert Prefix(structure, structure.mlps, [images], 2**30).steps == [
        "blocks.0",
        "blocks.1",
        "blocks.2",
    ]


@pytest.mark.parametrize("name", ["naflexvit_base_patch16_gap", "naflexvit_base_patch16_map"])
def test_what_padding_holds_matters_nowhere(name: str) -> None:
    """Scores, orders, foreseen errors, corrections and widths, with zeros in it and with noise."""
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    found = []
    for padding in (0.0, 50.0):
        batches = [batch(seed, padding) for seed in range(4)]
        model = model_of(name)
        taylor = tp_amp.EntropyTaylorImportance().collect(model, batches, progress=False)
        errors = tp_amp.ReconstructionImportance().collect(model, batches, progress=False)
        plan = tp_amp.plan_for_target(model, batches[0], errors, {"params": 0.97})
        fitted = tp_amp.compensate(
            model, plan, batches, every_linear=True, refine=2, progress=False
        )
        found.append((taylor.scores, errors.errors, plan.keep, fitted, model(batch(9)).detach()))
    (scores, errors_, keep, fitted, output), (scores2, errors2, keep2, fitted2, output2) = found
    assert keep == keep2
    for one, other in ((scores, scores2), (errors_, errors2)):
        for layer, values in one.items():
            torch.testing.assert_close(values, other[layer], rtol=1e-3, atol=1e-6)
    for layer, correction in fitted.items():
        assert correction.error == pytest.approx(fitted2[layer].error, rel=1e-2, abs=1e-7)
    torch.testing.assert_close(output, output2, rtol=1e-2, atol=1e-3)


def test_moments_are_those_of_the_images_without_padding() -> None:
    model, layers = model_of(), [f"blocks.{i}.mlp.fc2" for i in range(3)]
    plain, padded = (
        hidden_moments(model, layers, [batch(i, padding) for i in (1, 2)], progress=False)
        for padding in (None, 50.0)
    )
    for name in layers:
        one, other = plain[name].whole, padded[name].whole
        assert one.tokens == other.tokens == 2 * 8 * (4 + 6)  # registers count
        torch.testing.assert_close(one.mean_inputs, other.mean_inputs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.inputs, other.inputs, rtol=1e-4, atol=1e-5)


def test_which_tokens_are_padding() -> None:
    model = model_of()
    inputs = prepare(batch(1, 50.0), model)
    valid = valid_tokens(inputs, model, 8 * LONG)
    assert valid is not None
    assert valid.view(8, LONG).tolist() == [[1.0] * 6 + [0.0] * 3] * 8
    assert valid_tokens(inputs, model, 8) is None  # of pooled features
    assert valid_tokens(inputs, model, 8 * LONG + 1) is None
    assert valid_tokens(prepare(batch(1, None), model), model, 8 * 6) is None  # there is none
    model.num_prefix_tokens = 2
    with_classes = valid_tokens(inputs, model, 8 * (LONG + 2))
    assert with_classes is not None
    assert with_classes.view(8, -1).tolist() == [[1.0] * 8 + [0.0] * 3] * 8
    assert bool((images_alone(inputs)[:, 6:] == 0).all())
    assert torch.equal(images_alone(inputs)[:, :6], batch(1, None)["patches"])


def test_labels_and_measuring() -> None:
    measured = tp_amp.measure(model_of(), [FORMS["labelled"](batch(1))], repeats=1)
    assert measured.labelled_images == 8


@pytest.mark.parametrize("pool", ["avg", "avgmax", "map"])
def test_pooled_features_are_those_of_the_images_without_padding(pool: str) -> None:
    model = model_of(num_classes=0, global_pool=pool)
    before = fingerprint(model)
    with torch.no_grad():
        plain, padded = (
            pooled_features(model, prepare(batch(1, padding), model)) for padding in (None, 50.0)
        )
        torch.testing.assert_close(padded, plain, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(plain, model(batch(1, None)))
    assert fingerprint(model) == before


@pytest.mark.parametrize(("classes", "objective"), [(0, "auto"), (4, "similarity")])
def test_features_of_its_own_dict_are_what_a_model_is_for(classes: int, objective: str) -> None:
    found = []
    for padding in (0.0, 50.0):
        batches, model = [batch(seed, padding) for seed in range(3)], model_of(num_classes=classes)
        taylor = tp_amp.EntropyTaylorImportance(objective, data=batches[:1])
        errors = tp_amp.ReconstructionImportance(objective, data=batches)
        plan = tp_amp.plan_for_target(model, batches[0], errors, {"params": 0.97})
        pruner = tp_amp.AdaptiveMLPPruner(
            model, batches[0], taylor, batches[1:], max_increase=1e-5, progress=False
        )
        pruner.step()
        scores = taylor.scores["blocks.1.mlp.fc2"]
        found.append((plan.keep, pruner.plan.keep, scores))
    assert float(found[0][2].max()) > 0
    assert found[0][:2] == found[1][:2]
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-3, atol=1e-6)


def test_models_of_features_are_compared_and_distilled_on_their_own_dict() -> None:
    batches, teacher = [batch(seed) for seed in range(2)], model_of(num_classes=0)
    table = tp_amp.compare(
        teacher, batches[0], [tp_amp.DIMAPImportance()], batches, fractions=[0.5], progress=False
    )
    assert "cosine" in str(table)
    student = copy.deepcopy(teacher)
    tp_amp.apply_plan(
        student,
        tp_amp.plan_from_importance(teacher, batches[0], tp_amp.DIMAPImportance(), 0.5),
        batches[0],
    )
    weight = student.blocks[0].mlp.fc1.weight.detach().clone()
    tp_amp.distill(student, teacher, batches, epochs=1, warmup_epochs=0, progress=False)
    assert not torch.equal(student.blocks[0].mlp.fc1.weight, weight)


def test_padding_is_no_part_of_what_a_student_learns() -> None:
    model = model_of(num_classes=0)
    features, _ = read_features(model, prepare(batch(1), model), ["cls", "tokens"])
    with torch.no_grad():
        plain, padded = (
            prepare(batch(1, padding), model).call(features) for padding in (None, 50.0)
        )
    torch.testing.assert_close(padded["cls"], plain["cls"], rtol=1e-4, atol=1e-4)
    last = padded["tokens"].shape[1] - 3
    torch.testing.assert_close(padded["tokens"][:, :last], plain["tokens"], rtol=1e-4, atol=1e-4)
    assert not bool(padded["tokens"][:, last:].any())
