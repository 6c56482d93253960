"""Exported detectors: ONNX Runtime, OpenVINO and torch.export against the detector, whatever the number of rows."""

import sys

import numpy as np
import pytest
import torch
from scipy.stats import gaussian_kde
from sklearn.preprocessing import FunctionTransformer

from dfkde_sklearn import DFKDEDetector, PatchDFKDEDetector, ScatteringFeatures, TimmFeatures
from dfkde_sklearn._deploy.preprocessing import Preprocessing


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tiny networks spend their time on waking threads."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def rows(n, seed=0, dtype=np.float32, width=20):
    mixing = np.random.default_rng(1).normal(size=(width, width)) * np.logspace(0, -1, width)
    return (np.random.default_rng(seed).normal(size=(n, width)) @ mixing + 3.0).astype(dtype)


def pictures(n, seed=0, shape=(70, 60)):
    """Smooth pictures, no two alike in colour or contrast."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=(n, 3, 6, 6)) * rng.uniform(20, 80, (n, 1, 1, 1)) + rng.uniform(60, 200, (n, 3, 1, 1))
    fine = torch.nn.functional.interpolate(torch.from_numpy(coarse), shape, mode="bicubic").numpy()
    return np.moveaxis(np.clip(fine, 0, 255).astype(np.uint8), 1, -1)


def far_rows(n, seed, dtype):
    """Rows of which the last are 1e1 to 1e6 times as far out as the others."""
    factors = np.ones(n)
    factors[n // 2 :] = np.logspace(1, 6, n - n // 2)
    return (rows(n, seed, np.float64) * factors[:, None]).astype(dtype)


def extractor(backbone="test_resnet", **parameters):
    return TimmFeatures(backbone, **{"pretrained": False, "random_state": 0, "device": "cpu"} | parameters)


@pytest.fixture(scope="module")
def detector():
    return DFKDEDetector(extractor(layers=["layer1", "layer3"]), n_components=4, residual="box").fit(pictures(16))


def session_of(detector, path, **options):
    pytest.importorskip("onnx", reason="the extra onnx is not installed")
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    detector.to_onnx(path, **options)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = runtime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["log_density", "p_anomalous", "label"]
    return session


def assert_same(outputs, detector, X, rtol, atol=0.0):
    log_density, p_anomalous, label = (np.asarray(output) for output in outputs)
    expected = detector.score_samples(X)
    assert log_density.dtype == expected.dtype
    np.testing.assert_allclose(log_density, expected, rtol=rtol, atol=atol)
    np.testing.assert_allclose(p_anomalous, detector.predict_proba(X)[:, 0], atol=1e-4)
    clear = np.abs(expected - detector.offset_) > rtol * np.abs(expected) + atol
    np.testing.assert_array_equal(label[clear], detector.predict(X)[clear])
    assert label.dtype == np.int64
    assert clear.any()


# ---- ONNX


@pytest.mark.parametrize(
    ("parameters", "dtype"),
    [
        ({}, np.float32),
        ({"residual": "box"}, np.float64),
        ({"scaling": "norm", "residual": "gaussian"}, np.float32),
        ({"scaling": None, "n_components": 16}, np.float32),
    ],
)
def test_onnx_of_features_is_the_detector_far_outliers_included(parameters, dtype, tmp_path):
    detector = DFKDEDetector(**{"n_components": 5} | parameters).fit(rows(80, dtype=dtype))
    session = session_of(detector, tmp_path / "model.onnx")
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("features", ["n", 20])]
    for n in (1, 2, 17):
        new = far_rows(n, n, dtype)
        assert_same(session.run(None, {"features": new}), detector, new, 1e-5 if dtype == np.float32 else 1e-10)


@pytest.mark.parametrize("scaling", ["scale", "norm"])
def test_onnx_of_features_is_scipys_log_density(scaling, tmp_path):
    X, new = rows(60, dtype=np.float64), rows(9, 2, np.float64)
    session = session_of(DFKDEDetector.original(n_components=4, scaling=scaling).fit(X), tmp_path / "model.onnx")
    axes = np.linalg.svd(X - X.mean(0), full_matrices=False)[2][:4]
    train, test = ((table - X.mean(0)) @ axes.T for table in (X, new))
    lengths = np.linalg.norm(train, axis=1)
    divisors = (lengths.max(), lengths.max()) if scaling == "scale" else (lengths, np.linalg.norm(test, axis=1))
    expected = gaussian_kde(train.T / divisors[0]).logpdf(test.T / divisors[1])
    np.testing.assert_allclose(session.run(["log_density"], {"features": new})[0], expected, rtol=1e-9)
    new[1] = np.nan
    assert session.run(["label"], {"features": new})[0][1] == -1


@pytest.mark.parametrize("image_shape", [None, (70, 60)])
def test_onnx_of_images_is_the_detector(detector, image_shape, tmp_path):
    session = session_of(detector, tmp_path / "model.onnx", image_shape=image_shape)
    model = detector.to_torch()
    for n in (1, 2, 17):
        new = pictures(n, seed=n)
        new[n // 2 :] = 255 - new[n // 2 :] // 2
        batch = new if image_shape else model.read_images(new).numpy()
        assert_same(session.run(None, {"images": batch}), detector, new, 1e-4, 1e-4)


def test_onnx_of_a_transformer_is_the_detector(tmp_path):
    detector = DFKDEDetector.original(extractor("test_vit"), n_components=4).fit(pictures(16))
    session = session_of(detector, tmp_path / "model.onnx")
    new = pictures(3, 1)
    batch = detector.to_torch().read_images(new).numpy()
    assert_same(session.run(None, {"images": batch}), detector, new, 1e-4, 1e-4)


def test_onnx_has_the_documented_opset_in_one_file(tmp_path):
    onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    DFKDEDetector.original(n_components=5).fit(rows(40)).to_onnx(tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import if not entry.domain] == [("", 18)]


def test_without_the_extra_the_error_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"dfkde-sklearn\[onnx\]"):
        DFKDEDetector.original(n_components=5).fit(rows(40)).to_onnx(tmp_path / "model.onnx")


# ---- OpenVINO


def openvino_outputs(detector, path, batch, **options):
    """Return what OpenVINO makes of a batch, in float32: by itself it takes bfloat16 where the processor has it."""
    pytest.importorskip("onnx", reason="the extra onnx is not installed")
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    openvino = pytest.importorskip("openvino", reason="the extra openvino is not installed")
    detector.to_onnx(path, **options)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    outputs = compiled({compiled.input(0).any_name: batch})
    return [outputs[name] for name in ("log_density", "p_anomalous", "label")]


@pytest.mark.parametrize(
    ("backbone", "parameters"),
    [
        ("test_resnet", {"layers": ["layer2"], "pooling": "avg"}),
        ("test_resnet", {"layers": ["layer2"], "pooling": "max"}),
        ("test_resnet", {"layers": ["layer1", "layer3"], "pooling": "gem"}),
        ("test_vit", {"layers": ["blocks.1"]}),
        ("test_vit", {}),
    ],
)
def test_openvino_of_images_is_the_detector(backbone, parameters, tmp_path):
    """Its fusion of Reshape, a reduction without keepdims, and Sub made scores of layers wrong by up to 2051 nats."""
    detector = DFKDEDetector(extractor(backbone, **parameters), n_components=4, residual="box").fit(pictures(16))
    new = pictures(5, 1)
    batch = detector.to_torch().read_images(new).numpy()
    assert_same(openvino_outputs(detector, tmp_path / "model.onnx", batch), detector, new, 1e-4, 1e-4)


class OwnPooling(torch.nn.Module):
    """A network that pools by itself, and drops the axis of positions as it does."""

    def __init__(self, pool):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = torch.nn.Conv2d(3, 8, 5, stride=4)
        self.pool = pool
        self.pretrained_cfg = {"input_size": (3, 32, 32), "crop_pct": 1.0}

    def forward(self, batch):
        return self.pool(self.layer(batch).relu().flatten(2))


@pytest.mark.parametrize(
    "pool", [lambda positions: positions.mean(-1), lambda positions: positions.transpose(1, 2).amax(1)]
)
def test_openvino_of_a_network_that_pools_by_itself_is_the_detector(pool, tmp_path):
    detector = DFKDEDetector.original(TimmFeatures(OwnPooling(pool).eval(), device="cpu"), n_components=3).fit(
        pictures(16)
    )
    new = pictures(5, 1)
    batch = detector.to_torch().read_images(new).numpy()
    assert_same(openvino_outputs(detector, tmp_path / "model.onnx", batch), detector, new, 1e-4, 1e-4)


@pytest.mark.parametrize(
    ("parameters", "dtype"),
    [
        ({"residual": "box"}, np.float64),
        ({"scaling": "norm", "residual": "gaussian"}, np.float32),
        ({"scaling": None, "n_components": 16}, np.float32),
    ],
)
def test_openvino_of_features_is_the_detector_far_outliers_included(parameters, dtype, tmp_path):
    detector = DFKDEDetector(**{"n_components": 5} | parameters).fit(rows(80, dtype=dtype))
    new = far_rows(17, 17, dtype)
    assert_same(openvino_outputs(detector, tmp_path / "model.onnx", new), detector, new, 1e-4, 1e-4)


@pytest.mark.parametrize("density", ["kernel", "gaussian"])
@pytest.mark.parametrize("normalization", [0.0, 0.5])
def test_openvino_of_densities_at_positions_is_the_detector(normalization, density, tmp_path):
    """A constant of each position was added to other elements where positions were the first axis of a reduction."""
    features = np.random.default_rng(0).normal(size=(47, 5, 4, 6)) * np.arange(1, 5)[:, None]
    detector = PatchDFKDEDetector(None, normalization=normalization, density=density).fit(features[:30])
    outputs = openvino_outputs(detector, tmp_path / "model.onnx", features[30:])
    assert_same(outputs, detector, features[30:], 1e-4, 1e-4)


def test_openvino_resizes_to_a_grey_level(detector, tmp_path):
    new = pictures(5, 1)
    outputs = openvino_outputs(detector, tmp_path / "model.onnx", new, image_shape=(70, 60))
    assert_same(outputs, detector, new, 0.02, 0.02)


# ---- a check of what was exported


EXPORTS = [
    pytest.param("to_onnx", "ONNX Runtime", id="onnx"),
    pytest.param("to_pt2", "torch.export", id="pt2"),
]


def export(detector, method, path, **options):
    if method == "to_onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason="the extra onnx is not installed")
    getattr(detector, method)(path, **options)


@pytest.mark.parametrize(("method", "runtime"), EXPORTS)
def test_an_export_that_is_right_passes_its_check(method, runtime, tmp_path, detector):
    X = rows(80)
    export(DFKDEDetector.original(n_components=5).fit(X), method, tmp_path / "rows", check=far_rows(40, 3, np.float32))
    export(detector, method, tmp_path / "images", image_shape=(70, 60), check=list(pictures(3, 1)))
    flat = FunctionTransformer(lambda images: images.reshape(len(images), -1)[:, :50].astype(np.float32))
    export(
        DFKDEDetector.original(flat, n_components=3).fit(pictures(10)), method, tmp_path / "own", check=pictures(3, 1)
    )
    assert {file.name for file in tmp_path.iterdir()} == {"rows", "images", "own"}


class Skewed(torch.nn.Module):
    """A network that computes another thing where it is traced: an exporter's fault, made by hand."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = torch.nn.Conv2d(3, 8, 5, stride=4)
        self.pretrained_cfg = {"input_size": (3, 32, 32), "crop_pct": 1.0}

    def forward(self, batch):
        features = self.layer(batch).mean((2, 3))
        return features + 0.5 if torch.compiler.is_compiling() else features


