"""What errors count by, on models whose output is neither classes nor features."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from toys import ToyViT, fingerprint, images, perturbed, toy

import tp_amp
from tp_amp.importance.error_objective import error_objective, readable
from tp_amp.importance.objectives import Objective


class Dense(nn.Module):
    """A backbone, and what some models return of it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.backbone = perturbed(
            timm.create_model(
                "vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2
            )
        )

    def forward(self, x: Tensor) -> Any:
        tokens = self.backbone.forward_features(x)
        maps = tokens[:, 1:].transpose(1, 2).unflatten(2, (2, 2))
        return {
            "tokens": tokens,
            "maps": maps,
            "taps": [maps, 2 * maps],
            "depth": maps.mean(1),
            "dict": {"boxes": tokens[..., :4], "scores": tokens[..., 4]},
            "pair": (maps, tokens),
        }[self.kind]


KINDS = ("tokens", "maps", "taps", "depth", "dict", "pair")


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 3, 32, 32, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_recipe_needs_no_objective(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = Dense(kind).eval()
    before = fingerprint(model)
    with caplog.at_level(logging.WARNING):
        importance = tp_amp.ReconstructionImportance(data=data())
        plan = tp_amp.plan_for_target(model, data()[0][:1], importance, {"params": 0.85})
        assert fingerprint(model) == before
        told = [r for r in caplog.records if "neither classes nor features" in r.message]
        assert len(told) == 1
        assert "Dense" in told[0].message
        importance.collect(model, data(), progress=False)
        assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1
        cut, plain = copy.deepcopy(model), copy.deepcopy(model)
        options: dict[str, Any] = {"every_linear": True, "refine": 2}
        tp_amp.compensate(cut, plan, data(), token_weights="sensitivity", progress=False, **options)
        told = [r for r in caplog.records if "neither classes nor features" in r.message]
        assert len(told) == 2  # the copy is another model
    tp_amp.apply_plan(plain, plan)
    errors = []
    for other in (cut, plain):
        with torch.no_grad():
            pairs = zip(flat(model(data()[0])), flat(other(data()[0])), strict=True)
            errors.append(float(sum((one - two).square().sum() for one, two in pairs)))
    assert errors[0] < 0.5 * errors[1]


def flat(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return list(output.values() if isinstance(output, dict) else output)


def test_it_is_the_same_as_none() -> None:
    model = Dense("tokens").eval()
    named, none, automatic = (
        tp_amp.ReconstructionImportance(objective).collect(model, data(), progress=False)
        for objective in ("reconstruction", None, "auto")
    )
    for name, errors in none.errors.items():
        for other in (named, automatic):
            assert torch.equal(other.errors[name], errors)
            assert torch.equal(other.orders[name], none.orders[name])


def test_an_objective_is_used_for_what_errors_cost() -> None:
    model = Dense("tokens").eval()
    plan = tp_amp.PruningPlan({"backbone.blocks.1.mlp.fc2": list(range(30))})
    fitted = {}
    for name, objective in {
        "class token": lambda tokens: tokens[:, 0].square().mean(),
        "all alike": "reconstruction",
    }.items():
        cut = copy.deepcopy(model)
        tp_amp.compensate(
            cut,
            plan,
            data(),
            token_weights="sensitivity",
            objective=objective,
            progress=False,
        )
        with torch.no_grad():
            error = cut(data()[0]) - model(data()[0])
        fitted[name] = float(error[:, 0].square().mean())
    assert fitted["class token"] < 0.9 * fitted["all alike"]


@pytest.mark.parametrize("kind", ["prediction", "similarity", lambda output: output.sum()])
def test_what_is_asked_for_is_never_replaced(kind: Any) -> None:
    asked = Objective(kind)
    assert readable(asked, Dense("maps").eval(), data()) is asked
    assert readable(None, Dense("maps").eval(), data()) is None


def test_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match="'reconstruction', a callable or None, found 'depth'"):
        error_objective("depth")
    with pytest.raises(ValueError, match="'reconstruction', a callable or None, found 'depth'"):
        tp_amp.Recipe(objective="depth")
    with pytest.raises(ValueError, match="temperature must be positive"):
        error_objective("auto", 0.0)
    model = Dense("tokens").eval()
    before = fingerprint(model)
    plan = tp_amp.PruningPlan({"backbone.blocks.1.mlp.fc2": list(range(30))})
    with pytest.raises(ValueError, match="found 'depth'"):
        tp_amp.compensate(model, plan, data(), objective="depth")
    assert fingerprint(model) == before


class Segmenter(ToyViT):
    """Gives masks beside the tokens that they are made of, as EoMT does."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        tokens = self.norm(self.blocks(tokens))
        return {"last_hidden_state": tokens, "masks_queries_logits": self.head(tokens)}


def test_features_beside_predictions_are_not_what_a_model_is_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    model, batches = perturbed(Segmenter()), [images(4)]
    with caplog.at_level(logging.WARNING):
        assert readable(Objective("auto"), model, batches) is None
    assert "it gives masks_queries_logits too" in caplog.text
    own = Objective("similarity")
    assert readable(own, model, batches) is own


@pytest.mark.parametrize("make", [lambda: toy(classes=1), lambda: Regressor()])
def test_all_errors_count_the_same_where_one_number_is_given(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The softmax over one class is constant: no error would cost anything."""
    model, batches = make(), [images(8, seed) for seed in range(3)]
    with caplog.at_level(logging.WARNING):
        found = tp_amp.ReconstructionImportance().collect(
            model, batches, layers=["blocks.0.mlp.second"], progress=False
        )
    assert "it gives one number for each image" in caplog.text
    none = tp_amp.ReconstructionImportance(None).collect(
        model, batches, layers=["blocks.0.mlp.second"], progress=False
    )
    assert float(found.errors["blocks.0.mlp.second"][0]) > 0
    torch.testing.assert_close(found.errors, none.errors)


class Regressor(ToyViT):
    """Knows its classes, as timm's models do."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(classes=1)
        self.num_classes = 1
        perturbed(self)


class Named(ToyViT):
    """Has a place for logits, and none."""

    def forward(self, x: Tensor) -> dict[str, Tensor | None]:
        features = self.norm(self.blocks(self.embed(x).flatten(2).transpose(1, 2))).mean(1)
        return {"logits": None, "pooler_output": features}


def test_what_is_none_is_not_given(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    found = readable(Objective("auto"), perturbed(Named()), [images(4)])
    assert found is not None
    assert found.kind == "similarity"
    assert caplog.text == ""
