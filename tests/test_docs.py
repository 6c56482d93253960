"""The documentation is complete, and the examples of the public names run."""

import doctest
import re
from pathlib import Path

import pytest

import dfkde_sklearn
from dfkde_sklearn import datasets, metrics

REFERENCE = Path(__file__).parents[1] / "docs" / "api" / "index.rst"


@pytest.mark.parametrize("module", [dfkde_sklearn, datasets, metrics], ids=lambda module: module.__name__)
def test_every_public_name_has_a_page_in_the_api_reference(module):
    sections = re.split(r"^\.\. currentmodule:: (.*)\n", REFERENCE.read_text(), flags=re.MULTILINE)[1:]
    section = dict(zip(sections[::2], sections[1::2], strict=True))[module.__name__]
    assert set(re.findall(r"^   (\w+)$", section, re.MULTILINE)) == set(module.__all__) - {"datasets", "metrics"}


@pytest.mark.parametrize("name", sorted(set(dfkde_sklearn.__all__) - {"datasets", "metrics"}))
def test_the_examples_of_a_public_name_run(name):
    # Public classes name the package as their module, where doctest does not look for the examples of another file.
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    runner = doctest.DocTestRunner(optionflags=flags)
    for example in doctest.DocTestFinder().find(getattr(dfkde_sklearn, name), name, module=False, globs={}):
        runner.run(example)
    assert runner.failures == 0
