"""Log scattering coefficients: the filters, the transform on coarse grids, the transformer."""

import itertools
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.stats import gaussian_kde
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score

from dfkde_sklearn import ScatteringFeatures
from dfkde_sklearn._features.wavelets import morlet_filters, scattering_coefficients, wavelet_cascade
from dfkde_sklearn.datasets import make_textures

MEAN, STD, MAX = 0, 1, 2


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def clouds(rng, n_images, size):
    """Return images (n, size, size), 0 to 1, whose spectrum falls off as that of photographs."""
    frequency = np.fft.fftfreq(size)
    radius = np.hypot(frequency[:, None], frequency)
    radius[0, 0] = 1
    images = np.fft.ifft2(np.fft.fft2(rng.standard_normal((n_images, size, size))) / radius).real
    images -= images.min((1, 2), keepdims=True)
    return images / images.max((1, 2), keepdims=True)


def as_bytes(images):
    return np.round(255 * images).astype(np.uint8)


def coefficients(images, scales, orientations, border=0):
    """Return the coefficients (n, paths, 3) of images (n, size, size) taken as periodic."""
    cascade = wavelet_cascade(images.shape[-1], scales, orientations)
    return scattering_coefficients(torch.tensor(images, dtype=torch.float32), cascade, border).numpy()


# The slow reference: wavelets drawn in space, one path after the other, at full resolution, in float64.


def morlet_in_space(size, scale, angle, slant):
    """Return a Morlet wavelet of unit peak in frequency, sampled on a periodic grid."""
    sigma, frequency = 0.8 * 2**scale, 3 * np.pi / 4 / 2**scale
    wave = np.zeros((size, size), complex)
    envelope = np.zeros((size, size))
    # Wide wavelets wrap around small images several times.
    for down, right in itertools.product(range(-4, 4), repeat=2):
        y, x = np.mgrid[down * size : (down + 1) * size, right * size : (right + 1) * size]
        u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
        bump = slant / (2 * np.pi * sigma**2) * np.exp(-(u**2 + slant**2 * v**2) / (2 * sigma**2))
        wave += bump * np.exp(1j * frequency * u)
        envelope += bump
    return wave - wave.sum() / envelope.sum() * envelope


def slow_coefficients(images, scales, orientations, border):
    size = images.shape[-1]
    paths = list(itertools.product(range(scales), range(orientations)))
    spectra = {
        (j, k): np.fft.fft2(morlet_in_space(size, j, np.pi * k / orientations, min(1, 4 / orientations)))
        for j, k in paths
    }
    energy = sum(np.abs(spectrum) ** 2 for spectrum in spectra.values())
    norm = np.sqrt((energy + np.roll(energy[::-1, ::-1], 1, (0, 1))).max() / 2)

    def modulus(image, path):
        return np.abs(np.fft.ifft2(np.fft.fft2(image) * spectra[path] / norm))

    def statistics(values):
        values = values[border : size - border, border : size - border]
        return values.mean(), values.std(), values.max()

    result = []
    for image in images:
        maps = {path: modulus(image, path) for path in paths}
        second = [(p, q) for p in paths for q in paths if q[0] > p[0]]
        result.append(
            [statistics(maps[path]) for path in paths]
            + [statistics(modulus(maps[path], coarser)) for path, coarser in second]
        )
    return np.array(result)


@pytest.mark.parametrize(
    ("scales", "orientations", "size", "n_images"),
    [(4, 8, 96, 1), (3, 4, 56, 4), (3, 5, 64, 3), (2, 3, 20, 6), (1, 1, 8, 6)],
)
@pytest.mark.parametrize("framed", [False, True])
def test_coarse_grids_agree_with_every_path_at_full_resolution(rng, scales, orientations, size, n_images, framed):
    images, border = clouds(rng, n_images, size), 2**scales if framed else 0
    fast = coefficients(images, scales, orientations, border)
    slow = slow_coefficients(images, scales, orientations, border)
    error = np.log(fast / slow)
    assert (np.abs(error).max((0, 1)) < [0.03, 0.08, 0.35]).all()
    assert (np.sqrt((error**2).mean((0, 1))) < [0.004, 0.015, 0.07]).all()
    # Samples miss a peak, and are above all pixels only where it lies between them.
    assert error[..., MAX].max() < 0.05


