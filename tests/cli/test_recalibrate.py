"""``dfkde recalibrate``."""

import numpy as np
import pytest
from command_line import SCATTERING, fact, run

from dfkde_sklearn import DFKDEDetector


@pytest.fixture
def model(fitted, tmp_path):
    """A copy of a model."""
    path = tmp_path / "model"
    path.write_bytes(fitted.read_bytes())
    return path


def test_the_threshold_moves_as_the_detector_moves_it(model, fitted, textures, tmp_path, capsys):
    good = textures / "test" / "hole"  # which move it far
    assert run("recalibrate", model, good, "-o", tmp_path / "new") == 0
    printed = capsys.readouterr().out
    assert model.read_bytes() == fitted.read_bytes()
    before = DFKDEDetector.load(model)
    expected, found = DFKDEDetector.load(model).recalibrate(str(good)), DFKDEDetector.load(tmp_path / "new")
    assert found.offset_ == expected.offset_ != before.offset_
    np.testing.assert_array_equal(found.calibration_scores_, expected.calibration_scores_)
    assert fact(printed, "Calibration scores") == "80, before 60"
    assert fact(printed, "Threshold") == f"score {expected.offset_:.2f}, before {before.offset_:.2f}"
    np.testing.assert_array_equal(found.score_samples(str(good)), before.score_samples(str(good)))


def test_without_a_name_the_model_itself_is_replaced(model, textures, tmp_path):
    assert run("recalibrate", model, textures / "test" / "good" / "*.png", "--groups", r"(\d\d)\d\.png") == 0
    assert len(np.unique(DFKDEDetector.load(model).calibration_groups_)) == 60 + 2
    assert list(tmp_path.iterdir()) == [model]


def test_an_existing_file_is_kept_unless_forced(model, textures, tmp_path, capsys):
    (tmp_path / "new").write_bytes(b"precious")
    arguments = ("recalibrate", model, textures / "test" / "good", "-o", tmp_path / "new")
    assert run(*arguments) == 2
    assert "new exists" in capsys.readouterr().err
    assert (tmp_path / "new").read_bytes() == b"precious"
    assert run(*arguments, "--force") == 0


def test_a_model_whose_threshold_cannot_move_stays_as_it_is(textures, tmp_path, capsys):
    model, good = tmp_path / "model", textures / "train" / "good"
    assert run("fit", good, *SCATTERING, "--contamination", "0.1", "-o", model) == 0
    before = model.read_bytes()
    assert run("recalibrate", model, textures / "test" / "good") == 2
    assert "contamination=0.1 sets the threshold" in capsys.readouterr().err
    assert model.read_bytes() == before
