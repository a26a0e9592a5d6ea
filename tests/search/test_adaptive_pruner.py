import copy
import math

import open_clip
import pytest
import timm
import torch
import torch_pruning as tp
from entropies import entropy_of
from searches import data, duplicated, pruner_of
from torch import Tensor, nn
from toys import ToyViT, fingerprint, images, masked, perturbed, relative, toy

import tp_amp
from tp_amp import AdaptiveMLPPruner, EntropyTaylorImportance


def zoo() -> dict[str, tuple[nn.Module, int]]:
    small = {"pretrained": False, "num_classes": 7}
    swin = {"window_size": 2, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 32}
    tower = open_clip.model.VisionTransformer(32, 16, 64, 2, 4, 4.0, output_dim=8)
    return {
        "vit": (timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, **small), 32),
        "deit": (
            timm.create_model("deit_tiny_distilled_patch16_224", depth=2, img_size=32, **small),
            32,
        ),
        "dinov2": (
            timm.create_model("vit_small_patch14_dinov2", depth=2, img_size=28, pretrained=False),
            28,
        ),
        "swin": (
            timm.create_model("swin_tiny_patch4_window7_224", img_size=32, **swin, **small),
            32,
        ),
        "open_clip": (tower, 32),
    }


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "swin", "open_clip"])
def test_pruned_equals_masked_dense(name: str) -> None:
    torch.manual_seed(0)
    model, size = zoo()[name]
    model = perturbed(model)
    dense = copy.deepcopy(model)
    scoring, search = data(size=size, channels=3)
    pruner = AdaptiveMLPPruner(
        model,
        scoring[0][:1],
        EntropyTaylorImportance(data=scoring),
        search,
        max_increase=1.0,
        steps=2,
        max_pruning_ratio=0.75,
    )
    pruner.step()
    kept = [width / dense.get_submodule(n).in_features for n, width in pruner.plan.widths.items()]
    assert min(kept) < 1
    with torch.no_grad():
        expected = masked(dense, pruner.plan.keep)(search[0])
        assert relative(model(search[0]), expected) < 1e-5
        assert relative(dense(search[0]), expected) > 1e-3  # the masks matter


def test_deit_distilled_reads_the_mean_of_two_heads() -> None:
    """In eval mode its output is one tensor of logits; the search uses that."""
    model = zoo()["deit"][0]
    scoring, search = data(size=32, channels=3)
    pruner = AdaptiveMLPPruner(
        model, scoring[0][:1], EntropyTaylorImportance(data=scoring), search, steps=1
    )
    pruner.step()
    with torch.no_grad():
        model.eval()
        value = sum(float(entropy_of("prediction", model(b))) for b in search) / 2
    accepted = [p for probes in pruner.plan.probes.values() for p in probes if p.accepted]
    if accepted:
        assert value == pytest.approx(
            next(iter(p.entropy for ps in pruner.plan.probes.values() for p in ps if p.accepted)),
            rel=1e-4,
        )


@pytest.mark.parametrize(
    "importance",
    [
        tp.importance.RandomImportance(),
        tp.importance.MagnitudeImportance(p=1),
        tp.importance.LAMPImportance(),
        tp.pruner.importance.FPGMImportance(),
    ],
    ids=lambda importance: type(importance).__name__,
)
def test_any_torch_pruning_importance(importance: tp.importance.Importance) -> None:
    model = toy()
    dense = copy.deepcopy(model)
    pruner = pruner_of(model, importance=importance, max_increase=0.5)
    pruner.step()
    assert all(width < 20 for width in pruner.plan.widths.values())
    with torch.no_grad():
        expected = masked(dense, pruner.plan.keep)(images())
        assert relative(model(images()), expected) < 1e-5


def test_interactive_step_yields_groups_that_the_caller_prunes() -> None:
    automatic, manual = toy(), toy()
    pruner_of(automatic, max_increase=0.01).step()
    pruner = pruner_of(manual, max_increase=0.01)
    before = manual(images())
    groups = pruner.step(interactive=True)
    first = next(groups)
    torch.testing.assert_close(manual(images()), before)  # not cut yet
    first.prune()
    for group in groups:
        assert isinstance(group, tp.dependency.Group)
        group.prune()
    assert repr(manual) == repr(automatic)
    torch.testing.assert_close(manual(images()), automatic(images()))


def test_pruning_history_replays_on_the_dense_model() -> None:
    model, again = toy(), toy()
    pruner = pruner_of(model, max_increase=0.01)
    pruner.step()
    replay = tp.pruner.MetaPruner(again, (images(1),), tp.importance.RandomImportance())
    replay.load_pruning_history(pruner.pruning_history())
    torch.testing.assert_close(again(images()), model(images()))


