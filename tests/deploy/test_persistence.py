"""Saved detectors: the same scores, no code, no half-written or damaged files, no other weights than at the fit."""

import contextlib
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import huggingface_hub.constants
import joblib
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import timm
import torch
from sklearn.exceptions import NotFittedError
from sklearn.preprocessing import FunctionTransformer

from dfkde_sklearn import DFKDEDetector, PatchDFKDEDetector, ScatteringFeatures, TimmFeatures
from dfkde_sklearn._deploy import saved
from dfkde_sklearn._features import backbones

METHODS = ("predict", "predict_proba", "p_values", "decision_function", "score_samples", "score")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tiny networks spend their time on waking threads."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(autouse=True)
def _nothing_loaded_before():
    backbones._loaded.clear()


def rows(n, width=12, seed=0, dtype=np.float64):
    return (np.random.default_rng(seed).normal(size=(n, width)) * np.arange(1, width + 1) + 3.0).astype(dtype)


def pictures(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 40, 50, 3), dtype=np.uint8)


def tiny(**parameters):
    return TimmFeatures(
        **{"backbone": "test_resnet", "pretrained": False, "random_state": 0, "device": "cpu"} | parameters
    )


def small_file(path):
    detector = DFKDEDetector.original(n_components=2, device="cpu").fit(rows(8, 3, dtype=np.float32))
    detector.save(path)
    return detector


def header_of(path):
    data = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["dfkde-sklearn"])


def rewrite(path, **changes):
    """Write the file anew with another header or other tensors and a hash that is right: somebody meant it."""
    tensors = safetensors.torch.load_file(path)
    header = header_of(path)
    for key, value in changes.items():
        (tensors if key in tensors else header)[key] = value
    header["sha256"] = "0" * 64
    data = safetensors.torch.save(tensors, {"dfkde-sklearn": json.dumps(header)})
    Path(path).write_bytes(data.replace(b"0" * 64, saved.hashlib.sha256(data).hexdigest().encode(), 1))


# ---- the same detector


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"scaling": "norm", "residual": "box", "bandwidth": "loo"},
        {"scaling": None, "residual": "gaussian", "contamination": 0.1, "threshold_steepness": 0.2},
        {"n_components": 0.9, "max_samples": 40, "random_state": 3, "threshold_offset": -5.0, "bandwidth": 0.4},
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_loaded_detector_is_the_saved_one_to_the_last_bit(parameters, dtype, tmp_path):
    X, new = rows(60, dtype=dtype), rows(9, seed=1, dtype=dtype)
    detector = DFKDEDetector(**{"n_components": 4} | parameters).fit(X)
    detector.save(tmp_path / "detector")
    loaded = DFKDEDetector.load(tmp_path / "detector")
    assert loaded.get_params() == detector.get_params()
    # All but the training rows, which a file holds only if it is told to.
    kept = {name: value for name, value in vars(detector).items() if name not in ("_seed", "_sample")}
    assert vars(loaded).keys() == kept.keys()
    for name, value in kept.items():
        np.testing.assert_array_equal(getattr(loaded, name), value, err_msg=name)
    for method in METHODS:
        np.testing.assert_array_equal(getattr(loaded, method)(new), getattr(detector, method)(new))


