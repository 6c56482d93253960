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
            if "long" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="run with --long"))
