"""The one modelling file that transformers runs where this package is not installed."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Collection, Iterator
from types import ModuleType
from typing import Any

from torch import nn

from tp_amp.sharing.cutting_again import cut_again
from tp_amp.sharing.forms import (
    with_attention_removed,
    with_heads_cut,
    with_multihead_cut,
    with_nothing_read,
    with_ranks_cut,
)
from tp_amp.structure.attention.adapted_class import adapted
from tp_amp.structure.attention.fitting_reshapes import FittingReshapes
from tp_amp.structure.attention.head_forward import HeadForward
from tp_amp.structure.attention.multihead_forward import MultiheadForward
from tp_amp.structure.attention.rank_linear import RankLinear
from tp_amp.structure.constant_linear import ConstantLinear
from tp_amp.structure.ranks.removed_forward import RemovedForward

_HEADS = (FittingReshapes, HeadForward, adapted)
# What turns a layer into one of a form, and of each module that it needs one thing.
FORMS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "heads": (with_heads_cut, _HEADS),
    "multihead": (with_multihead_cut, (*_HEADS, MultiheadForward)),
    "inside_heads": (with_ranks_cut, (RankLinear,)),
    "constant": (with_nothing_read, (ConstantLinear,)),
    "removed": (with_attention_removed, (adapted, RemovedForward)),
}
_FILE = '''"""A pruned {kind}: config.json records the sizes of each layer that was cut.

Written by tp_amp.save_pruned; it needs transformers and torch alone. MIT license.
"""

{imports}


{body}


class {config}({kind}.config_class):
    """The dense model's configuration, and the sizes of what was cut from it."""

    model_type = "{model_type}"


class {pruned}({kind}):
    """The pruned model: the dense one, cut before its weights are loaded."""

    config_class = {config}

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if config._attn_implementation is None:  # as it was saved, unless another is asked for
            config._attn_implementation = config.dense_attention
        super().__init__(config, *args, **kwargs)
        cut_again(self, config.pruned_layers, {forms})
'''


def modelling_file(kind: type[nn.Module], names: dict[str, str], used: Collection[str]) -> str:
    """Write the file's text.

    Args:
        kind: the model's class in transformers.
        names: `pruned` and `config`, what its two classes are called, and the `model_type`.
        used: which of `FORMS` the layers have.
    """
    needed = [cut_again, *(thing for form in used for thing in FORMS[form][1])]
    modules = list(dict.fromkeys(sys.modules[thing.__module__] for thing in needed))
    functions = [inspect.getsource(FORMS[form][0]) for form in used]
    given = ", ".join(f'"{form}": {FORMS[form][0].__name__}' for form in used)
    return _FILE.format(
        kind=kind.__name__,
        imports=_imports(modules, kind.__name__),
        body="\n\n\n".join(text.strip() for text in [*map(_body, modules), *functions]),
        forms=f"{{{given}}}",
        **names,
    )


def _body(module: ModuleType) -> str:
    """A module's text without what it says of itself and imports."""
    text = inspect.getsource(module)
    lines = text.splitlines()
    tree = ast.parse(text)
    for node in (tree.body[0], *_import_nodes(tree)):
        for line in range(node.lineno - 1, node.end_lineno or node.lineno):
            lines[line] = ""
    return "\n".join(lines)


def _imports(modules: list[ModuleType], kind: str) -> str:
    """All that modules import from elsewhere, once."""
    plain: set[str] = set()
    named: dict[str, set[str]] = {"transformers": {kind}, "typing": {"Any"}}
    for module in modules:
        for node in _import_nodes(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Import):
                plain |= {alias.name for alias in node.names}
            elif node.module and not node.module.startswith("tp_amp"):
                named.setdefault(node.module, set()).update(alias.name for alias in node.names)
    named.pop("__future__", None)
    lines = [f"import {name}" for name in sorted(plain)]
    lines += [f"from {name} import {', '.join(sorted(of))}" for name, of in sorted(named.items())]
    return "\n".join(["from __future__ import annotations", "", *lines])


def _import_nodes(tree: ast.Module) -> Iterator[Any]:
    return (node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)))
