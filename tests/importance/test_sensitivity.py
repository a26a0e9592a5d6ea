"""The sensitivity against gradients taken image by image, and label by label."""

from typing import Any

import pytest
import torch
from sensitivities import output_sensitivity, place_sensitivity
from torch import Tensor, nn
from toys import fingerprint, images, toy

import tp_amp
from tp_amp.importance.objectives import Objective
from tp_amp.importance.places import repeated
from tp_amp.importance.sensitivity import sensitivity

LAYERS = ["blocks.0.mlp.second", "blocks.1.mlp.second"]


def gradient_of(model: nn.Module, layer: str, image: Tensor, loss: object) -> Tensor:
    """Gradient at a layer's output, `(tokens, outputs)`, for one image."""
    kept: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda m, a, out: kept.append(out))
    value = loss(model(image[None]))
    handle.remove()
    return torch.autograd.grad(value, kept[0])[0][0].double()


def test_a_callable_objective_gives_the_sum_of_outer_products() -> None:
    model = toy()
    squares = lambda output: output.square().sum(1).mean()  # noqa: E731
    before = fingerprint(model)
    found = output_sensitivity(model, LAYERS, images().split(4), Objective(squares))
    assert fingerprint(model) == before
    for layer in LAYERS:
        gradients = [gradient_of(model, layer, image, squares) for image in images()]
        products = torch.stack([g.T @ g for g in gradients])
        mean = products.mean(0)
        # Towards its diagonal, by what the mean of the products varies by.
        beside = ~torch.eye(len(mean), dtype=torch.bool)
        varies = products.var(0)[beside].sum() / len(products)
        share = varies / mean[beside].square().sum()
        assert 0.05 < share < 0.95
        expected = torch.where(beside, (1 - share) * mean, mean)
        assert torch.allclose(found[layer], expected, rtol=1e-4, atol=1e-9)


def test_predictions_give_the_fisher_information() -> None:
    """Labels are drawn from the model, one in ten from all; of many draws the mean is known."""
    model = toy()
    model.head.weight.data *= 8  # so that labels differ in probability
    few = images(4)
    many = [few] * 1000
    found = output_sensitivity(model, LAYERS[1:], many, Objective("prediction"))[LAYERS[1]]
    expected = torch.zeros(12, 12, dtype=torch.double)
    for image in few:
        p = 0.9 * model(image[None])[0].softmax(-1).detach() + 0.1 / 5
        for label, weight in enumerate(p.double()):
            loss = lambda logits, label=label: -logits.log_softmax(-1)[0, label]  # noqa: E731
            gradient = gradient_of(model, LAYERS[1], image, loss)
            expected += weight * (gradient.T @ gradient) / len(few)
    assert torch.allclose(found, expected, atol=0.05 * float(expected.abs().max()))


def test_errors_of_a_certain_model_are_not_free() -> None:
    model = toy()
    model.head.weight.data *= 1e3
    many = [images()] * 30
    found = output_sensitivity(model, LAYERS, many, Objective("prediction"))
    model.head.weight.data /= 1e3
    unsure = output_sensitivity(model, LAYERS, many, Objective("prediction"))
    for layer in LAYERS:
        assert found[layer].trace() > unsure[layer].trace()


def test_it_is_the_same_each_time() -> None:
    model = toy()
    once, again = (
        output_sensitivity(model, LAYERS, images().split(3), Objective("similarity"))
        for _ in range(2)
    )
    assert all(torch.equal(once[layer], again[layer]) for layer in LAYERS)


def test_a_layer_that_does_not_matter_is_named() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.unused(x)
            return self.used(x)

    with pytest.raises(ValueError, match=r"does not depend on \['unused'\]"):
        output_sensitivity(
            Unused(), ["used", "unused"], [torch.randn(5, 4)], Objective("prediction")
        )


def test_a_convolution_is_the_linear_at_each_place() -> None:
    torch.manual_seed(0)
    linear, convolution = nn.Linear(4, 3).double(), nn.Conv2d(4, 3, 1).double()
    convolution.load_state_dict(
        {"weight": linear.weight.detach()[:, :, None, None], "bias": linear.bias.detach()}
    )
    tokens = torch.randn(5, 6, 4).double()
    squares = Objective(lambda output: output.square().sum())
    maps = tokens.mT.reshape(5, 4, 2, 3)
    expected = output_sensitivity(nn.Sequential(linear), ["0"], [tokens], squares)
    found = output_sensitivity(nn.Sequential(convolution), ["0"], [maps], squares)
    torch.testing.assert_close(found["0"], expected["0"])


def places(model: nn.Module, batches: list[Tensor], objective: object, layers: list[str]) -> dict:
    return place_sensitivity(model, layers, batches, Objective(objective))


