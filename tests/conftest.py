"""What all tests share."""

import pytest
import torch

# The matrices here are small: more threads would spend their time waiting for each other, above all where other work
# shares the cores.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the long forms of the fuzz tests")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="needs --long"))


def pytest_configure(config):
    try:
        from hypothesis import settings
    except ImportError:
        return
    # The same examples at each run, and no time limit: other work shares the cores.
    n_examples = 1000 if config.getoption("--long") else 20
    settings.register_profile("dfkde", derandomize=True, deadline=None, database=None, max_examples=n_examples)
    settings.load_profile("dfkde")