# The filters


@pytest.mark.parametrize(("size", "scales", "orientations"), [(160, 4, 8), (64, 3, 4), (24, 2, 5), (8, 1, 1)])
def test_filters_are_wavelets_and_bounded(size, scales, orientations):
    filters = morlet_filters(size, scales, orientations)
    energy = (filters**2).sum((0, 1))
    littlewood_paley = (energy + np.roll(energy[::-1, ::-1], 1, (0, 1))) / 2
    assert filters.shape == (scales, orientations, size, size)
    assert np.abs(filters[..., 0, 0]).max() < 1e-15
    assert littlewood_paley.max() == pytest.approx(1, abs=1e-12)


def test_filters_leave_no_gap_between_scales_and_orientations():
    filters = morlet_filters(128, 4, 8)
    energy = (filters**2).sum((0, 1))
    littlewood_paley = (energy + np.roll(energy[::-1, ::-1], 1, (0, 1))) / 2
    frequency = 2 * np.pi * np.fft.fftfreq(128)
    radius = np.hypot(frequency[:, None], frequency)
    seen = (radius > 3 * np.pi / 4 / 8) & (radius < np.pi)
    assert littlewood_paley[seen].min() > 0.25


def test_first_order_has_no_more_energy_than_the_image(rng):
    images = clouds(rng, 4, 64) - rng.random((4, 1, 1))
    noise = rng.standard_normal((4, 64, 64))
    for pictures in (images, noise):
        first = coefficients(pictures, 3, 4)[:, :12]
        energy = (first[..., MEAN] ** 2 + first[..., STD] ** 2).sum(1)
        assert (energy < 1.001 * pictures.var((1, 2))).all()
        assert (energy > 0.1 * pictures.var((1, 2))).all()


# Laws of the transform


def test_circular_shift_changes_nothing(rng):
    images = clouds(rng, 3, 64)
    still = coefficients(images, 3, 4)
    # By whole steps of the coarsest grid, to rounding; by any number of pixels, to what sampling leaves.
    by_steps = coefficients(np.roll(images, (16, -24), (1, 2)), 3, 4)
    by_pixels = coefficients(np.roll(images, (5, -3), (1, 2)), 3, 4)
    np.testing.assert_allclose(by_steps, still, rtol=1e-4)
    np.testing.assert_allclose(by_pixels[..., [MEAN, STD]], still[..., [MEAN, STD]], rtol=0.05)
    np.testing.assert_allclose(by_pixels[..., MAX], still[..., MAX], rtol=0.35)


def feature_table(features, X):
    """Return features as a mapping from (order, scales, orientations, statistic), read from their names."""
    table = {}
    for name, column in zip(features.get_feature_names_out(), features.transform(X).T, strict=True):
        order, *waves, statistic = name.split("_")
        scales = tuple(int(wave.removeprefix("scale")) for wave in waves[::2])
        orientations = tuple(int(wave.removeprefix("orientation")) for wave in waves[1::2])
        assert order == f"order{len(scales)}"
        table[scales, orientations, statistic] = column
    return table


@pytest.mark.parametrize(
    ("turned", "orientation_of"),
    [
        (lambda images: np.rot90(images, axes=(1, 2)), lambda k: (k + 4) % 8),
        (lambda images: images[:, :, ::-1], lambda k: -k % 8),
        (lambda images: images.transpose(0, 2, 1), lambda k: (4 - k) % 8),
        (lambda images: images[:, ::-1, ::-1], lambda k: k),
    ],
    ids=["quarter turn", "mirrored", "transposed", "half turn"],
)
def test_turning_the_image_permutes_orientations(rng, turned, orientation_of):
    images = as_bytes(clouds(rng, 3, 64))
    features = ScatteringFeatures(scales=3, image_size=64).fit(images)
    before, after = feature_table(features, images), feature_table(features, turned(images).copy())
    for (scales, orientations, statistic), values in before.items():
        permuted = tuple(orientation_of(k) for k in orientations)
        np.testing.assert_allclose(after[scales, permuted, statistic], values, atol=1e-3)


