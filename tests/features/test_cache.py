"""The feature cache: each image goes through a network once, nothing stale is read, no damage changes a result."""

import contextlib
import hashlib
import os
import pickle
import resource
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.model_selection import GridSearchCV, HalvingGridSearchCV, cross_val_score
from torch import nn

from dfkde_sklearn import (
    AnomalyClassifier,
    DFKDEDetector,
    ScatteringFeatures,
    TimmFeatures,
    _images,
    cache_size,
    clear_cache,
)
from dfkde_sklearn._cli.main import main
from dfkde_sklearn._features import backbones, cache_stores, scattering
from dfkde_sklearn._features.backbones import Backbone
from dfkde_sklearn._images import as_images

N = 24
GRID_LAYERS = [["first"], ["second"], ["first", "third"]]


class Layer(nn.Conv2d):
    """Counts its runs, in a dictionary: a number that changes would make it another layer each time."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, 3)
        self.count = {"runs": 0}

    def forward(self, x):
        self.count["runs"] += 1
        return super().forward(x)

    @property
    def n_runs(self):
        return self.count["runs"]


class Network(nn.Module):
    """Three small layers; counts the images that it sees."""

    def __init__(self, seed=0, slope=0.1):
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, 16, 16), "crop_pct": 1.0}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.second, self.third = (Layer(n, n + 1) for n in (3, 4, 5))
        self.slope = slope
        self.count = {"seen": 0}

    @property
    def n_seen(self):
        return self.count["seen"]

    def forward(self, x):
        self.count["seen"] += len(x)
        for layer in (self.first, self.second, self.third):
            x = nn.functional.leaky_relu(layer(x), self.slope)
        return x


class Steeper(Network):
    def forward(self, x):
        self.count["seen"] += len(x)
        for layer in (self.first, self.second, self.third):
            x = 2 * nn.functional.leaky_relu(layer(x), self.slope)
        return x


@pytest.fixture(autouse=True)
def _nothing_kept_before():
    clear_cache()
    yield
    clear_cache()


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (N, 20, 20, 3), dtype=np.uint8)


@pytest.fixture
def paths(images, tmp_path):
    (tmp_path / "images").mkdir()
    paths = [str(tmp_path / "images" / f"{i:02d}.png") for i in range(N)]
    for image, path in zip(images, paths, strict=True):
        Image.fromarray(image).save(path)
    return paths


@pytest.fixture(params=["memory", "folder"])
def cache(request, tmp_path):
    return True if request.param == "memory" else tmp_path / "cache"


def extractor(network=None, layers=("first", "second", "third"), **parameters):
    return TimmFeatures(network or Network(), **{"layers": list(layers), "device": "cpu", "batch_size": 8} | parameters)


def n_computed(features, X, reference=True):
    """Return how many images go through the network when X is described, and check what comes out."""
    features = clone(features).fit(X)
    before = features.backbone.n_seen
    found = features.transform(X)
    n = features.backbone.n_seen - before
    if reference:
        expected = clone(features).set_params(cache=None).fit(X).transform(X)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    return n


@contextlib.contextmanager
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ---- every image once


def test_a_second_pass_reads_everything_bit_for_bit(cache, paths):
    features = extractor(cache=cache).fit(paths)
    first = features.transform(paths)
    n_seen = features.backbone.n_seen
    np.testing.assert_array_equal(features.transform(paths), first)
    np.testing.assert_array_equal(
        clone(features).set_params(batch_size=1).fit(paths).transform(paths[::-1]), first[::-1]
    )
    assert features.backbone.n_seen == n_seen


@pytest.mark.parametrize("batch_size", [1, 8, 100])
def test_without_a_cache_and_at_the_first_pass_the_features_are_the_same(cache, paths, batch_size):
    plain = extractor(batch_size=batch_size).fit_transform(paths)
    np.testing.assert_array_equal(extractor(batch_size=batch_size, cache=cache).fit_transform(paths), plain)


def test_only_new_images_go_through_the_network(cache, paths):
    features = extractor(cache=cache)
    assert n_computed(features, paths[:10]) == 10
    assert n_computed(features, paths[5:20]) == 10
    assert n_computed(features, paths) == 4


def test_equal_images_go_through_the_network_once(cache, images):
    X = np.concatenate([images[:3], images[:3], images[1:2]])
    assert n_computed(extractor(cache=cache), X) == 3


def test_each_layer_is_kept_by_itself(cache, paths):
    network = Network()
    assert n_computed(extractor(network, ["first", "third"], cache=cache), paths) == N
    assert n_computed(extractor(network, ["third", "first"], cache=cache), paths) == 0
    assert n_computed(extractor(network, ["third"], cache=cache), paths) == 0
    assert n_computed(extractor(network, ["first", "second"], cache=cache), paths) == N
    assert n_computed(extractor(network, ["second", "third", "first"], cache=cache), paths) == 0


def test_a_missing_layer_is_computed_without_the_later_ones(cache, paths):
    network = Network()
    extractor(network, ["third"], cache=cache).fit_transform(paths)
    features = extractor(network, ["first", "third"], cache=cache).fit(paths)
    n_runs = network.first.n_runs, network.second.n_runs, network.third.n_runs
    features.transform(paths)
    assert (network.first.n_runs, network.second.n_runs, network.third.n_runs) == (n_runs[0] + N // 8, *n_runs[1:])


def test_a_search_over_layers_sends_each_image_through_once(cache, paths):
    y = np.arange(N) % 4 == 0
    network = Network()
    grid = {
        "detector__features__layers": GRID_LAYERS,
        "detector__n_components": [1, 2],
    }

    def search(cache):
        detector = DFKDEDetector.original(extractor(network, cache=cache))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*training rows cannot be scored")
            classifier = AnomalyClassifier(detector)
            return GridSearchCV(classifier, grid, scoring="roc_auc", cv=3, error_score="raise").fit(paths, y)

    plain = search(None)
    features = extractor(network, cache=cache).fit(paths)
    for layers in GRID_LAYERS:
        clone(features).set_params(layers=layers).fit(paths)  # what the layers return is found out with blank images
    before = network.n_seen
    features.transform(paths)
    cached = search(cache)
    assert network.n_seen - before == N
    again = search(cache)
    assert network.n_seen - before == N
    for found in (cached, again):
        np.testing.assert_array_equal(found.cv_results_["mean_test_score"], plain.cv_results_["mean_test_score"])
        assert found.best_params_ == plain.best_params_


def test_without_filling_it_first_a_search_costs_one_pass_for_each_new_layer(paths):
    network = Network()
    detector = DFKDEDetector.original(extractor(network, cache=True), n_components=2)
    for layers in GRID_LAYERS:
        extractor(network, layers).fit(paths)
    before = network.n_seen
    GridSearchCV(detector, {"features__layers": GRID_LAYERS}, error_score="raise").fit(paths)
    # "first", "second", and "third", for which "first" is there.
    assert network.n_seen - before == 3 * N


def test_halving_searches_read_it_too(paths):
    network = Network()
    features = extractor(network, cache=True).fit(paths)
    features.transform(paths)
    before = network.n_seen
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        HalvingGridSearchCV(
            DFKDEDetector.original(features), {"n_components": [1, 2, 3]}, min_resources=10, cv=2, error_score="raise"
        ).fit(paths)
    assert network.n_seen == before


def test_a_study_of_optuna_sends_each_image_through_once(cache, paths):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    y = np.arange(N) % 4 == 0
    network = Network()

    def auroc(trial):
        layer = trial.suggest_categorical("layer", ["first", "second", "third"])
        detector = DFKDEDetector.original(
            extractor(network, [layer], cache=cache), n_components=trial.suggest_int("n_components", 1, 3)
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*training rows cannot be scored")
            return cross_val_score(AnomalyClassifier(detector), paths, y, cv=3, scoring="roc_auc").mean()

    for layer in ("first", "second", "third"):
        extractor(network, [layer]).fit(paths)  # what the layers return is found out with blank images
    features = extractor(network, cache=cache).fit(paths)
    before = network.n_seen
    features.transform(paths)
    sampler = optuna.samplers.GridSampler({"layer": ["first", "second", "third"], "n_components": [1, 3]}, seed=0)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(auroc, n_trials=6)
    assert len({trial.params["layer"] for trial in study.trials}) == 3
    assert network.n_seen - before == N


def test_processes_of_a_search_share_a_folder(paths, tmp_path):
    features = ScatteringFeatures(scales=2, orientations=2, image_size=16, cache=str(tmp_path / "cache"), device="cpu")
    detector = DFKDEDetector.original(features, n_components=2)
    grid = {"bandwidth": [0.3, 0.6]}
    parallel = GridSearchCV(detector, grid, cv=2, n_jobs=2, error_score="raise").fit(paths)
    assert cache_size(tmp_path / "cache").n_rows == N
    alone = GridSearchCV(clone(detector).set_params(features__cache=None), grid, cv=2).fit(paths)
    np.testing.assert_allclose(parallel.cv_results_["mean_test_score"], alone.cv_results_["mean_test_score"], rtol=1e-5)


def test_scattering_features_are_read_bit_for_bit(cache, paths, monkeypatch):
    features = ScatteringFeatures(scales=2, orientations=2, image_size=16, cache=cache, device="cpu").fit(paths)
    first = features.transform(paths)
    np.testing.assert_array_equal(first, clone(features).set_params(cache=None).fit(paths).transform(paths))
    monkeypatch.setattr(scattering, "scattering_coefficients", None)
    np.testing.assert_array_equal(features.transform(paths[::-1]), first[::-1])


@pytest.mark.parametrize(
    "parameters", [{"scales": 1}, {"orientations": 3}, {"image_size": 24}, {"white_level": 100}], ids=str
)
def test_scattering_with_other_parameters_misses(cache, paths, parameters):
    features = ScatteringFeatures(scales=2, orientations=2, image_size=16, cache=cache, device="cpu")
    features.fit_transform(paths)
    other = clone(features).set_params(**parameters)
    np.testing.assert_array_equal(other.fit_transform(paths), clone(other).set_params(cache=None).fit_transform(paths))


# ---- nothing stale


def test_an_overwritten_file_misses_whatever_its_name_size_and_time(cache, paths, tmp_path):
    raw = [tmp_path / f"{i}.bmp" for i in range(2)]
    for path, value in zip(raw, (10, 200), strict=True):
        Image.new("RGB", (20, 20), (value,) * 3).save(path)
    features = extractor(cache=cache).fit(raw)
    first = features.transform(raw)
    status = raw[0].stat()
    raw[0].write_bytes(raw[1].read_bytes())
    os.utime(raw[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    np.testing.assert_array_equal(features.transform(raw), first[[1, 1]])


def test_a_settled_file_is_read_once_and_again_after_it_was_written_to(tmp_path, monkeypatch):
    file = tmp_path / "image.bmp"
    Image.new("RGB", (8, 8), (10,) * 3).save(file)
    opened = []
    digest_of = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *call: opened.append(call) or digest_of(*call))
    looks = as_images([file, file])
    first = looks.digest(0)
    assert looks.digest(1) == first
    assert len(opened) == 2  # just written: another change may not show
    monkeypatch.setattr(_images, "SETTLED", -1.0)
    assert [looks.digest(0), looks.digest(1)] == [first] * 2
    assert len(opened) == 3
    status = file.stat()
    time.sleep(0.05)  # more than a tick of the clock of the file system
    Image.new("RGB", (8, 8), (200,) * 3).save(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert looks.digest(0) != first
    assert looks.digest(0) == hashlib.sha256(file.read_bytes()).digest()


def test_a_moved_file_hits(cache, paths, tmp_path):
    features = extractor(cache=cache).fit(paths)
    first = features.transform(paths)
    n_seen = features.backbone.n_seen
    moved = [Path(path).rename(tmp_path / f"moved_{i}.png") for i, path in enumerate(paths)]
    np.testing.assert_array_equal(features.transform(moved), first)
    assert features.backbone.n_seen == n_seen


@pytest.mark.parametrize("form", [np.array, list, torch.tensor, lambda X: [Image.fromarray(x) for x in X]])
def test_images_in_memory_are_found_by_their_pixels(cache, images, form):
    features = extractor(cache=cache).fit(images)
    first = features.transform(images)
    n_seen = features.backbone.n_seen
    np.testing.assert_array_equal(features.transform(form(images)), first)
    assert features.backbone.n_seen == n_seen
    changed = images.copy()
    changed[3, 19, 19, 2] ^= 1
    features.transform(form(changed))
    assert features.backbone.n_seen == n_seen + 1


def _more_weight(network):
    with torch.no_grad():
        network.second.weight[0, 0, 0, 0] += 1e-3


def _data_of_weight(network):
    network.third.bias.data[0] += 1e-3  # torch's version counter does not see this


def _another_slope(network):
    network.slope = 0.3


def _another_padding(network):
    network.first.stride = (2, 2)


def _a_hook(network):
    network.first.register_forward_hook(lambda *call: call[2] * 2)


def _another_forward(network):
    network.forward = lambda x, forward=network.forward: forward(x + 0.5)


def _another_class(network):
    network.__class__ = Steeper


@pytest.mark.parametrize(
    "change",
    [_more_weight, _data_of_weight, _another_slope, _another_padding, _a_hook, _another_forward, _another_class],
)
def test_a_changed_network_misses(cache, paths, change):
    network = Network()
    assert n_computed(extractor(network, cache=cache), paths) == N
    change(network)
    assert n_computed(extractor(network, cache=cache), paths) == N


def test_a_network_changed_after_fit_is_not_mistaken_for_what_it_was(cache, paths):
    network = Network()
    features = extractor(network, cache=cache).fit(paths)
    features.transform(paths)
    _more_weight(network)
    np.testing.assert_array_equal(
        features.transform(paths), clone(features).set_params(cache=None).fit(paths).transform(paths)
    )


def test_a_copy_of_a_network_hits(cache, paths):
    network = Network()
    n_computed(extractor(network, cache=cache), paths)
    assert n_computed(extractor(pickle.loads(pickle.dumps(network)), cache=cache), paths) == 0
    assert n_computed(extractor(Network(), cache=cache), paths) == 0


def scripted(n_in=3, seed=0, frozen=False):
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.manual_seed(seed)
        network = torch.jit.script(nn.Sequential(nn.Conv2d(n_in, 2, 3), nn.ReLU()).eval())
        return torch.jit.freeze(network) if frozen else network


def traced(sign):
    class Signed(nn.Module):
        def forward(self, x):
            return sign(x)

    return torch.fx.symbolic_trace(Signed())


def with_buffer(value):
    module = nn.Identity()
    module.register_buffer("kept", torch.tensor([value]), persistent=False)
    return module


def with_attribute(value):
    module = nn.Identity()
    module.value = value
    return module


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (nn.ReLU(), nn.Sigmoid()),
        (nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)),
        (nn.Sequential(nn.ReLU(), nn.Tanh()), nn.Sequential(nn.Tanh(), nn.ReLU())),
        (with_buffer(1.0), with_buffer(2.0)),
        (with_attribute([(1, torch.ones(2))]), with_attribute([(1, torch.zeros(2))])),
        (with_attribute(torch.sin), with_attribute(torch.cos)),
        (with_attribute(nn.functional.relu), with_attribute(nn.functional.gelu)),
        (traced(torch.sin), traced(torch.cos)),
        (scripted(), scripted(seed=1)),
        (scripted(frozen=True), scripted(frozen=True, seed=1)),
    ],
)
def test_what_decides_the_outputs_of_a_network_decides_its_fingerprint(one, other):
    assert Backbone(one).fingerprint == Backbone(one).fingerprint
    assert Backbone(one).fingerprint != Backbone(other).fingerprint


def test_a_named_backbone_is_looked_at_once(paths, monkeypatch):
    features = TimmFeatures("test_resnet", pretrained=False, random_state=0, device="cpu", cache=True).fit(paths)
    first = features.transform(paths)
    monkeypatch.setattr(backbones, "weights_hash", None)
    np.testing.assert_array_equal(clone(features).fit_transform(paths), first)


def test_a_network_has_the_same_fingerprint_in_every_process():
    call = (
        "import torch; from torch import nn; from dfkde_sklearn._features.backbones import Backbone;"
        "torch.manual_seed(0);"
        "print(Backbone(nn.Transformer(8, 2, 1, 1, 16, batch_first=True)).fingerprint, end='')"
    )
    # Strings, and with them sets, have other hashes in each process.
    command = [sys.executable, "-c", call]
    done = subprocess.run(command, capture_output=True, check=True, env=os.environ | {"PYTHONHASHSEED": "1"})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert done.stdout.decode() == Backbone(nn.Transformer(8, 2, 1, 1, 16, batch_first=True)).fingerprint


@pytest.mark.parametrize(
    "parameters",
    [
        {"pooling": "max"},
        {"pooling": "gem"},
        {"image_size": 12},
        {"image_size": (16, 12)},
        {"white_level": 100},
        {"reducing_gap": 2},
    ],
    ids=str,
)
def test_other_parameters_miss(cache, paths, parameters):
    network = Network()
    n_computed(extractor(network, cache=cache), paths)
    assert n_computed(extractor(network, cache=cache, **parameters), paths) == N


@pytest.mark.parametrize(
    "config",
    [
        {"mean": (0.1, 0.2, 0.3)},
        {"std": (0.1, 0.2, 0.3)},
        {"interpolation": "bilinear"},
        {"crop_pct": 0.5},
    ],
    ids=str,
)
def test_other_preprocessing_misses(cache, paths, config):
    network = Network()
    n_computed(extractor(network, cache=cache, crop="center"), paths)
    network.pretrained_cfg |= config
    assert n_computed(extractor(network, cache=cache, crop="center"), paths) == N


@pytest.mark.parametrize("crop", ["center", "border"])
def test_another_crop_misses(cache, paths, crop):
    network = Network()
    n_computed(extractor(network, cache=cache), paths)
    assert n_computed(extractor(network, cache=cache, crop=crop), paths) == N
    assert n_computed(extractor(network, cache=cache), paths) == 0


@pytest.mark.parametrize("name", ["torch.__version__", "PIL.__version__", "dfkde_sklearn.__version__"])
def test_other_versions_miss(cache, paths, name, monkeypatch):
    n_computed(extractor(cache=cache), paths)
    monkeypatch.setattr(name, "0.0.1")
    assert n_computed(extractor(cache=cache), paths) == N


@pytest.mark.parametrize("attribute", ["layer_formats_", "layer_prefix_tokens_"])
def test_a_layer_read_in_another_way_misses(cache, paths, attribute):
    features = extractor(layers=["first"], cache=cache).fit(paths)
    expected = features.transform(paths)
    setattr(features, attribute, {"layer_formats_": ["NHWC"], "layer_prefix_tokens_": [1]}[attribute])
    n_runs = features.backbone.first.n_runs
    if attribute == "layer_formats_":
        features.layer_widths_ = [features.backbone.first(torch.zeros(1, 3, 16, 16)).shape[-1]]
        n_runs += 1
    assert not np.array_equal(features.transform(paths), expected)
    assert features.backbone.first.n_runs > n_runs


def test_other_arithmetic_misses(cache, paths):
    n_computed(extractor(cache=cache), paths)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert n_computed(extractor(cache=cache), paths, reference=False) == N
    assert n_computed(extractor(cache=cache), paths) == 0


def test_a_file_that_changes_while_it_is_read_is_an_error_and_not_a_stale_entry(cache, paths):
    network = Network()
    features = extractor(network, cache=cache).fit(paths)

    def overwrite(*call):
        Path(paths[3]).write_bytes(Path(paths[4]).read_bytes())

    hook = network.third.register_forward_hook(overwrite)
    with pytest.raises(ValueError, match=r"03\.png was written to while its features were computed") as error:
        features.transform(paths)
    assert error.value.__traceback__
    assert network.training  # given back at once, not with the traceback
    hook.remove()
    np.testing.assert_array_equal(features.transform(paths[3:4]), features.transform(paths[4:5]))


# ---- nothing lost


def test_a_broken_image_loses_only_its_batch(cache, paths):
    network = Network()
    Path(paths[20]).write_bytes(b"not an image")
    features = extractor(network, cache=cache).fit(paths)
    with pytest.raises(ValueError, match=r"20\.png: the file is not an image"):
        features.transform(paths)
    Path(paths[20]).write_bytes(Path(paths[0]).read_bytes())
    assert n_computed(extractor(network, cache=cache), paths) == 7  # 16 were kept, and one is a copy


def test_a_killed_process_leaves_what_it_had_done(paths, tmp_path, monkeypatch):
    script = """