@pytest.mark.parametrize("max_samples", [None, 50])
@pytest.mark.parametrize("groups", [None, np.arange(60) // 3])
def test_a_file_with_training_rows_goes_on_where_the_detector_was(max_samples, groups, tmp_path):
    X, more = rows(60), rows(30, seed=1)
    more_groups = None if groups is None else [f"new {i}" for i in range(30)]
    detector = DFKDEDetector(n_components=3, max_samples=max_samples, random_state=0)
    detector.partial_fit(X, groups=groups).save(tmp_path / "d", training_rows=True)
    loaded = DFKDEDetector.load(tmp_path / "d")
    assert loaded._sample.keys() == detector._sample.keys()
    for name, value in detector._sample.items():
        np.testing.assert_array_equal(loaded._sample[name], value, err_msg=name)
    loaded.partial_fit(more, groups=more_groups)
    detector.partial_fit(more, groups=more_groups)
    np.testing.assert_array_equal(loaded.calibration_scores_, detector.calibration_scores_)
    np.testing.assert_array_equal(loaded.score_samples(more), detector.score_samples(more))
    loaded.save(tmp_path / "again", training_rows=True)
    assert DFKDEDetector.load(tmp_path / "again")._sample["n_seen"] == 90


def test_images_at_positions_go_on_from_a_file(tmp_path):
    detector = PatchDFKDEDetector(ScatteringFeatures(scales=2, image_size=16, pooling=None)).fit(pictures(12))
    detector.save(tmp_path / "d", training_rows=True)
    loaded = PatchDFKDEDetector.load(tmp_path / "d").partial_fit(pictures(8, 1))
    expected = detector.partial_fit(pictures(8, 1))
    np.testing.assert_array_equal(loaded.score_samples(pictures(4, 2)), expected.score_samples(pictures(4, 2)))


def test_training_rows_that_are_not_there_are_not_saved(tmp_path):
    small_file(tmp_path / "d")
    loaded = DFKDEDetector.load(tmp_path / "d")
    with pytest.raises(ValueError, match="training_rows=True, and this DFKDEDetector has none"):
        loaded.save(tmp_path / "e", training_rows=True)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training_rows": torch.ones(8, 3)}, "not 8 rows of 4 finite numbers"),
        ({"training_rows": torch.full((8, 4), torch.nan)}, "finite numbers"),
        ({"training_rows": torch.ones(8, 4, dtype=torch.float16)}, "finite numbers"),
        ({"training_numbers": torch.ones(8, dtype=torch.float64)}, r"not one in \[0, 1\) for each"),
        ({"training_numbers": torch.zeros(8)}, r"not one in \[0, 1\) for each"),
        ({"training_places": torch.arange(8).flip(0)}, "not increasing"),
        ({"training_places": torch.arange(1, 9)}, "not increasing and below 8"),
        ({"training_places": torch.arange(7)}, "not 7 rows"),
        ({"sample": None}, "of which its document says nothing"),
        (
            {"sample": {"n_seen": 8, "n_scores": 8, "seed": -1, "limit": None, "labels": None}},
            "the seed of its training rows is -1",
        ),
        ({"sample": {"n_seen": 8, "n_scores": 8, "seed": 1, "limit": 0.01, "labels": None}}, "smallest random numbers"),
        ({"sample": {"n_seen": 9, "n_scores": 8, "seed": 1, "limit": None, "labels": None}}, "smallest random numbers"),
        (
            {"sample": {"n_seen": 8, "n_scores": 8, "seed": 1, "limit": None, "labels": ["a"]}},
            "1 labels of 8 training rows",
        ),
        (
            {"sample": {"n_seen": 8, "n_scores": 8, "seed": 1, "limit": None, "labels": 3}},
            "labels of its training rows is 3",
        ),
        ({"sample": {}}, "does not hold what a detector needs"),
    ],
)
def test_training_rows_that_contradict_themselves_are_refused(changes, message, tmp_path):
    DFKDEDetector.original(n_components=2).fit(rows(8, 4)).save(tmp_path / "d", training_rows=True)
    rewrite(tmp_path / "d", **changes)
    with pytest.raises(ValueError, match=message):
        DFKDEDetector.load(tmp_path / "d")


def test_names_of_columns_are_kept(tmp_path):
    X = pd.DataFrame(rows(30), columns=[f"column {i}" for i in range(12)])
    detector = DFKDEDetector.original(n_components=np.int64(3)).fit(X)
    detector.save(tmp_path / "d")
    loaded = DFKDEDetector.load(tmp_path / "d")
    np.testing.assert_array_equal(loaded.predict(X), detector.predict(X))
    assert type(loaded.n_components) is int
    with pytest.raises(ValueError, match="feature names"):
        loaded.predict(X[X.columns[::-1]])


@pytest.mark.parametrize(
    "extractor",
    [
        lambda: tiny(
            layers=["layer1", "layer3"], pooling="gem", image_size=(64, 48), white_level=4095, reducing_gap=1.5
        ),
        lambda: tiny(layers=["layer1"], crop="center"),
        lambda: tiny(layers=["layer1"], crop="border"),
        lambda: ScatteringFeatures(scales=2, orientations=4, image_size=32, white_level=4095),
    ],
)
def test_the_feature_extractor_is_kept(extractor, tmp_path):
    detector = DFKDEDetector.original(extractor(), n_components=3).fit(pictures(10))
    detector.save(tmp_path / "d")
    backbones._loaded.clear()
    loaded = DFKDEDetector.load(tmp_path / "d", device="cpu")
    np.testing.assert_array_equal(loaded.score_samples(pictures(4, 1)), detector.score_samples(pictures(4, 1)))
    fitted, known = vars(loaded.features_), vars(detector.features_)
    assert {**fitted, "device": None} == {**known, "device": None}
    assert loaded.features is not loaded.features_
    assert not hasattr(loaded.features, "n_features_out_")
    assert loaded.fit(pictures(6)).n_components_ == 3


