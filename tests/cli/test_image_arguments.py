"""Images by folder, pattern, list and standard input."""

import io
import re
import shutil
import subprocess
import sys

import pytest
from command_line import SCATTERING, fact, rows_of, run

from dfkde_sklearn import DFKDEDetector


@pytest.fixture
def good(textures):
    """The images of a folder, in order."""
    return sorted(map(str, (textures / "test" / "good").iterdir()))


@pytest.fixture
def standard_input(monkeypatch):
    """A function that puts bytes there."""

    def put(data):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return put


def scored(tmp_path, *arguments):
    """Return the paths that were scored, in order."""
    file = tmp_path / "table.csv"
    assert run("score", *arguments, "--csv", file, "--sort", "input", "--force") == 0
    return [row["path"] for row in rows_of(file)]


def test_a_folder_a_pattern_and_lists_name_the_same_images(fitted, textures, good, standard_input, tmp_path):
    folder = textures / "test" / "good"
    lines, nul, windows = (tmp_path / name for name in ("lines", "nul", "windows"))
    lines.write_text("\n".join(good) + "\n")
    nul.write_bytes(b"\0".join(name.encode() for name in good) + b"\0")
    windows.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(good).encode())
    for arguments in (
        (folder,),
        (folder / "*.png",),
        (textures / "test" / "**" / "good" / "*.png",),
        ("--files-from", lines),
        ("--files-from", windows),
        ("--files-from", nul, "-0"),
        (*good[:3], "--files-from", lines),
    ):
        assert scored(tmp_path, fitted, *arguments) == good
    for data, arguments in (
        (lines.read_bytes(), ["-"]),
        (lines.read_bytes(), ["--files-from", "-"]),
        (nul.read_bytes(), ["-0"]),
        (nul.read_bytes(), ["-0", "-"]),
        (str(folder).encode() + b"\0", ["--null"]),
        (lines.read_bytes(), [good[0], "-"]),
    ):
        standard_input(data)
        assert scored(tmp_path, fitted, *arguments) == good


def test_find_pipes_names_of_any_characters(fitted, good, tmp_path):
    folder = tmp_path / "odd\nnames"
    folder.mkdir()
    for name in ("a\nb.png", " c .png"):
        shutil.copy(good[0], folder / name)
    program = [sys.executable, "-m", "dfkde_sklearn", "score", fitted, "-0", "--csv", tmp_path / "table.csv"]
    found = subprocess.run(["find", folder, "-name", "*.png", "-print0"], stdout=subprocess.PIPE, check=True)
    done = subprocess.run(list(map(str, program)), input=found.stdout, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {row["path"] for row in rows_of(tmp_path / "table.csv")} == {str(path) for path in folder.iterdir()}


def test_a_pattern_takes_folders_as_they_are_and_leaves_out_what_is_no_image(fitted, textures, tmp_path, monkeypatch):
    monkeypatch.chdir(textures)
    (textures / "test" / "notes.txt").write_text("no image")
    expected = scored(tmp_path, fitted, "test")
    assert len(expected) == 40
    assert scored(tmp_path, fitted, "test/*") == scored(tmp_path, fitted, "test/**") == expected
    (textures / "test" / "notes.txt").unlink()


def test_a_file_whose_name_reads_like_a_pattern_is_that_file(fitted, good, tmp_path):
    for name in ("part[1].png", "part1.png"):
        shutil.copy(good[0], tmp_path / name)
    assert scored(tmp_path, fitted, tmp_path / "part[1].png") == [str(tmp_path / "part[1].png")]


def test_fit_takes_a_pattern(textures, fitted, tmp_path, capsys):
    pattern = textures / "train" / "**" / "*.png"
    assert run("fit", pattern, *SCATTERING, "-o", tmp_path / "model") == 0
    assert fact(capsys.readouterr().out, "Training") == f"60 images in 1 folder, {pattern}"
    models = [DFKDEDetector.load(path) for path in (tmp_path / "model", fitted)]
    assert models[0].offset_ == models[1].offset_


def test_evaluate_takes_each_image_for_the_kind_that_its_folder_is_named_after(fitted, textures, capsys):
    assert run("evaluate", fitted, textures / "test") == 0
    expected = capsys.readouterr().out
    assert run("evaluate", fitted, textures / "test" / "*" / "*.png") == 0
    printed = capsys.readouterr().out
    for name in ("AUROC", "False alarms held", "Defects found"):
        assert fact(printed, name) == fact(expected, name)
    assert "On the 40 images in 2 folders:" in printed


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        (b"", ["-"], "standard input: the list names no image"),
        (b"\0\0", ["-0"], "standard input: the list names no image"),
        (b"a.png\0b.png\0", ["-"], "names that end with a NUL.*give -0"),
        (b"a.png\nb.png\n", ["-"], "a.png' is neither a folder nor a file"),
    ],
)
def test_a_list_that_names_no_images_is_an_error(data, arguments, message, fitted, standard_input, capsys):
    standard_input(data)
    assert run("score", fitted, *arguments) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("name", ["gone.png", "gone[1].png", "gone"])
def test_names_in_a_list_of_files_that_are_gone_are_broken_images(fitted, good, tmp_path, name, capsys):
    missing, names, table = str(tmp_path / name), tmp_path / "names", tmp_path / "table.csv"
    names.write_text("\n".join([good[0], missing, good[1]]))
    assert run("score", fitted, "--files-from", names) == 2
    assert "is neither a folder nor a file" in capsys.readouterr().err
    assert run("score", fitted, missing, good[0], "--skip-broken") == 2
    assert run("score", fitted, "--files-from", names, "--skip-broken", "--csv", table, "--sort", "input") == 0
    assert [row["path"] for row in rows_of(table)] == [good[0], missing, good[1]]
    assert [row["verdict"] == "broken" for row in rows_of(table)] == [False, True, False]
    assert "there is no such file" in rows_of(table)[1]["reason"]
