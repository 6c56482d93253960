"""``dfkde search``."""

import re
import shlex

import numpy as np
import pytest
from command_line import fact, run
from PIL import Image
from sklearn.metrics import roc_auc_score

from dfkde_sklearn import DFKDEDetector, PatchDFKDEDetector, ScatteringFeatures, TimmFeatures
from dfkde_sklearn._cli.main import parser
from dfkde_sklearn._cli.pasting import with_pasted_piece
from dfkde_sklearn._cli.search import Candidate, _recommended
from dfkde_sklearn._features import network
from dfkde_sklearn.datasets import load_mvtec_folder

TINY = ("--features", "scattering", "--image-size", "64")


def table(printed):
    """Return the rows of the table of settings, as words."""
    lines = printed.split("The settings, the best first:\n\n")[1].split("\n\n")[0].splitlines()
    return [line.split() for line in lines[1:]]


def use(printed):
    """Return the command that is recommended, as words after ``dfkde``."""
    line = printed.split("Use:\n\n")[1].splitlines()[0]
    program, *words = shlex.split(line)
    assert program == "dfkde"
    return words


def test_settings_are_measured_on_the_defects_of_a_test_folder(textures, capsys):
    assert run("search", textures, *TINY, "--bandwidth", "scott", "--bandwidth", "0.1") == 0
    printed = capsys.readouterr().out
    assert fact(printed, "Measured by") == f"AUROC of the images in {textures / 'test'}"
    data = load_mvtec_folder(textures)
    expected = {}
    for bandwidth in ("scott", 0.1):
        features = ScatteringFeatures(image_size=64, pooling=None)
        detector = PatchDFKDEDetector(features, bandwidth=bandwidth).fit(data.X_train)
        expected[str(bandwidth)] = roc_auc_score(data.y_test, -detector.score_samples(data.X_test))
    found = {row[1]: float(row[2]) for row in table(printed)}
    assert found == pytest.approx(expected, abs=6e-4)
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_the_recommended_command_fits_the_model_that_is_written(textures, tmp_path, capsys):
    good = textures / "train" / "good"
    arguments = ("--detector", "pooled", "--n-components", "8", "--n-components", "auto", "--bandwidth", "loo")
    assert run("search", good, *TINY, *arguments, "-o", tmp_path / "best") == 0
    printed = capsys.readouterr().out
    assert "pasted piece; 3 folds" in fact(printed, "Measured by")
    assert {tuple(row[1:3]) for row in table(printed)} == {("8", "loo"), ("auto", "loo")}
    words = use(printed)
    assert "--bandwidth loo" in " ".join(words)
    assert run(*words, "-o", tmp_path / "again") == 0
    best, again = (DFKDEDetector.load(tmp_path / name) for name in ("best", "again"))
    assert best.get_params(deep=False).items() - {"features"} >= {("bandwidth", "loo")}
    np.testing.assert_array_equal(best.calibration_scores_, again.calibration_scores_)
    assert best.offset_ == again.offset_


@pytest.mark.parametrize("detector", ["positions", "pooled"])
def test_layers_are_compared_at_the_price_of_one_pass(detector, textures, weights, tmp_path, monkeypatch, capsys):
    seen, visit = [], network.visit_layers
    monkeypatch.setattr(
        network, "visit_layers", lambda net, batch, *others: seen.append(len(batch)) or visit(net, batch, *others)
    )
    arguments = ("--features", "test_resnet", "--weights", weights, "--image-size", "64", "--detector", detector)
    assert run("search", textures / "train" / "good", *arguments, "--max-images", "24", "--bandwidth", "scott") == 0
    printed = capsys.readouterr().out
    assert sum(seen) == 2 * 24
    names = {row[0] for row in table(printed)}
    assert {"layer2", "layer3", "layer1,layer2", "layer2,layer3"} <= names
    assert use(printed)[:2] == ["fit", str(textures / "train" / "good")]


def test_parts_are_on_one_side_of_each_split(exposures, capsys):
    folder, _ = exposures
    assert run("search", folder, *TINY, "--groups", "folder", "--bandwidth", "scott") == 2
    assert "9 good images are too few" in capsys.readouterr().err
    for path in sorted(folder.rglob("*exp0.png")):
        Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path.with_name(f"{path.stem[:5]}_exp3.png"))
    assert run("search", folder, *TINY, "--groups", "folder", "--bandwidth", "scott") == 0
    printed = capsys.readouterr().out
    assert fact(printed, "Good images") == "12 images in 3 folders, of 3 parts"
    assert use(printed)[-2:] == ["--groups", "folder"]


def test_the_default_setting_stays_unless_another_is_clearly_better():
    options = parser().parse_args(["search", "images"])
    default = Candidate(None, "layer2,layer3", {"bandwidth": "scott"}, [0.90, 0.92, 0.94], 1.0)
    near = Candidate(["layer2"], "layer2", {"bandwidth": "scott"}, [0.91, 0.93, 0.95], 1.0)
    far = Candidate(["layer1"], "layer1", {"bandwidth": "scott"}, [0.98, 0.99, 1.00], 1.0)
    assert near.error == pytest.approx(0.02 / 3**0.5)
    assert _recommended(options, [default, near]) == (default, True)
    assert _recommended(options, [default, near, far]) == (far, False)


def test_a_pasted_piece_changes_a_small_part_of_the_picture():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8))
    before = np.array(picture)
    shares = []
    for seed in range(40):
        pasted = np.array(with_pasted_piece(picture, np.random.default_rng(seed)))
        np.testing.assert_array_equal(pasted, with_pasted_piece(picture, np.random.default_rng(seed)))
        assert pasted.shape == before.shape
        shares.append((pasted != before).any(2).mean())
    np.testing.assert_array_equal(picture, before)
    assert max(shares) < 0.05
    assert np.mean(np.array(shares) > 0) > 0.9


@pytest.mark.parametrize("pooling", [None, "avg"])
def test_features_of_one_pass_are_those_of_each_extractor(pooling):
    images = np.random.default_rng(0).integers(0, 256, (5, 48, 48, 3), np.uint8)
    sets = [["layer1"], ["layer3", "layer1"], None]
    extractors = [
        TimmFeatures("test_resnet", layers=of, pooling=pooling, pretrained=False, random_state=0).fit(images)
        for of in sets
    ]
    together = network.described_together(extractors, images)
    for extractor, rows in zip(extractors, together, strict=True):
        np.testing.assert_allclose(rows, extractor.transform(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--n-components", "4"), "--n-components is for --detector pooled"),
        (("--layers", "layer1"), "--layers is for a backbone"),
        (("--max-images", "0"), "'0' is not a whole number of at least 1"),
        (("--groups", "folder"), "greater than the number of groups"),
    ],
)
def test_what_cannot_be_searched_is_an_error(arguments, message, textures, capsys):
    assert run("search", textures / "train" / "good", *TINY, *arguments) == 2
    assert re.search(message, capsys.readouterr().err)