import os, signal, sys
from dfkde_sklearn import ScatteringFeatures
from dfkde_sklearn._features import scattering

whole, n_batches = scattering.scattering_coefficients, []

def scattering_coefficients(*arguments):
    n_batches.append(1)
    if len(n_batches) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*arguments)

scattering.scattering_coefficients = scattering_coefficients
features = ScatteringFeatures(scales=2, orientations=2, image_size=16, batch_size=8, device="cpu", cache=sys.argv[1])
features.fit_transform(sys.argv[2:])
"""
    folder = tmp_path / "cache"
    done = subprocess.run([sys.executable, "-c", script, str(folder), *paths], check=False)
    assert done.returncode == -signal.SIGKILL
    features = ScatteringFeatures(scales=2, orientations=2, image_size=16, device="cpu").fit(paths)
    expected = features.transform(paths)
    n_computed, whole = [], scattering.scattering_coefficients

    def counted(batch, *arguments):
        n_computed.append(len(batch))
        return whole(batch, *arguments)

    monkeypatch.setattr(scattering, "scattering_coefficients", counted)
    with no_warning():
        found = features.set_params(cache=folder).transform(paths)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert sum(n_computed) == N - 16


def test_processes_write_at_the_same_time(paths, tmp_path):
    script = """
import sys, warnings
import numpy as np
from dfkde_sklearn import ScatteringFeatures
warnings.simplefilter("error")
_, result, folder, *paths = sys.argv
extractor = ScatteringFeatures(scales=2, orientations=2, image_size=16, batch_size=2, cache=folder, device="cpu")
np.save(result, extractor.fit_transform(paths))
"""
    results = [tmp_path / f"{i}.npy" for i in range(2)]
    workers = [
        subprocess.Popen([sys.executable, "-c", script, str(result), str(tmp_path / "cache"), *paths])
        for result in results
    ]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    assert cache_size(tmp_path / "cache").n_rows == N
    np.testing.assert_array_equal(np.load(results[0]), np.load(results[1]))


def test_threads_share_the_memory(paths):
    network = Network()
    features = extractor(network, cache=True).fit(paths)
    expected = extractor(network).fit_transform(paths)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: features.transform(paths), range(4)):
            np.testing.assert_array_equal(found, expected)


def damage(file, how):
    content = bytearray(file.read_bytes())
    if how == "not a database":
        content[:100] = b"x" * 100
    elif how == "cut":
        del content[len(content) // 2 :]
    elif how == "empty":
        content.clear()
    elif how == "pages":
        content[4096:] = b"\xa5" * (len(content) - 4096)
    file.write_bytes(content)


@pytest.mark.parametrize("how", ["not a database", "cut", "pages"])
def test_a_damaged_file_is_reported_and_replaced(how, paths, tmp_path):
    features = extractor(cache=tmp_path).fit(paths)
    first = features.transform(paths)
    damage(tmp_path / cache_stores.FILE_NAME, how)
    with pytest.warns(UserWarning, match=r"damaged .*Its file is now .*damaged-\d+, which may be deleted"):
        found = features.transform(paths)
    np.testing.assert_array_equal(found, first)
    n_seen = features.backbone.n_seen
    with no_warning():
        features.transform(paths)  # fills the new file, where the damage showed only after it was opened
        n_seen = features.backbone.n_seen
        np.testing.assert_array_equal(features.transform(paths), first)
    assert features.backbone.n_seen == n_seen
    assert len(list(tmp_path.glob("*.damaged-*"))) == 1


def test_an_emptied_file_is_filled_again(paths, tmp_path):
    features = extractor(cache=tmp_path).fit(paths)
    first = features.transform(paths)
    damage(tmp_path / cache_stores.FILE_NAME, "empty")
    with no_warning():
        np.testing.assert_array_equal(features.transform(paths), first)
    assert cache_size(tmp_path).n_rows == 3 * N


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE features SET row = zeroblob(length(row)) WHERE rowid = 5",
        "UPDATE features SET row = substr(row, 1, length(row) - 4) WHERE rowid = 5",
        "UPDATE features SET row = 'text' WHERE rowid = 5",
        "UPDATE features SET row = (SELECT row FROM features WHERE rowid = 8) WHERE rowid = 5",
    ],
)
def test_a_damaged_row_is_reported_and_computed_again(statement, paths, tmp_path):
    features = extractor(cache=tmp_path).fit(paths)
    first = features.transform(paths)
    with contextlib.closing(sqlite3.connect(tmp_path / cache_stores.FILE_NAME)) as connection:
        connection.execute(statement)
        connection.commit()
    n_seen = features.backbone.n_seen
    with pytest.warns(UserWarning, match="1 of 72 entries asked for are damaged"):
        np.testing.assert_allclose(features.transform(paths), first, rtol=1e-6)
    assert features.backbone.n_seen == n_seen + 1
    with no_warning():
        features.transform(paths)
    assert features.backbone.n_seen == n_seen + 1


def folder_call(folder, call):
    """Ask a folder as a feature extractor does; return the answer, and how often it warned."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        store = cache_stores.FolderStore(folder)
        try:
            answer = call(store)
        finally:
            store.close()
    assert {warning.category for warning in caught} <= {UserWarning}
    return answer, len(caught)


