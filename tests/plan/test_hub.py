"""The Hugging Face Hub, as its own client keeps it on disk: no network is used."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from saved_models import planned, vit
from toys import images
from zoo import TINY, hugging_face_models

import tp_amp
from tp_amp.data.sources import load

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What `HfApi` is asked for, put into the client's cache as a download leaves it."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.made: list[tuple[str, bool | None, bool]] = []

    def create_repo(self, repository: str, *, private: bool | None, exist_ok: bool) -> None:
        self.made.append((repository, private, exist_ok))

    def upload_folder(self, *, repo_id: str, folder_path: Path, **named: Any) -> Any:
        here = self.cache / f"models--{repo_id.replace('/', '--')}"
        (here / "refs").mkdir(parents=True, exist_ok=True)
        (here / "refs" / "main").write_text(COMMIT)
        snapshot = here / "snapshots" / COMMIT
        snapshot.mkdir(parents=True, exist_ok=True)
        held = [path.name for path in snapshot.iterdir()]
        for name in huggingface_hub.utils.filter_repo_objects(
            held, allow_patterns=named["delete_patterns"] or ["none"]
        ):
            (snapshot / name).unlink()
        sent = huggingface_hub.utils.filter_repo_objects(
            [path.name for path in Path(folder_path).iterdir()],
            allow_patterns=named["allow_patterns"],
        )
        for name in sent:
            shutil.copy(Path(folder_path) / name, snapshot / name)
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/{COMMIT}")

    def hf_hub_download(self, repository: str, file: str) -> str:
        here = self.cache / f"models--{repository.replace('/', '--')}" / "snapshots" / COMMIT
        if not (here / file).is_file():
            raise huggingface_hub.errors.EntryNotFoundError(file)
        return str(here / file)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "cache")
    for name in ("create_repo", "upload_folder", "hf_hub_download"):
        method = getattr(made, name)
        monkeypatch.setattr(huggingface_hub.HfApi, name, lambda _, *a, _m=method, **n: _m(*a, **n))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(made.cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return made


def saved(folder: Path) -> tuple[torch.nn.Module, torch.Tensor]:
    arguments = {"img_size": 32, **TINY}
    model = timm.create_model("vit_tiny_patch16_224", **arguments).eval()
    inputs = images(2, size=32, channels=3)
    plan = planned(model, inputs)
    tp_amp.apply_plan(model, plan)
    origin = {"library": "timm", "name": "vit_tiny_patch16_224", "arguments": arguments}
    tp_amp.save_pruned(model, folder, plan, **origin)
    return model, inputs


def test_there_and_back(tmp_path: Path, hub: Hub) -> None:
    model, inputs = saved(tmp_path / "small")
    (tmp_path / "small" / "notes.txt").write_text("mine alone")
    (tmp_path / "small" / "prune.json").write_text('{"data": "/home/me/photos"}')
    address = tp_amp.push_to_hub(tmp_path / "small", "me/small-vit", private=True)
    assert address.endswith(COMMIT)
    assert hub.made == [("me/small-vit", True, True)]
    snapshot = hub.cache / "models--me--small-vit" / "snapshots" / COMMIT
    assert sorted(path.name for path in snapshot.iterdir()) == [
        "README.md", "model.safetensors", "plan.json", "source.json"
    ]  # fmt: skip
    for spec in ("hf-hub:me/small-vit", f"hf-hub:me/small-vit@{COMMIT}"):
        with torch.no_grad():
            assert torch.equal(tp_amp.create_model(spec).eval()(inputs), model(inputs))
    assert torch.equal(load("hf-hub:me/small-vit").model.eval()(inputs), model(inputs))


def test_only_what_was_saved_is_sent(tmp_path: Path, hub: Hub) -> None:
    """Not files of the user's that are called as those of another library's folder."""
    folder = tmp_path / "small"
    folder.mkdir()
    own = (
        "config.json",
        "preprocessor_config.json",
        "modeling_pruned.py",
        "README.md",
        "token.txt",
    )
    for name in own:
        (folder / name).write_text("secret")
    model = vit()
    plan = planned(model, images(2, size=32, channels=3))
    tp_amp.apply_plan(model, plan)
    tp_amp.save_pruned(model, folder, plan)
    tp_amp.push_to_hub(folder, "me/small-vit")
    snapshot = hub.cache / "models--me--small-vit" / "snapshots" / COMMIT
    sent = sorted(path.name for path in snapshot.iterdir())
    assert sent == ["model.safetensors", "plan.json", "source.json"]


def test_what_an_earlier_folder_left_is_deleted(tmp_path: Path, hub: Hub) -> None:
    """Or timm would build the sizes of the earlier config.json; a licence of the user's stays."""
    arguments = {"img_size": 32, **TINY}
    model = timm.create_model("vit_tiny_patch16_224", **arguments).eval()
    inputs = images(2, size=32, channels=3)
    even = tp_amp.plan_from_importance(model, inputs, tp_amp.DIMAPImportance(), 0.5)
    tp_amp.apply_plan(model, even)
    origin = {"library": "timm", "name": "vit_tiny_patch16_224", "arguments": arguments}
    tp_amp.save_pruned(model, tmp_path / "even", even, **origin)
    tp_amp.push_to_hub(tmp_path / "even", "me/small-vit")
    snapshot = hub.cache / "models--me--small-vit" / "snapshots" / COMMIT
    (snapshot / "LICENSE").write_text("mine")
    assert (snapshot / "config.json").is_file()
    uneven, _ = saved(tmp_path / "uneven")
    assert not (tmp_path / "uneven" / "config.json").exists()
    tp_amp.push_to_hub(tmp_path / "uneven", "me/small-vit")
    assert not (snapshot / "config.json").exists()
    assert (snapshot / "LICENSE").read_text() == "mine"
    with torch.no_grad():
        found = tp_amp.create_model("hf-hub:me/small-vit").eval()(inputs)
        assert torch.equal(found, uneven(inputs))


