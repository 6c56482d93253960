"""DfkdeModel: the original's formulas written out, the detector's numbers, and weights of anomalib."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from dfkde_sklearn import DFKDEDetector, ScatteringFeatures, TimmFeatures
from dfkde_sklearn._deploy.model import DfkdeModel
from dfkde_sklearn._features import backbones


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tiny networks spend their time on waking threads."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def rows(n, width=20, seed=0, dtype=np.float64):
    mixing = np.random.default_rng(1).normal(size=(width, width)) * np.logspace(0, -1, width)
    return (np.random.default_rng(seed).normal(size=(n, width)) @ mixing + 3.0).astype(dtype)


def images(n, seed=0, size=64):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def pictures(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 70, 60, 3), dtype=np.uint8)


def slow_log_density(X, new, d, pre_processing):
    """The original's method in float64, row by row; for "norm", training rows and new rows alike."""
    mean = X.mean(0)
    W = np.linalg.svd(X - mean, full_matrices=False)[2][:d].T
    Z, z = (X - mean) @ W, (new - mean) @ W
    if pre_processing == "scale":
        M = max(math.sqrt((row**2).sum()) for row in Z)
        Z, z = Z / M, z / M
    else:
        Z, z = (np.array([row / math.sqrt((row**2).sum()) for row in table]) for table in (Z, z))
    h = len(X) ** (-1 / (d + 4))
    T = np.linalg.cholesky(np.linalg.inv(np.cov(Z.T).reshape(d, d)) / h**2)
    scores = []
    for row in z:
        exponents = np.array([-(((row - kernel) @ T) ** 2).sum() / 2 for kernel in Z])
        top = exponents.max()
        scores.append(top + math.log(np.exp(exponents - top).mean()))
    return np.array(scores) + np.log(np.diag(T)).sum() - d / 2 * math.log(2 * math.pi)


def on_features(X, **parameters):
    model = DfkdeModel([], None, **parameters)
    assert model.fit([torch.from_numpy(X)])
    return model


# ---- the original's formulas


@pytest.mark.parametrize("pre_processing", ["scale", "norm"])
@pytest.mark.parametrize(("n", "width", "d"), [(60, 20, 5), (40, 90, 8), (30, 3, 2)])
def test_scores_are_the_originals_formula(pre_processing, n, width, d):
    X, new = rows(n, width), np.concatenate([rows(8, width, seed=2), 1e3 * rows(2, width, seed=3)])
    expected = slow_log_density(X, new, d, pre_processing)
    model = on_features(X, n_comps=d, pre_processing=pre_processing)
    np.testing.assert_allclose(model.compute_kde_scores(torch.from_numpy(new), True), expected, rtol=1e-9)
    detector = DFKDEDetector.original(n_components=d, scaling=pre_processing).fit(X)
    np.testing.assert_allclose(detector.score_samples(new), expected, rtol=1e-9)
    traced = model.density.traceable_log_density(torch.from_numpy(new))
    np.testing.assert_allclose(traced, expected, rtol=1e-9)


@pytest.mark.parametrize("pre_processing", ["scale", "norm"])
def test_the_density_is_the_exponential_of_its_log(pre_processing):
    X = rows(50)
    model = on_features(X, n_comps=3, pre_processing=pre_processing)
    x = torch.from_numpy(X)
    np.testing.assert_allclose(model.compute_kde_scores(x), model.compute_kde_scores(x, True).exp(), rtol=1e-12)


def test_probabilities_are_the_originals_curve():
    model = DfkdeModel([], None, threshold_steepness=0.3, threshold_offset=4.0)
    scores = torch.linspace(-30, 30, 13, dtype=torch.float64)
    np.testing.assert_allclose(
        model.compute_probabilities(scores), 1 / (1 + torch.exp(0.3 * (scores - 4.0))), rtol=1e-12
    )
    far = model.compute_probabilities(torch.tensor([-1e30, 1e30, -torch.inf]))
    assert far.tolist() == [1.0, 0.0, 1.0]