def test_enumerates_no_group_that_is_no_mlp(monkeypatch: pytest.MonkeyPatch) -> None:
    roots = []
    original = tp.DependencyGraph.get_pruning_group

    def spy(self, module, pruning_fn, idxs):
        roots.append(self._module2name[module])
        return original(self, module, pruning_fn, idxs)

    monkeypatch.setattr(tp.DependencyGraph, "get_pruning_group", spy)
    pruner_of(toy(), max_increase=0.01).step()
    assert roots == []  # it makes its own, from what find_mlps has checked


def test_frozen_flags_training_mode_and_gradients_survive_pruning() -> None:
    model = toy()
    model(images()).sum().backward()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp.second" not in name)
    model.train()
    model.blocks[0].eval()
    before = fingerprint(model)
    pruner_of(model, max_increase=0.01).step()
    after = fingerprint(model)
    for key in ("required", "training", "hooks", "random"):
        assert after[key] == before[key]
    assert model.norm.weight.grad.tolist() == before["gradients"]["norm.weight"]


def test_round_to_min_width_and_max_pruning_ratio() -> None:
    pruner = pruner_of(toy(hidden=40), max_increase=10.0, round_to=8)
    pruner.step()
    assert set(pruner.plan.widths.values()) == {8}
    pruner = pruner_of(toy(hidden=40), max_increase=10.0, min_width=13)
    pruner.step()
    assert set(pruner.plan.widths.values()) == {13}
    pruner = pruner_of(toy(hidden=40), max_increase=10.0, max_pruning_ratio=0.33, round_to=4)
    pruner.step()
    assert set(pruner.plan.widths.values()) == {28}  # 40 * 0.67 = 26.8 and up to a multiple of 4


def test_ignored_layers_are_not_pruned() -> None:
    model = toy()
    pruner = pruner_of(model, max_increase=10.0, ignored_layers=[model.blocks[0].mlp])
    pruner.step()
    assert list(pruner.plan.keep) == ["blocks.1.mlp.second"]
    assert model.blocks[0].mlp.first.out_features == 20
    model = toy()
    with pytest.raises(ValueError, match="all 2 MLPs are ignored layers"):
        pruner_of(model, ignored_layers=[model.blocks])


def test_objective_argument_wins_over_the_importances() -> None:
    model = toy()
    calls = []

    def objective(output: Tensor) -> Tensor:
        calls.append(1)
        return output.square().mean()

    pruner_of(model, objective=objective).step()
    assert calls


def test_second_step_says_that_nothing_happens(caplog: pytest.LogCaptureFixture) -> None:
    pruner = pruner_of(toy(), max_increase=0.01)
    pruner.step()
    widths = pruner.plan.widths
    pruner.step()
    assert "pruned by step() before" in caplog.text
    assert pruner.plan.widths == widths


BAD_ARGUMENTS = [
    ({"max_increase": -0.1}, "max_increase must be a finite number"),
    ({"max_increase": math.nan}, "max_increase must be a finite number"),
    ({"max_increase": math.inf}, "max_increase must be a finite number"),
    ({"steps": 0}, "steps must be an integer"),
    ({"steps": 2.5}, "steps must be an integer"),
    ({"round_to": 0}, "round_to must be an integer"),
    ({"min_width": 0}, "min_width must be an integer"),
    ({"max_pruning_ratio": 0.0}, "max_pruning_ratio must be a fraction"),
    ({"max_pruning_ratio": 1.5}, "max_pruning_ratio must be a fraction"),
    ({"objective": "loss"}, "objective must be 'auto'"),
    ({"rescore": True, "importance": EntropyTaylorImportance()}, "rescore=True needs"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments_raise_and_leave_the_model_untouched(
    arguments: dict[str, object], message: str
) -> None:
    model = toy()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        pruner_of(model, **arguments)
    assert fingerprint(model) == before


def test_calibration_must_be_repeatable_and_not_the_scoring_data() -> None:
    scoring, search = data()
    importance = EntropyTaylorImportance(data=scoring)
    with pytest.raises(TypeError, match="one-shot"):
        AdaptiveMLPPruner(toy(), images(1), importance, iter(search))
    with pytest.raises(ValueError, match="scores on the calibration batches"):
        AdaptiveMLPPruner(toy(), images(1), importance, scoring)


def test_no_mlp_raises() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    with pytest.raises(ValueError, match="no MLP was found in Sequential"):
        pruner_of(model)


def test_nan_weights_and_scores_raise() -> None:
    model = toy()
    with torch.no_grad():
        model.head.bias[0] = math.nan
    with pytest.raises(ValueError, match=r"parameter head\.bias holds NaN"):
        pruner_of(model)
    model = toy()
    pruner = pruner_of(model, importance=lambda group: torch.full((20,), math.nan))
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"scores for blocks\.1\.mlp\.second must be 20 finite"):
        pruner.step()
    pruner = pruner_of(model, importance=lambda group: None)
    with pytest.raises(ValueError, match=r"no score for the MLP blocks\.1\.mlp\.second"):
        pruner.step()
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        ([], ValueError, "holds no batch"),
        ([images(2, size=12, channels=3)], ValueError, "size and channels"),
        ([images() * math.nan], ValueError, "check the images for NaN"),
    ],
)
def test_bad_calibration_raises_and_leaves_the_model_untouched(
    calibration: list[Tensor], error: type[Exception], message: str
) -> None:
    model = toy()
    importance = EntropyTaylorImportance().collect(model, data()[0])
    pruner = AdaptiveMLPPruner(model, images(1), importance, calibration)
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        pruner.step()
    assert fingerprint(model) == before


