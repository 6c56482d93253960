"""Densities at positions: against a slow loop, and the laws that they have to follow."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from dfkde_sklearn._density.positions import (
    PositionDensity,
    PositionSettings,
    fit_positions,
    lowest_mean,
    normalized,
)

MEMORY = 2**26
SETTINGS = PositionSettings(0.3, "kernel", "scott", 0.0, 3, 10, MEMORY)


def vectors(n=25, n_positions=6, n_channels=4, seed=0, dtype=torch.float64):
    """Return correlated vectors (n, P, C), whose spread differs from position to position."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(n_positions, n_channels, n_channels)) * np.linspace(0.3, 3, n_positions)[:, None, None]
    x = np.einsum("npc,pcd->npd", rng.normal(size=(n, n_positions, n_channels)), mixing)
    return torch.from_numpy(x + 10 * rng.normal(size=(n_positions, n_channels))).to(dtype)


def slow_log_density(train, queries, settings):
    """Return the log densities (n, P) by SciPy: a loop over positions and kernels."""
    train, queries = train.double().numpy(), queries.double().numpy()
    n, n_positions, n_channels = train.shape
    own = [np.cov(train[:, p].T).reshape(n_channels, n_channels) for p in range(n_positions)]
    pooled = np.mean(own, axis=0)
    scores = np.empty((len(queries), n_positions))
    for p in range(n_positions):
        covariance = (1 - settings.pooled_share) * own[p] + settings.pooled_share * pooled
        covariance = covariance + 0.01 * np.trace(covariance) / n_channels * np.eye(n_channels)
        if settings.kind == "gaussian":
            scores[:, p] = multivariate_normal(train[:, p].mean(0), covariance).logpdf(queries[:, p])
            continue
        h = n ** (-1 / (n_channels + 4)) if settings.bandwidth == "scott" else settings.bandwidth
        kernels = [multivariate_normal(center, h**2 * covariance).logpdf(queries[:, p]) for center in train[:, p]]
        scores[:, p] = np.logaddexp.reduce(kernels, axis=0) - math.log(n)
    return scores


def fitted(train, settings=SETTINGS, **kwargs):
    options = {"groups": None, "n_anomalous": 0, "mirror": None} | kwargs
    return fit_positions(train, settings, **options)


@pytest.mark.parametrize("kind", ["kernel", "gaussian"])
@pytest.mark.parametrize("pooled_share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bandwidth", ["scott", 0.5])
def test_the_density_is_that_of_scipy(kind, pooled_share, bandwidth):
    settings = SETTINGS._replace(kind=kind, pooled_share=pooled_share, bandwidth=bandwidth)
    train, queries = vectors(), vectors(7, seed=1)
    actual = fitted(train, settings).fitted.log_density(queries, MEMORY)
    np.testing.assert_allclose(actual, slow_log_density(train, queries, settings), rtol=1e-10)


def test_calibration_maps_are_those_of_fits_without_the_fold():
    train = vectors(30)
    training = fitted(train)
    for start in range(0, 30, 3):
        others = torch.cat([train[:start], train[start + 3 :]])
        expected = slow_log_density(others, train[start : start + 3], SETTINGS)
        np.testing.assert_allclose(training.calibration_maps[start : start + 3], expected, rtol=1e-10)


def test_images_of_one_group_are_left_out_together():
    train = vectors(12)
    groups = torch.tensor([0, 1, 2] * 4)
    maps = fitted(train, groups=groups).calibration_maps
    for group in range(3):
        expected = slow_log_density(train[groups != group], train[groups == group], SETTINGS)
        np.testing.assert_allclose(maps[groups == group], expected, rtol=1e-10)


def test_mirrored_images_are_training_images_in_the_fold_of_their_original():
    train = vectors(12)
    mirror = torch.tensor([2, 1, 0, 5, 4, 3])
    training = fitted(train, mirror=mirror)
    doubled = torch.cat([train, train[:, mirror]])
    queries = vectors(3, seed=1)
    actual = training.fitted.log_density(queries, MEMORY)
    np.testing.assert_allclose(actual, slow_log_density(doubled, queries, SETTINGS), rtol=1e-10)
    without_first = torch.cat([train[1:], train[1:][:, mirror]])  # 10 folds of 12 images: the first holds one
    np.testing.assert_allclose(
        training.calibration_maps[:1], slow_log_density(without_first, train[:1], SETTINGS), rtol=1e-10
    )


def test_anomalous_training_images_leave_the_fit():
    train = vectors(40)
    train[[3, 17]] += 30 * train.std(0)
    training = fitted(train, n_anomalous=2)
    assert (~training.is_kept).nonzero()[:, 0].tolist() == [3, 17]
    queries = vectors(5, seed=1)
    np.testing.assert_allclose(
        training.fitted.log_density(queries, MEMORY),
        slow_log_density(train[training.is_kept], queries, SETTINGS),
        rtol=1e-10,
    )