def test_the_header_says_what_the_file_needs(tmp_path):
    detector = DFKDEDetector.original(tiny(layers="layer2"), n_components=3).fit(pictures(10))
    detector.save(tmp_path / "d")
    header = header_of(tmp_path / "d")
    assert (header["format"], header["format_version"]) == ("dfkde-sklearn", 5)
    assert header["versions"].keys() >= {"dfkde-sklearn", "numpy", "scikit-learn", "timm", "torch", "python"}
    fitted = header["extractor"]["fitted"]
    assert fitted["backbone_name_"] == detector.features_.backbone_name_
    assert fitted["weights_hash_"] == detector.features_.weights_hash_
    assert fitted["input_size_"] == {"tuple": list(detector.features_.input_size_)}
    assert {"mean_", "std_", "interpolation_", "crop_mode_", "crop_pct_"} <= fitted.keys()


def test_device_and_cache_belong_to_the_machine_not_to_the_file(tmp_path):
    detector = DFKDEDetector.original(tiny(cache=tmp_path / "cache"), n_components=3).fit(pictures(10))
    detector.device = detector.features.device = detector.features_.device = "cuda:7"  # a GPU of another machine
    detector.save(tmp_path / "d")
    loaded = DFKDEDetector.load(tmp_path / "d", device="cpu")
    assert (loaded.device, loaded.features.device, loaded.features_.device) == ("cpu", "cpu", "cpu")
    assert loaded.features.cache is loaded.features_.cache is None
    assert len(loaded.predict(pictures(2))) == 2


def test_a_generator_as_random_state_is_not_kept(tmp_path):
    DFKDEDetector.original(n_components=2, random_state=np.random.RandomState(0)).fit(rows(20)).save(tmp_path / "d")
    assert DFKDEDetector.load(tmp_path / "d").random_state is None


def test_files_of_the_same_detector_are_the_same(tmp_path):
    detector = small_file(tmp_path / "a")
    detector.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_memory_mapped_detector_can_be_saved(tmp_path):
    detector = DFKDEDetector.original(n_components=3).fit(rows(40))
    joblib.dump(detector, tmp_path / "d.joblib")
    joblib.load(tmp_path / "d.joblib", mmap_mode="r").save(tmp_path / "d")
    np.testing.assert_array_equal(DFKDEDetector.load(tmp_path / "d").kernel_centers_, detector.kernel_centers_)