ROWS = {bytes([i]) * 32: np.random.default_rng(i).normal(size=6).astype(np.float32) for i in range(5)}


@pytest.fixture(scope="module")
def cache_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    folder_call(folder, lambda store: store.put(ROWS))
    return (folder / cache_stores.FILE_NAME).read_bytes()


def check_damaged_cache(content, folder):
    """Check that a damaged file gives no wrong row, and that what it lost is kept again from then on."""
    (folder / cache_stores.FILE_NAME).write_bytes(content)
    try:
        for _ in range(3):
            for call in (lambda store: store.get(list(ROWS)), lambda store: store.put(ROWS)):
                for key, row in folder_call(folder, call)[0].items():
                    np.testing.assert_array_equal(row, ROWS[key])
    except ValueError as error:
        # Bytes that say whose file it is are believed: it may be another's.
        if not any(words in str(error) for words in ("another program", "newer version")):
            raise
        return
    found, n_warnings = folder_call(folder, lambda store: store.get(list(ROWS)))
    assert (found.keys(), n_warnings) == (ROWS.keys(), 0)


@pytest.mark.parametrize(
    ("at", "to"),
    [
        (b"features", 0xFF),  # a message that quotes the schema is no UTF-8 any more
        (b"CREATE TABLE", 0xFF),
        (b"features", 0x7A),  # no such table
        (b"key BLOB", 0x7A),  # no such column
        (18, 3),  # "read-only"
        (b"SQLite format", 0),
    ],
)
def test_a_damaged_schema_is_set_aside_like_other_damage(at, to, cache_file, tmp_path):
    content = bytearray(cache_file)
    content[at if isinstance(at, int) else cache_file.index(at)] = to
    check_damaged_cache(bytes(content), tmp_path)
    assert len(list(tmp_path.glob("*.damaged-*"))) == 1