def test_what_can_not_be_sent_or_fetched_is_told(tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(ValueError, match=r"holds no plan.json; it is no folder of save_pruned"):
        tp_amp.push_to_hub(tmp_path, "me/small-vit")
    assert not hub.made
    for spec in ("hf-hub:me/other", "hf-hub:no name"):
        with pytest.raises(ValueError, match=rf"{spec} can't be fetched .*; check the name"):
            tp_amp.create_model(spec)


OPENER = """
import sys
sys.modules.update(tp_amp=None, torch_pruning=None)
import copy, torch, transformers
from safetensors.torch import load_file, save_file
inputs = load_file("inputs")
model = transformers.AutoModel.from_pretrained("me/small-vit", trust_remote_code=True)
with torch.no_grad():
    save_file({"output": copy.deepcopy(model).eval()(**inputs).logits}, "output")
processor = transformers.AutoImageProcessor.from_pretrained("me/small-vit")
print(processor.size["height"])
"""


def test_transformers_opens_it_from_there(tmp_path: Path, hub: Hub) -> None:
    transformers = pytest.importorskip("transformers")
    make, inputs, _ = hugging_face_models()["hf_vit"]
    model = make().eval()
    plan = planned(model, inputs)
    tp_amp.apply_plan(model, plan)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    origin = {"library": "transformers", "processor": processor}
    tp_amp.save_pruned(model, tmp_path / "small", plan, **origin)
    tp_amp.push_to_hub(tmp_path / "small", "me/small-vit")
    safetensors.torch.save_file(inputs, tmp_path / "inputs")
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(hub.cache)}
    printed = subprocess.run(
        [sys.executable, "-c", OPENER],
        cwd=tmp_path,
        env={**environment, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert printed.stdout.split()[-1] == "32"
    output = safetensors.torch.load_file(tmp_path / "output")["output"]
    with torch.no_grad():
        assert torch.equal(output, model(**inputs).logits)
        again = tp_amp.create_model("hf-hub:me/small-vit").eval()
        assert torch.equal(again(**inputs).logits, output)