@pytest.mark.parametrize("kind", [DFKDEDetector, PatchDFKDEDetector])
def test_groups_and_a_recalibration_are_kept(kind, tmp_path):
    detector = kind(confidence=0.9, target_fpr=0.2).fit(rows(60), groups=np.arange(60) // 3)
    detector.recalibrate(rows(20, seed=1), groups=np.arange(20) // 2).save(tmp_path / "d")
    for other in (kind.load(tmp_path / "d"), pickle.loads(pickle.dumps(detector))):
        np.testing.assert_array_equal(other.calibration_scores_, detector.calibration_scores_)
        np.testing.assert_array_equal(other.calibration_groups_, detector.calibration_groups_)
        assert other.calibration_groups_.dtype == np.int64
        assert (other.offset_, other.confidence) == (detector.offset_, 0.9)
        for confidence in (None, 0.9):
            expected = detector.p_values(rows(20, seed=2), confidence=confidence)
            np.testing.assert_array_equal(other.p_values(rows(20, seed=2), confidence=confidence), expected)
    again = [which.recalibrate(rows(9, seed=3)).offset_ for which in (other, detector)]
    assert again[0] == again[1]


# ---- damage


def test_no_damaged_byte_goes_unseen(tmp_path):
    path = tmp_path / "d"
    small_file(path)
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    # Every byte of the lengths and of the structure at the start, a third of the others.
    for i in [*range(300), *range(300, len(whole), 3), length + 7, length + 8, len(whole) - 1]:
        path.write_bytes(whole[:i] + bytes([whole[i] ^ (1 << i % 8)]) + whole[i + 1 :])
        with pytest.raises(ValueError, match=r"damaged|format version"):
            DFKDEDetector.load(path)


def test_truncated_and_lengthened_files_are_refused(tmp_path):
    path = tmp_path / "d"
    small_file(path)
    whole = path.read_bytes()
    for cut in [0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="damaged"):
            DFKDEDetector.load(path)
    for junk in (whole + b"\0", whole + whole, b"\0" + whole):
        path.write_bytes(junk)
        with pytest.raises(ValueError, match="damaged"):
            DFKDEDetector.load(path)


def test_other_files_are_refused(tmp_path):
    safetensors.torch.save_file({"weight": torch.ones(2)}, tmp_path / "weights")
    (tmp_path / "pickle").write_bytes(pickle.dumps(DFKDEDetector.original()))
    for name in ("weights", "pickle"):
        with pytest.raises(ValueError, match=re.escape("not a file of a detector's save")):
            DFKDEDetector.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        DFKDEDetector.load(tmp_path / "nothing")


def test_integers_beyond_all_floats_are_refused(tmp_path):
    small_file(tmp_path / "d")
    rewrite(tmp_path / "d", parameters=header_of(tmp_path / "d")["parameters"] | {"threshold_steepness": 10**400})
    with pytest.raises(ValueError, match="threshold_steepness of DFKDEDetector is an integer of 1329 bits"):
        DFKDEDetector.load(tmp_path / "d")


def test_a_backbone_that_this_timm_lacks_is_named(tmp_path):
    DFKDEDetector.original(tiny(layers="layer2"), n_components=3).fit(pictures(10)).save(tmp_path / "d")
    extractor = header_of(tmp_path / "d")["extractor"]
    rewrite(tmp_path / "d", extractor=extractor | {"fitted": extractor["fitted"] | {"backbone_name_": "resnet19"}})
    with pytest.raises(ValueError, match=r"'resnet19' is not a model of timm\. Did you mean 'resnet18'"):
        DFKDEDetector.load(tmp_path / "d", device="cpu")


def test_a_newer_format_is_refused_with_the_way_out(tmp_path):
    small_file(tmp_path / "d")
    rewrite(tmp_path / "d", format_version=6)
    with pytest.raises(ValueError, match=r"format version 6.*reads up to 5\. Install a newer one"):
        DFKDEDetector.load(tmp_path / "d")


def test_the_format_before_the_first_release_is_refused_with_the_way_out(tmp_path):
    small_file(tmp_path / "d")
    rewrite(tmp_path / "d", format_version=1)
    with pytest.raises(ValueError, match=r"format version 1.*Fit the detector again"):
        DFKDEDetector.load(tmp_path / "d")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel_centers": torch.ones(8, 3)}, "kernel_centers has shape"),
        ({"scale": torch.tensor(1e200, dtype=torch.float64)}, "scale is 1e\\+200; allowed"),
        ({"mean": torch.ones(3)}, "mean has dtype"),
        ({"mean": torch.ones(4, dtype=torch.float64)}, "does not fit the other sizes"),
        ({"kernel_centers": torch.ones(0, 2)}, "contradict"),
        ({"scaling_code": torch.tensor(2)}, "contradict"),
        ({"parameters": {"n_components": 2, "colour": 1}}, "colour"),
        ({"parameters": {"n_components": -1}}, "n_components"),
        ({"features": "other"}, "other"),
        ({"extractor": {"class": "os.system", "parameters": {}, "fitted": {}}, "features": "extractor"}, r"os\.system"),
        (
            {
                "extractor": {"class": "ScatteringFeatures", "parameters": {}, "fitted": {"__class__": 1}},
                "features": "extractor",
            },
            "not a fitted attribute",
        ),
        (
            {
                "extractor": {
                    "class": "ScatteringFeatures",
                    "parameters": {},
                    "fitted": {"n_features_out_": 5, "grid_shape_": None},
                },
                "features": "extractor",
            },
            "different numbers of features",
        ),
    ],
)
def test_files_that_contradict_themselves_are_refused(changes, message, tmp_path):
    small_file(tmp_path / "d")
    rewrite(tmp_path / "d")
    DFKDEDetector.load(tmp_path / "d")
    rewrite(tmp_path / "d", **changes)
    with pytest.raises(ValueError, match=message):
        DFKDEDetector.load(tmp_path / "d")


