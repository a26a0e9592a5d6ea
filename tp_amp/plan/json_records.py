"""What a plan holds as JSON and back: values are checked, nothing is cast."""

from __future__ import annotations

import json
from dataclasses import asdict, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tp_amp.structure.model_structure import Site


def to_record(site: Site) -> dict[str, Any]:
    """A site as JSON, with its kind."""
    return {"kind": type(site).__name__, **asdict(site)}


def from_record(record: dict[str, Any]) -> Site:
    """Read a site that `to_record` wrote.

    Raises:
        KeyError, TypeError or ValueError: it is damaged.
    """
    kinds: dict[str, type[Site]] = {kind.__name__: kind for kind in get_args(Site)}
    fields = {name: value for name, value in record.items() if name != "kind"}
    site: Site = read_typed(fields, kinds[record["kind"]])
    if min(site.width, site.unit_width) < 1 or site.first < 0:
        raise ValueError(f"no {record['kind']} has such sizes: {fields}")
    return site


def read_typed(value: Any, expected: Any) -> Any:
    """Read a value of JSON as a dataclass, a tuple or one of the plain types; nothing is cast."""
    if is_dataclass(expected):
        hints = get_type_hints(expected)
        values = {name: read_typed(item, hints[name]) for name, item in value.items()}
        return expected(**values)  # type: ignore[operator]
    if get_origin(expected) is tuple:
        return tuple(read_typed(item, get_args(expected)[0]) for item in read_typed(value, list))
    if get_origin(expected) is Literal:
        if value not in get_args(expected):
            raise ValueError(f"expected one of {get_args(expected)}, found {value!r}")
        return value
    if type(value) not in (get_args(expected) or (expected,)):
        raise TypeError(f"expected {expected}, found {value!r}")
    return value


def read_indices(values: Any) -> list[int]:
    """Read a list of integers."""
    if set(map(type, values)) <= {int}:  # a million of them in the largest models
        return list(values)
    return [read_typed(value, int) for value in values]


def write_lines(value: Any) -> str:
    """Write JSON, a dict with one line for each entry."""
    if not isinstance(value, dict):
        return json.dumps(value)
    return "{" + ",".join(f"\n    {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "}"
