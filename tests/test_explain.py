"""What a log density is made of, against slow loops; regions of maps."""

import numpy as np
import pytest
from sklearn.exceptions import NotFittedError
from sklearn.utils._param_validation import InvalidParameterError

from dfkde_sklearn import DFKDEDetector, PatchDFKDEDetector, ScatteringFeatures, TimmFeatures
from dfkde_sklearn._maps import regions_of
from dfkde_sklearn.datasets import make_textures

SETTINGS = [{}, {"residual": None}, {"residual": "gaussian"}, {"scaling": "norm"}, {"scaling": None, "n_components": 4}]


def rows(n, seed=0, dtype=np.float64, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=(n, 20)) / np.arange(1, 21)).astype(dtype)


@pytest.mark.parametrize("parameters", SETTINGS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_terms_add_up_to_the_score(parameters, dtype):
    detector = DFKDEDetector(**parameters).fit(rows(120, dtype=dtype))
    new = rows(7, 1, dtype, 2.0)
    explanation = detector.explain(new)
    np.testing.assert_allclose(explanation.log_density, detector.score_samples(new), rtol=1e-6)
    terms = explanation.axis_terms.sum(1) + explanation.residual_term
    np.testing.assert_allclose(terms + explanation.rest, explanation.log_density, atol=1e-10)
    assert (explanation.feature_gains >= 0).all()
    assert (explanation.axis_terms <= 0).all()
    assert (explanation.residual_term <= 0).all()


def test_shares_and_axis_terms_are_those_of_a_slow_loop():
    good = rows(60)
    detector = DFKDEDetector(n_components=3, residual=None).fit(good)
    new = rows(4, 1)
    explanation = detector.explain(new, n_kernels=60)
    # Whitened by the variances: the principal axes are uncorrelated.
    standard = detector.singular_values_ / np.sqrt(59)
    on_axes = [(X - detector.mean_) @ detector.components_.T / standard for X in (good, new)]
    np.testing.assert_allclose(explanation.deviations, on_axes[1], atol=1e-10)
    for i, z in enumerate(on_axes[1]):
        kernels = np.array([np.exp(-np.sum((z - center) ** 2) / (2 * detector.bandwidth_**2)) for center in on_axes[0]])
        shares = kernels / kernels.sum()
        order = np.argsort(-shares)
        np.testing.assert_array_equal(explanation.kernels[i][:5], order[:5])
        np.testing.assert_allclose(explanation.shares[i], shares[order], atol=1e-10)
        nearby = sum(share * center for share, center in zip(shares, on_axes[0], strict=True))
        # Up to a rotation, which whitening may add: their sum.
        np.testing.assert_allclose(
            explanation.axis_terms[i].sum(), -np.sum((z - nearby) ** 2) / (2 * detector.bandwidth_**2), atol=1e-10
        )


@pytest.mark.parametrize("parameters", SETTINGS)
def test_a_gain_is_what_the_best_value_of_the_feature_gives_with_the_same_shares(parameters):
    good = rows(60)
    detector = DFKDEDetector(**parameters).fit(good)
    new = rows(3, 1, scale=2.0)
    explanation = detector.explain(new, n_kernels=60)
    kernels = detector.kernel_centers_[explanation.kernels]
    nearby = (explanation.shares[:, :, None] * kernels).sum(1)

    def terms(x, i):
        """Return the sum of axis and residual terms of a row, with the kernels nearby of row i."""
        scaled = detector.components_ @ (x - detector.mean_)
        residual = np.sum((x - detector.mean_ - scaled @ detector.components_) ** 2)
        if detector.scaling == "scale":
            scaled = scaled / detector.max_length_
        elif detector.scaling == "norm":
            scaled = scaled / np.linalg.norm(scaled)
        else:
            scaled = scaled * detector._scale
        kernel_terms = np.sum((scaled @ detector._whitening - nearby[i]) ** 2) / detector.bandwidth_**2
        variance = detector._residual[0] / detector._scale**2 if len(detector._residual) else np.inf
        return -(kernel_terms + residual / variance) / 2

    for i, x in enumerate(new):
        np.testing.assert_allclose(
            terms(x, i), explanation.axis_terms[i].sum() + explanation.residual_term[i], atol=1e-8
        )
        for feature in (0, 7, 19):
            step = 1e-4
            unit = step * np.eye(20)[feature]
            before, now, after = (terms(x + k * unit, i) for k in (-1, 0, 1))
            slope, curvature = (after - before) / (2 * step), -(after - 2 * now + before) / step**2
            if detector.scaling == "norm":
                continue  # a parabola only to first order
            np.testing.assert_allclose(explanation.feature_gains[i, feature], slope**2 / (2 * curvature), rtol=1e-3)


def test_the_feature_at_fault_has_the_largest_gain_though_features_are_correlated():
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(4, 12))

    def parts(n):
        return rng.normal(size=(n, 4)) @ directions + 0.2 * rng.normal(size=(n, 12))

    good, new = parts(300), parts(120)
    at_fault = np.tile(np.arange(12), 10)
    new[np.arange(120), at_fault] += 2.5
    for parameters in ({}, {"n_components": 4}, {"n_components": 4, "residual": "gaussian"}, {"scaling": "norm"}):
        explanation = DFKDEDetector(**parameters).fit(good).explain(new)
        assert (explanation.feature_gains.argmax(1) == at_fault).mean() > 0.8


