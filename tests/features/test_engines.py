"""Features by ONNX Runtime and OpenVINO, against those by torch."""

import builtins
import io
import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from torch import nn

from dfkde_sklearn import DFKDEDetector, PatchDFKDEDetector, TimmFeatures
from dfkde_sklearn._features import backbones
from dfkde_sklearn._features.engines import CompiledNetwork
from dfkde_sklearn._features.network import described_together
from dfkde_sklearn._features.optimized import difference

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

ENGINES = ["onnxruntime", "openvino"]
IMAGES = np.random.default_rng(0).integers(0, 256, (7, 48, 56, 3), np.uint8)


def tiny(engine, backbone="test_resnet", **parameters):
    """Return features of a tiny network with random weights."""
    parameters = {"pretrained": False, "random_state": 0, "device": "cpu", "image_size": 64} | parameters
    return TimmFeatures(backbone, engine=engine, **parameters)


def assert_close(found, expected):
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("backbone", "parameters"),
    [
        ("test_resnet", {}),
        ("test_resnet", {"layers": ["layer1", "layer3"], "batch_size": 3}),
        ("test_resnet", {"layers": ["layer3", "layer1"], "pooling": "gem"}),
        ("test_resnet", {"pooling": None}),
        ("test_resnet", {"pooling": None, "image_size": 96, "tile_size": 64}),
        ("test_efficientnet", {"layers": "blocks.2"}),
        ("test_vit", {"image_size": None, "layers": ["blocks.1", "blocks.3"]}),
        ("test_convnext", {"image_size": (64, 96)}),
    ],
)
def test_an_engine_gives_the_features_of_torch(engine, backbone, parameters):
    expected = tiny("torch", backbone, **parameters).fit_transform(IMAGES)
    features = tiny(engine, backbone, **parameters).fit(IMAGES)
    assert_close(features.transform(IMAGES), expected)
    assert_close(features.transform(IMAGES[:1]), expected[:1])
    assert features.engine_version_.count(".") >= 2


@pytest.mark.parametrize("engine", ENGINES)
def test_the_engine_computes_and_torch_does_not(engine, monkeypatch):
    features = tiny(engine).fit(IMAGES)
    expected = features.transform(IMAGES)
    monkeypatch.setattr(nn.Conv2d, "forward", None)
    np.testing.assert_array_equal(features.transform(IMAGES), expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_threads_of_a_user_get_their_own_results(engine):
    features = tiny(engine, layers="layer2").fit(IMAGES)
    images = np.random.default_rng(1).integers(0, 256, (24, 48, 56, 3), np.uint8)
    expected = features.transform(images)

    def describe(i):
        return np.concatenate([features.transform(images[[j]]) for j in range(i, 24, 4)])

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(describe, range(4)))
    for i in range(4):
        assert_close(found[i], expected[i::4])


def test_layers_in_the_cache_are_those_of_the_engine(tmp_path):
    torch_features = tiny("torch", layers=["layer1", "layer2"], cache=tmp_path)
    expected = torch_features.fit_transform(IMAGES)
    features = tiny("onnxruntime", layers=["layer1"], cache=tmp_path)
    first = features.fit_transform(IMAGES)
    assert_close(first, expected[:, :32])
    assert (first != expected[:, :32]).any()  # computed, not read
    # One layer is read and the other computed.
    both = clone(features).set_params(layers=["layer1", "layer2"]).fit_transform(IMAGES)
    np.testing.assert_array_equal(both[:, :32], first)
    assert_close(both, expected)


def test_several_extractors_share_the_passes_of_an_engine():
    extractors = [tiny("onnxruntime", layers=layers).fit(IMAGES) for layers in (["layer1"], ["layer3", "layer1"])]
    for extractor, found in zip(extractors, described_together(extractors, IMAGES), strict=True):
        assert_close(found, extractor.transform(IMAGES))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_detector_with_an_engine_is_cloned_pickled_saved_and_loaded(engine, tmp_path):
    detector = clone(DFKDEDetector(tiny(engine, layers="layer2"), n_components=3)).fit(IMAGES)
    expected = detector.score_samples(IMAGES)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(detector)).score_samples(IMAGES), expected)
    detector.save(tmp_path / "model")
    backbones._loaded.clear()
    loaded = DFKDEDetector.load(tmp_path / "model", device="cpu")
    assert loaded.features_.engine == engine
    assert loaded.features_.engine_version_ == detector.features_.engine_version_
    np.testing.assert_allclose(loaded.score_samples(IMAGES), expected, rtol=1e-4)
    in_torch = DFKDEDetector(tiny("torch", layers="layer2"), n_components=3).fit(IMAGES)
    np.testing.assert_allclose(in_torch.score_samples(IMAGES), expected, rtol=1e-3)


