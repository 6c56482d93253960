"""Streams: `partial_fit`, fits in bounded memory, and answers in order."""

import pickle
import re
import subprocess
import sys
import threading
import warnings
from collections import deque

import numpy as np
import pandas as pd
import polars as pl
import pytest
import sklearn
import torch
from PIL import Image
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from torch.utils.data import ConcatDataset

from dfkde_sklearn import DFKDEDetector, PatchDFKDEDetector, ScatteringFeatures

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(240, 12)).astype(np.float32) * np.linspace(2, 0.1, 12, dtype=np.float32)
IMAGES = RNG.integers(0, 256, (60, 32, 32), np.uint8)
POOLED = ScatteringFeatures(scales=2, orientations=4, image_size=32)
MAPS = ScatteringFeatures(scales=2, orientations=4, image_size=32, pooling=None)
DETECTORS = {
    "pooled": DFKDEDetector(POOLED, n_components=3, random_state=1),
    "positions": PatchDFKDEDetector(MAPS, random_state=1),
}


def in_parts(detector, X, cuts, groups=None):
    for places in np.array_split(np.arange(len(X)), cuts):
        detector.partial_fit(X[places], groups=None if groups is None else [groups[i] for i in places])
    return detector


def assert_same(one, other):
    for name, value in vars(one).items():
        if name.endswith("_") and name != "features_":
            np.testing.assert_array_equal(getattr(other, name), value, name)


@pytest.mark.parametrize("cuts", [[], [20], [100, 150, 239], list(range(30, 240, 35))])
@pytest.mark.parametrize("detector", [DFKDEDetector(), DFKDEDetector(contamination=0.05), DFKDEDetector.original()])
def test_parts_of_a_matrix_make_what_a_fit_to_all_makes(detector, cuts):
    assert_same(clone(detector).fit(ROWS), in_parts(clone(detector), ROWS, cuts))


@pytest.mark.parametrize("cuts", [[], [25], [10, 11, 40]])
@pytest.mark.parametrize("kind", DETECTORS)
def test_parts_of_images_make_what_a_fit_to_all_makes(kind, cuts):
    whole = clone(DETECTORS[kind]).fit(IMAGES)
    parts = in_parts(clone(DETECTORS[kind]), IMAGES, cuts)
    assert_same(whole, parts)
    np.testing.assert_array_equal(whole.score_samples(IMAGES), parts.score_samples(IMAGES))


@pytest.mark.parametrize("kind", DETECTORS)
def test_groups_hold_across_parts(kind):
    groups = [f"part {i // 3}" for i in range(60)]
    whole = clone(DETECTORS[kind]).fit(IMAGES, groups=groups)
    assert_same(whole, in_parts(clone(DETECTORS[kind]), IMAGES, [20, 31], groups))
    assert len(np.unique(whole.calibration_groups_)) == 20


@pytest.mark.parametrize("kind", DETECTORS)
def test_beyond_max_samples_parts_streams_and_lists_keep_the_same_images(kind):
    detector = clone(DETECTORS[kind]).set_params(max_samples=40)
    whole = clone(detector).fit(IMAGES)
    assert len(whole.calibration_scores_) == 40
    assert_same(whole, in_parts(clone(detector), IMAGES, [15, 35, 50]))
    assert_same(whole, clone(detector).fit(image for image in IMAGES))
    assert_same(whole, clone(detector).fit(list(IMAGES)))
    assert len(clone(detector).set_params(random_state=2).fit(IMAGES).calibration_scores_) == 40


def test_beyond_max_samples_parts_draw_what_a_fit_to_a_matrix_draws():
    detector = DFKDEDetector(n_components=3, max_samples=100, random_state=0)
    whole = clone(detector).fit(ROWS)
    parts = in_parts(clone(detector), ROWS, [50, 130])
    np.testing.assert_array_equal(parts.kernel_centers_, whole.kernel_centers_)
    # A matrix is in memory anyway: its other rows are held out, and calibrate too.
    assert (len(whole.calibration_scores_), len(parts.calibration_scores_)) == (240, 100)