def with_value(tensor, value):
    changed = tensor.clone()
    changed.view(-1)[0] = torch.tensor(value, dtype=torch.float64).to(tensor.dtype)
    return changed


VALUES = ("mean", "scale", "components", "singular_values", "max_length", "whitening", "log_volume", "log_jacobian")
VALUES += ("bandwidth", "kernel_centers", "residual", "gaussian_residual", "calibration_scores", "steepness", "offset")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", VALUES)
def test_values_with_which_all_would_be_normal_are_refused(name, value, tmp_path):
    DFKDEDetector(n_components=2, residual="box").fit(rows(8, 4)).save(tmp_path / "d")
    tensor = safetensors.torch.load_file(tmp_path / "d")[name]
    rewrite(tmp_path / "d", **{name: with_value(tensor, value)})
    with pytest.raises(ValueError, match=f"{name} holds NaN"):
        DFKDEDetector.load(tmp_path / "d")


@pytest.mark.parametrize("name", ["scale", "max_length", "bandwidth", "residual", "gaussian_residual"])
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_lengths_that_are_not_positive_are_refused(name, value, tmp_path):
    DFKDEDetector(n_components=2, residual="box").fit(rows(8, 4)).save(tmp_path / "d")
    tensor = safetensors.torch.load_file(tmp_path / "d")[name]
    rewrite(tmp_path / "d", **{name: with_value(tensor, value)})
    with pytest.raises(ValueError, match=f"{name} is {value}; allowed: positive"):
        DFKDEDetector.load(tmp_path / "d")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("components", 1e89, r"components has a row of length 1e\+89; allowed: 1"),
        ("log_volume", 1.6e308, r"log_volume holds 1\.6e\+308; allowed: logarithms"),
        ("bandwidth", 1e200, r"bandwidth is 1e\+200; allowed: 1e-150 to 1e150"),
        ("bandwidth", 1e-200, r"bandwidth is 1e-200; allowed: 1e-150 to 1e150"),
        ("log_jacobian", -1e300, r"log_jacobian holds 1e\+300; allowed: logarithms"),
    ],
)
def test_axes_and_logarithms_with_which_scores_would_be_infinite_are_refused(name, value, message, tmp_path):
    DFKDEDetector(n_components=2, residual="box").fit(rows(8, 4)).save(tmp_path / "d")
    tensor = safetensors.torch.load_file(tmp_path / "d")[name]
    rewrite(tmp_path / "d", **{name: with_value(tensor, value)})
    with pytest.raises(ValueError, match=message):
        DFKDEDetector.load(tmp_path / "d")


@pytest.mark.parametrize("bad", [1.0, [1.0], None, torch.empty((), dtype=torch.float64, device="meta")])
def test_a_state_dict_of_other_things_than_tensors_is_refused(bad):
    model = DFKDEDetector.original(n_components=2).fit(rows(8, 4)).to_torch()
    state = dict(model.state_dict())
    with pytest.raises(RuntimeError, match="bandwidth is not a tensor with its values"):
        model.load_state_dict(state | {"density.bandwidth": bad})
    with pytest.raises(RuntimeError, match="bandwidth holds NaN"):
        model.load_state_dict(state | {"density.bandwidth": torch.tensor(np.nan, dtype=torch.float64)})
    model.load_state_dict(state)