def test_predict_and_forward_are_the_chain_of_the_methods():
    model = DfkdeModel(["layer3"], "test_resnet", pre_trained=False, n_comps=4)
    batch = images(8)
    features = model.get_features(batch)
    assert model.fit([features[:3], features[3:]])
    expected = model.compute_probabilities(model.compute_kde_scores(features, as_log_likelihood=True))
    assert torch.equal(model.predict(features), expected)
    assert torch.equal(model(batch), expected)
    assert torch.equal(model(batch[2:3]), expected[2:3]) or torch.allclose(model(batch[2:3]), expected[2:3], atol=1e-6)


def test_pre_process_divides_by_the_largest_norm_of_training_or_by_each_rows_own():
    stack = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    scale = DfkdeModel([], None)
    divided, length = scale.pre_process(stack)
    assert (divided.tolist(), length.item()) == ((stack / 5).tolist(), 5.0)
    assert scale.pre_process(stack, torch.tensor(2.0))[0].tolist() == (stack / 2).tolist()
    unit, length = DfkdeModel([], None, pre_processing="norm").pre_process(stack)
    np.testing.assert_allclose(unit, [[0.6, 0.8], [0, 1]], rtol=1e-6)
    assert length.item() == 5.0
    assert stack.tolist() == [[3.0, 4.0], [0.0, 2.0]]


def test_max_length_is_the_largest_norm_of_training():
    X = rows(40)
    model = on_features(X, n_comps=4)
    W = np.linalg.svd(X - X.mean(0), full_matrices=False)[2][:4].T
    assert model.max_length.item() == pytest.approx(np.linalg.norm((X - X.mean(0)) @ W, axis=1).max())


# ---- what the original got wrong


def test_layers_are_concatenated_for_each_image():
    model = DfkdeModel(["layer2", "layer4"], "test_resnet", pre_trained=False)
    batch = images(3)
    seen = {}
    for name in ("layer2", "layer4"):
        module = model.feature_extractor.network.get_submodule(name)
        module.register_forward_hook(lambda _m, _a, out, name=name: seen.update({name: out.mean((2, 3))}))
    # layer4 ends the forward pass, so that its hook comes first: run the network whole.
    features = model.get_features(batch)
    with torch.no_grad():
        model.feature_extractor.network(batch)
    np.testing.assert_allclose(features, torch.cat([seen["layer2"], seen["layer4"]], 1), rtol=1e-5, atol=1e-6)
    assert not features.requires_grad


def test_nothing_that_is_handed_in_is_written_to():
    X = torch.from_numpy(rows(40))
    before = X.clone()
    model = DfkdeModel([], None, n_comps=4, pre_processing="norm")
    model.fit([X[:20], X[20:]])
    first = model.compute_kde_scores(X)
    assert torch.equal(model.compute_kde_scores(X), first)
    assert torch.equal(X, before)


def test_far_outliers_keep_their_order_in_float32():
    X = rows(100, 60, dtype=np.float32)
    model = on_features(X, n_comps=48)
    far = torch.from_numpy(X[:1] + np.array([[10.0], [1e2], [1e4], [1e6]], np.float32))
    scores = model.compute_kde_scores(far, as_log_likelihood=True)
    assert torch.isfinite(scores).all()
    assert (scores.diff() < 0).all()


def test_a_subset_is_the_same_each_time_and_leaves_the_global_generator_alone():
    X = torch.from_numpy(rows(90))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    models = [on_features(X.numpy(), n_comps=4, filter_count=50) for _ in range(2)]
    assert torch.equal(torch.rand(3), expected)
    assert len(models[0].density.kernel_centers) == 50
    assert torch.equal(models[0].compute_kde_scores(X), models[1].compute_kde_scores(X))


@pytest.mark.parametrize("filter_count", [0, None])
def test_no_filter_count_takes_all_rows(filter_count):
    assert len(on_features(rows(90), n_comps=4, filter_count=filter_count).density.kernel_centers) == 90


