"""PatchDFKDEDetector: what a user is promised, on features at positions and on generated images."""

import copy
import pickle

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from dfkde_sklearn import AnomalyClassifier, DFKDEDetector, PatchDFKDEDetector, ScatteringFeatures, TimmFeatures
from dfkde_sklearn.datasets import make_textures


def features(n, seed=0, shape=(4, 5, 6), dtype=np.float64):
    """Return features (n, h, w, C) of alike images."""
    center = 3 * np.random.default_rng(100).normal(size=shape)
    return (center + np.random.default_rng(seed).normal(size=(n, *shape))).astype(dtype)


TRAIN = features(60)
NEW = features(20, seed=1)
DEFECT = NEW.copy()
DEFECT[:, 1, 3] += 5


@pytest.fixture(scope="module")
def detector():
    return PatchDFKDEDetector(features=None).fit(TRAIN)


@pytest.fixture(scope="module")
def textures():
    return make_textures(40, 20, material="weave", random_state=0)


@pytest.fixture(scope="module")
def of_images(textures):
    return PatchDFKDEDetector(ScatteringFeatures(pooling=None)).fit(textures.X_train)


def test_a_defect_at_one_position_is_found_there(detector):
    assert (detector.predict(DEFECT) == -1).all()
    maps = detector.anomaly_maps(DEFECT, resolution="grid")
    assert maps.shape == (20, 4, 5)
    assert (maps.reshape(20, -1).argmin(1) == 1 * 5 + 3).all()
    assert (maps[:, 1, 3] < detector.map_offset_).all()


def test_the_map_on_the_grid_has_the_score_and_the_verdict(detector):
    maps = np.sort(detector.anomaly_maps(NEW, resolution="grid").reshape(20, -1), axis=1)
    scores = maps[:, 0]  # 3 % of 20 positions
    np.testing.assert_allclose(detector.score_samples(NEW), scores, rtol=1e-12)
    np.testing.assert_array_equal(detector.predict(NEW), np.where(scores < detector.offset_, -1, 1))


def test_thresholds_are_quantiles_of_out_of_fold_scores(detector):
    expected = np.quantile(detector.calibration_scores_, 0.05, method="median_unbiased")
    assert detector.offset_ == pytest.approx(expected, rel=1e-12)
    # The first of 10 folds, by a fit to the others.
    without = PatchDFKDEDetector(features=None).fit(TRAIN[6:])
    np.testing.assert_allclose(detector.calibration_scores_[:6], without.score_samples(TRAIN[:6]), rtol=1e-10)


def test_new_images_keep_both_rates(detector):
    many = features(2000, seed=2)
    assert 0.02 < (detector.predict(many) == -1).mean() < 0.09
    maps = detector.anomaly_maps(many, resolution="grid")
    # The threshold is that of interpolated maps, which are smoother: fewer pixels lie below it.
    assert 0.005 < (maps < detector.map_offset_).mean() < 0.05


def test_groups_share_a_fold():
    groups = np.repeat(["a", "b", "c"], 20)
    grouped = PatchDFKDEDetector(features=None).fit(TRAIN, groups=groups)
    without = PatchDFKDEDetector(features=None).fit(TRAIN[20:])
    np.testing.assert_allclose(grouped.calibration_scores_[:20], without.score_samples(TRAIN[:20]), rtol=1e-10)


def test_all_answers_are_those_of_their_methods(detector):
    answers, maps = detector.assess_with_maps(DEFECT, resolution="grid")
    np.testing.assert_array_equal(answers.log_density, detector.score_samples(DEFECT))
    np.testing.assert_array_equal(answers.p_value, detector.p_values(DEFECT))
    np.testing.assert_array_equal(answers.p_anomalous, detector.predict_proba(DEFECT)[:, 0])
    np.testing.assert_array_equal(answers.label, detector.predict(DEFECT))
    np.testing.assert_array_equal(maps, detector.anomaly_maps(DEFECT, resolution="grid"))
    assert detector.score(NEW) > detector.score(DEFECT)


