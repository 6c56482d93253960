"""Maps over images: what is red, what is outlined, and what a mask holds."""

import numpy as np
import pytest
from PIL import Image

from dfkde_sklearn._report.overlay import OUTLINE, TINT, mask, overlay

GREY = Image.fromarray(np.full((40, 60), 100, np.uint8))


def of_image(value=-5.0):
    """A map whose anomalous pixels are a block of 10 x 20."""
    log_densities = np.full((40, 60), 10.0)
    log_densities[10:20, 30:50] = value
    return log_densities


def test_normal_pixels_stay_and_anomalous_ones_turn_red():
    shown = np.asarray(overlay(GREY, of_image(-1e6), 0.0, 0.05))
    assert (shown[:8] == 100).all()
    inside = shown[10:20, 30:50].reshape(-1, 3)
    assert len(np.unique(inside, axis=0)) == 1
    assert np.linalg.norm(inside[0] - np.array(TINT)) < np.linalg.norm(inside[0] - np.array([100.0] * 3))
    assert (shown[9, 30:50] == OUTLINE).all()


def test_the_tint_grows_with_the_depth_below_the_threshold():
    red = [int(np.asarray(overlay(GREY, of_image(value), 0.0, 0.05))[15, 40, 0]) for value in (-1, -10, -100)]
    assert 100 < red[0] < red[1] < red[2]


def test_a_normal_map_leaves_the_picture():
    np.testing.assert_array_equal(overlay(GREY, of_image(5.0), 0.0, 0.05), np.asarray(GREY.convert("RGB")))


def test_a_mask_is_white_below_the_threshold():
    np.testing.assert_array_equal(np.asarray(mask(of_image(), 0.0)) == 255, of_image() < 0)


def test_a_map_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"A map of 60 x 40 pixels for a picture of 40 x 60"):
        overlay(GREY, of_image().T, 0.0, 0.05)
