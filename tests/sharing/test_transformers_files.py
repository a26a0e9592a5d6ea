"""Folders that transformers opens without this package: the same outputs, to the last bit."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from opened_elsewhere import outputs_elsewhere
from saved_models import planned
from torch import Tensor, nn
from toys import images, perturbed, toy
from zoo import hugging_face_models
from zoo_checks import run
from zoo_more import MODELS

import tp_amp
from tp_amp.sharing.transformers_files import dense_config

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("code_of_folders")

RANKS, STREAM = "hf_vit, inside heads", ", with the stream"
# Narrower alone, an `nn.MultiheadAttention` with fewer heads, and a forward pass with other sizes.
QUICK = ("hf_vit", RANKS, f"hf_vit{STREAM}", "hf_siglip", "hf_blip")
STREAMS = ("hf_deit_teacher", "hf_hiera", "hf_vjepa2", "hf_beit_masked")


def made(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    if name in MODELS:
        return MODELS[name].make(), MODELS[name].inputs
    make, inputs, _ = hugging_face_models()[name]
    return make(), inputs


def cut(name: str) -> tuple[nn.Module, dict[str, Tensor], tp_amp.PruningPlan]:
    """A model of the zoo, cut and changed since, in eval mode; a copy, to do with as one likes."""
    return copy.deepcopy(cut_once(name))


@cache
def cut_once(name: str) -> tuple[nn.Module, dict[str, Tensor], tp_amp.PruningPlan]:
    torch.manual_seed(0)
    model, inputs = made(name.partition(",")[0])
    model = perturbed(model)
    if name == RANKS:
        rotated = tp_amp.rotate_heads(model, inputs, [inputs], progress=False)
        plan = tp_amp.rank_plan(rotated, {"qk": 0.5, "vo": 0.5})
    elif name.endswith(STREAM):
        rotated = tp_amp.rotate(model, inputs, [inputs], progress=False)
        plan = tp_amp.stream_plan(rotated, 0.75).then(planned(model, inputs))
    else:
        plan = planned(model, inputs)
    tp_amp.apply_plan(model, plan)
    return perturbed(model).eval(), inputs, plan


def otherwise_elsewhere(names: Sequence[str], place: Path) -> list[str]:
    """Which models give other outputs in a process that knows transformers alone."""
    here, folders, inputs = [], [], []
    for number, name in enumerate(names):
        model, given, plan = cut(name)
        folder = place / f"small_{number}"
        tp_amp.save_pruned(model, folder, plan, library="transformers")
        with torch.no_grad():
            here.append(run(model, given))
        folders.append((folder, "AutoModel"))
        inputs.append(given)
    (place / "elsewhere").mkdir()
    there = outputs_elsewhere(folders, inputs, place / "elsewhere")
    outputs = zip(names, here, there, strict=True)
    return [name for name, one, other in outputs if not torch.equal(one, other)]


def test_it_opens_where_this_package_is_not(tmp_path: Path) -> None:
    assert otherwise_elsewhere(QUICK, tmp_path) == []


@pytest.mark.slow
def test_every_family_opens_where_this_package_is_not(tmp_path: Path) -> None:
    names = [name for name in (*hugging_face_models(), *MODELS) if name not in QUICK]
    names += [f"{name}{STREAM}" for name in STREAMS]
    assert otherwise_elsewhere(names, tmp_path) == []


def reopened(folder: Path, opener: str = "AutoModel") -> nn.Module:
    open_it = getattr(transformers, opener).from_pretrained
    model = open_it(folder, trust_remote_code=True, dtype="auto")
    return copy.deepcopy(model).eval()


def test_the_class_of_its_task_opens_it_and_ours_do(tmp_path: Path) -> None:
    model, inputs, plan = cut("hf_vit")
    tp_amp.save_pruned(model, tmp_path, plan, library="transformers")
    dense = made("hf_vit")[0]
    tp_amp.load_pruned(dense, tmp_path)
    again = reopened(tmp_path, "AutoModelForImageClassification")
    with torch.no_grad():
        for each in (again, dense.eval(), tp_amp.create_model(tmp_path).eval()):
            assert torch.equal(run(each, inputs), run(model, inputs))
    assert isinstance(again, transformers.ViTForImageClassification)
    assert type(tp_amp.create_model(tmp_path)) is transformers.ViTForImageClassification


def test_a_narrower_stream_with_as_many_heads_less_is_a_plain_model() -> None:
    """Which arguments build it, without this package's folder or classes."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 90}
    config = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 2, "num_labels": 5}
    torch.manual_seed(0)
    kind = transformers.ViTForImageClassification
    model = perturbed(kind(transformers.ViTConfig(**sizes, **config))).eval()
    batch = {"pixel_values": images(6, size=32, channels=3)}
    rotated = tp_amp.rotate(model, batch, [batch], progress=False)
    kept = {site.down: [0, 1, 3] for site in tp_amp.find_attentions(model, batch)}
    plan = tp_amp.stream_plan(rotated, 0.75).then(tp_amp.PruningPlan(kept))
    tp_amp.apply_plan(model, batch, plan)
    narrow = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 90}
    plain = kind(transformers.ViTConfig(**narrow, **config)).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(run(plain, batch), run(model, batch))