def test_layers_are_named():
    data = make_textures(n_train=30, n_test=3, image_size=32, random_state=0)
    layers = ["layer1", "layer2"]
    features = TimmFeatures("test_resnet", pretrained=False, layers=layers, image_size=32, random_state=0)
    detector = DFKDEDetector(features).fit(data.X_train)
    explanation = detector.explain(data.X_test)
    assert list(explanation.layer_terms) == layers
    np.testing.assert_allclose(
        sum(explanation.layer_terms.values()), explanation.axis_terms.sum(1) + explanation.residual_term, atol=1e-9
    )
    rows = detector.features_.transform(data.X_test)
    width = detector.features_.layer_widths_[0]
    rows[:, width:] += 3 * rows[:, width:].std(0)
    without = DFKDEDetector(None).fit(detector.features_.transform(data.X_train)).explain(rows)
    assert without.layer_terms == {}


def test_blocks_do_not_change_an_explanation(monkeypatch):
    detector = DFKDEDetector().fit(rows(80))
    whole = detector.explain(rows(11, 1))
    monkeypatch.setattr("dfkde_sklearn._density.explain._PAIRS", 160)
    for name, values in detector.explain(rows(11, 1))._asdict().items():
        if name != "layer_terms":
            np.testing.assert_allclose(values, getattr(whole, name), atol=1e-10)


def test_bad_input_to_explain_is_an_error():
    with pytest.raises(NotFittedError):
        DFKDEDetector().explain(rows(3))
    detector = DFKDEDetector().fit(rows(40))
    for n_kernels in (0, 1.5, "all"):
        with pytest.raises(InvalidParameterError, match="n_kernels"):
            detector.explain(rows(3), n_kernels=n_kernels)
    assert detector.explain(rows(3), n_kernels=1000).shares.shape == (3, 40)


def test_regions_are_those_of_a_slow_flood():
    of_image = np.random.default_rng(0).normal(size=(12, 15))
    regions = regions_of(of_image, -0.8, 3, 0.25)
    left = {(int(i), int(j)) for i, j in np.argwhere(of_image < -0.8)}
    expected = []
    while left:
        queue, found = [left.pop()], []
        while queue:
            i, j = queue.pop()
            found.append((i, j))
            near = {(i + a, j + b) for a in (-1, 0, 1) for b in (-1, 0, 1)} & left
            left -= near
            queue += near
        places = np.array(found)
        expected.append(
            (
                3,
                len(found),
                *places.min(0),
                *(places.max(0) + 1),
                *places.mean(0),
                of_image[tuple(places.T)].min(),
                0.25,
            )
        )
    expected.sort(key=lambda region: region[8])
    assert len(regions) > 3
    np.testing.assert_allclose(np.array(regions), np.array(expected, dtype=float))


def test_regions_of_images_lie_below_the_threshold_and_have_the_p_value_of_the_image():
    data = make_textures(n_train=40, n_test=6, image_size=64, anomaly_fraction=0.5, random_state=0)
    detector = PatchDFKDEDetector(ScatteringFeatures(image_size=64, pooling=None)).fit(data.X_train)
    assessment, maps = detector.assess_with_maps(data.X_test)
    regions = detector.regions(data.X_test)
    assert [region.image for region in regions] == sorted(region.image for region in regions)
    for i, of_image in enumerate(maps):
        of = [region for region in regions if region.image == i]
        assert sum(region.area for region in of) == (of_image < detector.map_offset_).sum()
        assert all(region.p_value == assessment.p_value[i] for region in of)
    grid = detector.regions(data.X_test, resolution="grid")
    assert max(region.bottom for region in grid) <= detector.grid_shape_[0]
