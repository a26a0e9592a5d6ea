import math

import numpy as np
import open_clip
import pytest
import scipy.special
import scipy.stats
import timm
import torch
from torch import nn
from toys import fingerprint, images, perturbed, toy

import tp_amp
from tp_amp.importance.objectives import (
    Objective,
    mean_objective,
    prediction_entropy,
    similarity_entropy,
)
from tp_amp.importance.outputs.features import pooled_features
from tp_amp.importance.outputs.logits import ends_in_classifier
from tp_amp.running.inputs import Inputs


def test_prediction_entropy_equals_scipy() -> None:
    logits = torch.randn(7, 5) * 4
    p = scipy.special.softmax(logits.double().numpy(), axis=-1)
    expected = scipy.stats.entropy(p, axis=-1).mean()
    assert float(prediction_entropy(logits)) == pytest.approx(expected, rel=1e-5)


def test_prediction_entropy_of_certain_logits_is_zero_not_nan() -> None:
    logits = torch.tensor([[1000.0, 0.0]], requires_grad=True)
    value = prediction_entropy(logits)
    value.backward()
    assert float(value.detach()) == 0
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("temperature", [1 / 15, 1 / 20, 1.0])
def test_similarity_entropy_equals_a_loop(temperature: float) -> None:
    features = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).double()
    f = features.numpy()
    entropies = []
    for i in range(6):
        cosines = [
            f[i] @ f[j] / (np.linalg.norm(f[i]) * np.linalg.norm(f[j])) / temperature
            for j in range(6)
        ]
        entropies.append(scipy.stats.entropy(scipy.special.softmax(cosines)))
    actual = float(similarity_entropy(features, temperature))
    assert actual == pytest.approx(np.mean(entropies), rel=1e-5)


def test_half_precision_is_computed_in_float32() -> None:
    features = torch.randn(8, 16)
    for dtype in (torch.bfloat16, torch.float16):
        assert similarity_entropy(features.to(dtype)).dtype == torch.float32
        assert prediction_entropy(features.to(dtype)).dtype == torch.float32


def test_similarity_of_one_image_raises() -> None:
    with pytest.raises(ValueError, match="batch of 1; use larger batches"):
        similarity_entropy(torch.randn(1, 4))


@pytest.mark.parametrize("kind", ["entropy", ""])
def test_unknown_objective_raises(kind: str) -> None:
    with pytest.raises(ValueError, match="objective must be 'auto'"):
        Objective(kind)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_bad_temperature_raises(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        Objective("similarity", temperature)


def clip_tower() -> nn.Module:
    return open_clip.model.VisionTransformer(32, 16, 64, 1, 4, 4.0, output_dim=8).eval()


def batch(size: int) -> Inputs:
    return Inputs((images(3, size=size, channels=3),))


def test_auto_tells_classifiers_from_feature_models() -> None:
    vit = {"depth": 1, "img_size": 32, "pretrained": False}
    for classes, expected in ((10, True), (0, False)):
        model = timm.create_model("vit_tiny_patch16_224", num_classes=classes, **vit)
        assert ends_in_classifier(model, batch(32)) is expected
    assert ends_in_classifier(toy(classes=5), Inputs((images(2),))) is True
    assert ends_in_classifier(toy(classes=0), Inputs((images(2),))) is False
    assert ends_in_classifier(clip_tower(), batch(32)) is False


def single(**arguments: object) -> nn.Module:
    """A ViT that gives one number for each image."""
    vit = {"depth": 2, "img_size": 32, "embed_dim": 24, "num_heads": 2, "num_classes": 1}
    return perturbed(timm.create_model("vit_tiny_patch16_224", **{**vit, **arguments}))


def test_one_number_for_each_image_is_no_classes() -> None:
    assert ends_in_classifier(single(), batch(32)) is False
    replaced = single(num_classes=10)
    replaced.head = nn.Linear(24, 1)  # num_classes stays
    assert ends_in_classifier(replaced, batch(32)) is False
    assert Objective("auto").resolve(single(), batch(32)).kind == "similarity"
    with pytest.raises(TypeError, match=r"needs features .* shape \(3, 1\); pass objective=a call"):
        Objective("similarity")(toy(classes=1), Inputs((images(3),)))


def test_the_prediction_of_one_class_is_refused() -> None:
    one = Objective("prediction")
    for measure in (one, one.values):
        with pytest.raises(ValueError, match="the softmax over one class is constant"):
            measure(single(), batch(32))
    with pytest.raises(ValueError, match="the softmax over one class is constant"):
        one.of_output({"logits": torch.zeros(4, 1)})


def test_a_model_of_one_number_is_scored_and_searched_by_its_features() -> None:
    data = [images(6, seed, 32, 3) for seed in range(4)]
    scores = tp_amp.EntropyTaylorImportance().collect(single(), data, progress=False).scores
    assert float(scores["blocks.0.mlp.fc2"].max()) > 0
    model = single()
    pruner = tp_amp.AdaptiveMLPPruner(
        model,
        data[0][:1],
        tp_amp.EntropyTaylorImportance(data=data[:2]),
        data[2:],
        max_increase=1e-4,
        progress=False,
    )
    pruner.step()
    assert pruner.plan.widths["blocks.0.mlp.fc2"] == 96  # nothing is free
    for importance in (tp_amp.EntropyTaylorImportance, tp_amp.ReconstructionImportance):
        with pytest.raises(ValueError, match="softmax over one class"):
            importance("prediction").collect(single(), data, progress=False)
    with pytest.raises(TypeError, match="pass objective=a callable"):
        tp_amp.EntropyTaylorImportance().collect(toy(classes=1), [images(4)], progress=False)


def test_features_of_timm_are_the_input_of_the_head() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=10).eval()
    seen = []
    model.head.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    features = pooled_features(model, batch(32))
    model(batch(32).args[0])
    torch.testing.assert_close(features, seen[-1])