def test_a_bias_that_was_added_and_a_half_precision_come_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80,
        image_size=32, patch_size=8, qkv_bias=False,
    )  # fmt: skip
    model, inputs = transformers.ViTModel(config), hugging_face_models()["hf_vit"][1]
    plan = planned(model, inputs)
    tp_amp.apply_plan(model, plan)
    attention = next(s for s in plan.sites.values() if isinstance(s, tp_amp.Attention))
    query = model.get_submodule(attention.up[0])
    assert query.bias is None
    query.bias = nn.Parameter(torch.randn(query.out_features))  # as compensate does
    model.to(torch.bfloat16).eval()
    tp_amp.save_pruned(model, tmp_path, plan, library="transformers")
    again = reopened(tmp_path)
    assert again.dtype == torch.bfloat16
    given = {name: values.bfloat16() for name, values in inputs.items()}
    with torch.no_grad():
        assert torch.equal(run(again, given), run(model, given))


def test_it_is_trained_and_saved_by_transformers_and_cut_again(tmp_path: Path) -> None:
    model, inputs, plan = cut("hf_siglip")
    tp_amp.save_pruned(model, tmp_path / "first", plan, library="transformers")
    again = reopened(tmp_path / "first")
    again.train()
    run(again, inputs).square().sum().backward()
    torch.optim.SGD(again.parameters(), 1e-3).step()
    again.eval()
    again.save_pretrained(tmp_path / "trained")
    trained = reopened(tmp_path / "trained")
    with torch.no_grad():
        assert torch.equal(run(trained, inputs), run(again, inputs))
        assert not torch.equal(run(trained, inputs), run(model, inputs))
    narrower = planned(trained, inputs)
    tp_amp.apply_plan(trained, narrower)
    assert sum(p.numel() for p in trained.parameters()) < sum(p.numel() for p in again.parameters())


def test_two_folders_of_one_family_are_opened_side_by_side(tmp_path: Path) -> None:
    folders = {}
    for name in ("hf_vit", RANKS):
        model, inputs, plan = cut(name)
        folder = tmp_path / str(len(folders)) / "small"
        tp_amp.save_pruned(model, folder, plan, library="transformers")
        folders[folder] = model
    for folder, model in folders.items():
        with torch.no_grad():
            assert torch.equal(run(reopened(folder), inputs), run(model, inputs))


def test_without_remote_code_transformers_says_what_to_pass(tmp_path: Path) -> None:
    model, _, plan = cut("hf_vit")
    tp_amp.save_pruned(model, tmp_path, plan, library="transformers")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        transformers.AutoModel.from_pretrained(tmp_path, trust_remote_code=False)


@pytest.mark.parametrize("name", ["hf_vit", f"hf_vit{STREAM}"])
def test_it_is_opened_for_more_classes(name: str, tmp_path: Path) -> None:
    """As for training on another task; only what was cut is as narrow as recorded."""
    model, inputs, plan = cut(name)
    tp_amp.save_pruned(model, tmp_path, plan, library="transformers")
    opener = transformers.AutoModelForImageClassification.from_pretrained
    options = {"num_labels": 9, "ignore_mismatched_sizes": True}
    again = opener(tmp_path, trust_remote_code=True, **options)
    assert run(again, inputs).shape[-1] == 9
    for path, kept in model.named_parameters():
        if "classifier" not in path:
            assert torch.equal(again.get_parameter(path), kept)


def test_where_it_was_loaded_from_is_not_told(tmp_path: Path) -> None:
    """Folders are sent to others; the library's own files don't tell it either."""
    made("hf_vit")[0].save_pretrained(tmp_path / "of_mine")
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "of_mine").eval()
    inputs = made("hf_vit")[1]
    plan = planned(model, inputs)
    tp_amp.apply_plan(model, plan)
    tp_amp.save_pruned(model, tmp_path / "small", plan, library="transformers")
    for path in (tmp_path / "small").iterdir():
        assert b"of_mine" not in path.read_bytes()
    with torch.device("meta"):
        both = transformers.CLIPModel(transformers.CLIPConfig())
    both.config.vision_config._name_or_path = "of_mine"  # as towers that were loaded apart have it
    assert "of_mine" not in json.dumps(dense_config(both, "CLIPModel"))


def test_a_processor_of_texts_too_is_refused(tmp_path: Path) -> None:
    """Its files are more than a save knows of."""
    model, _, plan = cut("hf_vit")

    class Both:
        image_processor = transformers.ViTImageProcessor()

        def save_pretrained(self, folder: Path) -> None:
            raise AssertionError

    options: Any = {"library": "transformers", "processor": Both()}
    with pytest.raises(TypeError, match="found a Both; pass its image_processor, and save the"):
        tp_amp.save_pruned(model, tmp_path / "small", plan, **options)
    assert not (tmp_path / "small").exists()