@pytest.mark.parametrize(("method", "runtime"), EXPORTS)
def test_an_export_that_is_wrong_is_named_and_not_written(method, runtime, tmp_path):
    detector = DFKDEDetector.original(TimmFeatures(Skewed().eval(), device="cpu"), n_components=3).fit(pictures(16))
    path = tmp_path / "model"
    with pytest.raises(ValueError, match=rf"check\[\d+\] has log_density \S+ in {runtime} and \S+ in the detector, "):
        export(detector, method, path, check=pictures(3, 1))
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"an earlier one")
    with pytest.raises(ValueError, match=r"Nothing was written"):
        export(detector, method, path, check=pictures(3, 1))
    assert path.read_bytes() == b"an earlier one"


def test_images_of_another_size_than_the_file_takes_are_named(tmp_path, detector):
    images = [*pictures(2), *pictures(1, shape=(50, 60))]
    with pytest.raises(ValueError, match=r"images\[2\].*takes images of image_shape=\(70, 60\) only"):
        detector.to_pt2(tmp_path / "model", image_shape=(70, 60), check=images)
    assert list(tmp_path.iterdir()) == []
    detector.to_pt2(tmp_path / "model", image_shape=[70, 60], check=pictures(2))


def test_the_check_needs_onnxruntime_and_says_so_before_the_export(tmp_path, monkeypatch):
    detector = DFKDEDetector.original(n_components=5).fit(rows(40))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"onnxruntime.*dfkde-sklearn\[onnx\]"):
        detector.to_onnx(tmp_path / "model.onnx", check=rows(3))
    assert list(tmp_path.iterdir()) == []


