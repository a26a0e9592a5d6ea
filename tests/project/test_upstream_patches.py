"""The patches for Torch-Pruning apply to the installed release, and their tests tell them apart."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_upstream import ROOT, SCRIPTS, run_all
from upstream_patches import MARK, PAGE, PATCHES, WITHOUT_DOWNLOADS, git, patched, without_fixes

IMPORTANCES = ["dimap_importance", "gram_schmidt_importance", "entropy_taylor_importance"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed package with all patches."""
    if shutil.which("git") is None:
        pytest.skip("git applies the patches")
    package = find_spec("torch_pruning")
    assert package is not None
    assert package.origin is not None
    folder = tmp_path_factory.mktemp("upstream")
    ignored = shutil.ignore_patterns("__pycache__")
    release = folder / "release" / "torch_pruning"
    shutil.copytree(Path(package.origin).parent, release, ignore=ignored)
    patched(release.parent, folder / "repository")
    return folder / "repository"


def names() -> list[str]:
    return [patch.stem.partition("-")[2] for patch in PATCHES]


def test_there_is_one_for_each_bug_and_importance_in_the_order_of_the_page() -> None:
    listed = re.findall(r"`examples/upstream/(\w+)\.py`", (ROOT / "UPSTREAM.md").read_text())
    bugs = [name for name in listed if names().count(name)]
    assert names() == [*dict.fromkeys(bugs), *IMPORTANCES]
    assert set(names()) == {script.stem for script in SCRIPTS} | set(IMPORTANCES)
    assert [patch.name[:4] for patch in PATCHES] == [f"{n + 1:04}" for n in range(len(PATCHES))]


def test_all_apply_and_each_brings_a_test_of_its_own(repository: Path) -> None:
    commits = git(repository, "rev-list", "--reverse", "release..HEAD").split()
    assert len(commits) == len(PATCHES)
    for name, commit in zip(names(), commits, strict=True):
        changed = git(repository, "show", "--name-only", "--format=", commit).split()
        assert [file for file in changed if file.startswith("tests/")] == [f"tests/test_{name}.py"]
        assert any(file.startswith("torch_pruning/") for file in changed)
    assert "tp_amp" not in git(repository, "diff", "release", "HEAD")


def test_the_page_tells_them_apart_too() -> None:
    """Torch-Pruning's own tests say the same with the patches, and each patch's others."""
    table = PAGE.read_text().split(MARK)[1]
    rows = re.findall(r"^\| `tests/test_(\w+)\.py` \| (.+) \| (.+) \|$", table, re.MULTILINE)
    changed = {name for name, without, with_them in rows if without != with_them}
    assert changed == set(names())
    assert len(rows) > len(names()) + 20
    for name, without, with_them in rows:
        if name in changed:
            count = without.split()[0]
            assert (without, with_them) == (f"{count} failed", f"{count} passed")


def test_pretrained_models_get_the_same_weights_each_time_without_a_download(
    tmp_path: Path,
) -> None:
    (tmp_path / "without_downloads.py").write_text(WITHOUT_DOWNLOADS)
    code = (
        "import without_downloads, torch, torchvision\n"
        "one, other = (torchvision.models.resnet18(weights='DEFAULT').state_dict() for _ in 'ab')\n"
        "assert all(torch.equal(one[name], other[name]) for name in one)\n"
        "other['fc.bias'] += 1\n"
        "model = torchvision.models.resnet18()\n"
        "model.load_state_dict(other)\n"
        "assert torch.equal(model.fc.bias, other['fc.bias'])\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def failed(repository: Path) -> set[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    done = subprocess.run(
        [*command, "tests"], cwd=repository, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stdout[-2000:]
    return set(re.findall(r"^(?:FAILED|ERROR) tests/test_(\w+)\.py", done.stdout, re.MULTILINE))


@pytest.mark.slow
def test_the_scripts_find_no_bug_any_more(repository: Path) -> None:
    outcomes = run_all(dict.fromkeys(SCRIPTS, str(repository)))
    left = {name: outcome for name, (outcome, *_) in outcomes.items() if outcome is not False}
    assert left == {}
    assert all(str(repository) in origin for *_, origin in outcomes.values())


@pytest.mark.slow
def test_their_tests_fail_without_and_pass_with_them(repository: Path, tmp_path: Path) -> None:
    assert failed(repository) == set()
    shutil.copytree(repository, tmp_path / "repository")
    without_fixes(tmp_path / "repository")
    assert failed(tmp_path / "repository") == set(names())


SAME_SCORES = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, torch_pruning as tp, tp_amp
from torch import nn
from torchvision.models import VisionTransformer, resnet18

assert tp.__file__.startswith(sys.argv[1])
torch.manual_seed(0)
vit, resnet = VisionTransformer(32, 8, 2, 2, 32, 64), resnet18(num_classes=10)
nn.init.normal_(vit.heads.head.weight)
grouped = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(),
    nn.ConvTranspose2d(8, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
cases = [(vit, vit.encoder.layers[0].mlp[0]), (grouped, grouped[0]), (grouped, grouped[2])]
cases += [(resnet, resnet.layer1[0].conv1), (resnet, resnet.conv1)]
for model, layer in cases:
    images = torch.randn(4, 3, 32, 32)
    linear = isinstance(layer, nn.Linear)
    prune = tp.prune_linear_out_channels if linear else tp.prune_conv_out_channels
    channels = layer.out_features if linear else layer.out_channels
    graph = tp.DependencyGraph().build_dependency(model, images)
    group = graph.get_pruning_group(layer, prune, list(range(channels)))
    for name in ("DIMAPImportance", "GramSchmidtImportance", "EntropyTaylorImportance"):
        theirs, ours = getattr(tp.importance, name)(), getattr(tp_amp, name)()
        pairs = [(theirs, ours)]
        if name == "EntropyTaylorImportance":
            model.zero_grad()
            ours.loss(model.eval()(images)).backward()
            for kind in ("prediction", "similarity"):
                if kind == "similarity" and model is not vit:
                    continue
                entropy = tp_amp.EntropyTaylorImportance(kind).loss  # of logits, as theirs
                one = getattr(tp.importance, name)(kind).collect(model, [images, images[:3]])
                other = getattr(tp_amp, name)(entropy)
                other.collect(model, [images, images[:3]], progress=False)
                pairs.append((one, other))
        for one, other in pairs:
            torch.testing.assert_close(one(group), other(group), rtol=1e-4, atol=1e-8)
            print(name, type(model).__name__, one(group)[:3])
"""


@pytest.mark.slow
def test_their_importances_score_as_those_here(repository: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SAME_SCORES, str(repository)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 5 * 4 + 1
