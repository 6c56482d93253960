"""``dfkde report``: it tells labelled folders, writes one page, and answers mistakes in a line."""

import json
import re
import sys

import numpy as np
import pytest

from dfkde_sklearn import PatchDFKDEDetector, ScatteringFeatures
from dfkde_sklearn._cli.main import main
from dfkde_sklearn.datasets import make_textures, write_mvtec_folder


@pytest.fixture(scope="module")
def textures(tmp_path_factory):
    """A folder in the MVTec layout, and a model of its good images."""
    root = tmp_path_factory.mktemp("images")
    data = make_textures(30, 20, material="knit", defects=["hole"], image_size=64, random_state=0)
    features = ScatteringFeatures(pooling=None, image_size=64)
    PatchDFKDEDetector(features).fit(data.X_train).save(root / "model.safetensors")
    return write_mvtec_folder(data, root / "knit"), root / "model.safetensors"


def run(*arguments):
    return main([str(argument) for argument in arguments])


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)[1])


def test_a_labelled_folder_gives_kinds_masks_and_neighbours(textures, tmp_path, capsys):
    folder, model = textures
    page = tmp_path / "report.html"
    assert run("report", model, folder, "-o", page, "--training", folder / "train" / "good") == 0
    said = capsys.readouterr()
    assert "20 labelled images in" in said.out
    assert f"{page}, " in said.out
    data = data_of(page)
    assert sorted(data["rows"]["kind"]) == ["good"] * 10 + ["hole"] * 10
    for i, shown in data["large"].items():
        assert ("truth" in shown) == (data["rows"]["kind"][int(i)] == "hole")
    assert all(near[0][0] in range(30) for near in data["neighbours"].values())
    assert data["training"]
    text = page.read_text(encoding="utf-8")
    assert "Confusion table" in text
    assert f"<h1>model.safetensors: {folder}</h1>" in text


def test_other_folders_and_files_have_no_labels_and_the_scores_of_dfkde_score(textures, tmp_path, capsys):
    folder, model = textures
    images = [folder / "test" / "hole", folder / "test" / "good" / "000.png", folder / "test" / "hole" / "001.png"]
    assert run("report", model, *images, "-o", tmp_path / "report.html", "--title", "Two kinds", "--quiet") == 0
    assert capsys.readouterr().err == ""
    assert run("score", model, *images, "--csv", tmp_path / "t.csv", "--sort", "input", "--quiet") == 0
    data = data_of(tmp_path / "report.html")
    assert data["rows"]["kind"] is None
    table = [line.split(",") for line in (tmp_path / "t.csv").read_text().splitlines()[1:]]
    assert [data["folder"] + name for name in data["rows"]["name"]] == [row[0] for row in table]
    np.testing.assert_allclose(data["rows"]["score"], [float(row[1]) for row in table], rtol=1e-5)
    assert "<h1>Two kinds</h1>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_broken_image_is_an_error_or_is_listed(textures, tmp_path, capsys):
    folder, model = textures
    (tmp_path / "broken.png").write_bytes(b"no image")
    arguments = ("report", model, tmp_path / "broken.png", folder / "test" / "hole", "-o", tmp_path / "report.html")
    assert run(*arguments) == 2
    assert "broken.png: the file is not an image" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
    assert run(*arguments, "--skip-broken") == 0
    assert data_of(tmp_path / "report.html")["rows"]["reason"]["0"]


def test_an_earlier_page_is_kept_without_force(textures, tmp_path, capsys):
    folder, model = textures
    page = tmp_path / "report.html"
    page.write_text("earlier")
    arguments = ("report", model, folder / "test" / "hole", "-o", page)
    assert run(*arguments) == 2
    assert "report.html exists" in capsys.readouterr().err
    assert page.read_text() == "earlier"
    assert run(*arguments, "--force") == 0
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_missing_extra_is_told_in_a_line(textures, tmp_path, capsys, monkeypatch):
    folder, model = textures
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert run("report", model, folder / "test" / "hole", "-o", tmp_path / "report.html") == 2
    assert "dfkde report: error: A report needs jinja2: pip install 'dfkde-sklearn[report]'." in capsys.readouterr().err


def test_a_model_of_a_feature_matrix_is_refused(textures, tmp_path, capsys):
    rows = np.random.default_rng(0).normal(size=(20, 4))
    PatchDFKDEDetector(features=None).fit(rows).save(tmp_path / "rows.safetensors")
    assert run("report", tmp_path / "rows.safetensors", textures[0], "-o", tmp_path / "report.html") == 2
    assert "was fitted on a feature matrix, not on images" in capsys.readouterr().err
