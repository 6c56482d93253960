"""Overlapping tiles: what they cover, and one grid of positions from all of them, against a slow loop."""

import json
import re
from itertools import pairwise

import numpy as np
import pytest
import torch

from dfkde_sklearn import PatchDFKDEDetector, TimmFeatures, cache_size
from dfkde_sklearn._document import from_json
from dfkde_sklearn._features.tiles import tiling


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 96, 128, 3), np.uint8)


def tiled(**parameters):
    return TimmFeatures(
        **{
            "backbone": "test_resnet",
            "pretrained": False,
            "random_state": 0,
            "image_size": (96, 128),
            "tile_size": 64,
            "pooling": None,
        }
        | parameters
    )


@pytest.mark.parametrize("image", [64, 80, 96, 112, 128, 448, 896])
@pytest.mark.parametrize("tile", [64, 48])
def test_tiles_cover_an_image_and_overlap_by_a_quarter(image, tile):
    tiles = tiling((image, tile), (tile, tile), (tile // 16, tile // 16))
    starts, n = tiles.starts[0], tile // 16
    assert starts[0] == 0
    assert starts[-1] + n == image // 16
    assert all(0 < b - a <= 0.75 * n for a, b in pairwise(starts))
    # One fewer would not do.
    assert len(starts) == 1 or (len(starts) - 2) * int(0.75 * n) < image // 16 - n
    assert tiles.starts[1] == [0]
    assert tiles.grid == (image // 16, n)


def test_positions_are_weighted_means_over_the_tiles_that_show_them(images):
    features = tiled().fit(images)
    assert features.tile_size_ == (64, 64)
    found = features.transform(images)
    of_tile = TimmFeatures("test_resnet", pretrained=False, random_state=0, image_size=64, pooling=None).fit(images)
    h, w = of_tile.grid_shape_
    step = 64 // h
    grid = (96 // step, 128 // step)
    assert found.shape == (5, *grid, sum(of_tile.layer_widths_))
    total, weights = np.zeros(found.shape), np.zeros(grid)
    for y in features._tiles().starts[0]:
        for x in features._tiles().starts[1]:
            cut = images[:, y * step : y * step + 64, x * step : x * step + 64]
            vectors = of_tile.transform(cut)
            for i in range(h):
                for j in range(w):
                    weight = min(i + 1, h - i) * min(j + 1, w - j)
                    total[:, y + i, x + j] += weight * vectors[:, i, j]
                    weights[y + i, x + j] += weight
    np.testing.assert_allclose(found, total / weights[..., None], rtol=1e-4, atol=1e-5)


def test_a_single_tile_is_the_image(images):
    whole = tiled(tile_size=None).fit_transform(images)
    one = tiled(tile_size=(96, 128)).fit_transform(images)
    np.testing.assert_allclose(one, whole, rtol=1e-5, atol=1e-6)


def test_the_module_and_its_trace_give_the_same(images):
    features = tiled().fit(images)
    module = features.as_module()
    batch, expected = module.read_images(images), features.transform(images)
    np.testing.assert_allclose(module(batch), expected, rtol=1e-5, atol=1e-6)
    program = torch.export.export(module, (batch,), dynamic_shapes=({0: torch.export.Dim("n", min=1)},))
    np.testing.assert_allclose(program.module()(batch[:3]), expected[:3], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="64 x 64 pixels; features at positions were fitted on 96 x 128"):
        module(batch[:, :, :64, :64])


def test_a_saved_document_keeps_the_tiles(images):
    fitted = tiled().fit(images)
    document = json.dumps(fitted.document())
    again = TimmFeatures.from_document(from_json(document))
    np.testing.assert_array_equal(again.transform(images), fitted.transform(images))
    wrong = document.replace(json.dumps(list(fitted.grid_shape_)), "[5, 5]")
    with pytest.raises(ValueError, match="contradictory"):
        TimmFeatures.from_document(from_json(wrong))


def test_tiles_have_their_own_place_in_the_cache(images, tmp_path):
    expected = tiled().fit_transform(images)
    for tile_size in (64, 96, None):
        tiled(tile_size=tile_size, cache=tmp_path).fit_transform(images)
    assert cache_size(tmp_path).n_rows == 15
    np.testing.assert_array_equal(tiled(cache=tmp_path).fit_transform(images), expected)
    assert cache_size(tmp_path).n_rows == 15


def test_a_detector_says_where_in_the_whole_image(images, tmp_path):
    rng = np.random.default_rng(0)
    good = rng.integers(100, 156, (30, 96, 128, 3), np.uint8)
    bad = good[:1].copy()
    bad[0, 64:84, 96:120] = 255
    detector = PatchDFKDEDetector(tiled()).fit(good)
    (of_bad,) = detector.anomaly_maps(bad)
    assert of_bad.shape == (96, 128)
    y, x = np.unravel_index(of_bad.argmin(), of_bad.shape)
    assert y >= 48
    assert x >= 64
    detector.save(tmp_path / "model.safetensors")
    again = PatchDFKDEDetector.load(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(again.score_samples(bad), detector.score_samples(bad))


def test_onnx_cuts_images_into_tiles(images, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    detector = PatchDFKDEDetector(tiled()).fit(images)
    detector.to_onnx(tmp_path / "d.onnx", check=images)
    assert (tmp_path / "d.onnx").stat().st_size > 0


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"pooling": "avg", "layers": ["layer2"]},
            "tile_size=64 with pooling='avg' and image_size=(96, 128). Tiles need",
        ),
        ({"image_size": None}, "tile_size=64 with pooling=None and image_size=None. Tiles need pooling=None"),
        ({"tile_size": 112}, "tiles have a height of 112 pixels, and images are resized to 96"),
        ({"tile_size": 50}, "tile_size: a height of 50 pixels is not a multiple of the"),
        (
            {"image_size": (96, 130)},
            "a width of 130 pixels is not a multiple of 16, the pixels of a position of the tiles.",
        ),
        ({"tile_size": (64, 0)}, "tile_size=(64, 0). Allowed: (height, width), one int for both, or None"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(parameters, message, images):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiled(**parameters).fit(images)
