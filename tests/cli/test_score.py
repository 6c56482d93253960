"""``dfkde score``."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars
import pytest
from command_line import SCATTERING, rows_of, run
from PIL import Image
from sklearn.base import clone

from dfkde_sklearn import DFKDEDetector, DriftMonitor, PatchDFKDEDetector, TimmFeatures
from dfkde_sklearn._features import scattering
from dfkde_sklearn._report.contact_sheet import ANOMALOUS, NORMAL
from dfkde_sklearn.datasets import load_mvtec_folder


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


def test_score_prints_the_worst_images_first(fitted, textures, capsys):
    assert run("score", fitted, textures / "test") == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["path", "score", "P(anomalous)", "p-value", "verdict"]
    scores = [float(line.split()[1]) for line in lines]
    assert len(scores) == 40
    assert scores == sorted(scores)


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


def test_images_whose_maps_would_have_one_name_are_refused(positions, textures, tmp_path, capsys):
    image = (textures / "test" / "good" / "000.png").read_bytes()
    (tmp_path / "images" / "00").mkdir(parents=True)
    for name in ("00/00.png", "00_00.png"):
        (tmp_path / "images" / name).write_bytes(image)
    assert run("score", positions, tmp_path / "images", "--maps", tmp_path / "maps", "--force") == 2
    error = capsys.readouterr().err
    assert "00.png and " in error
    assert "would both have the map 00_00.png.map.png. Rename one" in error
    assert not (tmp_path / "maps").exists()


def test_maps_of_cropped_images_are_refused(textures, tmp_path, capsys):
    features = TimmFeatures(
        "test_resnet", pretrained=False, layers="layer2", pooling=None, crop="center", image_size=64, random_state=0
    )
    model = tmp_path / "model.safetensors"
    PatchDFKDEDetector(features).fit(textures / "train" / "good").save(model)
    assert run("score", model, textures / "test", "--maps", tmp_path / "maps") == 2
    assert "cropped" in capsys.readouterr().err
    assert not (tmp_path / "maps").exists()


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


# Tables


def test_all_tables_hold_the_same_rows(fitted, textures, with_broken, tmp_path):
    files = {kind: tmp_path / f"table.{kind}" for kind in ("csv", "json", "jsonl", "parquet")}
    arguments = [word for kind, file in files.items() for word in (f"--{kind}", file)]
    assert run("score", fitted, textures / "test", with_broken, "--skip-broken", *arguments) == 0
    expected = rows_of(files["csv"])
    assert len(expected) == 43
    found = {
        "json": json.loads(files["json"].read_text()),
        "jsonl": [json.loads(line) for line in files["jsonl"].read_text().splitlines()],
        "parquet": polars.read_parquet(files["parquet"]).to_dicts(),
    }
    for kind, rows in found.items():
        as_text = [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]
        assert as_text == expected, kind
    assert found["json"][0]["score"] is None


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl"])
def test_a_table_on_standard_output_is_the_file(kind, fitted, textures, tmp_path, capsys):
    images = textures / "test" / "good"
    assert run("score", fitted, images, f"--{kind}", tmp_path / "table") == 0
    capsys.readouterr()
    assert run("score", fitted, images, f"--{kind}", "-", "--quiet") == 0
    captured = capsys.readouterr()
    assert captured.out == (tmp_path / "table").read_text()
    assert captured.err == ""


@pytest.mark.parametrize("missing", [["pyarrow"], ["polars"], ["pyarrow", "polars"]])
def test_parquet_is_written_by_the_library_that_is_installed(missing, fitted, textures, tmp_path, monkeypatch, capsys):
    file = tmp_path / "table.parquet"
    images = textures / "test" / "good"
    with monkeypatch.context() as patch:
        for name in missing:
            patch.setitem(sys.modules, name, None)
        code = run("score", fitted, images, "--parquet", file, "--csv", tmp_path / "table.csv")
    if len(missing) == 2:
        assert code == 2
        assert "pip install 'dfkde-sklearn[parquet]'" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
    else:
        assert code == 0
        paths = polars.read_parquet(file)["path"].to_list()
        assert paths == [row["path"] for row in rows_of(tmp_path / "table.csv")]


def test_the_top_is_printed_and_the_file_holds_all(fitted, textures, tmp_path, capsys):
    assert run("score", fitted, textures / "test") == 0
    whole = capsys.readouterr().out.splitlines()
    assert run("score", fitted, textures / "test", "--top", "3", "--csv", tmp_path / "table.csv") == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [line.split() for line in whole[:4]]
    assert len(rows_of(tmp_path / "table.csv")) == 40
    assert run("score", fitted, textures / "test", "--top", "3", "--jsonl", "-") == 0
    printed = [json.loads(line)["path"] for line in capsys.readouterr().out.splitlines()]
    assert printed == [line.split()[0] for line in whole[1:4]]


def test_head_leaves_a_whole_table(fitted, textures, tmp_path):
    table = tmp_path / "table.csv"
    program = [sys.executable, "-m", "dfkde_sklearn", "score", fitted, textures / "test", "--csv", table]
    with subprocess.Popen(list(map(str, program)), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline().startswith(b"path")
        process.stdout.close()
        errors = process.stderr.read().decode()
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors
    assert len(rows_of(table)) == 40


# Thresholds and parts


@pytest.mark.parametrize("given", [{"target_fpr": 0.3}, {"target_fpr": 0.2, "confidence": 0.9}, {"confidence": 0.8}])
def test_the_threshold_of_a_run_is_the_one_of_a_fit(given, fitted, textures, tmp_path, capsys):
    before = fitted.read_bytes()
    arguments = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert run("score", fitted, textures / "test", *arguments, "--csv", tmp_path / "t.csv", "--sort", "input") == 0
    assert fitted.read_bytes() == before
    fitted_so = clone(DFKDEDetector.load(fitted)).set_params(**given).fit(str(textures / "train" / "good"))
    assert f"Threshold for this run: {fitted_so.offset_:.2f}" in capsys.readouterr().err
    rows = rows_of(tmp_path / "t.csv")
    expected = fitted_so.assess([row["path"] for row in rows])
    assert [row["verdict"] == "anomalous" for row in rows] == (expected.label == -1).tolist()
    np.testing.assert_allclose([float(row["p_anomalous"]) for row in rows], expected.p_anomalous, rtol=1e-5)


def test_a_threshold_that_contamination_set_is_not_moved(textures, tmp_path, capsys):
    good = textures / "train" / "good"
    assert run("fit", good, *SCATTERING, "--contamination", "0.1", "-o", tmp_path / "model") == 0
    assert run("score", tmp_path / "model", good, "--target-fpr", "0.1") == 2
    assert "contamination=0.1 sets the threshold, and target_fpr moves one" in capsys.readouterr().err


@pytest.fixture
def parts(textures):
    """Images of parts, several of each, and the rule that says which."""
    images = [str(path) for kind in ("good", "hole") for path in sorted((textures / "test" / kind).iterdir())]
    # Ten images in each: 000 to 009, 010 to 019.
    return images, r"(\w+/\d\d)\d\.png", [path[-len("good/000.png") : -len("0.png")] for path in images]


def test_parts_are_selected_by_their_lowest_scores(fitted, parts, tmp_path):
    images, rule, groups = parts
    arguments = ("--fdr", "0.5", "--groups", rule, "--sort", "input", "--csv", tmp_path / "table.csv")
    assert run("score", fitted, *images, *arguments) == 0
    selected = [row["verdict"] == "anomalous" for row in rows_of(tmp_path / "table.csv")]
    assert selected == DFKDEDetector.load(fitted).select(images, fdr=0.5, groups=groups).tolist()
    assert any(selected)


def test_the_monitor_counts_parts(fitted, parts, with_broken, tmp_path):
    images, rule, groups = parts
    broken = with_broken / "b.png"
    arguments = ("--monitor", tmp_path / "monitor.json", "--groups", rf"{rule}|b\.png", "--skip-broken")
    assert run("score", fitted, *images, broken, *arguments) == 0
    detector = DFKDEDetector.load(fitted)
    expected = DriftMonitor(detector).update(images, groups=groups)
    monitor = DriftMonitor.load(tmp_path / "monitor.json", detector)
    assert monitor.n_seen_ == len(set(groups)) == 4
    assert monitor.history_ == expected.history_


def test_the_model_is_read_once(fitted, textures, monkeypatch):
    read, whole = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or whole(path))
    assert run("score", fitted, textures / "test" / "good") == 0
    assert read.count(fitted) == 1
