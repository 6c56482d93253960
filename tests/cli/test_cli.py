"""The command line, run in this process: its results, its files, and its errors."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from contextlib import redirect_stdout
from pathlib import Path

import huggingface_hub.constants
import joblib
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.metrics import roc_auc_score

from dfkde_sklearn import DFKDEDetector, DriftMonitor, PatchDFKDEDetector, TimmFeatures
from dfkde_sklearn._cli.arguments import detector_parameters
from dfkde_sklearn._cli.main import main, parser
from dfkde_sklearn._density.scoring import FeatureDensity
from dfkde_sklearn._features import scattering
from dfkde_sklearn._report.contact_sheet import ANOMALOUS, DEFECT, NORMAL
from dfkde_sklearn.datasets import load_mvtec_folder, make_textures, read_mask, write_mvtec_folder

SCATTERING = ("--features", "scattering", "--image-size", "64", "--detector", "pooled", "--residual", "box")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Small images spend their time on waking threads."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def textures(tmp_path_factory):
    """A folder in the MVTec layout: 60 good images to learn from, 20 good ones and 20 with a hole for the test."""
    data = make_textures(60, 40, material="knit", defects=["hole"], image_size=64, random_state=0)
    return write_mvtec_folder(data, tmp_path_factory.mktemp("images") / "knit")


@pytest.fixture(scope="module")
def fitted(textures, tmp_path_factory):
    """A model of the good images."""
    model = tmp_path_factory.mktemp("model") / "knit.safetensors"
    assert run("fit", textures, *SCATTERING, "--model", model) == 0
    return model


def run(*arguments):
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stopped:  # of wrong arguments
        return stopped.code


def rows_of(file):
    with Path(file).open(newline="") as lines:
        return list(csv.DictReader(lines))


# demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What `demo` printed, and the folder that it wrote to."""
    folder = tmp_path_factory.mktemp("demo") / "made by it"
    with redirect_stdout(io.StringIO()) as printed:
        assert run("demo", "--out", folder, "--material", "mesh") == 0
    return printed.getvalue(), folder


def fact(printed, name):
    (line,) = (line for line in printed.splitlines() if line.startswith(f"{name}  "))
    return line.removeprefix(name).strip()


def test_demo_distinguishes_good_from_defective_and_keeps_its_rate_of_false_alarms(demo):
    printed, _ = demo
    assert float(fact(printed, "AUROC")) > 0.95
    assert fact(printed, "False alarms asked for") == "5 %"
    assert float(fact(printed, "False alarms held").split()[0]) < 8
    assert "of 300 good images" in fact(printed, "False alarms held")


def test_demo_lists_the_worst_images_in_order(demo):
    printed, _ = demo
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:2] == ["rank", "index"])
    table = [line.split() for line in lines[start + 1 : start + 13]]
    assert [row[0] for row in table] == [str(rank) for rank in range(1, 13)]
    scores = [float(row[3]) for row in table]
    assert scores == sorted(scores)
    assert all(row[2] != "good" for row in table)


def test_demo_draws_a_picture_where_it_says(demo):
    printed, folder = demo
    assert [path.name for path in folder.iterdir()] == ["dfkde-demo.png"]
    assert fact(printed, "Picture") == str(folder / "dfkde-demo.png")
    with Image.open(folder / "dfkde-demo.png") as picture:
        colours = {colour for _, colour in picture.getcolors(picture.width * picture.height)}
    assert {DEFECT, ANOMALOUS, NORMAL} <= colours


def test_demo_keeps_a_picture_that_the_user_named(tmp_path, capsys):
    (tmp_path / "mine.png").write_bytes(b"mine")
    assert run("demo", "--out", tmp_path / "mine.png") == 2
    assert "mine.png exists" in capsys.readouterr().err
    assert (tmp_path / "mine.png").read_bytes() == b"mine"


# fit and score


def test_fit_then_score_finds_the_defective_images(fitted, textures, tmp_path, capsys):
    assert run("score", fitted, textures / "test", "--csv", tmp_path / "table.csv") == 0
    rows = rows_of(tmp_path / "table.csv")
    verdicts = {kind: [row["verdict"] for row in rows if kind in row["path"]] for kind in ("hole", "good")}
    assert verdicts["hole"].count("anomalous") >= 18
    assert verdicts["good"].count("normal") >= 18
    assert "of 40 images are anomalous." in capsys.readouterr().err


def test_the_table_has_the_numbers_of_the_detector(fitted, textures, tmp_path):
    assert run("score", fitted, textures / "test" / "hole", "--csv", tmp_path / "table.csv", "--sort", "input") == 0
    rows = rows_of(tmp_path / "table.csv")
    paths = sorted(str(path) for path in (textures / "test" / "hole").iterdir())
    assert [row["path"] for row in rows] == paths
    detector = DFKDEDetector.load(fitted)
    for column, expected in {
        "score": detector.score_samples(paths),
        "p_anomalous": detector.predict_proba(paths)[:, 0],
        "p_value": detector.p_values(paths),
    }.items():
        np.testing.assert_allclose([float(row[column]) for row in rows], expected, rtol=1e-6)
    assert [row["verdict"] == "anomalous" for row in rows] == (detector.predict(paths) == -1).tolist()


