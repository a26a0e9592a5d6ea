"""README.md of a saved folder: what it is, how it is opened, and what was measured."""

from __future__ import annotations

from tp_amp.reports.report import Report

_CARD = """---
library_name: {library}
tags:
- pruned
- tp_amp
---

# {name}, pruned

A `{name}` of {library}, smaller: {cut} were cut, by
[Torch-Pruning](https://github.com/VainF/Torch-Pruning) and tp_amp.

## Open it

```python
{opening}
```

{note}

## What was cut

{tables}
"""
# What was cut, by what a layer's width counts.
_UNITS = {
    "channels": "channels of its MLPs",
    "heads": "heads of its attentions",
    "channels of each head": "channels inside its heads",
    "channels of the stream": "channels of its residual streams",
}
_TRANSFORMERS = (
    """from transformers import {opener}

model = {opener}.from_pretrained("FOLDER_OR_REPOSITORY", trust_remote_code=True)""",
    """A configuration of transformers has one width for all layers. So `modeling_pruned.py` builds
the dense model and cuts it to the sizes in `config.json` before the weights are loaded. It needs
transformers and torch alone. With tp_amp installed, `tp_amp.create_model("FOLDER")` runs no code
of the folder.""",
)
_TIMM = (
    """import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True)  # or "hf-hub:REPOSITORY\"""",
    "All layers of a kind are of one width, so that timm's own arguments build the model.",
)
_OURS = (
    """import tp_amp

model = tp_amp.create_model("FOLDER")  # or "hf-hub:REPOSITORY\"""",
    "It needs tp_amp and {library}. No code of the folder is run.",
)


def model_card(library: str, name: str, report: Report, *, opener: str | None = None) -> str:
    """Write the card.

    Args:
        library: that the dense model is of.
        name: of the model there.
        report: widths, and what was measured if anything was.
        opener: what opens the folder where tp_amp is not: a class of transformers, or `"timm"`.
    """
    opening, note = {None: _OURS, "timm": _TIMM}.get(opener, _TRANSFORMERS)
    return _CARD.format(
        library=library,
        name=name,
        cut=_cut(report),
        opening=opening.format(opener=opener),
        note=note.format(library=library),
        tables=report.to_markdown(),
    )


def _cut(report: Report) -> str:
    """What was cut, in words; layers that a report does not know the kind of may be of either."""
    units = dict.fromkeys(layer.units for layer in report.layers)
    either = f"{_UNITS['channels']} or {_UNITS['heads']}"
    words = [_UNITS.get(unit, either) for unit in units] or ["no layers"]
    return " and ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)