def test_a_matrix_is_images_of_one_position():
    rows = TRAIN[:, 0, 0]
    detector = PatchDFKDEDetector().fit(rows)
    assert detector.grid_shape_ == (1, 1)
    expected = PatchDFKDEDetector(features=None).fit(TRAIN[:, :1, :1]).score_samples(NEW[:, :1, :1])
    np.testing.assert_allclose(detector.score_samples(NEW[:, 0, 0]), expected, rtol=1e-12)


def test_float32_stays_float32():
    detector = PatchDFKDEDetector(features=None).fit(TRAIN.astype(np.float32))
    scores = detector.score_samples(NEW.astype(np.float32))
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, PatchDFKDEDetector(features=None).fit(TRAIN).score_samples(NEW), rtol=1e-4)


def test_new_features_of_another_dtype_are_scored(detector):
    of_float32 = PatchDFKDEDetector(features=None).fit(TRAIN.astype(np.float32))
    scores = of_float32.score_samples(NEW)
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, detector.score_samples(NEW), rtol=1e-4)
    np.testing.assert_allclose(detector.score_samples(NEW.astype(np.float32)), detector.score_samples(NEW), rtol=1e-4)


@pytest.mark.parametrize(("dtype", "factor"), [(np.float32, 1e30), (np.float32, 1e37), (np.float64, 1e300)])
def test_scores_of_far_outliers_are_finite(dtype, factor):
    detector = PatchDFKDEDetector(features=None).fit(TRAIN.astype(dtype))
    scores = detector.score_samples((NEW * factor).astype(dtype))
    assert np.isfinite(scores).all()
    assert (scores < -1e30).all()


def test_no_input_is_written_to(detector):
    train, new = TRAIN.copy(), NEW.copy()
    train.flags.writeable = new.flags.writeable = False
    PatchDFKDEDetector(features=None, normalization=0.5).fit(train).anomaly_maps(new, resolution="grid")
    np.testing.assert_array_equal(train, TRAIN)


def test_a_fit_on_drawn_images_scores_the_others_too():
    detector = PatchDFKDEDetector(features=None, max_samples=30, random_state=0).fit(TRAIN)
    assert detector.kernel_centers_.shape == (20, 30, 6)
    assert detector.calibration_scores_.shape == (60,)
    assert np.isfinite(detector.calibration_scores_).all()


def test_contamination_calls_exactly_that_share_anomalous():
    mixed = np.concatenate([TRAIN, DEFECT[:6]])
    detector = PatchDFKDEDetector(features=None, contamination=6 / 66)
    assert (detector.fit_predict(mixed)[60:] == -1).all()
    assert (detector.predict(mixed) == -1).sum() == 6
    assert detector.kernel_centers_.shape[1] == 60


def test_few_images_are_mirrored_and_many_are_not():
    few = PatchDFKDEDetector(features=None).fit(TRAIN[:5])
    assert few.kernel_centers_.shape[1] == 10  # 5 images for 6 channels
    assert PatchDFKDEDetector(features=None, mirror=False).fit(TRAIN[:5]).kernel_centers_.shape[1] == 5
    assert PatchDFKDEDetector(features=None, mirror=True).fit(TRAIN).kernel_centers_.shape[1] == 120


def test_a_gaussian_is_what_wide_kernels_do_without():
    gaussian = PatchDFKDEDetector(features=None, density="gaussian").fit(TRAIN)
    assert gaussian.kernel_centers_.shape == (20, 1, 6)
    assert (gaussian.predict(DEFECT) == -1).all()


@pytest.mark.parametrize("settings", [{}, {"density": "gaussian", "normalization": 0.5}], ids=str)
def test_a_saved_detector_scores_the_same(settings, tmp_path):
    detector = PatchDFKDEDetector(features=None, **settings).fit(TRAIN)
    detector.save(tmp_path / "d")
    again = PatchDFKDEDetector.load(tmp_path / "d")
    assert again.get_params() == detector.get_params()
    for name, value in vars(detector).items():
        if name not in ("_seed", "_sample"):  # rows that a file does not hold
            np.testing.assert_array_equal(getattr(again, name), value, err_msg=name)
    np.testing.assert_array_equal(
        again.anomaly_maps(NEW, resolution="grid"), detector.anomaly_maps(NEW, resolution="grid")
    )