def test_fit_reports_the_auroc_and_false_alarms_of_a_test_folder(textures, tmp_path, capsys):
    assert run("fit", textures, *SCATTERING, "--model", tmp_path / "model") == 0
    printed = capsys.readouterr().out
    assert run("score", tmp_path / "model", textures / "test", "--csv", tmp_path / "table.csv") == 0
    rows = rows_of(tmp_path / "table.csv")
    defective = ["hole" in row["path"] for row in rows]
    auroc = roc_auc_score(defective, [-float(row["score"]) for row in rows])
    assert fact(printed, "AUROC") == f"{auroc:.3f}"
    n_alarms = sum("good" in row["path"] and row["verdict"] == "anomalous" for row in rows)
    assert f"({n_alarms} of 20 good images" in fact(printed, "False alarms held")


def test_fit_keeps_the_components_that_hold_for_new_images(textures, tmp_path):
    assert run("fit", textures, *SCATTERING, "--model", tmp_path / "model", "--n-components", "auto") == 0
    detector = DFKDEDetector.load(tmp_path / "model")
    assert detector.n_components == "auto"
    assert detector.n_components_ > 16


def test_fit_shows_a_bad_image_among_the_good_ones(textures, tmp_path, capsys):
    good = tmp_path / "good"
    good.mkdir()
    for path in sorted((textures / "train" / "good").iterdir())[:30]:
        (good / path.name).write_bytes(path.read_bytes())
    (good / "015b.png").write_bytes((textures / "test" / "hole" / "000.png").read_bytes())
    assert run("fit", good, *SCATTERING, "--model", tmp_path / "model") == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("path"))
    assert lines[start + 1].split()[0] == str(good / "015b.png")


def test_fit_says_which_rate_of_false_alarms_to_expect(textures, tmp_path, capsys):
    good = textures / "train" / "good"
    assert run("fit", good, *SCATTERING, "--model", tmp_path / "a", "--target-fpr", "0.1") == 0
    assert fact(capsys.readouterr().out, "False alarms expected") == "10 % of new good images"
    assert run("fit", good, *SCATTERING, "--model", tmp_path / "b", "--target-fpr", "0.001") == 0
    assert "60 images cannot tell a rate below 1.64 %" in fact(capsys.readouterr().out, "False alarms expected")
    confident = ("--target-fpr", "0.1", "--confidence", "0.9")
    assert run("fit", good, *SCATTERING, "--model", tmp_path / "d", *confident) == 0
    expected = "at most 10 % of new good images, with 90 % confidence"
    assert fact(capsys.readouterr().out, "False alarms expected") == expected
    assert run("fit", good, *SCATTERING, "--model", tmp_path / "c", "--contamination", "0.1") == 0
    assert fact(capsys.readouterr().out, "Anomalies expected") == "10 % of images like these"
    detector = DFKDEDetector.load(tmp_path / "c")
    assert (detector.predict(str(good)) == -1).sum() == 6


def test_score_prints_the_worst_images_first(fitted, textures, capsys):
    assert run("score", fitted, textures / "test") == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["path", "score", "P(anomalous)", "p-value", "verdict"]
    scores = [float(line.split()[1]) for line in lines]
    assert len(scores) == 40
    assert scores == sorted(scores)


def test_csv_on_standard_output_is_the_file(fitted, textures, tmp_path, capsys):
    images = textures / "test" / "good"
    assert run("score", fitted, images, "--csv", tmp_path / "table.csv") == 0
    capsys.readouterr()
    assert run("score", fitted, images, "--csv", "-", "--quiet") == 0
    captured = capsys.readouterr()
    assert captured.out == (tmp_path / "table.csv").read_text()
    assert captured.err == ""


def test_score_draws_the_worst_images(fitted, textures, tmp_path):
    assert run("score", fitted, textures / "test", "--sheet", tmp_path / "sheet.png") == 0
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.format == "PNG"
        colours = {colour for _, colour in picture.getcolors(picture.width * picture.height)}
    assert ANOMALOUS in colours
    assert NORMAL not in colours


def test_a_batch_is_selected_from_by_its_false_discovery_rate(fitted, textures, tmp_path, capsys):
    images = load_mvtec_folder(textures).X_test.tolist()
    assert run("score", fitted, *images, "--fdr", "0.3", "--sort", "input", "--csv", tmp_path / "table.csv") == 0
    expected = DFKDEDetector.load(fitted).select(images, fdr=0.3)
    found = [row["verdict"] == "anomalous" for row in rows_of(tmp_path / "table.csv")]
    np.testing.assert_array_equal(found, expected)
    assert f"{expected.sum()} of 40 images are anomalous" in capsys.readouterr().err


def test_an_image_named_twice_is_scored_once(fitted, textures, capsys):
    image = textures / "test" / "good" / "000.png"
    assert run("score", fitted, image, textures / "test" / "good", image) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 20


def test_the_exit_code_reports_anomalies_if_asked_to(fitted, textures, tmp_path):
    assert run("score", fitted, textures / "test", "--csv", tmp_path / "table.csv") == 0
    verdicts = {row["verdict"]: row["path"] for row in rows_of(tmp_path / "table.csv")}
    assert run("score", fitted, *verdicts.values(), "--exit-code") == 1
    assert run("score", fitted, verdicts["normal"], "--exit-code") == 0