def test_fewer_rows_than_components_are_no_model():
    model = DfkdeModel([], None, n_comps=16)
    assert model.fit([torch.from_numpy(rows(15))]) is False
    with pytest.raises(ValueError, match="not fitted"):
        model.predict(torch.from_numpy(rows(2)))
    assert model.fit([torch.from_numpy(rows(16))]) is True
    assert torch.isfinite(model.predict(torch.from_numpy(rows(5, seed=1)))).all()


def test_a_share_of_variance_is_a_share():
    X = rows(80)
    variances = np.linalg.svd(X - X.mean(0), compute_uv=False) ** 2
    expected = int((np.cumsum(variances) / variances.sum() < 0.95).sum()) + 1
    assert len(on_features(X, n_comps=0.95).density.components) == expected


def test_single_rows_and_one_matrix_are_embeddings_too():
    X = torch.from_numpy(rows(20))
    parts = [X[:10], X[10], X[11:]]  # a batch of one, squeezed
    models = [DfkdeModel([], None, n_comps=3) for _ in range(2)]
    assert models[0].fit(parts)
    assert models[1].fit(X)
    assert torch.equal(models[0].predict(X), models[1].predict(X))


# ---- a torch module


@pytest.fixture(scope="module")
def fitted():
    model = DfkdeModel(["layer1", "layer3"], "test_resnet", pre_trained=False, n_comps=4, threshold_offset=30.0)
    model.fit([model.get_features(images(12))])
    return model


def test_a_state_dict_makes_a_fresh_model_the_same(fitted):
    other = DfkdeModel(["layer1", "layer3"], "test_resnet", pre_trained=False, pre_processing="norm")
    stream = io.BytesIO()
    torch.save(fitted.state_dict(), stream)
    stream.seek(0)
    other.load_state_dict(torch.load(stream, weights_only=True))
    assert (other.pre_processing, other.threshold_offset) == ("scale", 30.0)
    assert torch.equal(other(images(3, 1)), fitted(images(3, 1)))
    other.load_state_dict(DfkdeModel(["layer1", "layer3"], "test_resnet", pre_trained=False).state_dict())
    assert not other.density.is_fitted


def test_a_state_dict_that_does_not_fit_together_is_refused_and_changes_nothing(fitted):
    model = copy.deepcopy(fitted)
    state = {key.removeprefix("density."): value for key, value in fitted.state_dict().items() if "density." in key}
    for name, wrong in {
        "kernel_centers": state["kernel_centers"][:, :2],
        "components": state["components"].float(),
        "whitening": state["whitening"].flatten(),
        "scaling_code": torch.tensor(7),
        "residual": torch.ones(1, dtype=torch.float64),
    }.items():
        with pytest.raises(RuntimeError, match=name):
            model.density.load_state_dict(state | {name: wrong})
        with pytest.raises(RuntimeError, match=name):
            model.density.load_state_dict({key: value for key, value in state.items() if key != name})
    assert torch.equal(model(images(3)), fitted(images(3)))
    with pytest.raises(RuntimeError, match=r"scaling_code has dtype torch\.float64; allowed: torch\.int64"):
        model.density.load_state_dict(state | {"scaling_code": torch.tensor(1.0, dtype=torch.float64)})


def test_pickles_and_copies_score_the_same(fitted):
    expected = fitted(images(3, 1))
    for twin in (copy.deepcopy(fitted), pickle.loads(pickle.dumps(fitted))):
        assert torch.equal(twin(images(3, 1)), expected)


def test_halving_the_backbone_or_all_leaves_the_density_in_float64(fitted):
    for part in ("feature_extractor", ""):
        model = copy.deepcopy(fitted)
        model.get_submodule(part).bfloat16()
        assert model.density.components.dtype == torch.float64
        features = model.get_features(images(3, 1))
        np.testing.assert_allclose(features, fitted.get_features(images(3, 1)), rtol=0.05, atol=0.05)
        assert torch.equal(fitted.predict(features), model.predict(features))


def test_training_mode_does_not_reach_the_backbone(fitted):
    model = copy.deepcopy(fitted)
    expected = model(images(3))
    assert torch.equal(model.train()(images(3)), expected)


