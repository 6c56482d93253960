"""Groups: rows of one part are left out of every fit together."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import config_context
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dfkde_sklearn import AnomalyClassifier, DFKDEDetector, PatchDFKDEDetector
from dfkde_sklearn._calibration import conformal_p_values, rank_with_confidence
from dfkde_sklearn._groups import share_of_near_duplicates, with_copies


def parts(n_parts=12, n_exposures=5, n_features=8, seed=0):
    """Return rows of parts, of which each was photographed several times, and the part of each row."""
    rng = np.random.default_rng(seed)
    of_part = rng.normal(size=(n_parts, 1, n_features))
    rows = of_part + 0.05 * rng.normal(size=(n_parts, n_exposures, n_features))
    return rows.reshape(-1, n_features), np.repeat([f"part {i}" for i in range(n_parts)], n_exposures)


def shuffled_parts(*args, **kwargs):
    """Return the same in random order."""
    rows, groups = parts(*args, **kwargs)
    order = np.random.default_rng(0).permutation(len(rows))
    return rows[order], groups[order]


X, GROUPS = parts()
SETTINGS = {"n_components": 3, "residual": None}


def test_calibration_scores_are_those_of_fits_without_the_group():
    detector = DFKDEDetector(**SETTINGS).fit(X, groups=GROUPS)
    for part in np.unique(GROUPS):
        is_held_out = part == GROUPS
        without = DFKDEDetector(**SETTINGS).fit(X[~is_held_out], groups=GROUPS[~is_held_out])
        np.testing.assert_allclose(
            detector.calibration_scores_[is_held_out], without.score_samples(X[is_held_out]), rtol=1e-9
        )


def test_the_order_of_rows_does_not_matter():
    order = np.random.default_rng(1).permutation(len(X))
    shuffled = DFKDEDetector(**SETTINGS).fit(X[order], groups=GROUPS[order])
    expected = DFKDEDetector(**SETTINGS).fit(X, groups=GROUPS).calibration_scores_[order]
    np.testing.assert_allclose(shuffled.calibration_scores_, expected, rtol=1e-9)


@pytest.mark.parametrize("kind", [DFKDEDetector, PatchDFKDEDetector])
def test_new_parts_keep_the_rate_only_with_groups(kind):
    train, groups = parts(60, 5)
    new, _ = parts(400, 1, seed=1)
    with_groups = (kind().fit(train, groups=groups).predict(new) == -1).mean()
    with pytest.warns(UserWarning, match="near-duplicate"):
        without = (kind().fit(train[np.random.default_rng(0).permutation(300)]).predict(new) == -1).mean()
    assert with_groups < 0.13
    assert without > 0.5


def test_bandwidth_loo_leaves_out_whole_groups():
    grouped = DFKDEDetector(n_components=3, residual=None, bandwidth="loo").fit(X, groups=GROUPS)
    single = DFKDEDetector(n_components=3, residual=None, bandwidth="loo").fit(X)
    assert grouped.bandwidth_ > 3 * single.bandwidth_

    def held_out(h):
        """Return the mean log density of the rows by the kernels of other parts."""
        centers = grouped.kernel_centers_
        distances = ((centers[:, None] - centers[None]) ** 2).sum(2)
        logs = np.where(GROUPS[:, None] == GROUPS, -np.inf, -distances / (2 * h**2))
        counts = (GROUPS[:, None] != GROUPS).sum(1)
        return (np.logaddexp.reduce(logs, axis=1) - np.log(counts) - 3 * np.log(h)).mean()

    grid = grouped.bandwidth_ * np.array([0.9, 0.97, 1.0, 1.03, 1.1])
    assert np.argmax([held_out(h) for h in grid]) in (1, 2, 3)


def test_auto_components_are_chosen_by_new_parts():
    train, groups = parts(30, 5, n_features=40)
    with pytest.warns(UserWarning, match="near-duplicate"):
        alone = DFKDEDetector().fit(train[np.random.default_rng(0).permutation(150)])
    grouped = DFKDEDetector().fit(train, groups=groups)
    assert grouped.n_components_ < alone.n_components_


def test_groups_that_share_a_copy_are_one():
    table = np.arange(12.0).reshape(6, 2)
    table[4] = table[1]
    numbers = with_copies(["a", "a", "b", "b", "c", "d"], table)
    assert numbers.tolist() == [0, 0, 2, 2, 0, 5]


@pytest.mark.parametrize("kind", [DFKDEDetector, PatchDFKDEDetector])
def test_a_promise_with_confidence_counts_parts_and_not_their_images(kind):
    train, groups = shuffled_parts(50, 5)
    detector = kind(confidence=0.9, target_fpr=0.1).fit(train, groups=groups)
    lowest = sorted(min(detector.calibration_scores_[groups == part]) for part in np.unique(groups))
    assert rank_with_confidence(50, 0.1, 0.9) == 2
    assert detector.offset_ == lowest[1]
    is_few = np.isin(groups, np.unique(groups)[:44])
    with pytest.raises(ValueError, match=r"at least 45 good rows or images, of as many groups .* there are 44"):
        kind(confidence=0.9).fit(train[is_few], groups=groups[is_few])


@pytest.mark.parametrize("kind", [DFKDEDetector, PatchDFKDEDetector])
def test_p_values_count_parts_and_not_their_images(kind):
    train, groups = shuffled_parts(30, 5)
    detector = kind().fit(train, groups=groups)
    new, _ = parts(20, 5, seed=1)
    expected = conformal_p_values(detector.score_samples(new), detector.calibration_scores_, groups)
    np.testing.assert_allclose(detector.p_values(new), expected, rtol=1e-12)
    assert detector.p_values(new + 99).max() == pytest.approx(1 / 31)
    lowest = np.array([min(detector.calibration_scores_[groups == part]) for part in np.unique(groups)])
    np.testing.assert_allclose(
        detector.p_values(new, confidence=0.9),
        [conditional_p_value(np.count_nonzero(lowest <= score), 30) for score in detector.score_samples(new)],
    )


def conditional_p_value(n_at_or_below, n, k=15, delta=0.1):
    """Return the constant of the generalised Simes inequality for 30 groups."""
    factors = np.maximum(n - n_at_or_below - np.arange(k), 0) / (n - np.arange(k))
    return 1 - (delta * factors.prod()) ** (1 / k)


def test_parts_that_share_a_copy_count_as_one():
    train, groups = parts(45, 3)
    detector = DFKDEDetector(confidence=0.9, **SETTINGS)
    assert len(np.unique(detector.fit(train, groups=groups).calibration_groups_)) == 45
    train[0] = train[-1]
    with pytest.raises(ValueError, match="there are 44"):
        detector.fit(train, groups=groups)


def test_without_groups_each_row_counts_even_copies():
    train = np.repeat(parts(40, 1)[0], 2, axis=0)
    detector = DFKDEDetector(**SETTINGS).fit(train)
    np.testing.assert_array_equal(detector.calibration_groups_, np.arange(80))
    np.testing.assert_array_equal(
        detector.p_values(train), conformal_p_values(detector.score_samples(train), detector.calibration_scores_)
    )


@pytest.mark.parametrize("kind", [DFKDEDetector, PatchDFKDEDetector])
def test_of_new_parts_at_most_the_rate_has_an_anomalous_image(kind):
    rates = []
    for seed in range(40):
        rows, groups = parts(60 + 200, 4, n_features=4, seed=seed)
        is_known = np.arange(len(rows)) < 60 * 4
        detector = kind(confidence=0.9, target_fpr=0.1).fit(rows[is_known], groups=groups[is_known])
        rates.append((detector.predict(rows[~is_known]).reshape(200, 4) == -1).any(1).mean())
    # A tenth may be above; more than 10 of 40 with a probability of 0.001.
    assert np.sum(np.array(rates) > 0.1) <= 10
    assert np.mean(rates) > 0.02


def test_labels_may_be_of_any_kind():
    expected = DFKDEDetector(**SETTINGS).fit(X, groups=GROUPS).calibration_scores_
    numbers = np.unique(GROUPS, return_inverse=True)[1]
    days = np.datetime64("2020-01-01", "ns") + numbers * np.timedelta64(1, "D")
    for groups in (
        *(GROUPS.tolist(), GROUPS.astype(object), numbers, numbers * 0.5, numbers[:, None], days),
        *([(i, "left") for i in numbers], list(torch.from_numpy(numbers)), torch.from_numpy(numbers)),
        pd.Series(GROUPS, index=np.arange(100, 160)),
        pd.Series(pd.Categorical(GROUPS)),
    ):
        detector = DFKDEDetector(**SETTINGS).fit(X, groups=groups)
        np.testing.assert_allclose(detector.calibration_scores_, expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (GROUPS[:-1], r"groups has 59 labels, and X has 60"),
        (["a"] * 60, r"all 60 rows are one group"),
        ([*GROUPS[:-1].tolist(), None], r"groups\[59\] is None: 1 of 60 labels are missing"),
        ([np.nan, *range(59)], r"groups\[0\] is nan: 1 of 60"),
        (["a", float("nan"), *["b"] * 58], r"groups\[1\] is nan: 1 of 60"),
        (np.array(["NaT", *["2020-01-01"] * 59], "datetime64[ns]"), r"groups\[0\] is NaT: 1 of 60"),
        (np.ma.masked_array(np.arange(60), np.arange(60) == 3), r"groups\[3\] is None: 1 of 60"),
        ([pd.NA, *range(59)], r"groups\[0\] is <NA>: 1 of 60"),
        (pd.Series([pd.NA, *range(59)], dtype="Int64"), r"groups\[0\] is .*: 1 of 60"),
        (np.zeros((60, 2)), r"groups is a ndarray of shape \(60, 2\)"),
        ("part", r"groups is a str of shape \(\)"),
        (dict.fromkeys(range(60)), r"groups is a dict of shape \(\)"),
    ],
)
def test_groups_that_cannot_be_are_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        DFKDEDetector().fit(X, groups=groups)


def test_a_fit_at_positions_needs_two_images_without_the_largest_group():
    with pytest.raises(ValueError, match=r"groups: 9 of 10 images are one group.*at least 2 others"):
        PatchDFKDEDetector().fit(X[:10], groups=[0] * 9 + [1])
    assert np.isfinite(PatchDFKDEDetector().fit(X[:10], groups=[0] * 8 + [1, 2]).offset_)


def test_labels_that_are_no_keys_are_refused():
    with pytest.raises(TypeError, match=r"labels that are no keys of a dictionary \(.*'list'"):
        DFKDEDetector().fit(X, groups=[[i] for i in range(60)])


def test_a_number_is_not_the_string_of_it():
    assert with_copies([1, "1", 1, "1"], np.arange(4.0)[:, None]).tolist() == [0, 1, 0, 1]


def test_groups_are_routed_through_pipelines_and_searches():
    with config_context(enable_metadata_routing=True):
        detector = DFKDEDetector(**SETTINGS).set_fit_request(groups=True)
        pipeline = make_pipeline(StandardScaler(), detector).fit(X, groups=GROUPS)
        scaled = StandardScaler().fit_transform(X)
        expected = DFKDEDetector(**SETTINGS).fit(scaled, groups=GROUPS)
        np.testing.assert_array_equal(pipeline[-1].calibration_scores_, expected.calibration_scores_)
        search = GridSearchCV(detector, {"n_components": [1, 2]}, cv=GroupKFold(3)).fit(X, groups=GROUPS)
        n_components = search.best_params_["n_components"]
        expected = DFKDEDetector(n_components=n_components, residual=None).fit(X, groups=GROUPS)
        np.testing.assert_array_equal(search.best_estimator_.calibration_scores_, expected.calibration_scores_)
        fitted = cross_validate(
            detector, X, cv=GroupKFold(3), params={"groups": GROUPS}, return_estimator=True, return_indices=True
        )
        for estimator, train in zip(fitted["estimator"], fitted["indices"]["train"], strict=True):
            expected = DFKDEDetector(**SETTINGS).fit(X[train], groups=GROUPS[train])
            np.testing.assert_array_equal(estimator.calibration_scores_, expected.calibration_scores_)


@pytest.mark.parametrize("kind", [DFKDEDetector, PatchDFKDEDetector])
def test_pipelines_are_searched_and_scored_with_routing(kind):
    # Pipeline.score routes sample_weight, also where it is None, and the last step has to know it.
    with config_context(enable_metadata_routing=True):
        pipeline = make_pipeline(StandardScaler(), kind().set_fit_request(groups=True))
        parameter = f"{kind.__name__.lower()}__bandwidth"
        search = GridSearchCV(pipeline, {parameter: [0.3, 1.0]}, cv=GroupKFold(3), error_score="raise")
        search.fit(X, groups=GROUPS)
        bandwidth = search.best_params_[parameter]
        scaled = StandardScaler().fit_transform(X)
        expected = kind(bandwidth=bandwidth).fit(scaled, groups=GROUPS)
        np.testing.assert_array_equal(search.best_estimator_[-1].calibration_scores_, expected.calibration_scores_)
        train, test = next(GroupKFold(3).split(X, groups=GROUPS))
        scaler = StandardScaler().fit(X[train])
        detector = kind(bandwidth=0.3).fit(scaler.transform(X[train]), groups=GROUPS[train])
        assert search.cv_results_["split0_test_score"][0] == detector.score(scaler.transform(X[test]))


@pytest.mark.parametrize("kind", [DFKDEDetector, PatchDFKDEDetector])
def test_weights_in_the_score_are_repetitions(kind):
    detector = kind().fit(X, groups=GROUPS)
    weights = np.arange(60) % 3
    expected = detector.score(np.repeat(X, weights, axis=0))
    assert detector.score(X, sample_weight=weights) == pytest.approx(expected, rel=1e-12)
    assert detector.score(X, sample_weight=weights * 1e307) == pytest.approx(expected, rel=1e-12)
    assert detector.score(X, sample_weight=np.ones(60)) == pytest.approx(detector.score(X), rel=1e-12)
    for weights, message in {(1, 2): "2 weights for 60 rows", (0,) * 60: "0.0 to 0.0", (-1,) * 60: "-1.0"}.items():
        with pytest.raises(ValueError, match=message):
            detector.score(X, sample_weight=weights)


@pytest.mark.parametrize("routed", [True, False])
def test_the_classifier_gives_its_detector_the_groups_of_normal_rows(routed):
    y = np.zeros(60, int)
    y[::7] = 1
    with config_context(enable_metadata_routing=routed):
        detector = DFKDEDetector(**SETTINGS)
        if routed:
            detector.set_fit_request(groups=True)
        classifier = AnomalyClassifier(detector).fit(X, y, groups=GROUPS)
    expected = DFKDEDetector(**SETTINGS).fit(X[y == 0], groups=GROUPS[y == 0])
    np.testing.assert_array_equal(classifier.detector_.calibration_scores_, expected.calibration_scores_)


# ---- near-duplicates without groups


def test_near_duplicates_are_reported_where_no_groups_are_given():
    train, groups = shuffled_parts(40, 5)
    with pytest.warns(
        UserWarning, match=r"About 100% of the 200 training rows have a near-duplicate.*groups="
    ) as record:
        DFKDEDetector(**SETTINGS).fit(train)
    assert record[0].filename == __file__
    DFKDEDetector(**SETTINGS).fit(train, groups=groups)  # warnings are errors in these tests
    with pytest.warns(UserWarning, match="near-duplicate") as record:
        PatchDFKDEDetector().fit(train)
    assert record[0].filename == __file__


@pytest.mark.parametrize("n", [40, 100, 400])
@pytest.mark.parametrize("n_features", [2, 10, 200])
@pytest.mark.parametrize("kind", ["normal", "uniform", "heavy"])
def test_independent_rows_are_no_near_duplicates(n, n_features, kind):
    rng = np.random.default_rng(0)
    draw = {"normal": rng.normal, "uniform": rng.uniform, "heavy": lambda size: rng.standard_t(3, size)}[kind]
    assert share_of_near_duplicates(draw(size=(n, n_features))) == 0


def test_rows_of_few_dimensions_or_of_two_kinds_are_no_near_duplicates():
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(200, 2)) @ rng.normal(size=(2, 50)) + 0.01 * rng.normal(size=(200, 50))
    two = rng.normal(size=(200, 10)) + 20 * (np.arange(200) % 2)[:, None]
    assert share_of_near_duplicates(flat) == share_of_near_duplicates(two) == 0
    # Copies are no near-duplicates: a warning of their own reports them.
    assert share_of_near_duplicates(np.repeat(two, 3, axis=0)) == 0


@pytest.mark.parametrize("n", [100, 150, 200, 400])
def test_parts_at_any_angle_are_no_near_duplicates(n):
    rng = np.random.default_rng(0)
    angles = rng.uniform(0, 2 * np.pi, n)[:, None]
    curve = np.concatenate([wave(k * angles) for k in range(1, 17) for wave in (np.sin, np.cos)], axis=1)
    assert share_of_near_duplicates(curve @ rng.normal(size=(32, 60)) + rng.normal(size=(n, 60))) == 0


def test_nearly_all_of_several_exposures_are_found():
    for n_exposures in (2, 4, 6):
        rows, _ = shuffled_parts(240 // n_exposures, n_exposures, n_features=20)
        assert share_of_near_duplicates(rows) > 0.9


def test_near_duplicates_that_share_a_fold_do_no_harm_and_are_not_reported():
    rows, _ = parts(200, 5)
    assert share_of_near_duplicates(rows) == 0
    # Ten rows to a fold: those of one part, in two halves, are in two folds each.
    torn = np.concatenate([rows[::2], rows[1::2]])
    assert share_of_near_duplicates(torn) > 0.9


@pytest.mark.parametrize("seed", range(3))
def test_near_duplicates_are_those_of_a_slow_search(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(150, 6)) * [1, 10, 0.1, 1, 1, 0] + [0, 0, 0, 1e4, 0, 7]
    rows[100:130] = rows[:30] + 0.01 * rows.std(0) * rng.normal(size=(30, 6))
    whitener = np.linalg.cholesky(np.linalg.inv(np.cov(rows[:, :5].T)))
    scaled = rows[:, :5] @ whitener
    folds = np.repeat(np.arange(20), np.diff([round(i * 7.5) for i in range(21)]))
    nearest = np.array(
        [
            sorted(np.linalg.norm(scaled[i] - scaled[j]) for j in range(150) if folds[j] != folds[i])[:12]
            for i in range(150)
        ]
    )
    # In d dimensions the log of the ratio of two distances has, on average, the sum of 1 / i over the ranks between.
    dimension = sum(1 / i for j in range(5, 12) for i in range(j, 12)) / np.mean(
        [sum(np.log(of_row[11] / of_row[j - 1]) for j in range(5, 12)) for of_row in nearest]
    )
    is_found = [1 - (1 - (of_row[0] / of_row[11]) ** dimension) ** 11 < 0.01 for of_row in nearest]
    assert 60 <= sum(is_found) <= 65
    monkeypatch.setattr("dfkde_sklearn._groups._ENTRIES", 1000)  # in several blocks
    assert share_of_near_duplicates(rows) == np.mean(is_found)


@pytest.mark.parametrize("noise", [1e-14, 1e-8, 1e-4])
def test_copies_but_for_rounding_are_near_duplicates(noise):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(200, 8))
    rows[150:] = rows[:50] + noise * rng.normal(size=(50, 8))
    assert share_of_near_duplicates(rows) == pytest.approx(0.5, abs=0.02)


def test_an_outlier_hides_no_near_duplicates():
    rows, _ = shuffled_parts(60, 5)
    rows[17] *= 1e3
    assert share_of_near_duplicates(rows) > 0.9


def test_the_largest_numbers_are_searched_without_overflow():
    rows = 1e300 * np.random.default_rng(0).normal(size=(400, 5))
    assert share_of_near_duplicates(rows) == 0
    rows[np.linspace(0, 399, 300).astype(int), 0] = 1e-300  # the rows whose neighbours are sought
    assert share_of_near_duplicates(rows) == 0


# ---- max_samples


@pytest.mark.parametrize("kind", [DFKDEDetector, PatchDFKDEDetector])
def test_max_samples_draws_whole_groups_so_that_all_others_are_held_out(kind):
    train, groups = shuffled_parts(60, 5)
    detector = kind(max_samples=101, random_state=0).fit(train, groups=groups)
    drawn = np.flatnonzero(detector.calibration_scores_ != detector.score_samples(train))
    assert len(drawn) == 100
    assert not set(groups[drawn]) & set(np.delete(groups, drawn))
    expected = kind().fit(train[drawn], groups=groups[drawn])
    np.testing.assert_allclose(detector.calibration_scores_[drawn], expected.calibration_scores_, rtol=1e-9)


def test_max_samples_passes_over_a_group_that_leaves_no_room_for_another():
    groups = np.repeat(["large", "a", "b", "c"], [40, 10, 10, 10])
    for seed in range(5):
        detector = DFKDEDetector(n_components=2, max_samples=41, random_state=seed)
        detector.fit(np.random.default_rng(0).normal(size=(70, 3)), groups=groups)
        assert len(detector.kernel_centers_) == 30
    with pytest.raises(
        ValueError, match=r"max_samples=15 has no room for two whole groups.*in 4 groups, the largest of 40"
    ):
        DFKDEDetector(max_samples=15).fit(np.random.default_rng(0).normal(size=(70, 3)), groups=groups)