def test_a_monitor_is_kept_from_run_to_run(fitted, textures, tmp_path, monkeypatch, capsys):
    good = sorted((textures / "test" / "good").iterdir())
    bad = sorted((textures / "test" / "hole").iterdir())
    arguments = ("--monitor", tmp_path / "monitor.json", "--quiet")
    assert run("score", fitted, *good[:12], *arguments) == 0
    assert "No drift in 12 parts" in capsys.readouterr().err
    assert run("score", fitted, *good[12:], *arguments) == 0
    assert "No drift in 20 parts" in capsys.readouterr().err
    for _ in range(3):
        assert run("score", fitted, *bad, *arguments) == 0
    assert "Alarm: since about part" in capsys.readouterr().err
    assert run("score", fitted, *good[:1], "--exit-code", *arguments) == 1

    # A run that fails is repeated, and counts once.
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dfkde_sklearn._cli.score.write_new", full)
        assert run("score", fitted, *good[:1], "--csv", tmp_path / "table.csv", *arguments) == 2
    detector = DFKDEDetector.load(fitted)
    expected = DriftMonitor(detector)
    for images in (good[:12], good[12:], bad, bad, bad, good[:1]):
        expected.update(images)
    assert DriftMonitor.load(tmp_path / "monitor.json", detector).history_ == expected.history_


# Backbones