def test_what_leaves_the_detector_is_torch_s_network(tmp_path):
    detector = PatchDFKDEDetector(tiny("onnxruntime", layers=["layer2"], pooling=None)).fit(IMAGES)
    module = detector.to_torch()
    with torch.no_grad():
        scores = module.log_densities(module.get_features(module.read_images(IMAGES)))[0]
    np.testing.assert_allclose(scores.numpy(), detector.score_samples(IMAGES), rtol=1e-3)


def test_a_pipeline_and_a_search_take_engines():
    pipeline = make_pipeline(tiny("torch", layers="layer2"), DFKDEDetector(features=None, n_components=3))
    expected = pipeline.fit(IMAGES).score_samples(IMAGES)
    pipeline.set_params(timmfeatures__engine="onnxruntime").fit(IMAGES)
    np.testing.assert_allclose(pipeline.score_samples(IMAGES), expected, rtol=1e-3)


def scores_in_a_child(detector, results):
    results.put(detector.score_samples(IMAGES))


def test_a_forked_process_computes_by_itself():
    detector = DFKDEDetector(tiny("onnxruntime", layers="layer2"), n_components=3).fit(IMAGES)
    expected = detector.score_samples(IMAGES)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=scores_in_a_child, args=(detector, results))
    child.start()
    found = results.get(timeout=120)
    child.join(60)
    assert child.exitcode == 0
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_network_that_changes_its_output_in_place_is_read_before():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.first(x).relu_().mean((2, 3))

    torch.manual_seed(0)
    network = Network().eval()
    compiled = CompiledNetwork(network, ["first", ""], (8, 8), "onnxruntime")
    assert difference(network, compiled, (8, 8), ["first", ""]) < 1e-5


# What cannot be


def test_another_result_is_an_error_and_no_features(monkeypatch):
    monkeypatch.setattr(backbones, "difference", lambda *_: 0.02)
    with pytest.raises(ValueError, match=r"engine='openvino' computes something else .*2e-02 of the largest"):
        tiny("openvino").fit_transform(IMAGES)


def test_an_engine_that_fails_is_named_with_the_way_out(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ValueError, match=r"engine='onnxruntime' cannot run backbone 'test_resnet.*no such operator"):
        tiny("onnxruntime").fit_transform(IMAGES)


def test_what_an_engine_cannot_run_is_refused(monkeypatch):
    network = timm.create_model("test_resnet", num_classes=0)
    with pytest.raises(ValueError, match="engine='openvino' needs a backbone by name"):
        tiny("openvino", network).fit(IMAGES)
    with pytest.raises(ValueError, match="'engine' parameter"):
        tiny("tensorrt").fit(IMAGES)
    monkeypatch.setattr("dfkde_sklearn._features.network.as_device", lambda _: torch.device("cuda", 0))
    with pytest.raises(ValueError, match=r"runs on the CPU, and device is 'cuda:0'\. Use device='cpu', or"):
        tiny("openvino", device=None).fit(IMAGES)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_that_is_not_installed_is_named_with_its_extra(engine, monkeypatch, tmp_path):
    DFKDEDetector(tiny(engine, layers="layer2"), n_components=3).fit(IMAGES).save(tmp_path / "model")
    imported = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == engine:
            raise ImportError(f"No module named {name!r}")
        return imported(name, *arguments, **keywords)

    monkeypatch.setattr("dfkde_sklearn._features.engines.importlib.import_module", without)
    for use in (lambda: tiny(engine).fit(IMAGES), lambda: DFKDEDetector.load(tmp_path / "model", device="cpu")):
        with pytest.raises(ImportError, match=rf"engine='{engine}' needs .*dfkde-sklearn\[(onnx|openvino)\]"):
            use()


def test_the_pickle_of_an_extractor_holds_no_network():
    features = tiny("onnxruntime").fit(IMAGES)
    features.transform(IMAGES)
    file = io.BytesIO()
    pickle.dump(features, file)
    assert len(file.getvalue()) < 10_000