def test_features_of_open_clip_are_before_the_projection() -> None:
    tower = clip_tower()
    before = fingerprint(tower)
    features = pooled_features(tower, batch(32))
    assert features.shape == (3, 64)
    torch.testing.assert_close(features @ tower.proj, tower(batch(32).args[0]))
    assert fingerprint(tower) == before


def test_features_of_clip_are_its_image_towers() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = clip_tower()

    model = Both()
    torch.testing.assert_close(
        pooled_features(model, batch(32)), pooled_features(model.visual, batch(32))
    )


@pytest.mark.parametrize("output", [torch.zeros(2, 3, 4), "text", None, (), torch.zeros(())])
@pytest.mark.parametrize("kind", ["prediction", "similarity"])
def test_unexpected_output_raises(output: object, kind: str) -> None:
    with pytest.raises(TypeError, match="pass objective=a callable"):
        Objective(kind).of_output(output)


def test_callable_must_return_a_scalar() -> None:
    with pytest.raises(TypeError, match=r"returned a tensor of shape \(2,\)"):
        Objective(lambda output: output[:, 0]).of_output(torch.zeros(2, 3))
    with pytest.raises(TypeError, match="returned a float"):
        Objective(lambda output: 1.0).of_output(torch.zeros(2, 3))
    assert float(Objective(lambda output: output.sum()).of_output(torch.ones(2, 3))) == 6


def test_mean_is_over_images_not_batches() -> None:
    model, data = toy(), images(7)
    whole = mean_objective(model, [data], Objective("prediction"))
    parts = mean_objective(model, data.split(4), Objective("prediction"))
    assert parts == pytest.approx(whole, rel=1e-6)


def test_mean_gives_the_same_value_from_a_shuffling_loader_and_restores_random_state() -> None:
    model = toy(classes=0)
    loader = torch.utils.data.DataLoader(images(8), batch_size=4, shuffle=True)
    before = fingerprint(model)
    values = [mean_objective(model, loader, Objective("similarity")) for _ in range(2)]
    assert values[0] == values[1]
    assert fingerprint(model) == before


def test_nan_images_raise() -> None:
    data = images(4)
    data[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="objective is nan"):
        mean_objective(toy(), [data], Objective("prediction"))


def test_features_of_hugging_face_without_a_pooler_are_its_cls_token() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4, num_channels=1,
    )  # fmt: skip
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        found = pooled_features(model, Inputs((), {"pixel_values": images(3)}))
        torch.testing.assert_close(found, model(images(3)).last_hidden_state[:, 0])
