"""The laws of a sample of a stream."""

import numpy as np
import pytest
from scipy.stats import chi2

from dfkde_sklearn._density.stream import RowSample, sampled_places

ROWS = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32)
LABELS = [f"part {i // 7}" for i in range(500)]


def sample_of(cuts, labels=None, max_rows=100, seed=3):
    sample = RowSample(max_rows, seed)
    for places in np.array_split(np.arange(500), cuts):
        sample.add(ROWS[places], None if labels is None else [labels[i] for i in places])
    return sample


@pytest.mark.parametrize("labels", [None, LABELS])
@pytest.mark.parametrize("max_rows", [10, 40, 499, 500, None])
def test_the_sample_does_not_depend_on_how_the_stream_is_cut(labels, max_rows):
    rng = np.random.default_rng(1)
    whole = sample_of([], labels, max_rows)
    for n_cuts in (1, 5, 60, 499):
        other = sample_of(np.sort(rng.integers(0, 501, n_cuts)), labels, max_rows)
        np.testing.assert_array_equal(other.places, whole.places)
        np.testing.assert_array_equal(other.rows, whole.rows)
        assert other.labels == whole.labels


def test_the_kept_rows_are_those_at_their_places_in_order():
    sample = sample_of([13, 200], LABELS)
    np.testing.assert_array_equal(sample.rows, ROWS[sample.places])
    assert sample.labels == [LABELS[i] for i in sample.places]
    assert (np.diff(sample.places) > 0).all()
    assert sample.n_seen == 500


def test_up_to_its_size_a_sample_keeps_all_rows():
    np.testing.assert_array_equal(sample_of([100], max_rows=500).rows, ROWS)
    assert len(sample_of([100], max_rows=499)) == 499


def test_the_places_of_a_sample_are_known_without_the_rows():
    np.testing.assert_array_equal(sampled_places(500, 100, 3), sample_of([77]).places)


def test_every_row_is_as_probable_as_any_other():
    # The counts are hypergeometric: their scaled sum of squares has nearly a chi-square distribution.
    n, k, n_seeds = 60, 15, 2000
    counts = np.zeros(n)
    for seed in range(n_seeds):
        counts[sampled_places(n, k, seed)] += 1
    share = k / n
    statistic = ((counts - n_seeds * share) ** 2).sum() / (n_seeds * share * (1 - share)) * (n - 1) / n
    assert chi2.cdf(statistic, n - 1) < 0.999
    assert chi2.sf(statistic, n - 1) < 0.999


def test_every_pair_of_rows_is_as_probable_as_any_other():
    n, k, n_seeds = 12, 4, 4000
    counts = np.zeros((n, n))
    for seed in range(n_seeds):
        places = sampled_places(n, k, seed)
        counts[np.ix_(places, places)] += 1
    pairs = counts[np.triu_indices(n, 1)]
    expected = n_seeds * k * (k - 1) / (n * (n - 1))
    assert np.abs(pairs - expected).max() < 5 * np.sqrt(expected)


def test_groups_are_kept_whole_and_each_is_as_probable_as_any_other():
    counts = np.zeros(72)
    for seed in range(300):
        kept = sample_of([], LABELS, seed=seed)
        numbers, sizes = np.unique([int(label.split()[1]) for label in kept.labels], return_counts=True)
        assert all(size == (3 if number == 71 else 7) for number, size in zip(numbers, sizes, strict=True))
        assert 100 - 7 < len(kept) <= 100
        counts[numbers] += 1
    assert np.abs(counts[:-1] - counts[:-1].mean()).max() < 5 * np.sqrt(counts[:-1].mean())


def test_a_group_too_large_leaves_room_for_those_before_it_only():
    sample = RowSample(10, 0)
    sample.add(ROWS[:30], ["large"] * 30)
    assert len(sample) == 0
    sample.add(ROWS[:3], ["large"] * 3)  # which was left out, and stays so
    assert len(sample) == 0
    assert sample.n_seen == 33


def test_another_seed_is_another_sample():
    assert not np.array_equal(sample_of([], seed=1).places, sample_of([], seed=2).places)


@pytest.mark.parametrize("labels", [None, LABELS])
def test_a_sample_from_a_state_goes_on(labels):
    half = None if labels is None else labels[:250]
    sample = RowSample(100, 3)
    sample.add(ROWS[:250], half)
    sample = RowSample.from_state(sample.state(), 100)
    sample.add(ROWS[250:], None if labels is None else labels[250:])
    whole = sample_of([], labels)
    np.testing.assert_array_equal(sample.rows, whole.rows)
    assert sample.labels == whole.labels


def test_a_sample_from_a_state_grows_on_its_own():
    sample = sample_of([])
    before = sample.places.copy()
    twin = RowSample.from_state(sample.state(), 100)
    twin.add(ROWS)
    np.testing.assert_array_equal(sample.places, before)
    assert (sample.n_seen, twin.n_seen) == (500, 1000)
    assert not np.array_equal(twin.places, before)


def test_rows_are_copied():
    rows = ROWS.copy()
    sample = RowSample(None, 0)
    sample.add(rows)
    rows[:] = 0
    np.testing.assert_array_equal(sample.rows, ROWS)


def test_dtypes_are_promoted_in_any_order():
    for first, second in [(np.float32, np.float64), (np.float64, np.float32)]:
        sample = RowSample(None, 0)
        sample.add(ROWS[:5].astype(first))
        sample.add(ROWS[5:9].astype(second))
        assert sample.rows.dtype == np.float64
