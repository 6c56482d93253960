"""Sphinx configuration. The build reads nothing from the network, and neither do the pages."""

import doctest

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
    "numpydoc",
    "matplotlib.sphinxext.plot_directive",
]
exclude_patterns = ["_build"]
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
html_sidebars = {"install": [], "quickstart": [], "changelog": []}

autosummary_generate = True
# Types stand in the docstrings; in signatures they would hide the defaults.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
# Every docstring that is shown is checked, so that -W makes errors of its faults. Methods need no examples (EX01),
# cross-references (SA01) or second paragraph (ES01) of their own.
numpydoc_validation_checks = {"all", "EX01", "SA01", "ES01"}
# Names of other packages, whose inventories would have to be downloaded.
nitpick_ignore_regex = [("py:.*", r"(sklearn|scipy|numpy|torch|timm|PIL)\..*")]

# For examples that need what need not be installed.
doctest_global_setup = "from importlib.util import find_spec"
# As in pytest, so that an example means the same in both.
doctest_default_flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

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
