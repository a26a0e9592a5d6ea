"""What a model is called with: batches of every form, and example inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import ToyViT, fingerprint, images, toy

import tp_amp
from tp_amp import EntropyTaylorImportance
from tp_amp.running.inputs import Inputs, example, of_size, one_image, prepare, runner
from tp_amp.running.padding import images_alone


def test_images_take_the_models_dtype_and_other_inputs_keep_theirs() -> None:
    model = toy().double()
    inputs = prepare({"x": images(2), "index": torch.arange(2), "labels": 1, "flag": True}, model)
    assert inputs.kwargs["x"].dtype == torch.float64
    assert inputs.kwargs["index"].dtype == torch.int64
    assert inputs.kwargs["flag"] is True
    assert "labels" not in inputs.kwargs
    assert inputs.images == 2


def test_batches_of_the_user_stay_as_they_are() -> None:
    batch = {"pixels": images(2), "labels": torch.zeros(2)}
    prepare(batch, toy())
    assert list(batch) == ["pixels", "labels"]


@pytest.mark.parametrize("second", [torch.rand(6), torch.rand(6, 5), torch.arange(3), "name"])
def test_what_can_be_no_labels_is_ignored(second: object) -> None:
    measured = tp_amp.measure(toy(), [(images(6), second)])
    assert (measured.accuracy, measured.labelled_images) == (None, 0)


def test_batches_may_be_tensors_pairs_or_dicts() -> None:
    model, data = toy(), images()
    labels = torch.zeros(len(data))
    plain = EntropyTaylorImportance().collect(model, [data]).scores
    pairs = EntropyTaylorImportance().collect(model, iter([(data, labels)])).scores
    assert all(torch.equal(plain[name], pairs[name]) for name in plain)

    class Keywords(ToyViT):
        def forward(self, pixels: Tensor) -> Tensor:
            return super().forward(pixels)

    keywords = Keywords()
    keywords.load_state_dict(model.state_dict())
    dicts = EntropyTaylorImportance().collect(keywords, [{"pixels": data, "labels": labels}]).scores
    assert all(torch.equal(plain[name], dicts[name]) for name in plain)


def test_dict_and_tuple_inputs() -> None:
    class Keywords(ToyViT):
        def forward(self, *, pixels: torch.Tensor) -> torch.Tensor:
            return super().forward(pixels)

    assert len(tp_amp.find_mlps(Keywords(), {"pixels": images(1)})) == 2
    assert len(tp_amp.find_mlps(toy(), (images(1),))) == 2


def test_the_first_images_of_a_batch_and_what_all_share() -> None:
    """What is as long as the images is cut with them; a table of another length is whole."""
    table = torch.randn(3, 2)
    batch = Inputs((images(5), table, 7), {"labels": torch.arange(5)})
    found = one_image(batch, 2)
    assert torch.equal(found.args[0], images(5)[:2])
    assert found.args[1] is table
    assert found.args[2] == 7
    assert found.kwargs["labels"].tolist() == [0, 1]
    assert one_image(batch).images == 1
    assert batch.images == 5


def test_example_inputs_are_read_as_torch_pruning_does() -> None:
    x, y = images(1), images(2)
    assert example(x).args == (x,)
    assert example([x, y]).args == (x, y)
    assert example({"pixels": x}).kwargs == {"pixels": x}
    assert (example(x).raw(), example({"pixels": x}).raw()) == (x, {"pixels": x})
    pair = example((x, y)).raw()
    assert pair[0] is x
    assert pair[1] is y
    with torch.inference_mode():
        made = torch.ones(2)
    found = example(made).args[0]
    assert not found.is_inference()
    assert torch.equal(found, made)


def test_a_call_that_fails_tells_the_shapes() -> None:
    with pytest.raises(ValueError, match=r"failed on inputs of shape \(1, 3, 8, 8\), \(2,\): "):
        Inputs((images(1, channels=3),), {"index": torch.zeros(2)}).call(toy())
    with pytest.raises(KeyError):  # none of those that wrong images give
        Inputs((images(1),)).call(lambda x: {}["missing"])


def test_the_model_is_called_as_the_script_does() -> None:
    x, model = images(2), toy()
    assert runner(model, None) is model
    given: list[object] = []

    def forward(called: nn.Module, inputs: object) -> Tensor:
        given.append(inputs)
        return called(x)

    call = runner(model, forward)
    assert torch.equal(call(x), model(x))
    call(x, 3)
    call(pixels=x)
    assert given[0] is x
    assert given[1] == (x, 3)
    assert given[2] == {"pixels": x}


class Masking(nn.Module):
    """Takes images, and maybe a mask."""

    def forward(self, pixels: Tensor, mask: Tensor | None = None) -> Tensor:
        return pixels if mask is None else pixels * mask


def test_what_may_be_left_out_may_be_missing_in_a_dict() -> None:
    x, mask = images(2), torch.tensor(2.0)
    assert Inputs(kwargs={"pixels": x}).call(Masking()) is x
    assert torch.equal(Inputs(kwargs={"pixels": x, "mask": mask}).call(Masking()), 2 * x)


def test_labels_of_a_batch_are_kept_apart() -> None:
    labels = torch.tensor([2, 0])
    for batch in ((images(2), labels), {"x": images(2), "target": labels}):
        found = prepare(batch, toy())
        assert found.labels is labels
        assert len(found.tensors()) == 1
    assert prepare((images(3), labels), toy()).labels is None  # not one for each image
    assert found.to("cpu").labels is labels


def test_texts_before_the_images_are_not_counted() -> None:
    """As a processor of CLIP gives them; several texts may belong to each image."""
    ids, pixels = torch.arange(12).view(6, 2), images(3)
    batch = Inputs(kwargs={"input_ids": ids, "attention_mask": ids, "pixel_values": pixels})
    assert batch.images == 3
    assert batch.tensors()[0] is pixels
    found = one_image(batch, 1, 1)
    assert torch.equal(found.kwargs["pixel_values"], pixels[1:2])
    assert found.kwargs["input_ids"].tolist() == ids[2:4].tolist()
    assert list(found.kwargs) == list(batch.kwargs)
    words = Inputs(kwargs={"input_ids": ids})
    assert words.images == 6


def test_patches_of_all_images_in_one_row() -> None:
    """As Qwen's vision tower is given them, of images that differ in size."""
    patches, grid = torch.arange(10).view(10, 1).float(), torch.tensor([[1, 2, 2], [1, 2, 3]])
    batch = Inputs(kwargs={"hidden_states": patches, "grid_thw": grid})
    assert batch.images == 2
    assert batch.patches == [4, 6]
    found = one_image(batch, 1, 1)
    assert found.kwargs["hidden_states"].flatten().tolist() == [4, 5, 6, 7, 8, 9]
    assert found.kwargs["grid_thw"].tolist() == [[1, 2, 3]]
    assert one_image(found).kwargs["hidden_states"].shape == (6, 1)
    alone = images_alone(batch)
    assert alone.shape == (2, 6, 1)
    assert alone[0].flatten().tolist() == [0, 1, 2, 3, 0, 0]