@pytest.mark.parametrize("scale", [0, 1, 2])
@pytest.mark.parametrize("orientation", [0, 1, 3, 4, 6])
def test_a_grating_answers_at_its_scale_and_orientation(scale, orientation):
    frequency, angle = 3 * np.pi / 4 / 2**scale, np.pi * orientation / 8
    y, x = np.mgrid[:96, :96]
    grating = 0.5 + 0.4 * np.cos(frequency * (np.cos(angle) * x + np.sin(angle) * y))
    features = ScatteringFeatures(scales=3, image_size=96)
    table = feature_table(features.fit([as_bytes(grating)]), [as_bytes(grating)])
    means = {path[:2]: values[0] for path, values in table.items() if len(path[0]) == 1 and path[2] == "mean"}
    assert max(means, key=means.get) == ((scale,), (orientation,))


@pytest.mark.parametrize("scale", [2, 3])
@pytest.mark.parametrize("orientation", [0, 3, 4, 6])
def test_the_second_order_tells_how_a_grating_is_modulated(scale, orientation):
    frequency, angle = 3 * np.pi / 4 / 2**scale, np.pi * orientation / 8
    y, x = np.mgrid[:128, :128]
    strength = 1 + np.cos(frequency * (np.cos(angle) * x + np.sin(angle) * y))
    grating = as_bytes(0.5 + 0.25 * strength * np.cos(3 * np.pi / 4 * y))
    table = feature_table(ScatteringFeatures().fit([grating]), [grating])
    second = {
        (coarser, after): table[(0, coarser), (4, after), "mean"][0]
        for coarser, after in itertools.product((1, 2, 3), range(8))
    }
    assert max(second, key=second.get) == (scale, orientation)


