"""``dfkde update``."""

import numpy as np
import pytest
from command_line import SCATTERING, fact, run

from dfkde_sklearn import DFKDEDetector, _streams


@pytest.fixture
def model(textures, tmp_path):
    """A model that can be updated."""
    path = tmp_path / "model"
    assert run("fit", textures / "train" / "good", *SCATTERING, "--training-rows", "-o", path) == 0
    return path


def test_an_updated_model_is_that_of_a_fit_to_all_images(model, textures, tmp_path, capsys):
    good = textures / "test" / "good"
    before = model.read_bytes()
    capsys.readouterr()
    assert run("update", model, good, "-o", tmp_path / "new") == 0
    printed = capsys.readouterr().out
    assert model.read_bytes() == before
    assert run("fit", textures / "train" / "good", good, *SCATTERING, "-o", tmp_path / "whole") == 0
    found, expected = DFKDEDetector.load(tmp_path / "new"), DFKDEDetector.load(tmp_path / "whole")
    n = len(expected.calibration_scores_)
    np.testing.assert_allclose(found.calibration_scores_, expected.calibration_scores_, rtol=1e-5)
    np.testing.assert_allclose(found.score_samples(str(good)), expected.score_samples(str(good)), rtol=1e-5)
    assert fact(printed, "Calibration scores") == f"{n}, before {len(DFKDEDetector.load(model).calibration_scores_)}"
    assert fact(printed, "Threshold").startswith(f"score {expected.offset_:.2f}, before ")


@pytest.mark.parametrize("options", [("--batch-size", "8"), ("--cache", "features")])
def test_an_update_may_compute_features_in_another_way(options, model, textures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("update", model, textures / "test" / "good", *options) == 0
    assert len(DFKDEDetector.load(model).calibration_scores_) == 80


def test_rows_are_kept_however_large_they_are(textures, tmp_path, monkeypatch):
    monkeypatch.setattr(_streams, "_KEPT_BYTES", 1000)
    path = tmp_path / "model"
    assert run("fit", textures / "train" / "good", *SCATTERING, "--training-rows", "-o", path) == 0
    n = len(DFKDEDetector.load(path).calibration_scores_)
    assert run("update", path, textures / "test" / "good") == 0
    assert len(DFKDEDetector.load(path).calibration_scores_) == n + 20


@pytest.mark.filterwarnings("default")
def test_a_model_can_be_updated_again_and_recalibrated_in_between(model, textures, capsys):
    good = textures / "test" / "good"
    n = len(DFKDEDetector.load(model).calibration_scores_)
    assert run("update", model, good / "*0.png") == 0
    assert run("recalibrate", model, good / "*1.png") == 0
    assert run("update", model, good / "*2.png") == 0
    assert "The 2 calibration scores that recalibrate added are left out" in capsys.readouterr().err
    added = len([*good.glob("*0.png"), *good.glob("*2.png")])
    assert len(DFKDEDetector.load(model).calibration_scores_) == n + added


def test_a_model_without_training_rows_stays_as_it_is(fitted, textures, tmp_path, capsys):
    before = fitted.read_bytes()
    assert run("update", fitted, textures / "test" / "good", "-o", tmp_path / "new") == 2
    assert "fit it with --training-rows" in capsys.readouterr().err
    assert fitted.read_bytes() == before
    assert not (tmp_path / "new").exists()
