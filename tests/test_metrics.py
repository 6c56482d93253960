import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from dfkde_sklearn.metrics import RegionHit, aupro, pixel_roc_auc, region_hits


def regions_of(mask):
    """The sets of pixels that touch, also at a corner, by a flood fill."""
    left, regions = {tuple(p) for p in np.argwhere(mask).tolist()}, []
    while left:
        region, edge = set(), [min(left)]
        while edge:
            pixel = edge.pop()
            if pixel in left:
                left.remove(pixel)
                region.add(pixel)
                edge += [(pixel[0] + y, pixel[1] + x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
        regions.append(sorted(region))
    return sorted(regions)


def slow_aupro(masks, maps, max_fpr):
    """Every threshold and every region in loops; then the trapezoids, the last cut at max_fpr."""
    regions = [[maps[i][p] for p in region] for i, mask in enumerate(masks) for region in regions_of(mask)]
    good = [v for mask, values in zip(masks, maps, strict=True) for v in values[~mask]]
    points = [(0.0, 0.0)]
    for t in sorted({v for values in maps for v in values.ravel()}):
        overlaps = [sum(v <= t for v in region) / len(region) for region in regions]
        points.append((sum(v <= t for v in good) / len(good), sum(overlaps) / len(overlaps)))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 < max_fpr and x1 > x0:
            x = min(x1, max_fpr)
            area += (x - x0) * (y0 + y0 + (y1 - y0) * (x - x0) / (x1 - x0)) / 2
    return area / max_fpr


def images(seed, *, n_values=None, dtype=np.float32):
    """Images of different sizes with random defects, one of them good; with `n_values`, maps full of ties."""
    rng = np.random.default_rng(seed)
    masks = [rng.random(shape) < 0.15 for shape in ((9, 11), (12, 7), (8, 8))] + [np.zeros((10, 6), dtype=bool)]
    maps = [rng.normal(size=mask.shape) - 1.2 * mask for mask in masks]
    if n_values:
        maps = [np.round(values * n_values / 6) for values in maps]
    return masks, [values.astype(dtype) for values in maps]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("n_values", [None, 8, 2])
def test_the_pixel_auroc_is_that_of_scikit_learn_on_all_pixels(n_values, dtype):
    masks, maps = images(0, n_values=n_values, dtype=dtype)
    labels = np.concatenate([mask.ravel() for mask in masks])
    scores = -np.concatenate([values.ravel() for values in maps])
    assert pixel_roc_auc(masks, maps) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


@pytest.mark.parametrize("max_fpr", [0.003, 0.05, 0.3, 1 / 3, 1.0])
@pytest.mark.parametrize("n_values", [None, 8, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_aupro_is_that_of_loops_over_thresholds_and_regions(seed, n_values, max_fpr):
    masks, maps = images(seed, n_values=n_values)
    assert aupro(masks, maps, max_fpr=max_fpr) == pytest.approx(slow_aupro(masks, maps, max_fpr), abs=1e-12)


def test_maps_that_are_right_have_an_area_of_1_and_maps_that_say_nothing_their_chance():
    masks, _ = images(0)
    right, constant = [-1.0 * mask for mask in masks], [np.zeros(mask.shape) for mask in masks]
    assert pixel_roc_auc(masks, right) == 1
    assert aupro(masks, right) == pytest.approx(1)
    assert pixel_roc_auc(masks, constant) == 0.5
    # The straight line from (0, 0) to (1, 1): 0.3 * 0.3 / 2, over 0.3.
    assert aupro(masks, constant) == pytest.approx(0.15)
    # Negated, they are wrong everywhere.
    assert pixel_roc_auc(masks, [-values for values in right]) == 0
    assert aupro(masks, [-values for values in right]) == 0


def test_a_monotone_transformation_of_the_maps_changes_no_area():
    masks, maps = images(2, dtype=np.float64)
    warped = [np.exp(3 * values) for values in maps]
    assert pixel_roc_auc(masks, warped) == pixel_roc_auc(masks, maps)
    assert aupro(masks, warped) == aupro(masks, maps)


def test_a_density_of_zero_is_the_lowest():
    masks, maps = images(2, dtype=np.float64)
    lowest = [np.where(values == values.min(), -np.inf, values) for values in maps]
    finite = [np.where(values == values.min(), -1e9, values) for values in maps]
    assert pixel_roc_auc(masks, lowest) == pixel_roc_auc(masks, finite)
    assert aupro(masks, lowest) == aupro(masks, finite)


def test_each_region_weighs_the_same_in_aupro_and_each_pixel_in_the_auroc():
    mask = np.zeros((20, 20), dtype=bool)
    mask[:10, :10] = mask[15, 15] = True  # 100 pixels that are found, and one that is the most normal of all
    values = np.where(mask, -1.0, 0.0)
    values[15, 15] = 1.0
    assert pixel_roc_auc([mask], [values]) == pytest.approx(100 / 101)
    # To the false-positive rate of 1, the level of all good pixels, only the first region is found.
    assert aupro([mask], [values]) == pytest.approx(0.5)


def test_regions_at_the_border_are_whole_and_those_that_touch_at_a_corner_are_one():
    mask = np.array([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 1]])
    values = np.where(mask, -2.0, 0.0)
    values[0, 3] = values[2, 3] = 0.0
    assert region_hits([mask], [values], -1.0) == [
        RegionHit(0, 2, 1.0, True),
        RegionHit(0, 1, 0.0, False),
        RegionHit(0, 2, 0.5, True),
        RegionHit(0, 1, 1.0, True),
    ]


@pytest.mark.parametrize("min_overlap", [0, 0.5, 1])
def test_hits_are_those_of_a_loop_over_regions(min_overlap):
    masks, maps = images(3, n_values=8)
    expected = []
    for i, mask in enumerate(masks):
        for region in regions_of(mask):
            n = sum(maps[i][pixel] < -1 for pixel in region)
            expected.append(RegionHit(i, len(region), n / len(region), n > 0 and n / len(region) >= min_overlap))
    hits = region_hits(masks, maps, -1.0, min_overlap=min_overlap)
    assert sorted(hits) == sorted(expected)
    assert len({hit.hit for hit in hits}) == 2


def test_a_pixel_at_the_threshold_is_normal_as_an_image_at_offset_is():
    assert not region_hits([[[1, 0]]], [[[-1.0, 0.0]]], -1.0)[0].hit
    assert region_hits([[[1, 0]]], [[[-1.0, 0.0]]], np.nextafter(-1.0, 0))[0].hit


def test_a_threshold_is_not_rounded_to_the_dtype_of_the_maps():
    value = np.float32(-0.1)
    above = float(value) + 1e-10
    assert np.float32(above) == value
    assert region_hits([[[1, 0]]], [np.array([[value, 0]])], above)[0].hit


def test_images_without_defects_have_no_hits():
    assert region_hits([None, [[0, 0]]], [[[0.0]], [[-9.0, -9.0]]], -1.0) == []


@pytest.mark.parametrize("measure", [pixel_roc_auc, aupro])
def test_masks_in_all_allowed_forms_mean_the_same(measure):
    rng = np.random.default_rng(0)
    masks, maps = rng.random((3, 6, 7)) < 0.2, rng.normal(size=(3, 6, 7)).astype(np.float32)
    masks[1] = False
    expected = measure(masks, maps)
    for same in (masks.astype(np.uint8), 255 * masks.astype(np.uint8), masks.astype(float), masks.tolist()):
        assert measure(same, maps) == expected
    assert measure([masks[0], None, masks[2]], list(maps)) == expected
    assert measure(iter(masks), iter(maps)) == expected


def test_inputs_are_not_changed():
    masks, maps = images(0)
    before = [values.copy() for values in (*masks, *maps)]
    pixel_roc_auc(masks, maps), aupro(masks, maps), region_hits(masks, maps, 0.0)
    for old, new in zip(before, (*masks, *maps), strict=True):
        np.testing.assert_array_equal(old, new)


BAD = {
    "no maps": ([], [], "no maps"),
    "a mask too few": ([None], [[[0.0]], [[0.0]]], "1 masks and 2 maps"),
    "another size": ([[[0, 1]], np.ones((8, 8))], [[[0.0, 1.0]], np.ones((2, 2))], r"mask 1 has shape \(8, 8\).*image"),
    "NaN": ([[[0, 1]]], [[[0.0, np.nan]]], "map 0 has NaN at 1 of 2"),
    "a batch axis": ([[[0, 1]]], [[[[0.0, 1.0]]]], r"map 0 has shape \(1, 1, 2\)"),
    "an empty map": ([None], [np.zeros((0, 3))], r"map 0 has shape \(0, 3\)"),
    "complex numbers": ([None], [[[1j]]], "map 0 has dtype complex128"),
    "grey levels": ([[[0, 128]]], [[[0.0, 1.0]]], "mask 0 has values other than"),
    "1 and 255": ([[[1, 255]]], [[[0.0, 1.0]]], "mask 0 has values other than"),
    "NaN in a mask": ([[[0, np.nan]]], [[[0.0, 1.0]]], "mask 0 has values other than"),
    "a path": (["mask.png"], [[[0.0]]], "mask 0 is text, mask.png.*read_mask"),
}


@pytest.mark.parametrize(("masks", "maps", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("measure", [pixel_roc_auc, aupro, lambda *a: region_hits(*a, 0.0)], ids=["roc", "pro", "hits"])
def test_input_that_cannot_be_right_is_an_error(measure, masks, maps, message):
    with pytest.raises(ValueError, match=message):
        measure(masks, maps)


@pytest.mark.parametrize("measure", [pixel_roc_auc, aupro])
def test_good_and_defective_pixels_are_needed(measure):
    with pytest.raises(ValueError, match="no defective pixel"):
        measure([None, [[0]]], [[[0.0]], [[1.0]]])
    with pytest.raises(ValueError, match="no good pixel"):
        measure([[[1]]], [[[0.0]]])


@pytest.mark.parametrize("max_fpr", [0, -0.1, 1.1, np.nan])
def test_a_false_positive_rate_out_of_range_is_an_error(max_fpr):
    with pytest.raises(ValueError, match="max_fpr is"):
        aupro([[[0, 1]]], [[[0.0, 1.0]]], max_fpr=max_fpr)


def test_a_threshold_or_an_overlap_out_of_range_is_an_error():
    with pytest.raises(ValueError, match="threshold is NaN"):
        region_hits([[[0, 1]]], [[[0.0, 1.0]]], np.nan)
    with pytest.raises(ValueError, match=r"min_overlap is 1\.5"):
        region_hits([[[0, 1]]], [[[0.0, 1.0]]], 0.0, min_overlap=1.5)


def test_the_package_has_the_module_without_an_import_of_its_own():
    code = "import dfkde_sklearn, sys; assert 'torch' not in sys.modules; dfkde_sklearn.metrics.aupro"
    subprocess.run([sys.executable, "-c", code], check=True)
