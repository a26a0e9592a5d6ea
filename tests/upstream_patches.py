"""Torch-Pruning with the patches of docs/upstream_patches: a repository, and its own tests there.

    python tests/upstream_patches.py                      # fetches the release's source by pip
    python tests/upstream_patches.py --source FOLDER      # or takes it from there

It applies all patches in order to release 1.6.1 and runs Torch-Pruning's own tests without and with
them, each file in a process of its own, then the patches' tests.
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
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", file]
    try:
        done = subprocess.run(
            command, cwd=repository, capture_output=True, text=True, timeout=LONGEST, check=False
        )
    except subprocess.TimeoutExpired:
        return f"longer than {LONGEST} s"
    lines = done.stdout.strip().splitlines() or [f"status {done.returncode}"]
    return lines[-1].split(" in ")[0].strip("= ")


def main() -> int:
    """Print a table; the status is 1 if a patch changes what Torch-Pruning's own tests say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="the unpacked source of the release")
    source = parser.parse_args().source
    with tempfile.TemporaryDirectory() as folder:
        source = source or fetched(Path(folder))
        fixed, release = Path(folder) / "with", Path(folder) / "without"
        added = patched(source, fixed)
        shutil.copytree(fixed, release)
        without_fixes(release)
        own = sorted(f"tests/{path.name}" for path in (source / "tests").glob("test_*.py"))
        print(f"{len(PATCHES)} patches applied to {source.name}\n")
        print("| file | without | with |\n|---|---|---|")
        bad = []
        for file in [*own, *added]:
            before, after = outcome(release, file), outcome(fixed, file)
            print(f"| {file} | {before} | {after} |", flush=True)
            new = "failed" in before and "failed" not in after
            bad += [] if (before == after if file in own else new) else [file]
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
