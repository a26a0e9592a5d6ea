"""Torch-Pruning with the patches of docs/upstream_patches: a repository, and its own tests there.

    python tests/upstream_patches.py                      # fetches the release's source by pip
    python tests/upstream_patches.py --source FOLDER      # or takes it from there

It applies all patches in order to release 1.6.1 and runs Torch-Pruning's own tests without and with
them, each file in a process of its own, then the patches' tests. Pretrained weights, which some of
these tests ask for, are not fetched: such models get random weights, the same each time. The
outcome goes into the table of UPSTREAM.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PATCHES = sorted((Path(__file__).parents[1] / "docs" / "upstream_patches").glob("*.patch"))
RELEASE = "torch-pruning==1.6.1"
# Tests of the release that relied on what a patch mends.
CHANGED_TESTS = ["tests/test_concat.py"]
LONGEST = 900  # seconds for one file of tests
PAGE, MARK = Path(__file__).parents[1] / "UPSTREAM.md", "<!-- outcome -->"
# A plugin of pytest. Torchvision takes the function by its name, so before its import.
WITHOUT_DOWNLOADS = """
import torch

nothing, load = {}, torch.nn.Module.load_state_dict
torch.hub.load_state_dict_from_url = lambda *args, **options: nothing

def same_each_time(self, state, *args, **options):
    if state is not nothing:
        return load(self, state, *args, **options)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in self.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)

torch.nn.Module.load_state_dict = same_each_time
"""


def git(repository: Path, *arguments: str) -> str:
    """Run git on a repository that is not part of another one, by no one's configuration."""
    environment = {
        **os.environ,
        "GIT_CEILING_DIRECTORIES": str(repository.parent),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
    }
    identity = ("-c", "user.name=tp_amp", "-c", "user.email=tp_amp@localhost")
    done = subprocess.run(
        ["git", *identity, *arguments],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"git {arguments[0]} failed: {done.stdout}{done.stderr}")
    return done.stdout


def patched(source: Path, repository: Path) -> list[str]:
    """Make a repository of a release's files with all patches applied, one commit for each.

    Its tag `release` is the release. Returns the files of tests that the patches add.
    """
    ignored = shutil.ignore_patterns("__pycache__", "*.pth", ".pytest_cache")
    shutil.copytree(source, repository, ignore=ignored)
    git(repository, "init", "--quiet")
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--message", "The release")
    git(repository, "tag", "release")
    # An installed package is without the tests that a patch changes.
    own = [file for file in CHANGED_TESTS if not (source / file).exists()]
    git(repository, "am", "--quiet", *(f"--exclude={file}" for file in own), *map(str, PATCHES))
    added = git(repository, "diff", "--name-only", "--diff-filter=A", "release", "--", "tests")
    return added.split()


def without_fixes(repository: Path) -> None:
    """Put the package back to the release's; the patches' tests stay."""
    git(repository, "rm", "-r", "--quiet", "torch_pruning")
    git(repository, "checkout", "release", "--", "torch_pruning")


def outcome(repository: Path, file: str) -> str:
    """Run one file of tests: what pytest says in its last line, without the time."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    plugins = repository.parent / "plugins"
    plugins.mkdir(exist_ok=True)
    (plugins / "without_downloads.py").write_text(WITHOUT_DOWNLOADS)
    try:
        done = subprocess.run(
            [*command, "-p", "without_downloads", file],
            cwd=repository,
            env={**os.environ, "PYTHONPATH": str(plugins)},
            capture_output=True,
            text=True,
            timeout=LONGEST,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"longer than {LONGEST} s"
    lines = done.stdout.strip().splitlines() or [f"status {done.returncode}"]
    return lines[-1].split(" in ")[0].strip("= ")


def table(rows: dict[str, tuple[str, str]]) -> str:
    """In Markdown: by file, what its tests say without and with the patches."""
    lines = [f"| `{file}` | {before} | {after} |" for file, (before, after) in rows.items()]
    return "\n".join(["| file | without | with |", "|---|---|---|", *lines])


def main() -> int:
    """Fill the table; the status is 1 if a patch changes what Torch-Pruning's own tests say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="the unpacked source of the release")
    source = parser.parse_args().source
    rows, bad = {}, []
    with tempfile.TemporaryDirectory() as folder:
        source = source or fetched(Path(folder))
        fixed, release = Path(folder) / "with", Path(folder) / "without"
        added = patched(source, fixed)
        shutil.copytree(fixed, release)
        without_fixes(release)
        own = sorted(f"tests/{path.name}" for path in (source / "tests").glob("test_*.py"))
        print(f"{len(PATCHES)} patches applied to {source.name}\n")
        for file in [*own, *added]:
            before, after = rows[file] = outcome(release, file), outcome(fixed, file)
            print(f"{file}: {before} without, {after} with", flush=True)
            new = "failed" in before and "failed" not in after
            bad += [] if (before == after if file in own else new) else [file]
    start, _, end = PAGE.read_text().split(MARK)
    PAGE.write_text(f"{start}{MARK}\n{table(rows)}\n{MARK}{end}")
    print(f"not as expected: {', '.join(bad)}" if bad else "as expected")
    return int(bool(bad))


def fetched(folder: Path) -> Path:
    """The release's source, from PyPI."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", ":all:", "--dest", str(folder), RELEASE]
    subprocess.run(command, check=True)
    [archive] = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


if __name__ == "__main__":
    sys.exit(main())