def test_contrast_scales_coefficients_and_brightness_does_not(rng):
    images = 2 * rng.integers(0, 100, (4, 32, 32), dtype=np.uint8)
    features = ScatteringFeatures(scales=2, image_size=32).fit(images)
    strong, weak = (np.expm1(features.transform(X).astype(float)) for X in (images, images // 2 + 70))
    np.testing.assert_allclose(weak, strong / 2, rtol=1e-3)


def test_coefficients_are_counted_in_what_rounding_to_8_bits_makes(rng):
    noise = rng.integers(0, 256, (4, 128, 128), dtype=np.uint8)
    table = feature_table(ScatteringFeatures(scales=3).fit(noise), noise)
    # Every level equally often: 256 times the standard deviation of rounding.
    for scale, orientation in itertools.product(range(3), range(8)):
        mean, std = (np.expm1(table[(scale,), (orientation,), statistic]) for statistic in ("mean", "std"))
        assert np.sqrt((mean**2 + std**2).mean()) == pytest.approx(256, rel=0.1)


@pytest.mark.parametrize("level", [0, 77, 255])
def test_an_image_of_one_colour_has_features_of_zero(level):
    images = np.full((2, 50, 70), level, np.uint8)
    features = ScatteringFeatures().fit_transform(images)
    assert np.abs(features).max() < 1e-3


def test_opposite_edges_do_not_meet():
    ramp = np.tile(np.linspace(0, 255, 64), (64, 1))
    cliff = np.roll(ramp, 32, axis=1)
    images = np.stack([ramp, cliff]).astype(np.uint8)
    table = feature_table(ScatteringFeatures(scales=3, image_size=64).fit(images), images)
    smooth, step = np.expm1(table[(0,), (0,), "max"])
    assert smooth < step / 20


# From pictures to grey levels


def test_a_batch_and_its_order_change_nothing(rng):
    images = as_bytes(clouds(rng, 7, 40))
    expected = ScatteringFeatures(scales=3, image_size=40, batch_size=32).fit_transform(images)
    for batch_size in (1, 3, 7):
        one = ScatteringFeatures(scales=3, image_size=40, batch_size=batch_size).fit_transform(images)
        np.testing.assert_allclose(one, expected, atol=1e-5)
    order = rng.permutation(7)
    features = ScatteringFeatures(scales=3, image_size=40).fit(images)
    np.testing.assert_allclose(features.transform(images[order]), expected[order], atol=1e-5)


def test_images_of_several_sizes_show_the_same_scene():
    y, x = np.mgrid[:128, :128] / 128
    scene = as_bytes(0.5 + 0.2 * np.sin(40 * x + 3) * np.cos(55 * y) + 0.2 * np.sin(70 * (x + y)))
    sizes = [(128, 128), (64, 64), (192, 160), (300, 1000), (1600, 1600)]
    images = [np.array(Image.fromarray(scene).resize(size, Image.Resampling.LANCZOS)) for size in sizes]
    features = ScatteringFeatures(scales=3, orientations=4, image_size=64).fit_transform(images)
    means = features[:, MEAN::3]
    assert np.abs(means - means[0]).max() < 0.2 < np.ptp(means[0])


def test_what_is_too_fine_to_show_is_averaged():
    board = 255 * (np.indices((256, 256)).sum(0) % 2).astype(np.uint8)
    features = ScatteringFeatures(scales=3, image_size=64).fit_transform([board, board[:64, :64]])
    assert features[0].max() < 1 < features[1].max()


def test_colour_is_seen_as_luma(rng):
    pattern = rng.integers(0, 256, (32, 32), dtype=np.uint8)
    black = np.zeros_like(pattern)
    channels = [np.stack([pattern if i == channel else black for i in range(3)], -1) for channel in range(3)]
    features = ScatteringFeatures(scales=2, image_size=32).fit(channels)
    grey, as_rgb = features.transform([pattern, np.stack([pattern] * 3, -1)]).astype(float)
    np.testing.assert_array_equal(as_rgb, grey)
    for weight, coloured in zip((0.299, 0.587, 0.114), features.transform(channels).astype(float), strict=True):
        np.testing.assert_allclose(np.expm1(coloured), weight * np.expm1(grey), rtol=1e-3)


def test_images_are_not_written_to(rng):
    images = as_bytes(clouds(rng, 3, 32))
    before = images.copy()
    images.flags.writeable = False
    ScatteringFeatures(scales=2, image_size=32).fit_transform(images)
    np.testing.assert_array_equal(images, before)


# The transformer


@pytest.mark.parametrize(("scales", "orientations"), [(1, 1), (1, 5), (2, 3), (3, 8), (4, 4)])
def test_there_is_a_feature_for_each_name(rng, scales, orientations):
    images = as_bytes(clouds(rng, 2, 32))
    features = ScatteringFeatures(scales=scales, orientations=orientations, image_size=32)
    rows, names = features.fit_transform(images), features.get_feature_names_out()
    n_paths = scales * orientations + orientations**2 * scales * (scales - 1) // 2
    assert rows.shape == (2, 3 * n_paths) == (2, features.n_features_out_)
    assert rows.dtype == np.float32
    assert np.isfinite(rows).all()
    assert len(set(names)) == len(names) == 3 * n_paths


def test_default_has_1248_features(rng):
    assert ScatteringFeatures().fit(as_bytes(clouds(rng, 1, 32))).n_features_out_ == 1248


def test_a_copy_gives_the_same_features(rng):
    images = as_bytes(clouds(rng, 3, 32))
    features = ScatteringFeatures(scales=2, image_size=32).fit(images)
    state = dict(vars(features))
    expected = features.transform(images)
    assert vars(features) == state
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(features)).transform(images), expected)
    np.testing.assert_array_equal(clone(features).fit(images[:1]).transform(images), expected)
    assert len(pickle.dumps(features)) < 2000