@pytest.mark.parametrize("factor", [1e-200, 1e-3, 1e200])
def test_other_units_shift_all_densities_alike(factor):
    train, queries = vectors(), vectors(5, seed=1)
    shift = -4 * math.log(factor)
    actual = fitted(train * factor).fitted.log_density(queries * factor, MEMORY)
    np.testing.assert_allclose(actual, fitted(train).fitted.log_density(queries, MEMORY) + shift, rtol=1e-9)


def test_float32_agrees_with_float64_far_from_zero():
    train, queries = vectors(60), vectors(9, seed=1)
    offset = 1000.0  # float32 keeps 4 digits of what is left of 1
    exact = fitted((train + offset).float().double()).fitted.log_density((queries + offset).float().double(), MEMORY)
    single = fitted((train + offset).float()).fitted.log_density((queries + offset).float(), MEMORY)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single, exact, rtol=1e-4)


def test_far_outliers_have_finite_densities():
    training = fitted(vectors())
    far = training.fitted.log_density(vectors(3, seed=1) + 1e6, MEMORY)
    assert torch.isfinite(far).all()
    assert (far < -1e9).all()


def test_any_working_memory_gives_the_same_result():
    train, queries = vectors(), vectors(9, seed=1)
    expected = fitted(train).fitted.log_density(queries, MEMORY)
    small = fitted(train, SETTINGS._replace(working_memory=1))
    np.testing.assert_allclose(small.fitted.log_density(queries, 1), expected, rtol=1e-12)


def test_the_state_makes_the_same_density():
    training, queries = fitted(vectors()), vectors(4, seed=1)
    again = PositionDensity.from_state(training.fitted.state())
    assert torch.equal(again.log_density(queries, MEMORY), training.fitted.log_density(queries, MEMORY))


def test_the_score_is_the_mean_of_the_lowest_positions():
    maps = torch.tensor([[3.0, -1.0, 0.0, 5.0], [1.0, 1.0, 1.0, -9.0]])
    assert lowest_mean(maps, 2).tolist() == [-0.5, -4.0]
    assert lowest_mean(maps, 10).tolist() == [1.75, -1.5]


def test_normalisation_is_its_formula():
    x = vectors(5).numpy()
    mean, std = x.mean(1, keepdims=True), x.std(1, keepdims=True)
    expected = (x - 0.5 * mean) / np.sqrt(std)
    scales = torch.from_numpy(x.std(1)).square().mean(0).sqrt()
    np.testing.assert_allclose(normalized(torch.from_numpy(x), scales, 0.5), expected, rtol=1e-12)


def test_full_normalisation_removes_contrast_and_brightness():
    train, queries = vectors(30, 9), vectors(4, 9, seed=1)
    density = fitted(train, SETTINGS._replace(normalization=1.0)).fitted
    changed = density.log_density(3 * queries + 5, MEMORY)
    np.testing.assert_allclose(changed, density.log_density(queries, MEMORY), rtol=1e-9)


def test_a_channel_that_is_constant_over_images_divides_by_nothing():
    train = vectors(20)
    train[:, :, 2] = 7.0
    queries = vectors(4, seed=1)
    for strength in (0.0, 0.5, 1.0):
        density = fitted(train, SETTINGS._replace(normalization=strength)).fitted
        assert torch.isfinite(density.log_density(queries, MEMORY)).all()


def test_a_constant_position_is_as_wide_as_the_pooled_share_says():
    train = vectors(20)
    train[:, 0] = 1.0
    queries = vectors(4, seed=1)
    expected = slow_log_density(train, queries, SETTINGS)
    np.testing.assert_allclose(fitted(train).fitted.log_density(queries, MEMORY), expected, rtol=1e-10)
    alone = fitted(train, SETTINGS._replace(pooled_share=0.0)).fitted.log_density(queries, MEMORY)
    assert torch.isfinite(alone).all()


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e6 / 3])
def test_equal_images_have_no_density(offset):
    with pytest.raises(ValueError, match=r"The \d+ training images do not differ.*at least three"):
        fitted(torch.full((5, 3, 2), offset, dtype=torch.float64))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("settings", [SETTINGS, SETTINGS._replace(kind="gaussian", normalization=0.5)], ids=str)
def test_a_gpu_gives_the_same(settings):
    train, queries, groups = vectors(30), vectors(5, seed=1), torch.arange(30) // 2
    mirror = torch.tensor([2, 1, 0, 5, 4, 3])
    expected = fitted(train, settings, groups=groups, mirror=mirror, n_anomalous=2)
    actual = fitted(train.cuda(), settings, groups=groups.cuda(), mirror=mirror.cuda(), n_anomalous=2)
    torch.testing.assert_close(actual.calibration_maps.cpu(), expected.calibration_maps, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        actual.fitted.log_density(queries.cuda(), MEMORY).cpu(),
        expected.fitted.log_density(queries, MEMORY),
        rtol=1e-9,
        atol=1e-9,
    )
