"""The documentation is complete, and the examples of the public names run."""

import csv
import doctest
import re
from pathlib import Path

import pytest

import dfkde_sklearn
from dfkde_sklearn import datasets, metrics

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "api" / "index.rst"
FIGURES = sorted((ROOT / "docs" / "figures").glob("*.csv"))


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


def included_files():
    """Return the files that the pages include."""
    pages = (ROOT / "docs").rglob("*.rst")
    return [
        (page.parent / name).resolve()
        for page in pages
        for name in re.findall(r"^ +:file: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]


def test_every_table_that_a_page_includes_is_there():
    files = included_files()
    assert files
    assert [file for file in files if not file.is_file()] == []


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.stem)
def test_a_table_of_figures_is_included_and_written_by_the_benchmark_that_its_name_begins_with(figure):
    assert figure.resolve() in included_files()
    writers = [
        script
        for script in (ROOT / "benchmarks").glob("*.py")
        if figure.stem.startswith(f"{script.stem}_")
        and re.search(rf'f?"{script.stem}_[a-z{{]', script.read_text(encoding="utf-8"))
    ]
    assert len(writers) == 1
    header, *rows = csv.reader(figure.read_text(encoding="utf-8").splitlines())
    assert rows
    assert {len(row) for row in rows} == {len(header)}