def stage_file(path, extractor):
    detector = DFKDEDetector.original(extractor, n_components=3).fit(pictures(10))
    detector.save(path)
    return detector


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("fitted", "crop_pct_", 0, "crop_pct_ of TimmFeatures is 0"),
        ("fitted", "crop_mode_", "circle", "crop_mode_ of TimmFeatures is 'circle'"),
        ("parameters", "crop", "circle", "crop"),
        ("fitted", "mean_", {"tuple": [float("nan"), 0.5, 0.5]}, "mean_"),
        ("fitted", "std_", {"tuple": [0.0, 0.5, 0.5]}, "std_"),
        ("fitted", "input_size_", {"tuple": [64]}, "input_size_"),
        ("fitted", "interpolation_", "loudly", "loudly"),
        ("fitted", "layer_formats_", ["NCHW", "WHCN"], "layer_formats_"),
        ("fitted", "layer_widths_", [1, 2], "contradictory"),
        ("fitted", "layers_", ["layer1", "layer9"], "layer9"),
        ("fitted", "layers_", "layer1", "layers_"),
        ("fitted", "seed_", "0", "seed_"),
        ("fitted", "backbone_name_", ["test_resnet"], "backbone_name_"),
        ("fitted", "_rows", "_rows", "not a fitted attribute"),
        ("parameters", "cache", "elsewhere", "cache"),
        ("parameters", "device", "cuda", "device"),
        ("parameters", "image_size", [], "image_size"),
    ],
)
def test_a_feature_stage_that_cannot_be_is_refused(part, name, value, message, tmp_path):
    stage_file(tmp_path / "d", tiny(layers=["layer1", "layer3"]))
    described = header_of(tmp_path / "d")["extractor"]
    described[part][name] = value
    rewrite(tmp_path / "d", extractor=described)
    with pytest.raises(ValueError, match=message):
        DFKDEDetector.load(tmp_path / "d")


def test_a_feature_stage_without_an_attribute_is_refused(tmp_path):
    stage_file(tmp_path / "d", tiny())
    whole = header_of(tmp_path / "d")["extractor"]
    for name in whole["fitted"]:
        rewrite(
            tmp_path / "d",
            extractor=whole | {"fitted": {key: whole["fitted"][key] for key in {*whole["fitted"]} - {name}}},
        )
        with pytest.raises(ValueError, match=name):
            DFKDEDetector.load(tmp_path / "d")


# What is put in the place of a value of the header.
STRANGE = [None, True, 0, -1, 10**400, 1e308, float("nan"), float("-inf"), "", "tuple", "\ud800", [], [[]], {}]
STRANGE += [{"tuple": 5}, {"tuple": []}, {"a": {"b": []}}, 2**63, 0.5, ["x"] * 3]


def places(document, path=()):
    """Yield the path to each value of a JSON document."""
    if path:
        yield path
    entries = (
        document.items() if isinstance(document, dict) else enumerate(document if isinstance(document, list) else ())
    )
    for key, value in entries:
        yield from places(value, (*path, key))


def altered(document, path, rng):
    """Return a copy of a document with another value, or none, at a path."""
    document = json.loads(json.dumps(document))
    owner = document
    for key in path[:-1]:
        owner = owner[key]
    if rng.random() < 0.2:
        del owner[path[-1]]
    else:
        owner[path[-1]] = STRANGE[rng.integers(len(STRANGE))]
    return document


def write_signed(path, header, tensors):
    data = safetensors.torch.save(tensors, {"dfkde-sklearn": json.dumps(header | {"sha256": "0" * 64})})
    digest = saved.hashlib.sha256(data).hexdigest().encode()
    Path(path).write_bytes(data.replace(b"0" * 64, digest, 1))


def fuzz_files(tmp_path, n, extractors):
    """Change files at random, with a right checksum: loaded as what scores and can be saved, or refused in words."""
    rng = np.random.default_rng(0)
    images = pictures(2, 1)
    for extractor in extractors:
        (
            DFKDEDetector(n_components=2, residual="box").fit(rows(10, 4)).save
            if extractor is None
            else DFKDEDetector.original(extractor, n_components=2).fit(pictures(8)).save
        )(tmp_path / "whole", training_rows=True)
        header, tensors = header_of(tmp_path / "whole"), safetensors.torch.load_file(tmp_path / "whole")
        where = [path for path in places(header) if path[0] not in ("sha256", "versions")]
        for _ in range(n):
            if rng.random() < 0.6:
                write_signed(tmp_path / "d", altered(header, where[rng.integers(len(where))], rng), tensors)
            else:
                name = list(tensors)[rng.integers(len(tensors))]
                strange = [
                    tensors[name].float(),
                    tensors[name][None],
                    tensors[name].reshape(-1)[:0],
                    tensors[name].long() * 0 + 9,
                ]
                if tensors[name].numel() and tensors[name].is_floating_point():
                    strange += [with_value(tensors[name], value) for value in (np.nan, -np.inf, 1e308, 0.0, 1e-320)]
                write_signed(tmp_path / "d", header, tensors | {name: strange[rng.integers(len(strange))]})
            try:
                loaded = DFKDEDetector.load(tmp_path / "d", device="cpu")
            except (ValueError, OSError):  # the latter: weights that are not on this machine
                continue
            X = rows(10, loaded.n_features_in_) if loaded.features_ is None else images
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    scores = loaded.score_samples(X)
                except ValueError as error:
                    if "returned NaN or infinite features" in str(error):  # by images over a tiny deviation
                        continue
                    raise
                labels = loaded.predict(X)
                with contextlib.suppress(ValueError):  # settings that a fit refuses in words
                    loaded.partial_fit(X)
            assert not (np.isnan(scores) & (labels == 1)).any()
            loaded.save(tmp_path / "again")