def test_unexpected_output_type_raises() -> None:
    class Text(ToyViT):
        def forward(self, x: Tensor) -> object:
            output = super().forward(x)
            return output if torch.is_grad_enabled() else "text"

    model = Text()
    importance = tp.importance.MagnitudeImportance()
    pruner = pruner_of(model, importance=importance, objective="prediction")
    before = fingerprint(model)
    with pytest.raises(TypeError, match="model returned a str; pass objective=a callable"):
        pruner.step()
    assert fingerprint(model) == before


def test_heads_that_cannot_be_cut_are_named() -> None:
    message = r"no attention of ToyViT can lose heads: blocks\.0, blocks\.1: .*number of heads"
    with pytest.raises(ValueError, match=message):
        pruner_of(toy(), prune_num_heads=True)


@pytest.mark.parametrize("target", [{"params": 0.8}, {"macs": 0.8}])
def test_target_is_met(target: dict[str, float]) -> None:
    model = toy(hidden=40)
    dense = tp_amp.inspect(model, images(1)).shares["total"]
    pruner = pruner_of(model, target=target)
    pruner.step()
    reached = tp_amp.inspect(model, images(1)).shares["total"]
    shares = {"params": reached.parameters / dense.parameters, "macs": reached.macs / dense.macs}
    [(kind, amount)] = target.items()
    assert 0.5 * amount < shares[kind] <= amount
    assert pruner.max_increase > 0


def test_target_out_of_reach_raises_and_leaves_the_model() -> None:
    model = toy()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"can't be met: reachable are .* to 1"):
        pruner_of(model, target={"params": 0.1})
    assert fingerprint(model) == before


def test_bad_compensation_raises() -> None:
    with pytest.raises(ValueError, match="compensation must be one of"):
        pruner_of(toy(), compensation="ridge")
    with pytest.raises(TypeError, match="found a one-shot list_iterator"):
        pruner_of(toy(), compensation="affine", compensation_data=iter([images()]))


def test_forward_fn_gets_what_the_script_gave() -> None:
    """A tensor stays a tensor, as with Torch-Pruning's own pruners."""
    model = toy()
    seen: list[type] = []

    def forward(called: nn.Module, inputs: Tensor) -> Tensor:
        seen.append(type(inputs))
        return called(inputs.float())

    pruner = pruner_of(model, forward_fn=forward, target={"macs": 0.9})
    assert len(pruner.mlps) == 2
    assert set(seen) == {Tensor}


def test_groups_must_be_pruned_as_they_come_with_compensation() -> None:
    pruner = pruner_of(
        duplicated(), max_increase=0.05, compensation="affine", compensation_data=[images(40)]
    )
    with pytest.raises(ValueError, match="prune each group as it comes"):
        list(pruner.step(interactive=True))


def test_a_step_that_failed_can_be_taken_again() -> None:
    model = toy()
    pruner = pruner_of(model)
    pruner.calibration = [images(4, channels=3)]
    for _ in range(2):
        with pytest.raises(ValueError, match="the model failed on inputs of shape"):
            pruner.step()


def test_the_importances_own_objective_is_searched_with() -> None:
    importance = tp_amp.ReconstructionImportance("similarity", data=[images(10)])
    assert pruner_of(toy(), importance=importance).objective.kind == "similarity"
