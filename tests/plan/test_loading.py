"""Saved models brought back, and what is said to folders that are damaged."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from saved_models import planned, saved_vit, vit
from toys import fingerprint, images, toy
from zoo import TINY

import tp_amp


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return saved_vit(tmp_path)


@pytest.mark.parametrize("every_linear", [False, True])
def test_a_bias_that_compensation_added_comes_back(every_linear: bool, tmp_path: Path) -> None:
    model = toy(bias=False)
    dense = copy.deepcopy(model)
    plan = tp_amp.plan_from_importance(model, images(1), tp_amp.DIMAPImportance(), 0.5)
    options = {"add_bias": True, "every_linear": every_linear}
    tp_amp.compensate(model, plan, [images(40)], progress=False, **options)
    tp_amp.save_pruned(model, tmp_path, plan)
    tp_amp.load_pruned(dense, tmp_path)
    assert torch.equal(dense(images()), model(images()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 1}, r"has no layer blocks\.1\.mlp\.fc2; build the same dense model"),
        ({"mlp_ratio": 2}, "has 128 input channels, the dense model had 256"),
    ],
)
def test_another_architecture_is_refused(
    saved: Path, arguments: dict[str, Any], message: str
) -> None:
    model = vit(**arguments)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        tp_amp.load_pruned(model, saved)
    assert fingerprint(model) == before


def test_other_classes_are_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="does not fit the model or is damaged"):
        tp_amp.load_pruned(vit(num_classes=7), saved)


@pytest.mark.parametrize("name", ["model.safetensors", "plan.json"])
@pytest.mark.parametrize("length", [0, 0.5])
def test_truncated_files_are_refused(saved: Path, name: str, length: float) -> None:
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: int(len(content) * length)])
    with pytest.raises(ValueError, match=r"damaged|not JSON"):
        tp_amp.load_pruned(vit(), saved)


def test_a_newer_format_and_missing_files_are_told(saved: Path) -> None:
    record = json.loads((saved / "plan.json").read_text())
    (saved / "plan.json").write_text(json.dumps({**record, "format": 99}))
    with pytest.raises(ValueError, match="format 99, this tp_amp reads 1; upgrade"):
        tp_amp.load_pruned(vit(), saved)
    (saved / "plan.json").unlink()
    with pytest.raises(ValueError, match=r"holds no plan\.json"):
        tp_amp.load_pruned(vit(), saved)


def test_a_damaged_plan_is_refused(saved: Path) -> None:
    record = json.loads((saved / "plan.json").read_text())
    record["keep"]["blocks.0.mlp.fc2"][0] = 9999
    (saved / "plan.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="must be distinct and within"):
        tp_amp.load_pruned(vit(), saved)


def test_precision_and_timm_arguments_come_back(tmp_path: Path) -> None:
    model = vit().bfloat16()
    inputs = images(1, size=32, channels=3).bfloat16()
    plan = planned(model, inputs)
    tp_amp.apply_plan(model, inputs, plan)
    arguments = {**TINY, "img_size": 32, "pretrained": True}
    name = "vit_tiny_patch16_224"
    tp_amp.save_pruned(model, tmp_path, plan, library="timm", name=name, arguments=arguments)
    again = tp_amp.create_model(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(again.eval()(inputs), model.eval()(inputs))


def test_a_folder_without_a_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no source\.json; it is no folder of save_pruned"):
        tp_amp.create_model(tmp_path)


def test_a_plan_with_a_list_for_a_number_is_refused(saved: Path) -> None:
    """Found by damaging folders at random."""
    path = saved / "plan.json"
    text = path.read_text()
    assert '"first": 0' in text
    path.write_text(text.replace('"first": 0', '"first": [0]', 1))
    with pytest.raises(ValueError, match=r"expected <class 'int'>, found \[0\]"):
        tp_amp.load_pruned(vit(), saved)


@pytest.mark.parametrize(
    ("kind", "place", "least"),
    [("MLP", 0, 80), ("Attention", 0, 80), ("HeadRanks", 0, 60), ("HeadRanks", 1, 60)],
)
def test_each_value_of_a_damaged_site_is_refused_or_harmless(
    kind: str, place: int, least: int, saved: Path
) -> None:
    """Found by damaging folders at random: layers of None or another kind raised anything."""
    if kind == "HeadRanks":
        save_ranks(saved)
    whole = json.loads((saved / "plan.json").read_text())
    down = [name for name, record in whole["sites"].items() if record["kind"] == kind][place]
    inputs = images(1, size=32, channels=3)
    pruned = vit().eval()
    tp_amp.load_pruned(pruned, saved)
    expected = pruned(inputs)
    model, refused = vit().eval(), 0

    def state() -> Any:
        return str(model), [(p.requires_grad, p._version, p.data_ptr()) for p in model.parameters()]

    for name in whole["sites"][down]:
        for value in (None, "", "x", [], ["x"], {}, -1, 0, 3, "norm", ["norm"]):
            damaged = copy.deepcopy(whole)
            damaged["sites"][down][name] = value
            (saved / "plan.json").write_text(json.dumps(damaged))
            before = state()
            try:
                tp_amp.load_pruned(model, saved)
            except ValueError:
                assert state() == before
                refused += 1
            else:
                torch.testing.assert_close(model(inputs), expected)
                model = vit().eval()
    assert refused > least


def save_ranks(folder: Path) -> None:
    """A ViT with half of the channels of queries and keys, and of values."""
    model, x = vit().eval(), images(8, size=32, channels=3)
    plan = tp_amp.rank_plan(tp_amp.rotate_heads(model, x[:1], [x]), {"qk": 0.5, "vo": 0.5})
    tp_amp.apply_plan(model, plan)
    tp_amp.save_pruned(model, folder, plan)


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize(("version", "told"), [("999.0.0", True), ("1.0.2", False), (None, False)])
def test_heads_from_a_newer_release_are_told(
    heads: bool,
    version: str | None,
    told: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """timm 1.0.17 fixes the number of heads that timm 1.0.31 reads off the module."""
    model = vit()
    plan = tp_amp.PruningPlan({"blocks.0.attn.proj": [1, 2]} if heads else {})
    plan = plan.then(tp_amp.PruningPlan({"blocks.1.mlp.fc2": list(range(9))}))
    tp_amp.apply_plan(model, plan, images(1, size=32, channels=3))
    tp_amp.save_pruned(model, tmp_path, plan)
    source = json.loads((tmp_path / "source.json").read_text())
    assert source["versions"]["timm"] == timm.__version__
    source["versions"]["timm"] = version
    if version is None:
        del source["versions"]
    (tmp_path / "source.json").write_text(json.dumps(source))
    with caplog.at_level(logging.WARNING, logger="tp_amp"):
        tp_amp.load_pruned(vit(), tmp_path)
    expected = f"was saved with timm 999.0.0, and here is {timm.__version__}"
    assert (expected in caplog.text) == (told and heads)
    assert bool(caplog.messages) == (told and heads)


def test_building_a_model_gives_random_state_back(tmp_path: Path) -> None:
    model, inputs = vit(), images(1, size=32, channels=3)
    plan = planned(model, inputs)
    tp_amp.apply_plan(model, plan)
    origin: Any = {"name": "vit_tiny_patch16_224", "arguments": {"img_size": 32, **TINY}}
    tp_amp.save_pruned(model, tmp_path, plan, library="timm", **origin)
    before = torch.get_rng_state()
    tp_amp.create_model(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("text", ["[]", "{}", '{"library": "timm"}'])
def test_a_source_that_says_too_little_is_refused(text: str, saved: Path) -> None:
    (saved / "source.json").write_text(text)
    with pytest.raises(ValueError, match="does not say where the model is from"):
        tp_amp.create_model(saved)