@pytest.mark.parametrize("count", [1, 3, 7])
def test_a_batch_of_another_size_repeats_the_images(count: int) -> None:
    images, texts = torch.arange(6.0).view(3, 2), torch.arange(12).view(6, 2)
    batch = Inputs((images,), {"input_ids": texts, "scale": torch.ones(4, 5), "flag": True})
    found = of_size(batch, count)
    order = [i % 3 for i in range(count)]
    assert torch.equal(found.args[0], images[order])
    assert torch.equal(found.kwargs["input_ids"], texts.view(3, 2, 2)[order].flatten(0, 1))
    assert torch.equal(found.kwargs["scale"], torch.ones(4, 5))
    assert found.kwargs["flag"] is True


@pytest.fixture(scope="module")
def vit() -> Any:
    """Of transformers: all of its arguments have defaults, and it takes any others."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4, num_channels=1,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config).eval()


WRONG = r"its forward takes \(pixel_values, .*\), found the keys \['image'\]; .*pick_inputs\(batch"


def test_other_keys_than_those_of_transformers_are_told_everywhere(vit: Any) -> None:
    x, batches = images(4), [{"image": images(4)} for _ in range(2)]
    plan = tp_amp.plan_from_importance(vit, {"pixel_values": x}, tp_amp.DIMAPImportance(), 0.5)
    quiet: Any = {"progress": False}
    before = fingerprint(vit)
    calls: list[Callable[[], Any]] = [
        lambda: tp_amp.inspect(vit, batches[0]),
        lambda: tp_amp.ReconstructionImportance().collect(vit, batches, **quiet),
        lambda: tp_amp.EntropyTaylorImportance().collect(vit, batches, **quiet),
        lambda: tp_amp.compensate(vit, plan, batches, **quiet),
        lambda: tp_amp.measure(vit, batches, **quiet),
        lambda: tp_amp.distill(vit, copy.deepcopy(vit), batches, epochs=1, **quiet),
        lambda: tp_amp.AdaptiveMLPPruner(
            vit, {"pixel_values": x}, tp_amp.DIMAPImportance(), batches, **quiet
        ).step(),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=WRONG):
            call()
    assert fingerprint(vit) == before


def test_images_by_position_are_told_their_name() -> None:
    class Both(ToyViT):
        """Takes texts first, as CLIP does."""

        def forward(self, input_ids: Any = None, pixel_values: Any = None, **_: Any) -> Tensor:
            return super().forward(pixel_values.float())

    with pytest.raises(ValueError, match=r"found 1 inputs by position; pass a dict by name, such"):
        tp_amp.inspect(Both(), images(1))
    assert len(tp_amp.find_mlps(Both(), {"pixel_values": images(1), "more": 3})) == 2


def test_a_fault_of_the_model_is_its_own() -> None:
    class Broken(ToyViT):
        def forward(self, x: Tensor) -> Tensor:
            return self.heads(x)  # type: ignore[no-any-return]

    with pytest.raises(AttributeError, match="has no attribute 'heads'"):
        tp_amp.inspect(Broken(), images(1))


def test_a_whole_dict_beside_other_options() -> None:
    class Whole(ToyViT):
        def forward(self, batch: dict[str, Tensor], **_: Any) -> Tensor:
            return super().forward(batch["image"])

    batches = [{"image": images(4), "label": torch.arange(4)}]
    assert len(tp_amp.find_mlps(Whole(), batches[0])) == 2
    assert tp_amp.measure(Whole().eval(), batches, repeats=1).labelled_images == 4


class Conditional(ToyViT):
    """Can't do without the classes that it draws images of."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.classes = nn.Embedding(5, 12)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.classes(labels)[:, None]
        return self.norm(self.blocks(tokens)).mean(1)