def test_fit_predict_answers_for_every_image_of_a_stream():
    detector = clone(DETECTORS["pooled"]).set_params(max_samples=40)
    verdicts = detector.fit_predict(image for image in IMAGES)
    assert verdicts.shape == (60,)
    np.testing.assert_array_equal(verdicts, clone(detector).fit_predict(IMAGES))


def test_whole_groups_of_a_stream_are_kept():
    groups = [i // 3 for i in range(60)]
    detector = clone(DETECTORS["pooled"]).set_params(max_samples=40).fit((image for image in IMAGES), groups=groups)
    _, sizes = np.unique(detector.calibration_groups_, return_counts=True)
    assert sizes.tolist() == [3] * 13


def test_a_pickled_detector_goes_on_where_it_was():
    detector = pickle.loads(pickle.dumps(DFKDEDetector(n_components=3).partial_fit(ROWS[:100])))
    assert_same(DFKDEDetector(n_components=3).fit(ROWS), detector.partial_fit(ROWS[100:]))


def test_a_fit_begins_anew():
    detector = DFKDEDetector(n_components=3).partial_fit(ROWS[:100])
    assert_same(DFKDEDetector(n_components=3).fit(ROWS[100:]), detector.fit(ROWS[100:]))


@pytest.mark.parametrize("fit", ["fit", "fit_predict"])
def test_a_fit_is_the_first_part(fit):
    for detector in (DFKDEDetector(n_components=3), DFKDEDetector(n_components=3, max_samples=70, random_state=0)):
        expected = clone(detector).partial_fit(ROWS[:100]).partial_fit(ROWS[100:])
        getattr(detector, fit)(ROWS[:100])
        assert_same(expected, detector.partial_fit(ROWS[100:]))
    groups = [i // 4 for i in range(240)]
    detector = DFKDEDetector(n_components=3).fit(ROWS[:100], groups=groups[:100])
    assert_same(
        DFKDEDetector(n_components=3).fit(ROWS, groups=groups), detector.partial_fit(ROWS[100:], groups=groups[100:])
    )


def test_a_fit_that_kept_no_rows_says_so(tmp_path):
    groups = [i // 4 for i in range(240)]
    drawn = DFKDEDetector(n_components=3, max_samples=70, random_state=0).fit(ROWS, groups=groups)
    fitted = DFKDEDetector(n_components=3).fit(ROWS)
    fitted.save(tmp_path / "model.safetensors")
    for detector in (drawn, DFKDEDetector.load(tmp_path / "model.safetensors")):
        with pytest.raises(ValueError, match="has no training rows to add to"):
            detector.partial_fit(ROWS[:100])


def test_large_rows_are_not_kept(monkeypatch):
    monkeypatch.setattr("dfkde_sklearn._streams._KEPT_BYTES", ROWS.nbytes - 1)
    detector = DFKDEDetector(n_components=3).fit(ROWS)
    assert not hasattr(detector, "_sample")
    assert hasattr(DFKDEDetector(n_components=3).fit(ROWS[:-1]), "_sample")


@pytest.mark.parametrize("method", ["fit", "partial_fit"])
@pytest.mark.parametrize("max_samples", [None, 40])
def test_scores_of_recalibrate_are_left_out_with_a_warning(method, max_samples):
    detector = DFKDEDetector(n_components=3, max_samples=max_samples, random_state=0)
    expected = clone(detector).partial_fit(ROWS)
    getattr(detector, method)(ROWS[:100]).recalibrate(ROWS[100:150])
    with pytest.warns(UserWarning, match="The 50 calibration scores that recalibrate added are left out"):
        detector.partial_fit(ROWS[100:])
    assert_same(expected, detector)


def test_rows_that_are_not_kept_make_a_fit_all_the_same():
    detector = DFKDEDetector(n_components=3, max_samples=40, random_state=0).fit(ROWS[:239])
    places = detector._sample["places"]
    detector.set_params(target_fpr=0.2).partial_fit(ROWS[239:])
    np.testing.assert_array_equal(detector._sample["places"], places)
    expected = DFKDEDetector(n_components=3, max_samples=40, target_fpr=0.2, random_state=0).partial_fit(ROWS)
    assert_same(expected, detector)


@pytest.mark.parametrize(
    ("kind", "changed", "named"),
    [
        ("pooled", {"features__scales": 3}, "features__scales: 2 became 3"),
        ("pooled", {"features": None}, "features: ScatteringFeatures"),
        ("pooled", {"features__cache_dtype": "float16"}, "features__cache_dtype: 'float32' became 'float16'"),
        ("pooled", {"features": FeatureUnion([("maps", MAPS)])}, "features: ScatteringFeatures"),
        ("positions", {"features__white_level": 4095}, "features__white_level: 65535 became 4095"),
        ("positions", {"flips": "all"}, "flips: None became 'all'"),
    ],
)
@pytest.mark.parametrize("is_loaded", [False, True])
def test_images_are_described_as_those_before_or_refused(kind, changed, named, is_loaded, tmp_path):
    detector = clone(DETECTORS[kind]).fit(IMAGES[:50])
    if is_loaded:
        detector.save(tmp_path / "model", training_rows=True)
        detector = type(detector).load(tmp_path / "model")
    before = pickle.dumps({name: value for name, value in vars(detector).items() if name.endswith("_")})
    old = {name: detector.get_params()[name] for name in changed}
    detector.set_params(**changed)
    with pytest.raises(ValueError, match=re.escape(named)):
        detector.partial_fit(IMAGES[50:])
    assert pickle.dumps({name: value for name, value in vars(detector).items() if name.endswith("_")}) == before
    detector.set_params(**old).partial_fit(IMAGES[50:])
    assert len(detector.calibration_scores_) == 60


def test_what_decides_only_how_features_are_computed_may_change(tmp_path):
    changed = {"batch_size": 4, "cache": str(tmp_path), "device": "cpu", "verbose": 1}
    for of_whom in ("features", "features_"):
        detector = clone(DETECTORS["pooled"]).fit(IMAGES[:50])
        getattr(detector, of_whom).set_params(**changed)
        assert_same(clone(DETECTORS["pooled"]).fit(IMAGES), detector.partial_fit(IMAGES[50:]))


@pytest.mark.parametrize(("old", "new"), [(np.log1p, np.sqrt), (np.sort, np.copy)])
def test_functions_and_dictionaries_are_compared(old, new):
    steps = make_pipeline(FunctionTransformer(old, kw_args={}))
    detector = DFKDEDetector(steps, n_components=3).fit(np.abs(ROWS[:200]))
    detector = pickle.loads(pickle.dumps(detector)).partial_fit(np.abs(ROWS[200:220]))
    for changed in ({"func": new}, {"kw_args": {"axis": 0}}):
        other = pickle.loads(pickle.dumps(detector))
        other.set_params(**{f"features__functiontransformer__{name}": value for name, value in changed.items()})
        with pytest.raises(ValueError, match="The kept rows were computed with other parameters"):
            other.partial_fit(np.abs(ROWS[220:]))


def test_a_union_is_the_same_union_in_the_next_call():
    union = FeatureUnion([("one", POOLED), ("pca", PCA(2))])
    detector = DFKDEDetector(union.set_params(pca="drop"), n_components=3).fit(IMAGES[:50])
    detector.partial_fit(IMAGES[50:])
    with pytest.raises(ValueError, match="features__one__scales: 2 became 3"):
        detector.set_params(features__one=clone(POOLED).set_params(scales=3)).partial_fit(IMAGES[50:])


def test_the_parts_of_a_union_read_the_same_stream():
    union = FeatureUnion([("one", POOLED), ("other", ScatteringFeatures(scales=1, orientations=4, image_size=32))])
    detector = DFKDEDetector(union, n_components=3)
    whole = clone(detector).fit(IMAGES)
    assert_same(whole, clone(detector).fit(image for image in IMAGES))
    assert_same(whole, clone(detector).partial_fit(iter(IMAGES[:20])).partial_fit(iter(IMAGES[20:])))
    np.testing.assert_array_equal(whole.score_samples(iter(IMAGES)), whole.score_samples(IMAGES))
    of_one_position = PatchDFKDEDetector(union)
    assert_same(clone(of_one_position).fit(IMAGES), clone(of_one_position).fit(iter(IMAGES)))


@pytest.mark.parametrize("fit", ["fit", "fit_predict", "partial_fit"])
def test_a_white_level_that_is_not_that_of_a_stream_is_a_warning(fit, monkeypatch):
    monkeypatch.setattr("dfkde_sklearn._features.extractor.STREAMED", 20)
    stream = (image.astype(np.uint16) * (4 if i == 5 else 2) for i, image in enumerate(IMAGES))
    detector = clone(DETECTORS["pooled"])
    brightest = int(IMAGES[5].max()) * 4
    with pytest.warns(UserWarning, match=f"The brightest value of the 16-bit images is {brightest},") as found:
        getattr(detector, fit)(stream)
    assert len(found) == 1
    detector.score_samples(image.astype(np.uint16) for image in IMAGES)


def test_any_transformer_is_fitted_to_the_first_part():
    detector = DFKDEDetector(PCA(4, svd_solver="full"), n_components=2).partial_fit(ROWS[:100]).partial_fit(ROWS[100:])
    features = PCA(4, svd_solver="full").fit(ROWS[:100]).transform(ROWS)
    expected = DFKDEDetector(n_components=2).fit(features)
    np.testing.assert_allclose(detector.calibration_scores_, expected.calibration_scores_, rtol=1e-4)


@pytest.mark.parametrize(
    ("X", "groups", "message"),
    [
        (ROWS[:, :5], None, "X has 5 features, but DFKDEDetector is expecting 12"),
        (np.full((3, 12), np.nan), None, "NaN"),
        (ROWS[:3], [1, 2, 3], "groups were not given in earlier calls of partial_fit, and are given in this one"),
    ],
)
def test_a_part_that_is_refused_changes_nothing(X, groups, message):
    detector = DFKDEDetector(n_components=3).partial_fit(ROWS[:100])
    before = pickle.dumps(detector)
    with pytest.raises(ValueError, match=message):
        detector.partial_fit(X, groups=groups)
    assert pickle.dumps(detector) == before
    detector.partial_fit(ROWS[100:])
    assert_same(DFKDEDetector(n_components=3).fit(ROWS), detector)


@pytest.mark.parametrize("method", ["fit", "fit_predict", "partial_fit"])
@pytest.mark.parametrize("kind", DETECTORS)
def test_a_stream_that_ends_with_an_error_leaves_the_detector_as_it_was(kind, method):
    def stream():
        yield from IMAGES[:10]
        raise RuntimeError("no camera")

    detector = clone(DETECTORS[kind]).fit(IMAGES)
    expected = detector.score_samples(IMAGES)
    if method != "partial_fit":
        detector.set_params(features__orientations=8)
    with pytest.raises(RuntimeError, match="no camera"):
        getattr(detector, method)(stream())
    np.testing.assert_array_equal(detector.score_samples(IMAGES), expected)
    detector.set_params(features__orientations=4)
    assert_same(clone(detector).fit(np.concatenate([IMAGES, IMAGES[:9] // 2])), detector.partial_fit(IMAGES[:9] // 2))


def test_a_fit_to_rows_without_names_forgets_those_of_an_earlier_fit():
    pandas = pytest.importorskip("pandas")
    detector = DFKDEDetector(n_components=3).fit(pandas.DataFrame(ROWS, columns=list("abcdefghijkl")))
    assert hasattr(detector, "feature_names_in_")
    assert not hasattr(detector.fit(ROWS), "feature_names_in_")


def test_a_first_part_that_is_refused_leaves_the_detector_unfitted():
    detector = DFKDEDetector(n_components=3)
    with pytest.raises(ValueError, match="do not differ"):
        detector.partial_fit(np.zeros((5, 12)))
    with pytest.raises(NotFittedError):
        detector.predict(ROWS)
    assert vars(detector).keys() == vars(DFKDEDetector()).keys()


@pytest.mark.parametrize(("n_labels", "message"), [(5, "groups has 5 labels"), (61, "groups has 61 labels")])
def test_groups_of_another_number_than_the_images_of_a_stream_are_refused(n_labels, message):
    with pytest.raises(ValueError, match=message):
        clone(DETECTORS["pooled"]).fit((image for image in IMAGES), groups=list(range(n_labels)))


def test_groups_without_room_say_so():
    detector = clone(DETECTORS["pooled"]).set_params(max_samples=20)
    with pytest.raises(ValueError, match="max_samples=20 has no room for two whole groups of 60 rows"):
        detector.fit((image for image in IMAGES), groups=[i // 30 for i in range(60)])


def test_an_empty_stream_is_refused():
    with pytest.raises(ValueError, match="0 images; at least one is needed"):
        clone(DETECTORS["pooled"]).fit(iter([]))


def test_a_broken_image_of_a_stream_is_named_by_its_place():
    def images():
        yield from (np.zeros((32, 32), np.uint8) + i % 7 for i in range(300))
        yield np.full((32, 32), np.nan)

    with pytest.raises(ValueError, match=r"images\[300\]: NaN"):
        clone(DETECTORS["pooled"]).fit(images())


def test_lists_beyond_max_samples_name_images_by_their_places(monkeypatch):
    monkeypatch.setattr("dfkde_sklearn._features.extractor.STREAMED", 16)
    images = [*IMAGES[:50], np.full((32, 32), np.nan)]
    with pytest.raises(ValueError, match=r"images\[50\]: NaN"):
        clone(DETECTORS["pooled"]).set_params(max_samples=30).fit(images)


def test_the_memory_of_a_fit_does_not_grow_with_the_stream():
    # Of a process each, as its largest size is what the system reports. Kept, the features would add 200 MB.
    script = """
import resource, sys
import numpy as np
from dfkde_sklearn import DFKDEDetector, ScatteringFeatures
rng = np.random.default_rng(0)
features = ScatteringFeatures(scales=4, orientations=8, image_size=32)
images = (rng.integers(0, 256, (32, 32), np.uint8) for _ in range(int(sys.argv[1])))
detector = DFKDEDetector(features, n_components=3, max_samples=200, random_state=0).fit(images)
assert len(detector.calibration_scores_) == 200
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    few, many = (
        int(subprocess.check_output([sys.executable, "-W", "ignore", "-c", script, str(n)])) for n in (400, 2000)
    )
    assert many < 1.02 * few


# Answers for streams


@pytest.fixture(scope="module")
def fitted():
    return clone(DETECTORS["pooled"]).fit(IMAGES)


def assert_answers(found, expected):
    for i, values in enumerate(expected):
        # Other batches round otherwise.
        np.testing.assert_allclose([answers[i] for answers in found], values, rtol=1e-5)


@pytest.mark.parametrize("kind", DETECTORS)
@pytest.mark.parametrize("batch_size", [1, 7, 60, 100])
def test_a_stream_gets_the_answers_of_assess_in_order(kind, batch_size):
    detector = clone(DETECTORS[kind]).fit(IMAGES)
    expected = detector.assess(IMAGES)
    pairs, batches = ((image, 0) for image in IMAGES), iter([IMAGES[:30, None], IMAGES[30:, None]])
    for images in (iter(IMAGES), IMAGES, pairs, batches):
        found = list(detector.score_stream(images, batch_size=batch_size))
        assert type(found[0]) is type(expected)
        assert isinstance(found[0].label, int)
        assert_answers(found, expected)


def test_a_folder_and_paths_are_streams_too(fitted, tmp_path):
    for i in range(5):
        Image.fromarray(IMAGES[i]).save(tmp_path / f"{i}.png")
    paths = sorted(tmp_path.iterdir())
    for images in (tmp_path, paths, iter(paths)):
        assert_answers(list(fitted.score_stream(images, batch_size=2)), fitted.assess(IMAGES[:5]))


@pytest.mark.parametrize(
    "features",
    [
        FeatureUnion([("a", POOLED), ("b", clone(POOLED).set_params(scales=3, white_level=4095)), ("no", "drop")]),
        make_pipeline(POOLED, PCA(5, random_state=0)),
    ],
)
def test_extractors_inside_others_read_folders_and_name_images_by_their_places(features, tmp_path):
    for i in range(5):
        Image.fromarray(IMAGES[i]).save(tmp_path / f"{i}.png")
    detector = DFKDEDetector(clone(features), n_components=3).fit(IMAGES)
    for images in (tmp_path, f"{tmp_path}/*.png", sorted(tmp_path.iterdir()), IMAGES[:5], iter(IMAGES[:5])):
        assert_answers(list(detector.score_stream(images, batch_size=2)), detector.assess(IMAGES[:5]))
    broken = [*IMAGES[:3], np.full((32, 32), np.nan)]
    for images in (broken, iter(broken)):
        with pytest.raises(ValueError, match=r"images\[3\]: NaN"):
            list(detector.score_stream(images, batch_size=2))


@pytest.mark.parametrize("make", [pd.DataFrame, pl.DataFrame, np.asarray, list])
def test_tables_are_read_by_rows_whatever_transforms_them(make):
    rows = ROWS[:12]  # as many as there are columns
    names = (
        {} if make in (np.asarray, list) else {"schema" if make is pl.DataFrame else "columns": list("abcdefghijkl")}
    )
    detector = DFKDEDetector(StandardScaler(), n_components=3).fit(ROWS)
    expected = detector.score_samples(rows)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "X has feature names")
        found = [answers.log_density for answers in detector.score_stream(make(rows, **names), batch_size=5)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_folders_and_frames_of_paths_reach_extractors_behind_other_steps(tmp_path):
    for i in range(5):
        Image.fromarray(IMAGES[i]).save(tmp_path / f"{i}.png")
    paths = sorted(map(str, tmp_path.iterdir()))
    detector = DFKDEDetector(make_pipeline("passthrough", POOLED, StandardScaler()), n_components=3).fit(IMAGES)
    for images in (tmp_path, pd.DataFrame({"path": paths}), paths):
        assert_answers(list(detector.score_stream(images, batch_size=2)), detector.assess(IMAGES[:5]))

    class Opened(TransformerMixin, BaseEstimator):
        def fit(self, X, y=None):
            return self

        def transform(self, X):
            return np.array([np.asarray(Image.open(path)).ravel()[:50].astype(float) for path in X])

    detector = DFKDEDetector(Opened(), n_components=2).fit(paths)
    assert_answers(list(detector.score_stream(tmp_path, batch_size=2)), detector.assess(paths))


def test_rows_may_be_tensors_of_any_kind():
    detector = DFKDEDetector(n_components=3).fit(ROWS)
    rows = torch.from_numpy(ROWS[:9]).bfloat16().requires_grad_()
    expected = detector.score_samples(rows.detach())
    found = [answers.log_density for answers in detector.score_stream(iter(rows))]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.* training rows are exact copies of rows")
@pytest.mark.parametrize("dtype", [np.int64, bool, np.float16])
def test_rows_of_any_dtype_are_kept_as_a_file_holds_them(dtype, tmp_path):
    rows = np.rint(ROWS).astype(dtype)
    detector = DFKDEDetector(n_components=3).partial_fit(rows[:100])
    detector.save(tmp_path / "model", training_rows=True)
    loaded = DFKDEDetector.load(tmp_path / "model").partial_fit(rows[100:])
    assert_same(DFKDEDetector(n_components=3).fit(rows), loaded)


def test_features_may_come_one_by_one():
    rows = clone(MAPS).fit(IMAGES).transform(IMAGES)
    detector = PatchDFKDEDetector(MAPS, random_state=1)
    assert_same(clone(detector).fit(IMAGES), detector.fit_features(rows[i : i + 1] for i in range(60)))
    with pytest.raises(ValueError, match="minimum of 3"):
        detector.fit_features([rows[:2]])


def test_a_detector_has_arrays_whatever_scikit_learn_is_configured_to_return(tmp_path):
    expected = {kind: clone(detector).fit(IMAGES).score_samples(IMAGES) for kind, detector in DETECTORS.items()}
    with sklearn.config_context(transform_output="pandas"):
        for kind, detector in DETECTORS.items():
            fitted = clone(detector).fit(IMAGES)
            np.testing.assert_array_equal(fitted.score_samples(IMAGES), expected[kind])
            fitted.save(tmp_path / kind)
            loaded = type(fitted).load(tmp_path / kind)
            np.testing.assert_array_equal(loaded.score_samples(IMAGES), expected[kind])
    features = clone(POOLED).set_output(transform="polars")
    found = DFKDEDetector(features, n_components=3, random_state=1).fit(IMAGES).score_samples(IMAGES)
    np.testing.assert_array_equal(found, expected["pooled"])


def test_rows_and_matrices_are_streams():
    detector = DFKDEDetector(n_components=3).fit(ROWS)
    expected = detector.assess(ROWS[:50])
    for rows in (ROWS[:50], iter(ROWS[:50]), iter([ROWS[:20], ROWS[20], ROWS[21:50]]), ROWS[:50].tolist()):
        found = list(detector.score_stream(rows))
        np.testing.assert_allclose([answers.log_density for answers in found], expected.log_density, rtol=1e-5)
        assert [answers.label for answers in found] == expected.label.tolist()


def test_any_transformer_scores_streams():
    images = [row.reshape(3, 4) for row in ROWS[:30]]

    class Flat(TransformerMixin, BaseEstimator):
        def fit(self, X, y=None):
            return self

        def transform(self, X):
            return np.array([image.ravel() for image in X])

    detector = DFKDEDetector(Flat(), n_components=2).fit(images)
    for some in (iter(images), images, deque(images), ConcatDataset([images])):
        assert_answers(list(detector.score_stream(some, batch_size=20)), detector.assess(images))


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_all_answers_before_a_broken_image_come_first(fitted, batch_size):
    def images():
        yield from IMAGES[:10]
        yield np.full((32, 32), np.nan)
        yield from IMAGES

    found = []
    with pytest.raises(ValueError, match=r"images\[10\]: NaN"):
        found.extend(fitted.score_stream(images(), batch_size=batch_size))
    assert_answers(found, fitted.assess(IMAGES[:10]))


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_all_answers_before_an_error_of_the_stream_come_first(fitted, batch_size):
    def images():
        yield from IMAGES[:10]
        raise ConnectionError("the camera is off")

    found = []
    with pytest.raises(ConnectionError, match="the camera is off"):
        found.extend(fitted.score_stream(images(), batch_size=batch_size))
    assert_answers(found, fitted.assess(IMAGES[:10]))


def test_no_more_of_a_stream_is_read_than_is_needed_soon(fitted):
    read = []

    def images():
        for i in range(1000):
            read.append(i)
            yield IMAGES[i % 60]

    answers = fitted.score_stream(images(), batch_size=5)
    assert not read  # nothing happens before the first answer is asked for
    next(answers)
    assert len(read) <= 15
    answers.close()
    n_read = len(read)
    assert not [thread for thread in threading.enumerate() if "ahead" in thread.name]
    assert len(read) == n_read


@pytest.mark.parametrize("empty", [[], iter([]), (image for image in [])])
def test_an_empty_stream_has_no_answers(fitted, empty):
    with pytest.raises(ValueError, match=r"at least one is needed|gave no image or row"):
        list(fitted.score_stream(empty))


def test_streams_of_a_detector_that_is_not_fitted_are_refused_at_once():
    with pytest.raises(NotFittedError):
        DFKDEDetector().score_stream(IMAGES)
    with pytest.raises(ValueError, match="batch_size"):
        DFKDEDetector().fit(ROWS).score_stream(ROWS, batch_size=0)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_a_stream_may_write_all_images_into_the_same_memory(kind):
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32), dtype=np.uint8)
    buffer = images[0].copy()

    def camera():
        for image in images:
            buffer[:] = image
            yield kind(buffer)

    detector = DFKDEDetector(ScatteringFeatures(scales=2, image_size=32), n_components=3)
    expected = clone(detector).fit(list(images))
    detector.fit(camera())
    np.testing.assert_array_equal(detector.score_samples(list(images)), expected.score_samples(list(images)))
    found = [assessment.log_density for assessment in detector.score_stream(camera(), batch_size=5)]
    np.testing.assert_allclose(found, expected.score_samples(list(images)), rtol=1e-5)
