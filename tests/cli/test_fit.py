"""``dfkde fit``."""

import re
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from command_line import SCATTERING, fact, rows_of, run
from sklearn.base import clone
from sklearn.metrics import roc_auc_score

from dfkde_sklearn import DFKDEDetector, PatchDFKDEDetector, TimmFeatures
from dfkde_sklearn._cli.arguments import detector_parameters
from dfkde_sklearn._cli.main import parser
from dfkde_sklearn._density.scoring import FeatureDensity
from dfkde_sklearn._features import scattering
from dfkde_sklearn.datasets import load_mvtec_folder, read_mask


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


@pytest.mark.parametrize("max_samples", [40000, 15])
def test_fit_shows_a_bad_image_among_the_good_ones(max_samples, textures, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(DFKDEDetector.__init__.__kwdefaults__, "max_samples", max_samples)
    good = tmp_path / "good"
    good.mkdir()
    for path in sorted((textures / "train" / "good").iterdir())[:30]:
        (good / path.name).write_bytes(path.read_bytes())
    (good / "015b.png").write_bytes((textures / "test" / "hole" / "000.png").read_bytes())
    # Of more images than are used, the seed decides whether it is one of them.
    ranks = set()
    for seed in range(4):
        assert run("fit", good, *SCATTERING, "--model", tmp_path / "model", "--seed", seed, "--force") == 0
        shown = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith(str(good))]
        ranks.add(shown.index(str(good / "015b.png")) if str(good / "015b.png") in shown else None)
    assert ranks == ({0} if max_samples > 31 else {0, None})


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


def test_large_images_can_be_divided_before_they_are_resized(textures, weights, tmp_path):
    arguments = ("--features", "test_resnet", "--weights", weights, "--model", tmp_path / "model")
    assert run("fit", textures / "train" / "good", *arguments, "--image-size", "32", "--reducing-gap", "1.5") == 0
    assert PatchDFKDEDetector.load(tmp_path / "model").features_.reducing_gap == 1.5


def test_an_engine_can_be_chosen(textures, weights, tmp_path):
    pytest.importorskip("onnxruntime")
    arguments = ("--features", "test_resnet", "--weights", weights, "--model", tmp_path / "model", "--device", "cpu")
    assert run("fit", textures / "train" / "good", *arguments, "--engine", "onnxruntime") == 0
    assert PatchDFKDEDetector.load(tmp_path / "model", device="cpu").features_.engine == "onnxruntime"
    assert run("score", tmp_path / "model", textures / "test" / "good") == 0


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


def test_an_existing_model_is_kept_unless_forced(textures, tmp_path, capsys):
    model, good = tmp_path / "model", textures / "train" / "good"
    model.write_bytes(b"precious")
    assert run("fit", good, *SCATTERING, "--model", model) == 2
    assert f"{model} exists" in capsys.readouterr().err
    assert model.read_bytes() == b"precious"
    assert run("fit", good, *SCATTERING, "--model", model, "--force") == 0
    assert isinstance(DFKDEDetector.load(model), DFKDEDetector)
    assert list(tmp_path.iterdir()) == [model]