def test_the_image_processor_lies_in_the_folder(tmp_path: Path) -> None:
    model, _, plan = cut("hf_vit")
    size = {"height": 32, "width": 32}
    processor = transformers.ViTImageProcessor(size=size, image_mean=[0.1, 0.2, 0.3])
    tp_amp.save_pruned(model, tmp_path, plan, library="transformers", processor=processor)
    found = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert list(found.image_mean) == [0.1, 0.2, 0.3]
    assert dict(found.size) == size


def test_the_processor_of_the_checkpoint_is_taken_along(tmp_path: Path) -> None:
    model, inputs = made("hf_vit")
    model.save_pretrained(tmp_path / "dense")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(
        tmp_path / "dense"
    )
    model = type(model).from_pretrained(tmp_path / "dense")
    plan = planned(model, inputs)
    tp_amp.apply_plan(model, plan)
    tp_amp.save_pruned(model, tmp_path / "small", plan, library="transformers")
    again = tp_amp.create_model(tmp_path / "small")
    plan = plan.then(narrower := planned(again, inputs))
    tp_amp.apply_plan(again, narrower)
    tp_amp.save_pruned(again, tmp_path / "smaller", plan, library="transformers")
    for folder in ("small", "smaller"):
        found = transformers.AutoImageProcessor.from_pretrained(tmp_path / folder)
        assert found.size["height"] == 32


def test_what_the_configuration_does_not_build_is_told_and_nothing_written(tmp_path: Path) -> None:
    folder = tmp_path / "small"

    def refused(model: nn.Module, plan: tp_amp.PruningPlan, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            tp_amp.save_pruned(model, folder, plan, library="transformers")
        assert not folder.exists()

    model, _, plan = cut("hf_vit")
    model.classifier = nn.Linear(32, 7)
    refused(model, plan, r"classifier.weight is \(7, 32\), \(2, 32\) in the dense model; what is")
    model, _, plan = cut("hf_vit")
    model.classifier = nn.Sequential(nn.Linear(32, 2))
    refused(model, plan, "only the model has a layer classifier.0; what is changed besides the cut")
    model, _, plan = cut("hf_vit")
    model.classifier.register_buffer("scale", torch.ones(2))
    refused(model, plan, "classifier.scale is in one of dense and pruned model; what is changed")
    with pytest.raises(ValueError, match="ToyViT is no model of transformers; pass the library"):
        saved_toy(folder)


def saved_toy(folder: Path) -> None:
    model = toy()
    plan = tp_amp.plan_from_importance(model, images(1), tp_amp.DIMAPImportance(), 0.5)
    tp_amp.apply_plan(model, plan)
    tp_amp.save_pruned(model, folder, plan, library="transformers")


def test_another_save_leaves_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    model, _, plan = cut("hf_vit")
    tp_amp.save_pruned(model, tmp_path, plan, library="transformers")
    names = {"README.md", "config.json", "modeling_pruned.py"}
    assert names <= {path.name for path in tmp_path.iterdir()}
    tp_amp.save_pruned(model, tmp_path, plan)
    assert not names & {path.name for path in tmp_path.iterdir()}


def test_sizes_are_recorded_for_those_who_read_the_configuration(tmp_path: Path) -> None:
    model, _, plan = cut("hf_vit")
    tp_amp.save_pruned(model, tmp_path, plan, library="transformers")
    record = json.loads((tmp_path / "config.json").read_text())["pruned_layers"]
    down = next(name for name, site in plan.sites.items() if isinstance(site, tp_amp.MLP))
    assert record[down] == {"attributes": {"in_features": 40}, "tensors": {"weight": [None, 40]}}
    # The MLP's two; q, k, v and the projection; and what counts the heads.
    assert 2 * (2 + 4) < len(record) <= 2 * (2 + 6)


def test_another_release_with_other_names_of_layers_says_so(tmp_path: Path) -> None:
    model, _, plan = cut("hf_vit")
    tp_amp.save_pruned(model, tmp_path, plan, library="transformers")
    text = (tmp_path / "config.json").read_text()
    down = next(iter(plan.keep))
    (tmp_path / "config.json").write_text(text.replace(f'"{down}"', '"encoder.0.of_old"'))
    with pytest.raises(ValueError, match=r"no layer encoder\.0\.of_old.*transformers_version"):
        reopened(tmp_path)


def test_a_class_of_ones_own_is_not_saved_as_its_parent(tmp_path: Path) -> None:
    model, inputs, plan = cut("hf_vit")

    class Doubling(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().forward(*args, **kwargs).logits

    parent, model.__class__ = type(model), Doubling
    with pytest.raises(
        ValueError, match=rf'Doubling is a class of your own.*name="{parent.__name__}"'
    ):
        tp_amp.save_pruned(model, tmp_path, plan, library="transformers")
    assert not list(tmp_path.iterdir())
    tp_amp.save_pruned(model, tmp_path, plan, library="transformers", name=parent.__name__)
    with torch.no_grad():
        found = tp_amp.create_model(tmp_path).eval()(**inputs).logits
        assert torch.equal(2 * found, model(**inputs))