def test_numpy_integers_are_integers(rng):
    images = as_bytes(clouds(rng, 3, 32))
    parameters = {"scales": 2, "orientations": 4, "image_size": 32, "batch_size": 2}
    expected = ScatteringFeatures(**parameters).fit_transform(images)
    as_numpy = {name: np.int64(value) for name, value in parameters.items()}
    np.testing.assert_array_equal(ScatteringFeatures(**as_numpy).fit_transform(images), expected)


def test_pandas_output_has_the_names(rng):
    images = as_bytes(clouds(rng, 3, 32))
    features = ScatteringFeatures(scales=2, orientations=2, image_size=32).set_output(transform="pandas")
    frame = features.fit_transform(images)
    assert isinstance(frame, pd.DataFrame)
    assert frame.columns.tolist() == features.get_feature_names_out().tolist()


def test_transform_before_fit_is_an_error(rng):
    with pytest.raises(NotFittedError):
        ScatteringFeatures().transform(as_bytes(clouds(rng, 1, 32)))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"scales": 0}, "'scales' parameter"),
        ({"scales": 2.0}, "'scales' parameter"),
        ({"orientations": 0}, "'orientations' parameter"),
        ({"image_size": 0}, "'image_size' parameter"),
        ({"batch_size": 0}, "'batch_size' parameter"),
        ({"white_level": 0}, "'white_level' parameter"),
        ({"white_level": 65536}, "'white_level' parameter"),
        ({"device": "abacus"}, "device='abacus'"),
        ({"image_size": 100}, r"image_size=100 does not go with scales=4.*Use image_size=96"),
        ({"image_size": 16}, r"image_size=16 does not go with scales=4.*Use image_size=32"),
        ({"image_size": 128, "scales": 7}, r"image_size=128 does not go with scales=7.*Use image_size=256"),
    ],
)
def test_a_bad_parameter_is_named(rng, parameters, message):
    with pytest.raises(ValueError, match=message):
        ScatteringFeatures(**parameters).fit(as_bytes(clouds(rng, 1, 32)))


def test_a_broken_image_is_named(tmp_path):
    good, broken = tmp_path / "good.png", tmp_path / "broken.png"
    Image.new("L", (40, 40), 100).save(good)
    broken.write_bytes(good.read_bytes()[:60])
    features = ScatteringFeatures(scales=2, image_size=32).fit([good])
    with pytest.raises(ValueError, match=r"broken\.png"):
        features.transform([good, broken])


def test_12_bits_in_16_are_what_8_bits_are_given_the_white_level_and_warned_of_otherwise(rng):
    grey = as_bytes(clouds(rng, 6, 32))
    deep = np.round(grey / 255 * 4095).astype(np.uint16)
    features = ScatteringFeatures(scales=2, orientations=2, image_size=32)
    expected = features.fit_transform(grey)
    told = clone(features).set_params(white_level=4095)
    np.testing.assert_array_equal(told.fit_transform(deep), expected)
    np.testing.assert_array_equal(told.transform(deep[:2]), expected[:2])
    np.testing.assert_array_equal(told.transform(grey[:2]), expected[:2])
    with pytest.warns(UserWarning, match="white_level=4095"):
        assert np.abs(features.fit_transform(deep) - expected).max() > 0.1
    # One image of many may be dark.
    features.transform(deep)


def test_no_images_is_an_error():
    with pytest.raises(ValueError, match="0 images"):
        ScatteringFeatures().fit([])


# What it is for


def test_defects_of_a_weave_lie_where_normal_images_are_rare():
    data = make_textures(80, 60, material="weave", random_state=0)
    features = ScatteringFeatures().fit(data.X_train)
    reduction = PCA(16, whiten=True, random_state=0).fit(features.transform(data.X_train))
    density = gaussian_kde(reduction.transform(features.transform(data.X_train)).T)
    scores = density.logpdf(reduction.transform(features.transform(data.X_test)).T)
    # 0.88 when written.
    assert roc_auc_score(data.y_test, -scores) > 0.75
