"""Sphinx: `make docs` builds the site into build/site; a warning is an error."""

import sys
from pathlib import Path

import sao_prune

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "sao_prune"
copyright = "the sao_prune authors, Apache-2.0"
version = release = sao_prune.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "formulas",
    "repository",
    "executed",
]
exclude_patterns = ["_ext"]
suppress_warnings = ["myst.header"]  # the reports of runs have headings of the third level below the first
default_role = "py:obj"

myst_enable_extensions = ["attrs_inline", "colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_use_admonition_for_examples = False
python_maximum_signature_line_length = 88
add_module_names = False

html_theme = "furo"
html_title = f"sao_prune {version}"
html_math_renderer = "svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
pygments_style = "default"
pygments_dark_style = "github-dark"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5a8a", "color-brand-content": "#0b62a0"},
    "dark_css_variables": {"color-brand-primary": "#6cb6f0", "color-brand-content": "#6cb6f0"},
}


def skip_foreign(app, what, name, obj, skip, options):  # type: ignore[no-untyped-def]
    """Members that are functions of other libraries have their documentation there."""
    foreign = callable(obj) and not (getattr(obj, "__module__", None) or "sao_prune").startswith("sao_prune")
    return True if foreign or getattr(obj, "__objclass__", None) is not None else None


def setup(app):  # type: ignore[no-untyped-def]
    app.connect("autodoc-skip-member", skip_foreign)