def test_a_place_weighs_its_mean_squared_gradient() -> None:
    model = toy()
    squares = lambda output: output.square().sum(1).mean()  # noqa: E731
    before = fingerprint(model)
    found = places(model, list(images().split(4)), squares, LAYERS)
    assert fingerprint(model) == before
    for layer in LAYERS:
        gradients = [gradient_of(model, layer, image, squares) for image in images()]
        expected = torch.stack([g.square().sum(1) for g in gradients]).mean(0)
        expected = expected / expected.mean() + 1
        assert torch.allclose(found[layer], expected, rtol=1e-4, atol=1e-9)
        assert len(expected) > 1


def test_both_come_from_one_pass() -> None:
    model, squares = toy(), Objective(lambda output: output.square().sum(1).mean())
    passes: list[int] = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    batches = list(images().split(4))
    found = sensitivity(model, batches, squares, outputs=LAYERS[:1], places=LAYERS, progress=False)
    handle.remove()
    assert len(passes) == len(batches)
    alone = output_sensitivity(model, LAYERS[:1], batches, squares)
    assert alone.keys() == found.outputs.keys()
    assert torch.equal(alone[LAYERS[0]], found.outputs[LAYERS[0]])
    others = place_sensitivity(model, LAYERS, batches, squares)
    assert others.keys() == found.places.keys()
    assert all(torch.equal(others[name], found.places[name]) for name in LAYERS)


def test_layers_whose_places_are_unknown_are_left_out() -> None:
    class Parts(nn.Module):
        """One layer that is read, one that is not, and one that has no images first."""

        def __init__(self) -> None:
            super().__init__()
            self.read, self.unread, self.turned = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            self.unread(x)
            turned = self.turned(x.flatten(0, 1)[:-1])
            return self.read(x).mean(1) + turned.mean(0)

    torch.manual_seed(0)
    layers = ["read", "unread", "turned"]
    squares = lambda output: output.square().sum(1).mean()  # noqa: E731
    found = places(Parts(), [torch.randn(3, 4, 6)], squares, layers)
    assert list(found) == ["read"]
    assert not places(Parts(), [torch.randn(3, 4, 6), torch.randn(3, 5, 6)], squares, ["read"])


def test_places_repeat_for_each_image() -> None:
    weights = torch.tensor([1.0, 2.0])
    assert repeated(weights, 6).tolist() == [1, 2, 1, 2, 1, 2]
    assert repeated(weights, 5) is None
    assert repeated(None, 6) is None


def test_gradients_that_are_not_finite_raise() -> None:
    model = toy()
    broken = lambda output: (output * 0).abs().sqrt().mean()  # noqa: E731
    with pytest.raises(ValueError, match=r"blocks.0.mlp.second.* not finite"):
        places(model, [images(4)], broken, LAYERS)


@pytest.mark.parametrize(
    "objective", [lambda output: output.detach().sum(), lambda output: torch.tensor(0.0)]
)
def test_an_objective_without_a_gradient_is_told_by_all_that_take_one(objective: Any) -> None:
    model, batches = toy(), [images(8), images(8, 2)]
    before = fingerprint(model)
    plan = tp_amp.PruningPlan({"blocks.0.mlp.second": [0, 1, 2]})
    options: dict[str, Any] = {"token_weights": "sensitivity", "progress": False}
    for call in (
        lambda: tp_amp.compensate(model, plan, batches, objective=objective, **options),
        lambda: tp_amp.ReconstructionImportance(objective).collect(model, batches, progress=False),
        lambda: tp_amp.EntropyTaylorImportance(objective).collect(model, batches, progress=False),
    ):
        with pytest.raises(ValueError, match="reads the model's output with its gradient"):
            call()
    assert fingerprint(model) == before


def test_an_objective_of_other_layers_has_a_gradient() -> None:
    """What it does not depend on is told, or left out, layer by layer."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.first(x), self.second(x)

    found = sensitivity(
        Two(),
        [torch.ones(4, 4)],
        Objective(lambda output: output[0].sum()),
        outputs=["second"],
        optional=["second"],
        progress=False,
    )
    assert found.outputs == {}


def test_images_of_nan_are_told() -> None:
    bad = images(4)
    bad[2, 0, 0, 0] = float("nan")
    plan = tp_amp.PruningPlan({"blocks.1.mlp.second": [0, 1]})
    message = "what the model gives is not finite; check weights and images for NaN"
    with pytest.raises(ValueError, match=message):
        tp_amp.ReconstructionImportance().collect(toy(), [images(4), bad], progress=False)
    with pytest.raises(ValueError, match=message):
        tp_amp.compensate(toy(), plan, [images(4), bad], token_weights="sensitivity")