def test_a_file_names_its_class(detector, tmp_path):
    detector.save(tmp_path / "d")
    with pytest.raises(ValueError, match=r"holds a PatchDFKDEDetector, not a DFKDEDetector"):
        DFKDEDetector.load(tmp_path / "d")
    DFKDEDetector(n_components=2).fit(TRAIN[:, 0, 0]).save(tmp_path / "rows")
    with pytest.raises(ValueError, match=r"holds a DFKDEDetector, not a PatchDFKDEDetector"):
        PatchDFKDEDetector.load(tmp_path / "rows")


def test_a_parameter_that_contradicts_the_fit_is_not_saved(tmp_path):
    detector = PatchDFKDEDetector(features=None).fit(TRAIN).set_params(normalization=1.0)
    with pytest.raises(ValueError, match=r"normalization=1\.0 was set after a fit with 0\.0"):
        detector.save(tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_pickles_and_clones_are_as_others(detector):
    again = pickle.loads(pickle.dumps(detector))
    np.testing.assert_array_equal(again.score_samples(NEW), detector.score_samples(NEW))
    assert clone(detector).get_params() == detector.get_params()
    assert not hasattr(clone(detector), "offset_")
    copy.deepcopy(detector)


# Of torch.export.load in torch 2.10 and 2.11.
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@pytest.mark.parametrize("normalization", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_module_and_its_exports_are_the_detector(normalization, dtype, tmp_path):
    detector = PatchDFKDEDetector(features=None, normalization=normalization).fit(TRAIN.astype(dtype))
    new = torch.from_numpy(DEFECT.astype(dtype))
    module = detector.to_torch()
    scores, maps = module.log_densities(new)
    np.testing.assert_allclose(maps, detector.anomaly_maps(DEFECT.astype(dtype), resolution="grid"), rtol=1e-6)
    np.testing.assert_allclose(module(new), detector.predict_proba(DEFECT.astype(dtype))[:, 0], rtol=1e-6)
    assert scores.dtype == new.dtype
    detector.to_pt2(tmp_path / "d.pt2", check=DEFECT.astype(dtype))
    *_, exported = torch.export.load(tmp_path / "d.pt2").module()(new)
    np.testing.assert_allclose(exported, maps, rtol=1e-4 if dtype == np.float32 else 1e-8)


def test_the_module_has_gradients_that_point_at_the_defect(detector):
    batch = torch.from_numpy(DEFECT[:2]).requires_grad_()
    detector.to_torch().log_densities(batch)[0].sum().backward()
    strength = batch.grad.abs().sum(3).reshape(2, -1)
    assert (strength.argmax(1) == 1 * 5 + 3).all()


def test_onnx_answers_with_a_map(tmp_path, of_images, detector):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    detector.to_onnx(tmp_path / "d.onnx", check=DEFECT)
    session = onnxruntime.InferenceSession(tmp_path / "d.onnx")
    names = [output.name for output in session.get_outputs()]
    assert names == ["log_density", "p_anomalous", "label", "log_density_map"]
    answers = dict(zip(names, session.run(None, {"features": DEFECT}), strict=True))
    expected = detector.anomaly_maps(DEFECT, resolution="grid")
    np.testing.assert_allclose(answers["log_density_map"], expected, rtol=1e-8)
    np.testing.assert_array_equal(answers["label"], detector.predict(DEFECT))
    with pytest.raises(ValueError, match=r"ScatteringFeatures\(\.\.\.\) cannot be exported"):
        of_images.to_onnx(tmp_path / "no.onnx")


def test_images_have_maps_of_their_own_size(of_images, textures):
    sizes = [(128, 128), (64, 96), (31, 200)]
    images = [textures.X_test[0], np.zeros(sizes[1], np.uint8), np.full(sizes[2], 200, np.uint8)]
    maps = of_images.anomaly_maps(images)
    assert [of_image.shape for of_image in maps] == sizes
    grid = of_images.anomaly_maps(images, resolution="grid")
    # Constant regions of a map stay what they are: interpolation and smoothing are averages.
    for of_image, of_grid in zip(maps, grid, strict=True):
        assert of_grid.min() - 1e-3 <= of_image.min() <= of_image.max() <= of_grid.max() + 1e-3


def test_a_map_of_an_image_is_interpolated_and_smoothed(of_images, textures):
    grid = of_images.anomaly_maps(textures.X_test[:1], resolution="grid")[0].astype(np.float64)
    # A slow bilinear interpolation at the centres of pixels, to eight times the grid: 128 pixels.
    places = np.clip((np.arange(128) + 0.5) / 8 - 0.5, 0, 15)
    low = np.minimum(places.astype(int), 14)
    share = places - low
    rows = grid[low] * (1 - share)[:, None] + grid[low + 1] * share[:, None]
    fine = rows[:, low] * (1 - share) + rows[:, low + 1] * share
    expected = gaussian_filter(fine, 2.0, mode="nearest")
    np.testing.assert_allclose(of_images.anomaly_maps(textures.X_test[:1])[0], expected, rtol=1e-4, atol=1e-4)


def test_one_pass_through_the_extractor_gives_scores_and_maps(of_images, textures, monkeypatch):
    passes = []
    transform = ScatteringFeatures.transform
    monkeypatch.setattr(ScatteringFeatures, "transform", lambda self, X: passes.append(len(X)) or transform(self, X))
    of_images.assess_with_maps(textures.X_test)
    assert passes == [20]


def test_flips_average_the_features_of_mirrored_images(textures):
    extractor = ScatteringFeatures(pooling=None)
    flipped = PatchDFKDEDetector(extractor, flips="all").fit(textures.X_train)
    plain = extractor.fit_transform(textures.X_train).astype(np.float64)
    flips = [np.flip(extractor.transform(np.flip(textures.X_train, axes)), axes) for axes in ((1,), (2,), (1, 2))]
    average = np.mean([plain, *flips], axis=0).astype(np.float32)
    expected = PatchDFKDEDetector(features=None).fit(average)
    np.testing.assert_allclose(flipped.calibration_scores_, expected.calibration_scores_, rtol=1e-5)
    with pytest.raises(ValueError, match=r"flips='all' takes several passes"):
        flipped.to_torch()


def test_a_network_gives_maps(textures):
    network = TimmFeatures("test_resnet", pooling=None, pretrained=False, random_state=0, image_size=64)
    detector = PatchDFKDEDetector(network).fit(textures.X_train)
    assert detector.features_.layers_ == ["layer2", "layer3"]
    assert detector.anomaly_maps(textures.X_test)[0].shape == (128, 128)
    cropped = TimmFeatures("test_resnet", pooling=None, pretrained=False, random_state=0, crop="center", image_size=64)
    detector = PatchDFKDEDetector(cropped).fit(textures.X_train)
    with pytest.raises(ValueError, match=r"resolution='image' needs features of whole images[\s\S]*crop='squash'"):
        detector.anomaly_maps(textures.X_test)
    assert detector.anomaly_maps(textures.X_test, resolution="grid").shape[1:] == detector.grid_shape_


def test_it_composes_with_scikit_learn(textures):
    pipeline = make_pipeline(ScatteringFeatures(pooling=None), PatchDFKDEDetector(features=None))
    labels = pipeline.fit(textures.X_train).predict(textures.X_test)
    direct = PatchDFKDEDetector(ScatteringFeatures(pooling=None)).fit(textures.X_train).predict(textures.X_test)
    np.testing.assert_array_equal(labels, direct)
    search = GridSearchCV(PatchDFKDEDetector(features=None), {"pooled_share": [0.0, 0.3, 1.0]}, cv=3).fit(TRAIN)
    assert search.best_params_["pooled_share"] > 0
    y = np.array([0] * 60 + [1] * 20)
    both = np.concatenate([TRAIN, DEFECT])
    classifier = AnomalyClassifier(PatchDFKDEDetector(features=None)).fit(both, y)
    assert classifier.score(both, y) > 0.9


def nan_at(i):
    bad = TRAIN.copy()
    bad[i, 0, 0, 0] = np.nan
    return bad


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (TRAIN[:2], "2 sample.*minimum of 3"),
        (TRAIN[:1], "1 sample.*minimum of 3"),
        (np.ones((5, 4, 4, 2)), "do not differ"),
        (TRAIN[0], r"features at positions \(n_images, h, w, C\).*shape \(4, 5, 6\)"),
        (TRAIN[:, :0], r"got ndarray of shape \(60, 0, 5, 6\)"),
        (nan_at(3), "contains NaN"),
        (["a.png", "b.png"], r"got list.*TimmFeatures\(pooling=None\)"),
    ],
)
def test_what_is_no_features_is_refused(X, message):
    with pytest.raises(ValueError, match=message):
        PatchDFKDEDetector(features=None).fit(X)