@pytest.fixture
def weights(tmp_path):
    """A file of random weights of a tiny network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model("test_resnet", num_classes=0)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def test_a_backbone_and_its_layers_describe_the_images(textures, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    good = textures / "train" / "good"
    assert run("fit", good, "--features", "test_resnet", "--weights", weights.name, "--layers", "layer1,layer3") == 0
    features = PatchDFKDEDetector.load("dfkde-model.safetensors").features_
    assert features.layers_ == ["layer1", "layer3"]
    described = fact(capsys.readouterr().out, "Detector")
    assert described == "10 x 10 positions of 224 features (test_resnet.r160_in1k, layer1, layer3)"
    # The model knows where the weights are, wherever it is used.
    monkeypatch.chdir(textures)
    assert run("score", tmp_path / "dfkde-model.safetensors", Path("test", "good")) == 0


@pytest.mark.parametrize("crop", [None, "squash", "center", "border"])
def test_the_crop_of_the_backbone_can_be_chosen(crop, textures, weights, tmp_path):
    chosen = () if crop is None else ("--crop", crop)
    arguments = ("--features", "test_resnet", "--weights", weights, "--model", tmp_path / "model", *chosen)
    assert run("fit", textures / "train" / "good", *arguments) == 0
    features = PatchDFKDEDetector.load(tmp_path / "model").features_
    assert features.crop == features.crop_mode_ == (crop or TimmFeatures().crop)


def test_weights_that_moved_can_be_named(textures, weights, tmp_path, capsys):
    good, model = textures / "train" / "good", tmp_path / "model"
    assert run("fit", good, "--features", "test_resnet", "--weights", weights, "--model", model) == 0
    assert run("score", model, good) == 0
    before = capsys.readouterr().out.splitlines()[-61:]
    moved = weights.rename(tmp_path / "moved.safetensors")
    assert run("score", model, good) == 2
    assert "tiny.safetensors': there is no such file. On the command line: --weights FILE" in capsys.readouterr().err
    assert run("score", model, good, "--weights", moved) == 0
    assert capsys.readouterr().out.splitlines() == before


def test_pretrained_weights_that_are_not_available_are_an_error_with_the_ways_out(
    textures, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert run("fit", textures, "--model", tmp_path / "model") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("dfkde fit: error: The pretrained weights of backbone 'resnet18.tv_in1k'")
    assert "--weights FILE, or --features scattering" in message


def test_the_settings_of_one_run_are_not_in_the_model(textures, tmp_path):
    good = textures / "train" / "good"
    assert (
        run("fit", good, *SCATTERING, "--device", "cpu", "--cache", tmp_path / "cache", "--model", tmp_path / "model")
        == 0
    )
    detector = DFKDEDetector.load(tmp_path / "model")
    assert detector.device is detector.features.device is detector.features_.device is None
    assert detector.features.cache is detector.features_.cache is None


def test_a_second_run_describes_only_images_that_are_not_in_the_cache(textures, tmp_path, monkeypatch, capsys):
    described = []
    coefficients = scattering.scattering_coefficients

    def counted(batch, *arguments):
        described.append(len(batch))
        return coefficients(batch, *arguments)

    monkeypatch.setattr(scattering, "scattering_coefficients", counted)
    good, cache = textures / "train" / "good", ("--cache", tmp_path / "cache")
    for model, n in (("first", 60), ("second", 60)):
        assert run("fit", good, *SCATTERING, "--model", tmp_path / model, *cache) == 0
        assert sum(described) == n
    capsys.readouterr()
    printed = []
    for model, with_cache, n in (("first", cache, 80), ("second", cache, 80), ("first", (), 80 + 80)):
        assert run("score", tmp_path / model, good, textures / "test" / "good", *with_cache) == 0
        printed.append(capsys.readouterr().out)
        assert sum(described) == n
    assert printed[0] == printed[1] == printed[2]
    assert run("cache", "size", tmp_path / "cache") == 0
    assert "80, one for each image and layer" in capsys.readouterr().out


def test_an_image_costs_one_pass_of_the_extractor_and_one_evaluation_of_the_density(
    fitted, textures, tmp_path, monkeypatch
):
    described, evaluated = [], []
    coefficients, log_density = scattering.scattering_coefficients, FeatureDensity.log_density

    def counted_coefficients(batch, *arguments):
        described.append(len(batch))
        return coefficients(batch, *arguments)

    def counted_log_density(self, rows, *arguments, **options):
        evaluated.append(len(rows))
        return log_density(self, rows, *arguments, **options)

    monkeypatch.setattr(scattering, "scattering_coefficients", counted_coefficients)
    monkeypatch.setattr(FeatureDensity, "log_density", counted_log_density)
    assert run("score", fitted, textures / "test", "--csv", "-") == 0
    assert (sum(described), sum(evaluated)) == (40, 40)
    described.clear()
    evaluated.clear()
    # 60 images for the fit, whose calibration scores come from elsewhere, and 40 for the test.
    assert run("fit", textures, *SCATTERING, "--model", tmp_path / "model") == 0
    assert (sum(described), sum(evaluated)) == (60 + 40, 40)


@pytest.mark.parametrize("command", ["demo", "fit"])
def test_the_defaults_are_those_of_the_detector(command):
    options = parser().parse_args([command, "folder"][: 1 + (command == "fit")])
    given = detector_parameters(options)
    for kind in (DFKDEDetector, PatchDFKDEDetector):
        assert kind(**given).get_params() == kind().get_params()


# Maps and groups


@pytest.fixture(scope="module")
def positions(textures, tmp_path_factory):
    """A model of the good images, with a density at every position."""
    model = tmp_path_factory.mktemp("positions") / "knit.safetensors"
    assert (
        run("fit", textures / "train" / "good", "--features", "scattering", "--image-size", "64", "--model", model) == 0
    )
    return model


def test_maps_show_where_the_defects_are(positions, textures, tmp_path):
    folder = tmp_path / "maps"
    assert run("score", positions, textures / "test", "--maps", folder, "--masks", "--csv", tmp_path / "t.csv") == 0
    verdicts = {Path(row["path"]): row["verdict"] for row in rows_of(tmp_path / "t.csv")}
    assert len(list(folder.iterdir())) == 2 * len(verdicts) == 80
    detector = PatchDFKDEDetector.load(positions)
    holes = sorted(path for path in verdicts if path.parent.name == "hole")
    maps = detector.anomaly_maps(holes)
    overlaps = []
    for path, of_image in zip(holes, maps, strict=True):
        found = np.asarray(Image.open(folder / f"hole_{path.name}.mask.png"))
        np.testing.assert_array_equal(found, np.where(of_image < detector.map_offset_, 255, 0))
        true = np.asarray(Image.open(textures / "ground_truth" / "hole" / f"{path.stem}_mask.png")) > 0
        overlaps.append((found[true] == 255).mean())
        with Image.open(folder / f"hole_{path.name}.map.png") as shown, Image.open(path) as picture:
            assert shown.size == picture.size
            assert shown.mode == "RGB"
    assert np.mean(overlaps) > 0.5
    assert sum(verdicts[path] == "anomalous" for path in holes) >= 15


def test_fit_reports_how_well_the_maps_of_a_test_folder_find_the_masks(textures, tmp_path, capsys):
    arguments = ("--features", "scattering", "--image-size", "64", "--model", tmp_path / "model")
    assert run("fit", textures, *arguments) == 0
    printed = capsys.readouterr().out
    data = load_mvtec_folder(textures)
    detector = PatchDFKDEDetector.load(tmp_path / "model")
    maps = detector.anomaly_maps(data.X_test)
    masks = [read_mask(path) if path else np.zeros((64, 64), bool) for path in data.masks_test]
    pixels = roc_auc_score(np.concatenate(masks, None), -np.concatenate(maps, None))
    assert float(fact(printed, "AUROC of pixels")) == pytest.approx(pixels, abs=6e-4)
    assert float(fact(printed, "AUPRO")) > 0.5
    assert "of 20)" in fact(printed, "Regions found")
    assert run("evaluate", tmp_path / "model", textures) == 0
    again = capsys.readouterr().out
    assert again.splitlines()[-15:] == printed.splitlines()[-15:]
    assert fact(again, "AUPRO") == fact(printed, "AUPRO")
    # Without masks, and without the layout: the same images, and what can be said without masks.
    assert run("evaluate", tmp_path / "model", textures / "test") == 0
    without = capsys.readouterr().out
    assert fact(without, "AUROC") == fact(printed, "AUROC")
    assert "AUPRO" not in without


def test_evaluate_says_what_other_thresholds_would_give(positions, textures, capsys):
    assert run("evaluate", positions, textures, "--quiet") == 0
    table = capsys.readouterr().out.split("defects found\n")[1].splitlines()
    data, detector = load_mvtec_folder(textures), PatchDFKDEDetector.load(positions)
    scores = detector.score_samples(data.X_test)
    thresholds = np.quantile(detector.calibration_scores_, [0.01, 0.02, 0.05, 0.1, 0.2], method="median_unbiased")
    for line, threshold in zip(table, thresholds, strict=True):
        alarms, found = (100 * np.mean(scores[data.y_test == kind] < threshold) for kind in (0, 1))
        cells = line.split(" %")
        assert float(cells[0].split()[-1]) in (1, 2, 5, 10, 20)
        assert [float(cells[1].split()[-1]), float(cells[2].split()[-1])] == pytest.approx([alarms, found], rel=1e-2)
    assert f"{detector.offset_:.2f}" in table[2]


def test_evaluate_takes_good_images_alone(fitted, textures, tmp_path, capsys):
    (tmp_path / "good").symlink_to(textures / "test" / "good")
    assert run("evaluate", fitted, tmp_path) == 0
    printed = capsys.readouterr().out
    assert "of 20 good images" in fact(printed, "False alarms held")
    assert "AUROC" not in printed
    assert {line.split()[-1] for line in printed.splitlines()[-5:]} == {"-"}


def test_info_tells_what_a_model_holds_without_its_network(textures, weights, tmp_path, capsys):
    model = tmp_path / "model"
    arguments = ("--features", "test_resnet", "--weights", weights, "--layers", "layer2,layer3", "--target-fpr", "0.1")
    assert run("fit", textures / "train" / "good", *arguments, "--model", model) == 0
    weights.unlink()
    capsys.readouterr()
    assert run("info", model) == 0
    printed = capsys.readouterr().out
    assert fact(printed, "Detector") == "PatchDFKDEDetector"
    assert fact(printed, "Calibration scores") == "60"
    assert fact(printed, "Layers") == "layer2, layer3"
    assert "target_fpr=0.1" in fact(printed, "Settings")
    assert fact(printed, "Backbone").startswith("test_resnet")
    assert run("info", model, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["extractor"]["fitted"]["layers_"] == ["layer2", "layer3"]
    assert f"score {document['offset']:.2f}" in fact(printed, "Threshold")


def test_info_tells_of_a_detector_of_feature_matrices(odd, capsys):
    assert run("info", odd / "matrix") == 0
    assert fact(capsys.readouterr().out, "Feature extractor") == "none: feature matrices"


def test_existing_maps_are_kept_unless_forced(positions, textures, tmp_path, capsys):
    good = textures / "test" / "good"
    assert run("score", positions, good, "--maps", tmp_path) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert run("score", positions, good, "--maps", tmp_path) == 2
    assert "exists" in capsys.readouterr().err
    assert run("score", positions, good, "--maps", tmp_path, "--force") == 0
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_one_pass_gives_the_table_the_sheet_and_the_maps(positions, textures, tmp_path, monkeypatch):
    passes = []
    rows = scattering.ScatteringFeatures._rows
    monkeypatch.setattr(
        scattering.ScatteringFeatures, "_rows", lambda self, batch: passes.append(len(batch)) or rows(self, batch)
    )
    arguments = ("--maps", tmp_path / "maps", "--masks", "--sheet", tmp_path / "s.png", "--csv", tmp_path / "t.csv")
    assert run("score", positions, textures / "test", *arguments) == 0
    assert sum(passes) == 40


@pytest.fixture
def exposures(tmp_path):
    """A folder of three parts at several exposures, and the part of each image."""
    data = make_textures(9, 1, material="leather", image_size=64, random_state=0)
    folder, groups = tmp_path / "parts", {}
    for i, image in enumerate(data.X_train):
        path = folder / f"part{i % 3}" / f"part{i % 3}_exp{i // 3}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        groups[path] = f"part{i % 3}"
    with (tmp_path / "groups.csv").open("w") as table:
        table.write("path,group\n")
        table.writelines(f"{path.relative_to(folder).as_posix()},{group}\n" for path, group in groups.items())
    return folder, groups


@pytest.mark.parametrize("rule", ["folder", "{table}", r"part[0-9]", r"(part\d)_exp\d"])
@pytest.mark.parametrize("kind", ["positions", "pooled"])
def test_groups_are_what_the_rule_says(rule, kind, exposures, tmp_path, capsys):
    folder, groups = exposures
    rule = rule.format(table=tmp_path / "groups.csv") if "table" in rule else rule
    arguments = ("--features", "scattering", "--image-size", "64", "--detector", kind, "--model", tmp_path / "model")
    assert run("fit", folder, *arguments, "--groups", rule) == 0
    assert "of 3 parts" in fact(capsys.readouterr().out, "Training")
    detector = {"positions": PatchDFKDEDetector, "pooled": DFKDEDetector}[kind].load(tmp_path / "model")
    paths = sorted(map(str, groups))
    expected = clone(detector).fit(paths, groups=[groups[Path(path)] for path in paths])
    np.testing.assert_allclose(detector.calibration_scores_, expected.calibration_scores_, rtol=1e-6)


def test_an_image_that_the_table_lacks_is_named(exposures, tmp_path, capsys):
    folder, _ = exposures
    table = tmp_path / "groups.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))
    assert run("fit", folder, "--features", "scattering", "--groups", table, "--model", tmp_path / "m") == 2
    assert re.search("names no group for .*part2_exp2.png .1 of 9 images", capsys.readouterr().err)
    table.write_text("file,part\n")
    assert run("fit", folder, "--features", "scattering", "--groups", table, "--model", tmp_path / "m") == 2
    assert "needed are path and group" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


# Files


def test_an_existing_model_is_kept_unless_forced(textures, tmp_path, capsys):
    model, good = tmp_path / "model", textures / "train" / "good"
    model.write_bytes(b"precious")
    assert run("fit", good, *SCATTERING, "--model", model) == 2
    assert f"{model} exists" in capsys.readouterr().err
    assert model.read_bytes() == b"precious"
    assert run("fit", good, *SCATTERING, "--model", model, "--force") == 0
    assert isinstance(DFKDEDetector.load(model), DFKDEDetector)
    assert list(tmp_path.iterdir()) == [model]


@pytest.mark.parametrize("option", ["--csv", "--sheet"])
def test_existing_tables_and_pictures_are_kept_unless_forced(option, fitted, textures, tmp_path, capsys):
    file = tmp_path / "table.png"
    file.write_bytes(b"precious")
    assert run("score", fitted, textures / "test" / "good", option, file) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{file} exists" in captured.err
    assert file.read_bytes() == b"precious"
    assert run("score", fitted, textures / "test" / "good", option, file, "--force") == 0
    assert file.read_bytes() != b"precious"


@pytest.fixture
def with_broken(textures, tmp_path):
    """Two good images, and between them one that is cut off."""
    folder = tmp_path / "some broken"
    folder.mkdir()
    good = sorted((textures / "test" / "good").iterdir())[:2]
    for name, path in zip("ac", good, strict=True):
        (folder / f"{name}.png").write_bytes(path.read_bytes())
    (folder / "b.png").write_bytes(good[0].read_bytes()[:300])
    return folder


def test_a_broken_image_stops_and_nothing_is_written(fitted, with_broken, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert run("score", fitted, with_broken, "--csv", tmp_path / "table.csv") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith(f"dfkde score: error: {with_broken / 'b.png'}: the image cannot")
    assert run("fit", with_broken, *SCATTERING, "--model", tmp_path / "model") == 2
    assert str(with_broken / "b.png") in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_skipped_image_is_named_on_standard_error_and_in_the_table(fitted, with_broken, tmp_path, capsys):
    table = tmp_path / "table.csv"
    assert run("score", fitted, with_broken, "--skip-broken", "--csv", table, "--sort", "input", "--exit-code") == 1
    captured = capsys.readouterr()
    assert f"dfkde score: skipped: {with_broken / 'b.png'}: the image cannot be read" in captured.err
    assert "1 could not be read" in captured.err
    assert captured.out.splitlines()[2].split()[-4:] == ["-", "-", "-", "broken"]
    rows = rows_of(table)
    assert [Path(row["path"]).name for row in rows] == ["a.png", "b.png", "c.png"]
    assert (rows[1]["score"], rows[1]["verdict"]) == ("", "broken")
    assert "cannot be read" in rows[1]["reason"]
    assert [row["reason"] for row in rows[::2]] == ["", ""]
    # The others are scored as if it were not there.
    (with_broken / "b.png").unlink()
    assert run("score", fitted, with_broken, "--csv", "-", "--sort", "input") == 0
    without = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [rows[0], rows[2]] == without


def test_only_broken_images_are_an_error_even_where_they_are_skipped(fitted, with_broken, capsys):
    assert run("score", fitted, with_broken / "b.png", "--skip-broken") == 2
    assert "None of the 1 images can be read" in capsys.readouterr().err


# Mistakes


@pytest.fixture(scope="module")
def odd(fitted, textures, tmp_path_factory):
    """Folders and files that are not what they should be."""
    folder = tmp_path_factory.mktemp("odd")
    image = (textures / "test" / "hole" / "000.png").read_bytes()
    for place in ("single", "tested/test/hole", "several/one/train/good"):
        (folder / place).mkdir(parents=True)
        (folder / place / "000.png").write_bytes(image)
    (folder / "none").mkdir()
    (folder / "text").write_text("no model")
    (folder / "cut").write_bytes(fitted.read_bytes()[:1000])
    rows = np.random.default_rng(0).normal(size=(9, 2))
    matrix = DFKDEDetector().fit(rows)
    matrix.save(folder / "matrix")
    joblib.dump({"dfkde_sklearn": "0.1.0", "detector": matrix}, folder / "older")
    safetensors.torch.save_file({"weight": torch.ones(2)}, folder / "weights")
    return folder


# What is typed, and what the error says.
MISTAKES = {
    "fit {odd}/missing": "missing' is neither a folder nor a file",
    "fit {model} --features scattering": "the file is not an image",
    "fit {odd}/none": "no image file in the folder",
    "fit {odd}/single --features scattering": "minimum of 3 is required",
    "fit {odd}/several": "It holds several categories, load one of them: 'one'",
    "fit {odd}/tested": "has no folder train/good",
    "fit {images} --features resnet1": "is not a model of timm",
    "fit {images} --features test_resnet --weights no.safetensors": "no.safetensors': there is no such file",
    "fit {images} --features scattering --weights {model}": "--weights is for a backbone",
    "fit {images} --features scattering --crop center": "--crop is for a backbone",
    "fit {images} --features scattering --tile-size 32": "--tile-size is for a backbone",
    "fit {images} --features test_resnet --tile-size 32": "Tiles need pooling=None",
    "fit {images} --target-fpr 5": "argument --target-fpr: 5 is not a rate between 0 and 1: 0.05 is 5 %",
    "fit {images} --target-fpr 5%": "5% is not a rate between 0 and 1: 0.05 is 5 %",
    "fit {images} --target-fpr 0": "0 is not a rate between 0 and 1: 0.05 is 5 %",
    "fit {images} --target-fpr nan": "nan is not a rate between 0 and 1: 0.05 is 5 %",
    "fit {images} --confidence 90": "argument --confidence: 90 is not a rate between 0 and 1: 0.9 is 90 %",
    "fit {images} --contamination 2.5": "argument --contamination: 2.5 is not a rate between 0 and 1: 0.025 is 2.5 %",
    "fit {images} --features scattering --contamination 0.6": "'contamination' parameter of PatchDFKDEDetector must be",
    "fit {images} --bandwidth wide": "'wide' is neither a number nor one of scott, silverman, loo",
    "fit {images} --features scattering --bandwidth loo": "'bandwidth' parameter of PatchDFKDEDetector must be",
    "fit {odd}/missing --model {model}": "missing' is neither a folder nor a file",
    "fit {odd}/missing*.png": "neither a folder nor a file, and as a pattern it matches nothing",
    "fit {images} --features scattering --confidence 0.99": r"confidence=0\.99 of .* at least 90 good .* there are 60",
    "fit {images} --features scattering --confidence 0.9 --contamination 0.1": "contamination=0.1 sets the threshold",
    "fit {images} --features scattering --residual box": "--residual is for the other detector",
    "fit {images} --detector pooled --flips all": "--flips is for the other detector",
    "fit {images} --features scattering --groups (": r"--groups '\(' is not a regular expression",
    "fit {images} --features scattering --groups x[0-9]y": "does not match train/good/.*60 of 60 images",
    "fit {images} --features scattering --groups no.csv": "no.csv",
    "fit {images} --features scattering --groups folder": "all 60 rows are one group",
    "score {model} {images} --maps maps": "is a pooled detector, which has no maps",
    "score {model} {images} --fdr 5": "5 is not a rate between 0 and 1: 0.05 is 5 %",
    "score {model} {images} --fdr 0.001": "fdr=0.001 with 60 calibration scores",
    "score {model} {images} --monitor {odd}/text": "is not a file of DriftMonitor.save, or it is damaged",
    "score {model} {images} --monitor no/where": "there is no folder no",
    "score {model} {images} --masks": "Give --maps FOLDER too",
    "fit {images} --features scattering --device tpu9": "device='tpu9'",
    "fit {images} --features scattering --device meta": "device='meta'. Allowed: 'cpu', 'cuda'",
    "score {model} {images} --device xpu": "device='xpu'. Allowed: 'cpu', 'cuda'",
    "score {model} {images} --device vulkan:1": "device='vulkan:1'. Allowed: 'cpu', 'cuda'",
    "score {model} {images} --device cpu:3": "device='cpu:3': torch numbers CUDA GPUs only",
    "score {model} {images} --max-pixels 4095": " pixels.*MAX_IMAGE_PIXELS.*On the command line: --max-pixels N",
    "score {model} {images} --skip-broken --max-pixels 9": "None of the 120 images.*: --max-pixels N",
    "fit {images} --model no/where": "there is no folder no",
    "fit {images} --model {odd} --force": "is a folder. Name a file.",
    "score {odd}/missing {images}": "MODEL .*missing: there is no such file",
    "score {odd}/text {images}": "is not a file of a detector's save",
    "score {odd}/single/000.png {images}": "is not a file of a detector's save",
    "score {odd}/cut {images}": "or it is damaged",
    "score {odd}/weights {images}": "is not a file of a detector's save",
    "score {odd}/older {images}": "is a pickle.*fit it again",
    "score {odd}/matrix {images}": "fitted on a feature matrix",
    "score {model} {odd}/missing.png": "missing.png' is neither a folder nor a file",
    "score {model} {images} --weights {model}": "ScatteringFeatures has no backbone.*weights= is --weights",
    "score {model} {images} --sheet a.png --csv ./a.png": "name the same file",
    "score {model} {images} --sheet sheet.jpg": r"ends in \.png",
    "evaluate {model} {odd}/missing": "missing' is neither a folder nor a file",
    "evaluate {model} {odd}/none": "has no folder 'good', but no folders",
    "evaluate {model} {images}/test/hole/000.png": "The images are in no folder 'good', but 'hole'",
    "evaluate {odd}/matrix {images}": "fitted on a feature matrix",
    "info {odd}/cut": "or it is damaged",
    "info {odd}/older": "is a pickle.*fit it again",
    "info {odd}/missing": "MODEL .*missing: there is no such file",
    "demo --out sheet.jpg": r"ends in \.png",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_on_standard_error(mistake, fitted, textures, odd, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [part.format(odd=odd, model=fitted, images=textures) for part in mistake.split()]
    assert run(*arguments, *([] if arguments[0] == "info" else ["--quiet"])) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"dfkde {arguments[0]}: error: ")
    assert re.search(MISTAKES[mistake], line)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [[], ["fit"], ["score", "model"], ["demo", "--material", "jelly"], ["fit", "a", "--n-components", "b"]]
)
def test_wrong_arguments_end_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_the_limit_of_pixels_ends_with_the_command(fitted, textures):
    before = Image.MAX_IMAGE_PIXELS
    assert run("score", fitted, textures / "test" / "good", "--max-pixels", 64 * 64) == 0
    assert before == Image.MAX_IMAGE_PIXELS


# Names, terminals and pipes

NAMES = ("a\nb.png", "c\rd.png", "e\x1b[31mf.png", "g\u4e2d.png", "h\u202ei.png", 'j,"k.png')


@pytest.fixture
def odd_names(textures, tmp_path):
    """Images whose names no terminal takes as they are."""
    folder = tmp_path / "odd names"
    folder.mkdir()
    names = [os.fsencode(name) for name in NAMES] + [b"k\xff.png"] * (sys.platform == "linux")
    for name, image in zip(names * 3, sorted((textures / "train" / "good").iterdir()), strict=False):
        (folder / os.fsdecode(image.stem.encode() + name)).write_bytes(image.read_bytes())
    return folder


def is_png(path):
    with Image.open(path) as picture:
        return picture.format == "PNG"


def test_names_are_printed_harmlessly_and_written_exactly(fitted, odd_names, tmp_path, monkeypatch):
    terminal, errors = (io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", errors)
    (odd_names / "l\nm.png").write_bytes(b"")
    table, sheet = tmp_path / "table.csv", tmp_path / "sheet.png"
    assert run("score", fitted, odd_names, "--csv", table, "--sheet", sheet, "--skip-broken", "--sort", "input") == 0
    n = len(list(odd_names.iterdir()))
    for stream, n_lines in ((terminal, 1 + n), (errors, 2)):
        printed = stream.buffer.getvalue().decode("ascii")
        assert printed.count("\n") == n_lines
        assert all(line.isprintable() for line in printed.split("\n"))
    assert r"000a\nb.png" in terminal.buffer.getvalue().decode()
    with table.open(newline="", encoding="utf-8", errors="surrogateescape") as lines:
        assert {row["path"] for row in csv.DictReader(lines)} == {str(path) for path in odd_names.iterdir()}
    assert is_png(sheet)


def test_a_fit_lists_odd_names(odd_names, textures, tmp_path, capsys):
    assert run("fit", odd_names, *SCATTERING, "--model", tmp_path / "model") == 0
    assert all(line.isprintable() for line in capsys.readouterr().out.split("\n"))


def closed_pipe():
    """A text stream whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", buffering=1)


