"""Sphinx's settings: `make docs` builds these pages and takes a warning for an error."""

from typing import Any

import tp_amp

project = "tp_amp"
version = release = tp_amp.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"tp_amp {release}"
myst_heading_anchors = 3

# A name in single backticks is code, as it is in Markdown.
default_role = "literal"

# Fields of a dataclass are told in its docstring, under `Attributes`.
napoleon_use_ivar = True

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88


def setup(app: Any) -> None:
    """Let default factories of dataclasses be read as Python, so that types are linked."""
    app.connect("autodoc-process-signature", _readable)


def _readable(*arguments: Any) -> tuple[str | None, str | None]:
    signature, returns = arguments[-2:]
    return signature and signature.replace("<factory>", "..."), returns
