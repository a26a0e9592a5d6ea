"""What is on disk is whole: a file, or what a long run that may be killed has done so far."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tp_amp.running.distributed import agree, is_first, of_each
from tp_amp.running.fingerprints import digest

FORMAT = 1


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Write under another name first, so that a crash leaves no half file under the final one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class Checkpoint:
    """One file that a run reads when it starts and writes as it goes on.

    Of several ranks the first alone reads and writes; all of them know what it read.

    Args:
        path: of the file, a safetensors file; its folder is made.
        identity: what run this is, JSON values by the name of the argument.

    Attributes:
        tensors: what was written, by name; empty for a new run.
        facts: JSON values that were written; empty for a new run.

    Raises:
        ValueError: the file is of a run with other arguments, which are named, or is damaged.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.identity = json.loads(json.dumps({"format": FORMAT, **identity}))
        self.tensors: dict[str, Tensor] = {}
        self.facts: dict[str, Any] = {}
        if is_first():
            self._read()
        self.tensors, self.facts = agree(f"reading {path.name}", (self.tensors, self.facts))

    def _read(self) -> None:
        path = self.path
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            return
        try:
            with safe_open(str(path), "pt") as file:
                content = json.loads(file.metadata()["content"])
                self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.facts, written = content["facts"], content["identity"]
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no checkpoint or is damaged; delete it: {error}"
            ) from error
        names = [n for n in {**written, **self.identity} if written.get(n) != self.identity.get(n)]
        if names:
            found = "; ".join(
                f"{name} was {_short(written.get(name))}, now {_short(self.identity.get(name))}"
                for name in names
            )
            raise ValueError(
                f"{path} is of another run: {found}; start with the same arguments, or pass "
                "another folder"
            )

    def write(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Replace what is on disk, at once."""
        if not is_first():
            return
        content = {"content": json.dumps({"identity": self.identity, "facts": dict(facts)})}
        stored = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        write_atomically(self.path, lambda part: save_file(stored, str(part), content))


def first_digest(tensors: Iterable[Tensor]) -> str | list[str]:
    """A short name for a first batch; of several ranks, one for each."""
    return of_each("the first batch", digest((str(i), t) for i, t in enumerate(tensors)))


def model_digest(model: nn.Module) -> str:
    """A short name for a model's class and weights."""
    return f"{type(model).__name__} {digest(model.state_dict().items())}"


def describe(value: Any) -> Any:
    """An argument as JSON values: plain ones as they are, objects by class and plain attributes."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    name = getattr(value, "__qualname__", None)
    if name is not None:
        return name
    plain = (bool, int, float, str)
    attributes = vars(value).items() if hasattr(value, "__dict__") else ()
    own = {k: v for k, v in attributes if isinstance(v, plain) and not k.startswith("_")}
    return {"class": type(value).__qualname__, **own}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
