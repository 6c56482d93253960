"""``dfkde layers``."""

import re

import numpy as np
import pytest
from command_line import fact, run

from dfkde_sklearn import TimmFeatures

# Any: nothing is learnt from them.
IMAGES = np.zeros((1, 32, 32, 3), np.uint8)


def listed(capsys, *arguments):
    """Return the layers that were printed, each with its channels and its grid."""
    assert run("layers", *arguments) == 0
    printed = capsys.readouterr().out
    rows = re.findall(r"^(\S+) +(\d+) +(?:(\d+) x (\d+)|-)$", printed.split("grid\n")[1], re.MULTILINE)
    return printed, {name: (int(width), [int(h), int(w)] if h else []) for name, width, h, w in rows}


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_layers_have_the_channels_and_the_grid_that_features_have(backbone, capsys):
    printed, layers = listed(capsys, backbone)
    assert len(layers) > 5
    features = TimmFeatures(backbone, layers=list(layers), pretrained=False, random_state=0).fit(IMAGES)
    expected = zip(features.layers_, features.layer_widths_, features.layer_grids_, strict=True)
    assert layers == {name: (width, grid) for name, width, grid in expected}
    assert fact(printed, "Images") == "{} x {} pixels".format(*features.input_size_)


def test_the_default_layers_are_those_of_a_fit(capsys):
    printed, _ = listed(capsys, "test_resnet")
    features = TimmFeatures("test_resnet", pooling=None, pretrained=False, random_state=0)
    assert fact(printed, "Default layers") == ", ".join(features.fit(IMAGES).layers_)


def test_all_lists_the_parts_of_blocks_too(capsys):
    _, some = listed(capsys, "test_resnet")
    _, every = listed(capsys, "test_resnet", "--all")
    assert some.items() < every.items()
    assert any(name.count(".") > 1 for name in every)


def test_grids_follow_the_size_of_the_images(capsys):
    _, usual = listed(capsys, "test_resnet")
    _, larger = listed(capsys, "test_resnet", "--image-size", "320")
    assert larger["layer2"] == (usual["layer2"][0], [2 * side for side in usual["layer2"][1]])