def test_the_buffers_follow_to_another_device(fitted):
    model = copy.deepcopy(fitted).to("meta")
    assert {buffer.device.type for buffer in model.buffers()} == {"meta"}


def test_gradients_reach_the_features():
    model = on_features(rows(40), n_comps=4)
    x = torch.from_numpy(rows(3, seed=2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: model.compute_kde_scores(t, as_log_likelihood=True), x)


@pytest.mark.parametrize("scaling", ["scale", "norm", None])
@pytest.mark.parametrize("residual", [None, "gaussian", "box"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_traceable_density_is_score_samples(scaling, residual, dtype):
    detector = DFKDEDetector(n_components=5, scaling=scaling, residual=residual).fit(rows(80, dtype=dtype))
    new = np.concatenate([rows(20, seed=2), rows(3, seed=3) * 1e2, rows(3, seed=3) * 1e6]).astype(dtype)
    traced = detector.to_torch().density.traceable_log_density(torch.from_numpy(new))
    np.testing.assert_allclose(
        traced, detector.score_samples(new), rtol=1e-10 if dtype == np.float64 else 2e-6, atol=2e-5
    )


def test_one_image_and_no_image_are_batches(fitted):
    assert fitted(images(1)).shape == (1,)
    assert fitted.predict(fitted.get_features(images(2))[:0]).shape == (0,)


# ---- to and from the detector


@pytest.mark.parametrize(
    "extractor",
    [
        TimmFeatures("test_resnet", layers=["layer1", "layer3"], pooling="max", pretrained=False, random_state=0),
        TimmFeatures("test_vit", pretrained=False, random_state=0, image_size=64),
        ScatteringFeatures(scales=2, orientations=4, image_size=32),
    ],
    ids=["layers", "embedding", "scattering"],
)
def test_a_detector_of_images_and_its_module_give_the_same_probabilities(extractor):
    detector = DFKDEDetector(extractor, n_components=4, residual="box").fit(pictures(14))
    model = detector.to_torch()
    new = pictures(5, seed=1)
    expected = detector.predict_proba(new)[:, 0]
    np.testing.assert_allclose(model(model.read_images(new)), expected, atol=1e-6)
    back = DFKDEDetector.from_torch(model)
    np.testing.assert_allclose(back.predict_proba(new)[:, 0], expected, atol=1e-6)
    np.testing.assert_array_equal(back.predict(new), detector.predict(new))
    np.testing.assert_array_equal(back.p_values(new), detector.p_values(new))
    assert back.residual == "box"
    assert back.features.get_params() == detector.features_.get_params()


@pytest.mark.parametrize("scaling", ["scale", "norm", None])
@pytest.mark.parametrize("contamination", ["auto", 0.1])
def test_a_detector_of_features_comes_back_from_its_module(scaling, contamination):
    X, new = rows(60), rows(10, seed=2)
    detector = DFKDEDetector.original(
        n_components=5, scaling=scaling, contamination=contamination, bandwidth="loo"
    ).fit(X)
    model = detector.to_torch()
    np.testing.assert_allclose(model(torch.from_numpy(new)), detector.predict_proba(new)[:, 0], rtol=1e-12)
    back = DFKDEDetector.from_torch(model)
    for method in ("predict", "score_samples", "decision_function", "predict_proba", "p_values", "score"):
        np.testing.assert_array_equal(getattr(back, method)(new), getattr(detector, method)(new))
    np.testing.assert_array_equal(back.singular_values_, detector.singular_values_)


def test_a_module_is_fitted_as_a_detector_is():
    X, new = rows(60), rows(10, seed=2)
    detector = DFKDEDetector.from_torch(on_features(X, n_comps=5, threshold_offset=2.0))
    same = DFKDEDetector.original(n_components=5, threshold_offset=2.0).fit(X)
    np.testing.assert_allclose(detector.predict_proba(new), same.predict_proba(new), rtol=1e-12)
    np.testing.assert_allclose(detector.calibration_scores_, same.calibration_scores_, rtol=1e-12)
    assert detector.get_params() | {"features": "auto"} == same.get_params()


def test_the_module_and_the_detector_share_nothing(fitted):
    model = copy.deepcopy(fitted)
    detector = DFKDEDetector.from_torch(model)
    expected = detector.score_samples(pictures(3))
    with torch.no_grad():
        for parameter in model.feature_extractor.parameters():
            parameter.zero_()
    np.testing.assert_array_equal(detector.score_samples(pictures(3)), expected)


def test_changed_weights_go_into_the_detector(fitted):
    model = copy.deepcopy(fitted)
    with torch.no_grad():
        for parameter in model.feature_extractor.parameters():
            parameter.mul_(1.01)
    detector = DFKDEDetector.from_torch(model)
    assert isinstance(detector.features_.backbone, nn.Module)
    batch = pictures(3)
    np.testing.assert_allclose(detector.predict_proba(batch)[:, 0], model(model.read_images(batch)), atol=1e-6)


@pytest.mark.parametrize("n_components", [np.int64(3), np.float32(0.5)])
def test_numpy_numbers_of_components_go_into_the_module(n_components):
    X = rows(60)
    model = DFKDEDetector.original(n_components=n_components).fit(X).to_torch()
    assert model.n_components == n_components
    assert model.fit([torch.from_numpy(X)])


def test_a_parameter_of_the_features_that_is_set_does_not_change_a_detector_from_a_module():
    extractor = ScatteringFeatures(scales=2, orientations=4, image_size=32)
    model = DFKDEDetector.original(extractor, n_components=3).fit(pictures(12)).to_torch()
    detector = DFKDEDetector.from_torch(model)
    expected = detector.score_samples(pictures(3, 1))
    detector.set_params(features__orientations=6)
    np.testing.assert_array_equal(detector.score_samples(pictures(3, 1)), expected)


def test_what_cannot_be_taken_is_refused():
    with pytest.raises(TypeError, match="from_anomalib"):
        DFKDEDetector.from_torch(nn.Identity())
    with pytest.raises(ValueError, match="not fitted"):
        DFKDEDetector.from_torch(DfkdeModel([], None))
    with pytest.raises(ValueError, match=r"layer9.*Available: .*'layer1'"):
        DfkdeModel(["layer9"], "test_resnet", pre_trained=False)
    with pytest.raises(ValueError, match="pre_processing='unit'"):
        DfkdeModel([], None, pre_processing="unit")
    with pytest.raises(ValueError, match="n_comps=0"):
        DfkdeModel([], None, n_comps=0)
    with pytest.raises(ValueError, match="filter_count=1"):
        DfkdeModel([], None, filter_count=1)
    model = on_features(rows(30), n_comps=3)
    with pytest.raises(ValueError, match=r"fitted on 20 features"):
        model(torch.zeros(3, 19))
    with pytest.raises(ValueError, match="NaN"):
        model(torch.full((3, 20), torch.nan))
    with pytest.raises(ValueError, match="takes feature rows"):
        model.read_images(pictures(1))
    with pytest.raises(ValueError, match="do not differ"):
        model.fit([torch.ones(30, 20)])


def test_an_image_without_a_batch_is_refused(fitted):
    with pytest.raises(ValueError, match=r"image\[None\]"):
        fitted(images(1)[0])


# ---- weights of anomalib


def anomalib_state(X, d, pre_processing, prefix="", dtype=torch.float32):
    """What the original's fit leaves in its buffers, by its formulas, rounded as it rounds; with its bias of "norm"."""
    X = torch.from_numpy(X)
    mean = X.mean(0)
    W = torch.linalg.svd(X - mean, full_matrices=False)[2][:d].T
    Z = (X - mean) @ W
    max_length = Z.norm(dim=1).max()
    Z = Z / Z.norm(dim=1, keepdim=True) if pre_processing == "norm" else Z / max_length
    centred = Z - Z.mean(0)
    h = len(X) ** (-1 / (d + 4))
    T = torch.linalg.cholesky(torch.linalg.inv(centred.T @ centred / (len(X) - 1)) / h**2)
    state = {
        "pca_model.singular_vectors": W,
        "pca_model.mean": mean,
        "pca_model.num_components": torch.tensor([d]),
        "kde_model.bw_transform": T,
        "kde_model.dataset": centred @ T,
        "kde_model.norm": T.diagonal().prod() * (2 * math.pi) ** (-d / 2),
        "max_length": max_length,
    }
    return {prefix + key: value.to(dtype) for key, value in state.items()}


def anomalib_log_density(state, new, pre_processing):
    """The original's formula in float64, of the weights as they are."""
    state = {key: value.double().numpy() for key, value in state.items()}
    z = (new - state["pca_model.mean"]) @ state["pca_model.singular_vectors"]
    z = z / (state["max_length"] if pre_processing == "scale" else np.linalg.norm(z, axis=1, keepdims=True))
    T = state["kde_model.bw_transform"]
    densities = [
        np.mean(np.exp(-((state["kde_model.dataset"] - row @ T) ** 2).sum(1).astype(np.longdouble) / 2)) for row in z
    ]
    d = len(T)
    return (np.log(densities) + np.log(np.diag(T)).sum() - d / 2 * math.log(2 * math.pi)).astype(float)


@pytest.mark.parametrize("pre_processing", ["scale", "norm"])
@pytest.mark.parametrize("prefix", ["", "model.", "model.classifier.", "module.model.model.classifier."])
def test_weights_of_anomalib_score_by_its_formula(pre_processing, prefix, tmp_path):
    X, new = rows(70), rows(15, seed=2)
    state = anomalib_state(X, 6, pre_processing)
    path = tmp_path / "model.ckpt"
    torch.save({"epoch": 1, "state_dict": {prefix + key: value for key, value in state.items()}}, path)
    model = DfkdeModel.from_anomalib(path)
    assert model.pre_processing == pre_processing
    scores = model.compute_kde_scores(torch.from_numpy(new), as_log_likelihood=True)
    np.testing.assert_allclose(scores, anomalib_log_density(state, new, pre_processing), rtol=1e-9)
    detector = DFKDEDetector.from_torch(model)
    np.testing.assert_allclose(detector.score_samples(new), scores, rtol=1e-12)
    assert detector.offset_ == 12.0
    assert len(detector.calibration_scores_) == 70


def test_weights_of_anomalib_are_the_models_own_but_for_rounding():
    X, new = rows(70), torch.from_numpy(rows(15, seed=2))
    model = DfkdeModel.from_anomalib(anomalib_state(X, 6, "scale"))
    own = on_features(X, n_comps=6)
    np.testing.assert_allclose(model.predict(new), own.predict(new), rtol=1e-4)
    np.testing.assert_allclose(
        np.sort(model.density.singular_values)[::-1], own.density.singular_values.numpy(), rtol=1e-3
    )


def test_the_backbone_comes_with_the_weights_of_anomalib():
    source = DfkdeModel(["layer2"], "test_resnet", pre_trained=False, n_comps=4)
    with torch.no_grad():
        for parameter in source.feature_extractor.parameters():
            parameter.mul_(1.1)
    features = source.get_features(images(12)).double().numpy()
    network = source.feature_extractor.network.state_dict()
    # anomalib's network ends after its last layer, and is wrapped twice.
    ends = ("layer3", "layer4", "fc", "head")
    state = anomalib_state(features, 4, "scale", "model.classifier.") | {
        f"model.feature_extractor.feature_extractor.{key}": value
        for key, value in network.items()
        if not key.startswith(ends)
    }
    model = DfkdeModel.from_anomalib(state, ["layer2"], "test_resnet")
    assert torch.equal(model.get_features(images(3, 1)), source.get_features(images(3, 1)))
    with pytest.raises(ValueError, match="not of this backbone"):
        DfkdeModel.from_anomalib(state, ["blocks.0"], "test_vit")
    short = {key: value for key, value in state.items() if "layer1" not in key}
    with pytest.raises(ValueError, match=r"lacks .*layer1"):
        DfkdeModel.from_anomalib(short, ["layer2"], "test_resnet")
    bare = {key: value for key, value in state.items() if "feature_extractor" not in key}
    with pytest.raises(ValueError, match="hold no backbone"):
        DfkdeModel.from_anomalib(bare, ["layer2"], "test_resnet")


class _Payload:
    def __reduce__(self):
        return (pytest.fail, ("code from the file was run",))


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": anomalib_state(rows(70), 6, "scale"), "hyper_parameters": _Payload()}, path)
    with pytest.raises(ValueError, match="would run code"):
        DfkdeModel.from_anomalib(path)


def test_weights_that_are_not_of_a_fitted_dfkde_are_refused(tmp_path):
    state = anomalib_state(rows(70), 6, "scale")
    empty = {key: torch.empty(0) for key in state}
    for wrong, message in [
        ({"model.memory_bank": torch.ones(3)}, r"not that of one DFKDE.*model\.memory_bank"),
        (state | {"other." + key: value for key, value in state.items()}, "2 such models"),
        (empty, "was not fitted"),
        (state | {"pca_model.mean": torch.ones(7)}, "do not fit one another"),
        (state | {"kde_model.dataset": state["kde_model.dataset"] * torch.nan}, "NaN"),
        (state | {"kde_model.norm": state["kde_model.norm"] * 2}, "does not belong"),
        (state | {"kde_model.dataset": state["kde_model.dataset"] * 3}, "neither of largest length"),
        (state | {"max_length": torch.tensor(-1.0)}, "not positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            DfkdeModel.from_anomalib(wrong)
    path = tmp_path / "other.pt"
    for other in ([1, 2], torch.ones(3), {0: torch.ones(3)}):
        torch.save(other, path)
        with pytest.raises(ValueError, match=r"not that of one DFKDE.*its names are none"):
            DfkdeModel.from_anomalib(path)
    path = tmp_path / "broken.ckpt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"cannot be read|would run code"):
        DfkdeModel.from_anomalib(path)


def test_a_normaliser_that_overflowed_float32_does_not_matter():
    X, new = rows(200, 60), rows(5, 60, seed=2)
    state = anomalib_state(X, 48, "scale")
    assert torch.isinf(state["kde_model.norm"])
    scores = DfkdeModel.from_anomalib(state).compute_kde_scores(torch.from_numpy(new), as_log_likelihood=True)
    np.testing.assert_allclose(scores, anomalib_log_density(state, new, "scale"), rtol=1e-9)


def test_the_original_in_float32_loses_what_the_log_keeps():
    """The note in the documentation: far rows tie at the original's floor, and its "norm" is off by the mean."""
    X = rows(70, dtype=np.float32)
    state = anomalib_state(X, 6, "scale")
    new = torch.from_numpy(X[:2] + np.array([[30.0], [300.0]], np.float32))
    z = (new - state["pca_model.mean"]) @ state["pca_model.singular_vectors"] / state["max_length"]
    squares = torch.stack(
        [((state["kde_model.dataset"] - row @ state["kde_model.bw_transform"]) ** 2).sum(1) for row in z]
    )
    original = torch.log((torch.exp(-squares / 2) * state["kde_model.norm"]).mean(1) + 1e-300)
    assert original.tolist() == [-math.inf, -math.inf]
    scores = DfkdeModel.from_anomalib(state).compute_kde_scores(new, as_log_likelihood=True)
    assert -math.inf < scores[1] < scores[0]


def test_nothing_is_left_loaded_for_a_module():
    before = dict(backbones._loaded)
    DfkdeModel(["0"], nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    assert dict(backbones._loaded) == before


def test_the_order_of_newer_versions_of_anomalib_is_an_error_that_says_so():
    with pytest.raises(TypeError, match=r"since 1\.0"):
        DfkdeModel("test_resnet", ["layer3"], False)
    with pytest.raises(TypeError, match=r"layers=\['layer4'\]"):
        DfkdeModel("layer3", "test_resnet", False)