def test_another_grid_is_refused(detector):
    with pytest.raises(ValueError, match=r"5 x 4 positions, and the detector was fitted on 4 x 5"):
        detector.predict(NEW.transpose(0, 2, 1, 3))
    with pytest.raises(ValueError, match=r"1 x 1 positions.*\(n_images, 4, 5, 6\) are needed"):
        detector.predict(NEW.reshape(20, -1))
    with pytest.raises(ValueError, match="features"):
        detector.predict(NEW[..., :3])
    with pytest.raises(ValueError, match="0 sample"):
        detector.predict(NEW[:0])
    with pytest.raises(ValueError, match=r"resolution='image', but X holds features"):
        detector.anomaly_maps(NEW)
    with pytest.raises(ValueError, match=r"resolution='pixels'\. Allowed"):
        detector.anomaly_maps(NEW, resolution="pixels")
    with pytest.raises(NotFittedError):
        PatchDFKDEDetector().predict(NEW)


def test_flips_are_those_of_the_fit(textures, tmp_path):
    detector = PatchDFKDEDetector(ScatteringFeatures(scales=2, image_size=32, pooling=None), flips="all")
    expected = detector.fit(textures.X_train).score_samples(textures.X_test)
    np.testing.assert_array_equal(detector.set_params(flips=None).score_samples(textures.X_test), expected)
    with pytest.raises(ValueError, match=r"flips=None was set after the fit, which had flips='all'\."):
        detector.save(tmp_path / "model")
    detector.set_params(flips="all").save(tmp_path / "model")
    np.testing.assert_array_equal(PatchDFKDEDetector.load(tmp_path / "model").score_samples(textures.X_test), expected)


