"""``dfkde evaluate``."""

import numpy as np
import pytest
from command_line import fact, run

from dfkde_sklearn import PatchDFKDEDetector
from dfkde_sklearn.datasets import load_mvtec_folder


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