# ---- torch.export and torch.compile


@pytest.mark.parametrize("image_shape", [None, (70, 60)])
def test_a_program_is_the_detector(detector, image_shape, tmp_path):
    detector.to_pt2(tmp_path / "model.pt2", image_shape=image_shape)
    program = torch.export.load(tmp_path / "model.pt2").module()
    model = detector.to_torch()
    for n in (1, 2, 17):
        new = pictures(n, seed=n)
        batch = torch.from_numpy(new) if image_shape else model.read_images(new)
        assert_same(program(batch), detector, new, 1e-4, 1e-4)


def test_a_model_can_be_exported_and_compiled_by_hand(detector):
    model = detector.to_torch()
    batch = model.read_images(pictures(3, 1))
    expected = model(batch)
    dynamic = torch.export.export(model, (batch,), dynamic_shapes=({0: torch.export.Dim("n", min=1)},)).module()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for run in (dynamic, compiled):
        torch.testing.assert_close(run(batch), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(run(batch[:2]), expected[:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(batch), expected, rtol=0, atol=0)


def test_an_export_leaves_the_backbone_as_it_was(detector, tmp_path):
    expected = detector.score_samples(pictures(2))
    detector.to_pt2(tmp_path / "model.pt2")
    np.testing.assert_array_equal(detector.score_samples(pictures(2)), expected)
    with detector.features_._lent_backbone() as backbone:
        assert not any(module._forward_hooks for module in backbone.network.modules())


# ---- preprocessing


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("crop", ["center", "squash"])
@pytest.mark.parametrize("shape", [(70, 60), (160, 160), (168, 300), (401, 333)])
def test_exported_preprocessing_is_timms_to_the_pixel(interpolation, crop, shape):
    fitted = extractor(crop=crop).fit(pictures(1))
    fitted.interpolation_ = interpolation
    noise = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), dtype=np.uint8)
    expected = fitted.as_module().read_images(noise)
    torch.testing.assert_close(Preprocessing(fitted, shape)(torch.from_numpy(noise)), expected, rtol=0, atol=1e-6)