def fuzz_cache(cache_file, tmp_path, n):
    rng = np.random.default_rng(0)
    used = np.flatnonzero(np.frombuffer(cache_file, np.uint8))
    for number in range(n):
        content = bytearray(cache_file)
        content[rng.choice(used)] ^= rng.integers(1, 256)
        if number % 10 == 0:
            del content[rng.integers(len(content)) :]
        folder = tmp_path / str(number)
        folder.mkdir()
        check_damaged_cache(bytes(content), folder)


def test_no_damaged_byte_of_a_cache_changes_a_row_or_makes_it_useless(cache_file, tmp_path):
    fuzz_cache(cache_file, tmp_path, 25)


@pytest.mark.long
def test_no_damaged_byte_of_a_cache_changes_a_row_or_makes_it_useless_at_length(cache_file, tmp_path):
    fuzz_cache(cache_file, tmp_path, 3000)


@contextlib.contextmanager
def bounded_files(n_bytes):
    """Let no file grow beyond so many bytes, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_cache_is_emptied_where_no_file_can_grow(tmp_path):
    folder_call(tmp_path, lambda store: store.put(ROWS))
    # Not even the index of SQLite's log, of 32 KiB, can be made.
    with bounded_files(4096), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nor an empty cache
        clear_cache(tmp_path)
    assert cache_size(tmp_path).n_rows == 0
    assert folder_call(tmp_path, lambda store: store.put(ROWS))[1] == 0
    assert cache_size(tmp_path).n_rows == len(ROWS)


def test_a_cache_on_a_full_disk_is_emptied(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if sys.platform != "linux" or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        rows = {bytes([i]) * 32: np.ones(2000, np.float32) for i in range(50)}
        folder_call(disk, lambda store: store.put(rows))
        with contextlib.suppress(OSError), (disk / "other").open("wb", buffering=0) as file:
            while file.write(b"x" * 512):
                pass
        with no_warning():
            clear_cache(disk)
        assert cache_size(disk).n_rows == 0
        assert folder_call(disk, lambda store: store.put(ROWS))[1] == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_file_of_another_program_is_not_removed_on_a_full_disk(tmp_path):
    file = tmp_path / cache_stores.FILE_NAME
    with contextlib.closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE letters (text)")
    content = file.read_bytes()
    with bounded_files(4096), pytest.raises((OSError, ValueError), match=r"cannot be emptied|another program"):
        clear_cache(tmp_path)
    assert file.read_bytes() == content


def test_a_full_disk_costs_the_cache_and_not_the_result(images, tmp_path):
    features = extractor(cache=tmp_path, batch_size=4).fit(images)
    expected = clone(features).set_params(cache=None).fit(images).transform(images)
    with bounded_files(20_000), pytest.warns(UserWarning, match="cannot be used .* computed and not kept") as caught:
        found = features.transform(images)
    np.testing.assert_array_equal(found, expected)
    assert len(caught) == 1
    with no_warning():
        np.testing.assert_array_equal(features.transform(images), expected)


def test_a_locked_file_is_waited_for_only_so_long(images, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_stores, "PATIENCE", 0.05)
    features = extractor(cache=tmp_path).fit(images)
    with contextlib.closing(sqlite3.connect(tmp_path / cache_stores.FILE_NAME)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        with pytest.warns(UserWarning, match=r"cannot be used \(database is locked\)"):
            found = features.transform(images)
    np.testing.assert_array_equal(found, clone(features).set_params(cache=None).fit(images).transform(images))


# ---- what cannot be a cache


def test_a_file_of_another_program_is_left_alone(images, tmp_path):
    file = tmp_path / cache_stores.FILE_NAME
    with contextlib.closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE letters (text)")
    content = file.read_bytes()
    for call in (lambda: extractor(cache=tmp_path).fit(images), lambda: clear_cache(tmp_path)):
        with pytest.raises(ValueError, match=r"is an SQLite file of another program\. Give another folder"):
            call()
    assert file.read_bytes() == content


def test_a_cache_of_a_newer_version_is_refused_and_left_alone(images, tmp_path):
    features = extractor(cache=tmp_path).fit(images)
    features.transform(images)
    with contextlib.closing(sqlite3.connect(tmp_path / cache_stores.FILE_NAME)) as connection:
        connection.execute("PRAGMA user_version = 7")
    for call in (features.fit, features.transform, lambda _: clear_cache(tmp_path)):
        with pytest.raises(ValueError, match=r"newer version \(its format is 7.*Update dfkde-sklearn"):
            call(images)
    with contextlib.closing(sqlite3.connect(tmp_path / cache_stores.FILE_NAME)) as connection:
        assert connection.execute("SELECT count(*) FROM features").fetchone() == (3 * N,)


def test_a_file_is_no_folder(images, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"cache='.*file' is a file. Give a folder"):
        extractor(cache=tmp_path / "file").fit(images)
    with pytest.raises(OSError, match=r"cache='.*below': the folder cannot be made"):
        extractor(cache=tmp_path / "file" / "below").fit(images)


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_computed(images, tmp_path, monkeypatch):
    # Permissions stop no administrator, so the question itself is answered.
    monkeypatch.setattr(os, "access", lambda *_: False)
    network = Network()
    with pytest.raises(PermissionError, match=r"cannot be written to. Give another folder, or cache=True"):
        extractor(network, cache=tmp_path).fit(images)
    assert network.n_seen == 0


@pytest.mark.parametrize("cache", [3, 1.5, ["folder"]])
def test_other_values_are_refused(cache, images):
    with pytest.raises(ValueError, match="The 'cache' parameter of TimmFeatures must be"):
        extractor(cache=cache).fit(images)


# ---- how much there is


def test_size_is_counted_and_cleared(cache, images):
    extractor(cache=cache).fit_transform(images)
    size = cache_size(cache)
    assert size.n_rows == 3 * N
    assert size.n_bytes > 4 * (4 + 5 + 6) * N
    clear_cache(cache)
    assert cache_size(cache).n_rows == 0
    assert cache_size(cache).n_bytes < size.n_bytes
    assert n_computed(extractor(cache=cache), images) == N


def test_memory_is_bounded_and_keeps_what_was_read_last(images, monkeypatch):
    one_row = 4 * 4 + cache_stores.ENTRY_BYTES
    monkeypatch.setattr(cache_stores, "MEMORY_BYTES", 10 * one_row)
    features = extractor(layers=["first"], cache=True)
    assert n_computed(features, images[:10]) == 10
    assert n_computed(features, images[:5]) == 0
    assert n_computed(features, images[10:15]) == 5  # 5 to 9 make room
    assert cache_size() == (10, 10 * one_row)
    assert n_computed(features, images[:5]) == 0
    assert n_computed(features, images[5:10]) == 5
    assert n_computed(features, images) > 0  # more than there is room for
    assert cache_size().n_bytes <= 10 * one_row


def test_there_is_nothing_to_count_where_there_is_no_cache(tmp_path):
    for call in (cache_size, clear_cache):
        with pytest.raises(FileNotFoundError, match=r"there is no features\.sqlite3 in this folder"):
            call(tmp_path)
        with pytest.raises(ValueError, match="cache=None is none"):
            call(None)
    assert list(tmp_path.iterdir()) == []


def test_false_and_none_keep_nothing(images):
    for cache in (False, None):
        extractor(cache=cache).fit_transform(images)
    assert cache_size().n_rows == 0


def test_the_command_tells_the_size_and_empties_it(images, tmp_path, capsys):
    extractor(cache=tmp_path).fit_transform(images)
    assert main(["cache", "size", str(tmp_path)]) == 0
    size = cache_size(tmp_path)
    assert f"Entries                 {3 * N}, one for each image and layer" in capsys.readouterr().out
    assert main(["cache", "clear", str(tmp_path)]) == 0
    assert "Entries                 0, one" in capsys.readouterr().out
    assert cache_size(tmp_path).n_bytes < size.n_bytes
    assert main(["cache", "size", str(tmp_path / "nowhere")]) == 2
    assert "error: cache=" in capsys.readouterr().err
