"""Saved folders on the Hugging Face Hub: sent there, and fetched from it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tp_amp.plan.file_names import FILES, PLAN, SOURCE, WEIGHTS, written_files

_PREFIX = "hf-hub:"


def push_to_hub(
    folder: str | os.PathLike[str],
    repository: str,
    *,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Send a folder of `save_pruned` to the Hugging Face Hub.

    `create_model("hf-hub:USER/NAME")` brings it back, whatever the library. Only the files that
    `save_pruned` wrote are sent, not what else lies in the folder, of such a name or another. What
    an earlier folder left in the repository and this one has not is deleted there.

    Args:
        folder: from `save_pruned`.
        repository: `"USER/NAME"`; made if it is missing.
        private: whether a repository that is made is seen by its owner alone; left out, as the
            account has it.
        token: of the account; left out, that of `hf auth login`.

    Returns:
        The address of the commit.

    Raises:
        ValueError: the folder holds no saved model.

    Example:
        >>> import tempfile, tp_amp
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     try:
        ...         tp_amp.push_to_hub(folder, "me/small-vit")
        ...     except ValueError as error:
        ...         print(str(error).replace(folder, "FOLDER"))
        FOLDER holds no plan.json; it is no folder of save_pruned
    """
    from huggingface_hub import HfApi

    for name in (PLAN, SOURCE, WEIGHTS):
        if not (Path(folder) / name).is_file():
            raise ValueError(f"{folder} holds no {name}; it is no folder of save_pruned")
    hub = HfApi(token=token)
    hub.create_repo(repository, private=private, exist_ok=True)
    sent = {SOURCE} | written_files(Path(folder))
    commit = hub.upload_folder(
        repo_id=repository,
        folder_path=Path(folder),
        allow_patterns=sorted(sent),
        delete_patterns=sorted(_sent_before(hub, repository) - sent),
        commit_message="A model pruned by tp_amp",
    )
    return str(commit.commit_url)


def _sent_before(hub: Any, repository: str) -> set[str]:
    """The files of a repository that an earlier folder left there, so that none is read as new."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return written_files(Path(hub.hf_hub_download(repository, SOURCE)).parent)
    except EntryNotFoundError:
        return set()


def local_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder itself, or where the files of `"hf-hub:USER/NAME"` or `...@REVISION` lie here.

    Raises:
        ValueError: they can't be fetched.
    """
    if not str(folder).startswith(_PREFIX):
        return Path(folder)
    from huggingface_hub import snapshot_download

    repository, _, revision = str(folder).removeprefix(_PREFIX).partition("@")
    try:
        known = [SOURCE, *FILES]
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=known))
    # What the hub's client raises are of these two.
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} can't be fetched ({str(error).splitlines()[0]}); check the name and the "
            "network, and hf auth login where the repository is private"
        ) from error
