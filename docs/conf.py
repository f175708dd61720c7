"""How the pages of this folder become a site: `make docs` writes it to build/docs, without a network."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from sphinx.application import Sphinx

from clipless_dp import __version__

project = "clipless-dp"
author = "the authors of clipless-dp"
copyright = "the authors of clipless-dp, Apache 2.0"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
# Sphinx has a page of its own under this name: what is written here is shown under another.
exclude_patterns = ["search.md"]
root_doc = "index"
language = "en"
# Links of signatures to torch and Python would need their inventories from the network.
nitpicky = False
suppress_warnings = ["myst.strikethrough"]

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "deflist"]
highlight_language = "none"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 120
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Guarantee", "Shape", "Source", "Cost", "Chosen by"]

# Of docstrings that write code between single backticks.
default_role = "code"

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = "clipless-dp"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
copybutton_exclude = ".linenos, .gp"

warnings.filterwarnings("ignore", module=r"opacus\..*")

HERE = Path(__file__).parent
REPOSITORY = HERE / "repository"
"""Copies of pages from above this folder, of which Sphinx takes none; git ignores them."""
SEARCH = "private-search.md"
OUTSIDE = re.compile(r"\]\(\.\./(?:benchmarks/results/)?(\w[\w-]*)\.md")


def bring_in(app: Sphinx) -> None:
    """Copies what is written elsewhere in the repository: how to contribute, what changed, results."""
    REPOSITORY.mkdir(exist_ok=True)
    above = [HERE.parent / "CONTRIBUTING.md", HERE.parent / "CHANGELOG.md"]
    pages = {page.name: page for page in (*above, *(HERE.parent / "benchmarks" / "results").glob("*.md"))}
    for name, page in {**pages, SEARCH: HERE / "search.md"}.items():
        text = page.read_text("utf-8").replace("](docs/", "](../")
        if name == SEARCH:
            text = re.sub(r"\]\((?=[\w-]+\.md)", "](../", text)
        copy = REPOSITORY / name
        if not copy.exists() or copy.read_text("utf-8") != text:  # Else it would be built again each time.
            copy.write_text(text, "utf-8")


def link_to_copies(app: Sphinx, name: str, source: list[str]) -> None:
    """Links that work in the repository lead to the copies on the site."""
    if "/" not in name:
        source[0] = OUTSIDE.sub(r"](repository/\1.md", source[0]).replace("](search.md", f"](repository/{SEARCH}")


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("builder-inited", bring_in)
    app.connect("source-read", link_to_copies)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