def test_a_reader_that_has_gone_does_not_cost_the_files(fitted, textures, tmp_path, monkeypatch):
    outputs = ("--csv", tmp_path / "table.csv", "--sheet", tmp_path / "sheet.png")
    with closed_pipe() as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        assert run("score", fitted, textures / "test" / "good", *outputs) == 141
    assert len(rows_of(tmp_path / "table.csv")) == 20
    assert is_png(tmp_path / "sheet.png")


def test_standard_error_that_nobody_reads_costs_nothing(fitted, textures, tmp_path, monkeypatch, capsys):
    with closed_pipe() as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", pipe)
        assert run("score", fitted, textures / "test" / "good", "--csv", tmp_path / "table.csv") == 0
    assert len(rows_of(tmp_path / "table.csv")) == 20
    assert len(capsys.readouterr().out.splitlines()) == 21


def test_a_table_that_cannot_be_written_is_still_printed(fitted, textures, tmp_path, capsys):
    resource = pytest.importorskip("resource")
    table = tmp_path / "table.csv"
    table.write_text("before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # As on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        assert run("score", fitted, textures / "test" / "good", "--csv", table, "--force") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 21
    assert re.search(r"error: .*What was there before is unchanged.*table\.csv", captured.err)
    assert table.read_text() == "before"
    assert list(tmp_path.iterdir()) == [table]


def test_a_link_that_waits_under_a_guessed_name_is_not_followed(fitted, textures, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / f".table.csv.{os.getpid()}").symlink_to(victim)
    assert run("score", fitted, textures / "test" / "good", "--csv", tmp_path / "table.csv") == 0
    assert victim.read_text() == "precious"


def test_tables_go_into_standard_output_by_its_path(fitted, textures, capfd):
    assert run("score", fitted, textures / "test" / "good", "--csv", "/dev/stdout", "--quiet") == 0
    printed = capfd.readouterr().out.splitlines()
    assert printed[0].startswith("path,score")
    assert len(printed) == 21 + 21


def test_streams_that_are_closed_at_the_start_cost_nothing(fitted, textures, tmp_path):
    image = textures / "test" / "good" / "000.png"
    program = [sys.executable, "-m", "dfkde_sklearn", "score", fitted, image, "--csv", tmp_path / "table.csv"]
    done = subprocess.run(["sh", "-c", '"$@" 0<&- 1>&- 2>&-', "sh", *map(str, program)], check=False)
    assert done.returncode == 0
    assert [row["path"] for row in rows_of(tmp_path / "table.csv")] == [str(image)]


def test_an_interrupt_during_the_imports_ends_the_program_without_a_traceback():
    script = """
        import os, signal, sys

        class Interrupt:
            def find_spec(self, name, *_):
                if name == "torch":
                    os.kill(os.getpid(), signal.SIGINT)

        sys.meta_path.insert(0, Interrupt())
        sys.argv = ["dfkde", "info", "model"]
        from dfkde_sklearn.__main__ import main
        main()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "dfkde_sklearn", "--help"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    for command in ("demo", "fit", "score"):
        assert re.search(rf"^ +{command} +\w", done.stdout, re.MULTILINE)
