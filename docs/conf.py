"""Sphinx's settings: `make docs` builds these pages and takes a warning for an error."""

import re
from pathlib import Path
from typing import Any

import tp_amp

project = "tp_amp"
version = release = tp_amp.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"tp_amp {release}"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["pages.css"]
myst_heading_anchors = 3
# A block without a language is one of shell commands.
highlight_language = "none"

# A name in single backticks is code, as it is in Markdown.
default_role = "literal"

# Fields of a dataclass are told in its docstring, under `Attributes`.
napoleon_use_ivar = True

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88


def setup(app: Any) -> None:
    """Let default factories be read as Python, and put files of the root into their pages."""
    app.connect("autodoc-process-signature", _readable)
    app.connect("source-read", _whole)


def _readable(*arguments: Any) -> tuple[str | None, str | None]:
    signature, returns = arguments[-2:]
    return signature and signature.replace("<factory>", "..."), returns


def _whole(app: Any, page: str, source: list[str]) -> None:
    """Show a page that only points to UPSTREAM.md with all that stands there."""
    if page == "upstream":
        text = (Path(app.srcdir).parent / "UPSTREAM.md").read_text()
        text = re.sub(r"\]\((?!https?:)", "](../", text)
        source[0] = text.replace("](../docs/", "](")
