"""Sphinx configuration. The build reads nothing from the network, and neither do the pages."""

import doctest
import tempfile
import zlib
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import dfkde_sklearn

project = "dfkde-sklearn"
author = "the dfkde-sklearn developers"
copyright = "the dfkde-sklearn developers"
version = release = dfkde_sklearn.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.extlinks",
    "sphinx.ext.intersphinx",
    "numpydoc",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "matplotlib.sphinxext.plot_directive",
]
exclude_patterns = ["_build", "examples"]
templates_path = ["_templates"]
extlinks = {"doi": ("https://doi.org/%s", "doi:%s")}

html_theme = "pydata_sphinx_theme"
html_title = "dfkde-sklearn"
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_math_renderer = "mathml"
html_theme_options = {"show_toc_level": 2, "show_prev_next": True}
# One page has no sections beside it to list.
html_sidebars = {name: [] for name in ("install", "quickstart", "faq", "changelog", "laboratory")}

autosummary_generate = True
# Types stand in the docstrings; in signatures they would hide the defaults.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
# Every docstring that is shown is checked, so that -W makes errors of its faults. Methods need no examples (EX01),
# cross-references (SA01) or second paragraph (ES01) of their own.
numpydoc_validation_checks = {"all", "EX01", "SA01", "ES01"}


def _inventory(project: str) -> str:
    """Return the path of an inventory of the names of another project that these pages link to.

    Its own would have to be downloaded, and is binary. The files in `inventories` have the lines of one.
    """
    lines = (Path(__file__).parent / "inventories" / f"{project}.txt").read_bytes()
    header = f"# Sphinx inventory version 2\n# Project: {project}\n# Version:\n# Compressed with zlib.\n"
    file = Path(tempfile.mkdtemp()) / "objects.inv"
    file.write_bytes(header.encode() + zlib.compress(lines))
    return str(file)


intersphinx_mapping = {
    "scikit-learn": ("https://scikit-learn.org/stable", _inventory("scikit-learn")),
    "scipy": ("https://docs.scipy.org/doc/scipy", _inventory("scipy")),
    "numpy": ("https://numpy.org/doc/stable", _inventory("numpy")),
    "torch": ("https://docs.pytorch.org/docs/stable", _inventory("torch")),
}

# For examples that need what need not be installed.
doctest_global_setup = "from importlib.util import find_spec"
# As in pytest, so that an example means the same in both.
doctest_default_flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

# Examples that are run by the build; `-D plot_gallery=0` leaves that out.
sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "auto_examples",
    "subsection_order": ["examples/first_steps", "examples/choosing", "examples/moving"],
    "download_all_examples": False,
    # Files to copy, to which the pages link.
    "ignore_pattern": r"serve\.py$",
    "default_thumb_file": str(Path(__file__).parent / "_static" / "demo.png"),
    "show_signature": False,
    "min_reported_time": float("inf"),
    "abort_on_example_error": True,
}

plot_formats = [("svg", 72)]
plot_html_show_formats = False
plot_html_show_source_link = False


def _visit_math(translator, node: nodes.math) -> None:
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def _visit_displayed_math(translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="displayed-math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app) -> None:
    # MathML, which browsers draw themselves: the usual renderer loads a script from elsewhere into each page.
    app.add_html_math_renderer("mathml", (_visit_math, None), (_visit_displayed_math, None))