def test_a_changed_file_with_a_right_checksum_is_refused_in_words_or_scores(tmp_path):
    fuzz_files(tmp_path, 40, [None, ScatteringFeatures(scales=2, orientations=4, image_size=32)])


@pytest.mark.long
def test_a_changed_file_with_a_right_checksum_is_refused_in_words_or_scores_at_length(tmp_path):
    extractors = [None, ScatteringFeatures(scales=2, orientations=4, image_size=32), tiny(layers=["layer1", "layer3"])]
    fuzz_files(tmp_path, 2000, extractors)


@pytest.mark.parametrize("deep", ["[" * 100_000, '{"a":' * 100_000])
def test_a_header_that_is_nested_too_deep_is_refused(deep, tmp_path):
    data = safetensors.torch.save({"mean": torch.ones(1)}, {"dfkde-sklearn": deep})
    (tmp_path / "d").write_bytes(data)
    with pytest.raises(ValueError, match="or it is damaged"):
        DFKDEDetector.load(tmp_path / "d")


# ---- the old file or the new one


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_failure_while_writing_leaves_the_old_file(moment, tmp_path, monkeypatch):
    path = tmp_path / "d"
    detector = small_file(path)
    before = path.read_bytes()

    def fail(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(*((os, "fsync") if moment == "fsync" else (Path, "replace")), fail)
    detector.offset_ = 1.0
    with pytest.raises(OSError, match="no space"):
        detector.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["d"]


def test_a_killed_process_leaves_the_old_file(tmp_path):
    path = tmp_path / "d"
    small_file(path)
    before = path.read_bytes()
    script = f"""
        import os, pathlib, signal
        from dfkde_sklearn import _files
        pathlib.Path.replace = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
        _files.write_file({str(path)!r}, b"new")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert done.returncode == -9
    assert path.read_bytes() == before
    detector = DFKDEDetector.load(path)
    detector.offset_ = 1.0
    detector.save(path)
    assert DFKDEDetector.load(path).offset_ == 1.0


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "d")
    small_file(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "d").is_file()


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder"):
        small_file(tmp_path)


# ---- backbones


def test_a_module_is_given_anew_and_has_to_be_the_same(tmp_path):
    network = timm.create_model("test_resnet", num_classes=0).eval()
    detector = DFKDEDetector.original(tiny(backbone=network), n_components=3).fit(pictures(10))
    detector.save(tmp_path / "d")
    with pytest.raises(ValueError, match="backbone=MODULE"):
        DFKDEDetector.load(tmp_path / "d")
    loaded = DFKDEDetector.load(tmp_path / "d", backbone=network, device="cpu")
    np.testing.assert_array_equal(loaded.score_samples(pictures(2)), detector.score_samples(pictures(2)))
    assert loaded.features.backbone is network
    with torch.no_grad():
        next(network.parameters()).add_(1)
    with pytest.raises(ValueError, match="weights of backbone 'test_resnet"):
        DFKDEDetector.load(tmp_path / "d", backbone=network)


def test_weights_that_are_not_those_of_the_fit_are_refused(tmp_path):
    file = tmp_path / "weights.safetensors"
    network = timm.create_model("test_resnet", num_classes=0)
    safetensors.torch.save_file(network.state_dict(), file)
    detector = DFKDEDetector.original(tiny(weights=file), n_components=3).fit(pictures(10))
    detector.save(tmp_path / "d")
    expected = detector.score_samples(pictures(2))
    elsewhere = file.rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(FileNotFoundError, match=re.escape("weights.safetensors")):
        DFKDEDetector.load(tmp_path / "d")
    loaded = DFKDEDetector.load(tmp_path / "d", weights=elsewhere, device="cpu")
    np.testing.assert_array_equal(loaded.score_samples(pictures(2)), expected)
    safetensors.torch.save_file(timm.create_model("test_resnet", num_classes=0).state_dict(), elsewhere)
    with pytest.raises(ValueError, match="not those that the detector was fitted with"):
        DFKDEDetector.load(tmp_path / "d", weights=elsewhere)


def test_load_does_not_ask_the_network_unless_told_to(tmp_path, monkeypatch):
    detector = DFKDEDetector.original(tiny(), n_components=3).fit(pictures(10))
    detector.features.pretrained = detector.features_.pretrained = True
    detector.features_.seed_ = None
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    detector.save(tmp_path / "d")
    asked = []

    def ask(request, timeout):
        asked.append(request.full_url)
        raise OSError("no network here")

    monkeypatch.setattr(backbones.urllib.request, "urlopen", ask)
    with pytest.raises(OSError, match="download=False"):
        DFKDEDetector.load(tmp_path / "d")
    assert asked == []
    with pytest.raises(OSError, match="no network here"):
        DFKDEDetector.load(tmp_path / "d", download=True)
    assert len(asked) == 1


def test_arguments_that_the_file_has_no_use_for_are_refused(tmp_path):
    DFKDEDetector.original(tiny(), n_components=3).fit(pictures(10)).save(tmp_path / "named")
    with pytest.raises(ValueError, match="by name: load it without backbone="):
        DFKDEDetector.load(tmp_path / "named", backbone=torch.nn.Identity())
    extractor = ScatteringFeatures(scales=2, orientations=4, image_size=32)
    DFKDEDetector.original(extractor, n_components=3).fit(pictures(10)).save(tmp_path / "scattering")
    with pytest.raises(ValueError, match="has no backbone"):
        DFKDEDetector.load(tmp_path / "scattering", weights="file")
    small_file(tmp_path / "rows")
    with pytest.raises(ValueError, match="no feature extractor"):
        DFKDEDetector.load(tmp_path / "rows", weights="file")


def test_what_a_file_cannot_hold_is_refused(tmp_path):
    with pytest.raises(NotFittedError):
        DFKDEDetector.original().save(tmp_path / "d")
    flat = FunctionTransformer(lambda images: images.reshape(len(images), -1).astype(np.float32))
    detector = DFKDEDetector.original(flat, n_components=3).fit(pictures(10))
    with pytest.raises(TypeError, match=r"not FunctionTransformer.*joblib"):
        detector.save(tmp_path / "d")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("parameters", [{"scaling": "norm"}, {"features": None}, {"bandwidth": -1}])
def test_parameters_that_contradict_the_fit_are_refused_before_a_file_is_written(parameters, tmp_path):
    extractor = ScatteringFeatures(scales=2, orientations=4, image_size=32)
    detector = DFKDEDetector.original(extractor, n_components=3).fit(pictures(10))
    with pytest.raises(ValueError, match=next(iter(parameters))):
        detector.set_params(**parameters).save(tmp_path / "d")
    assert list(tmp_path.iterdir()) == []


# ---- pickles


def test_pickle_and_joblib_keep_a_backbone_by_name(tmp_path):
    detector = DFKDEDetector.original(tiny(), n_components=3).fit(pictures(10))
    joblib.dump(detector, tmp_path / "d.joblib")
    data = pickle.dumps(detector)
    n_weights = sum(p.numel() for p in timm.create_model("test_resnet", num_classes=0).parameters())
    assert len(data) < n_weights
    for twin in (pickle.loads(data), joblib.load(tmp_path / "d.joblib")):
        np.testing.assert_array_equal(twin.score_samples(pictures(3)), detector.score_samples(pictures(3)))


def test_skops_loads_a_detector_with_the_types_that_the_documentation_lists():
    skops = pytest.importorskip("skops.io", reason="skops is not installed")
    trusted = {
        "dfkde_sklearn.DFKDEDetector",
        "dfkde_sklearn.TimmFeatures",
        "dfkde_sklearn.ScatteringFeatures",
    }
    for extractor in (tiny(), ScatteringFeatures(scales=2, orientations=4, image_size=32)):
        detector = DFKDEDetector(extractor, n_components=3, residual="box").fit(pictures(10))
        data = skops.dumps(detector)
        assert set(skops.get_untrusted_types(data=data)) <= trusted
        loaded = skops.loads(data, trusted=sorted(trusted))
        np.testing.assert_array_equal(loaded.score_samples(pictures(3)), detector.score_samples(pictures(3)))