def test_the_check_of_an_export_reads_16_bit_images_as_the_detector_does(tmp_path):
    deep = np.random.default_rng(0).integers(0, 4096, (12, 70, 60), dtype=np.uint16)
    detector = DFKDEDetector.original(extractor(white_level=4095), n_components=3).fit(deep)
    detector.to_pt2(tmp_path / "model.pt2", check=deep[:4])
    assert (tmp_path / "model.pt2").exists()


# ---- what cannot be exported


def test_what_cannot_be_exported_is_refused(tmp_path, detector):
    scattering = ScatteringFeatures(scales=2, orientations=4, image_size=32)
    with pytest.raises(ValueError, match=r"ScatteringFeatures.*features=None"):
        DFKDEDetector.original(scattering, n_components=3).fit(pictures(10)).to_pt2(tmp_path / "model.pt2")
    with pytest.raises(ValueError, match="no images to resize"):
        DFKDEDetector.original(n_components=3).fit(rows(20)).to_pt2(tmp_path / "model.pt2", image_shape=(30, 30))
    bordered = DFKDEDetector.original(extractor(crop="border"), n_components=3).fit(pictures(10))
    with pytest.raises(ValueError, match="crop='border' pads its images"):
        bordered.to_pt2(tmp_path / "model.pt2", image_shape=(70, 60))
    dividing = DFKDEDetector.original(extractor(reducing_gap=2), n_components=3).fit(pictures(10))
    with pytest.raises(ValueError, match="reducing_gap=2: an exported file resizes images from all pixels"):
        dividing.to_pt2(tmp_path / "model.pt2", image_shape=(70, 60))
    with pytest.raises(ValueError, match=r"image_shape=\(0, 60\)"):
        detector.to_pt2(tmp_path / "model.pt2", image_shape=(0, 60))
    assert list(tmp_path.iterdir()) == []