def test_scores_are_means_of_as_many_positions_as_in_the_fit(tmp_path):
    detector = PatchDFKDEDetector(None, n_lowest=2).fit(TRAIN)
    expected = detector.score_samples(TRAIN)
    np.testing.assert_array_equal(detector.set_params(n_lowest=1).score_samples(TRAIN), expected)
    with pytest.raises(ValueError, match=r"n_lowest=1 was set after a fit with 2\. Fit again, or set it back"):
        detector.save(tmp_path / "model")
    detector.set_params(n_lowest=2).save(tmp_path / "model")
    np.testing.assert_array_equal(PatchDFKDEDetector.load(tmp_path / "model").score_samples(TRAIN), expected)


def test_flips_need_images(textures):
    with pytest.raises(ValueError, match="with pooling=None, whose features can be flipped back"):
        PatchDFKDEDetector(ScatteringFeatures(), flips="all").fit(textures.X_train)
    with pytest.raises(ValueError, match="flips='all' needs images, and X holds features"):
        PatchDFKDEDetector(features=None, flips="all").fit(TRAIN)


def test_pooled_features_are_refused_by_their_own_detector(textures):
    with pytest.raises(ValueError, match=r"PatchDFKDEDetector"):
        DFKDEDetector(ScatteringFeatures(pooling=None)).fit(textures.X_train)
