"""Torch-Pruning's importances made ready to score, against its own examples."""

from __future__ import annotations

import pytest
import torch
import torch_pruning as tp
from comparisons import batches
from torch import Tensor, nn
from toys import images, toy

import tp_amp
from tp_amp.importance.readiness import forget, make_ready


def test_taylor_sums_the_gradients_of_all_batches() -> None:
    model, data = toy().requires_grad_(False).train(), batches(labels=True)
    make_ready(tp.importance.TaylorImportance(), model, data, progress=False)
    reference = toy()
    for x, y in data:
        nn.functional.cross_entropy(reference(x), y).backward()
    for found, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)
        assert not found.requires_grad
    assert model.training
    forget(model)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_labels_in_dicts_and_out_of_range() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = toy()

        def forward(self, pixel_values: Tensor) -> Tensor:
            return self.inner(pixel_values)

    model, (x, y) = Named(), batches(labels=True)[0]
    taylor = tp.importance.TaylorImportance()
    make_ready(taylor, model, [{"pixel_values": x, "labels": y}], progress=False)
    reference = toy()
    nn.functional.cross_entropy(reference(x), y).backward()
    torch.testing.assert_close(model.inner.head.weight.grad, reference.head.weight.grad)
    with pytest.raises(ValueError, match=r"labels lie between .* the model has 5 classes"):
        make_ready(taylor, model, [(x, y + 3)], progress=False)


def test_activation_sums_all_batches() -> None:
    model, seen = toy(), []
    down = model.blocks[0].mlp.second
    handle = down.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))
    for batch in batches():
        model(batch)
    handle.remove()
    importance = tp.pruner.importance.ActivationImportance()
    make_ready(importance, model, batches(), progress=False)
    expected = sum(h.abs().sum((0, 1)) for h in seen)
    torch.testing.assert_close(down._importance, expected)


def test_what_cannot_be_made_ready_is_told() -> None:
    with pytest.raises(ValueError, match="hooks of its own"):
        make_ready(tp.importance.OBDCImportance(num_classes=5), toy(), batches())


class Recorder(tp.importance.HessianImportance):
    """Keeps each image's gradient, of which Torch-Pruning's own sum keeps the last alone."""

    def accumulate_grad(self, model: nn.Module) -> None:
        self.seen = [*getattr(self, "seen", []), model.head.weight.grad.clone()]


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_hessian_reads_batches_image_by_image(form: str) -> None:
    x, labels = images(5), torch.tensor([0, 1, 2, 3, 4])
    importance, model = Recorder(), toy()
    batch = (x, labels) if form == "tuple" else {"x": x, "labels": labels}
    make_ready(importance, toy(), [batch], progress=False)
    assert len(importance.seen) == 5
    for i, found in enumerate(importance.seen):
        loss = nn.functional.cross_entropy(model(x[i : i + 1]), labels[i : i + 1])
        expected = torch.autograd.grad(loss, model.head.weight)[0]
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("GroupTaylorImportance", "TaylorImportance"),
        ("GroupHessianImportance", "HessianImportance"),
    ],
)
def test_both_names_of_an_importance_are_made_ready_alike(one: str, other: str) -> None:
    found = []
    for name in (one, other):
        importance = getattr(tp.importance, name)()
        data = batches(labels=True)
        table = tp_amp.compare(toy(), images(1), {name: importance}, data, progress=False)
        found.append([(row.kept, row.value) for row in table.rows])
        assert not table.failures
    assert found[0] == found[1]


def test_what_a_vit_has_nothing_for_is_said_in_a_sentence() -> None:
    importances = [
        tp.importance.BNScaleImportance(),
        tp.pruner.importance.OBDCImportance(num_classes=5),
        tp.importance.LAMPImportance(),
    ]
    found = tp_amp.compare(toy(), images(1), importances, batches(labels=True), progress=False)
    assert found.failures["BNScaleImportance"] == (
        "BNScaleImportance reads the scales of batch norms, and ToyViT has none; take another "
        "importance"
    )
    assert "needs hooks of its own" in found.failures["OBDCImportance"]
    assert {row.importance for row in found.rows} == {"LAMPImportance"}
