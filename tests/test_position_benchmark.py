"""The rivals of the benchmark of positions do what their papers say, and its splits keep groups together."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, mahalanobis

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def positions():
    # As a script finds its neighbours.
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("positions", BENCHMARKS / "positions.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


@pytest.fixture
def vectors():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(30, 4, 5, generator=generator), torch.randn(6, 4, 5, generator=generator)


def test_padim_is_the_mahalanobis_distance_of_each_position(positions, vectors):
    train, test = vectors
    found = positions.padim(train)(test)
    for p in range(4):
        covariance = np.cov(train[:, p].double().numpy().T) + 0.01 * np.eye(5)
        mean, inverse = train[:, p].double().mean(0).numpy(), np.linalg.inv(covariance)
        expected = [-mahalanobis(row, mean, inverse) for row in test[:, p].double().numpy()]
        np.testing.assert_allclose(found[:, p], expected, rtol=1e-4)


def test_patchcore_with_all_vectors_is_the_nearest_neighbour_of_any_position(positions, vectors):
    train, test = vectors
    expected = -cdist(test.reshape(-1, 5), train.reshape(-1, 5)).min(1).reshape(6, 4)
    np.testing.assert_allclose(positions.patchcore(train, share=1.0)(test), expected, rtol=1e-4)


def test_centers_are_always_the_farthest_from_those_before(positions, vectors):
    points = vectors[0].flatten(0, 1)
    distances = cdist(points, points)
    expected = [0]
    while len(expected) < 12:
        expected.append(int(distances[expected].min(0).argmax()))
    assert positions.k_centers(points, 12).tolist() == expected


def test_folds_are_whole_groups_of_about_one_size(positions):
    groups = np.repeat(list("abcdefg"), [6, 1, 5, 2, 4, 3, 3])
    folds = positions.folds_by_group(groups, 4)
    assert np.array_equal(np.sort(np.concatenate(folds)), np.arange(len(groups)))
    for i, fold in enumerate(folds):
        others = np.concatenate(folds[:i] + folds[i + 1 :])
        assert not set(groups[fold]) & set(groups[others])
    assert sorted(len(fold) for fold in folds) == [6, 6, 6, 6]