def conditioned(seed: int) -> dict[str, Tensor]:
    return {"x": images(6, seed), "labels": torch.arange(6) % 5, "target": torch.zeros(6)}


def test_labels_that_a_model_needs_are_its_inputs() -> None:
    model, batches = Conditional().eval(), [conditioned(1), conditioned(2)]
    found = prepare(batches[0], model)
    assert list(found.kwargs) == ["x", "labels"]
    assert found.labels is None
    importance = tp_amp.ReconstructionImportance(data=batches)
    example_inputs = {name: batches[0][name] for name in ("x", "labels")}
    plan = tp_amp.plan_for_target(model, example_inputs, importance, {"params": 0.9})
    student = copy.deepcopy(model)
    tp_amp.compensate(
        student, plan, batches, every_linear=True, token_weights="sensitivity", progress=False
    )
    tp_amp.distill(student, model, batches, epochs=1, warmup_epochs=0, progress=False)


class Optional(ToyViT):
    """Works with and without labels, as models of transformers do."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return super().forward(x) + (0 if labels is None else 100)


def test_what_a_function_picks_is_what_the_model_takes() -> None:
    batches, x = [conditioned(1)], images(6, 1)
    (picked,) = tp_amp.pick_inputs(batches, lambda batch: dict(batch, target=torch.arange(6)))
    model = Optional().eval()
    found = prepare(picked, model)
    assert list(found.kwargs) == ["x", "labels"]  # it takes no target
    assert found.labels is not None
    assert list(prepare(found.raw(), model).kwargs) == ["x", "labels"]
    assert torch.equal(found.call(model), model(x) + 100)
    assert list(prepare(batches[0], model).kwargs) == ["x"]
    (pair,) = tp_amp.pick_inputs(batches, lambda batch: (batch, torch.arange(6)))
    assert list(prepare(pair, model).kwargs) == ["x", "labels"]


def test_a_tuple_of_two_inputs_is_told_to_be_a_dict() -> None:
    class Tracker(ToyViT):
        def forward(self, template: Tensor, target: Tensor) -> Tensor:
            return super().forward(template) - super().forward(target)

    model, pair = Tracker().eval(), (images(4), images(4, 2))
    importance = tp_amp.ReconstructionImportance()
    with pytest.raises(ValueError, match=r"key=lambda batch: \{'template': batch\[0\], 'target': "):
        importance.collect(model, [pair], progress=False)
    named = tp_amp.pick_inputs([pair], lambda batch: {"template": batch[0], "target": batch[1]})
    importance.collect(model, named, progress=False)
    importance.collect(model, [{"template": pair[0], "target": pair[1]}], progress=False)
