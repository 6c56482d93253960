"""``dfkde score --shard``."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from command_line import run

pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "shards"


def shard(fitted, images, folder, k, n, *more):
    return run("score", fitted, *images, "--shard", f"{k}/{n}", "--parquet", folder, "--quiet", *more)


@pytest.fixture
def images(textures):
    return sorted(map(str, (textures / "test").rglob("*.png")))


def test_the_shards_together_are_the_table_of_one_run(fitted, images, folder, tmp_path, capsys):
    for k in (1, 2, 3):
        assert shard(fitted, images[:: -1 if k == 2 else 1], folder, k, 3) == 0
    assert sorted(os.listdir(folder)) == [f"scores-0000{k}-of-00003.parquet" for k in (1, 2, 3)]  # noqa: PTH208
    assert capsys.readouterr().out == ""
    assert run("score", fitted, *images, "--parquet", tmp_path / "all.parquet", "--sort", "input") == 0
    assert pq.read_table(folder).sort_by("path").equals(pq.read_table(tmp_path / "all.parquet"))
    sizes = [pq.read_metadata(file).num_rows for file in sorted(folder.iterdir())]
    assert sizes == [14, 13, 13]


def test_more_shards_than_images_leave_empty_files(fitted, images, folder):
    assert shard(fitted, images[:2], folder, 3, 3) == 0
    assert pq.read_table(folder / "scores-00003-of-00003.parquet").num_rows == 0


def test_a_complete_shard_is_kept_by_resume_and_else_an_error(fitted, images, folder, capsys):
    assert shard(fitted, images, folder, 1, 2) == 0
    file = folder / "scores-00001-of-00002.parquet"
    before = file.stat().st_mtime_ns
    assert shard(fitted, images, folder, 1, 2) == 2
    assert "exists. Keep it and go on with --resume, or overwrite it with --force." in capsys.readouterr().err
    assert shard(fitted, images, folder, 1, 2, "--resume") == 0
    assert file.stat().st_mtime_ns == before
    # The exit code is that of a run that scores.
    assert shard(fitted, images, folder, 1, 2, "--resume", "--exit-code") == 1
    content = file.read_bytes()
    assert shard(fitted, images, folder, 1, 2, "--force") == 0
    assert file.stat().st_mtime_ns != before
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model", "another model: the SHA-256 of its model is"),
        ("images", "other images: the SHA-256 of their list is"),
        ("threshold", "another threshold:"),
        ("shards", "another number of shards: 2, and of this job 3"),
        ("damage", "is no shard of dfkde score, or it is damaged"),
    ],
)
def test_a_shard_of_another_job_in_the_folder_is_an_error(fitted, images, folder, tmp_path, change, message, capsys):
    assert shard(fitted, images, folder, 1, 2) == 0
    model, k, n, more = fitted, 2, 2, []
    if change == "model":
        model = tmp_path / "other"
        shutil.copy(fitted, model)
        assert run("recalibrate", model, *images[:9], "--quiet") == 0
    elif change == "images":
        images = images[1:]
    elif change == "threshold":
        more = ["--target-fpr", "0.2"]
    elif change == "shards":
        n = 3
    else:
        file = folder / "scores-00001-of-00002.parquet"
        file.write_bytes(file.read_bytes()[:-10])
    before = {path: path.read_bytes() for path in folder.iterdir()}
    capsys.readouterr()
    assert shard(model, images, folder, k, n, "--resume", *more) == 2
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_stopped_shard_goes_on_where_it_was(fitted, images, folder, monkeypatch, capsys):
    from dfkde_sklearn import DFKDEDetector

    monkeypatch.setattr("dfkde_sklearn._cli.shards._IMAGES", 5)
    assessed = DFKDEDetector.assess
    seen = []

    def stopped(self, X):
        if len(seen) == 10:
            raise KeyboardInterrupt
        seen.extend(X)
        return assessed(self, X)

    with monkeypatch.context() as patch:
        patch.setattr(DFKDEDetector, "assess", stopped)
        assert shard(fitted, images, folder, 2, 2) == 130
    names = [path.name for path in folder.iterdir()]
    assert sorted(names) == [f".scores-00002-of-00002.parquet.{start:09}" for start in (0, 5)]
    # Another model does not go on with it.
    assert shard(fitted, images, folder, 2, 2, "--resume", "--target-fpr", "0.2") == 2
    assert "another threshold" in capsys.readouterr().err
    seen.clear()

    def counted(self, X):
        seen.extend(X)
        return assessed(self, X)

    with monkeypatch.context() as patch:
        patch.setattr(DFKDEDetector, "assess", counted)
        assert shard(fitted, images, folder, 2, 2, "--resume") == 0
    assert seen == images[1::2][10:]
    assert [path.name for path in folder.iterdir()] == ["scores-00002-of-00002.parquet"]
    table = pq.read_table(folder / "scores-00002-of-00002.parquet")
    assert table["path"].to_pylist() == images[1::2]


def test_a_damaged_shard_is_named(fitted, images, folder, capsys):
    assert shard(fitted, images, folder, 1, 1) == 0
    file = folder / "scores-00001-of-00001.parquet"
    content = file.read_bytes()
    file.write_bytes(content[:4] + b"\xff" * 200 + content[204:])
    assert shard(fitted, images, folder, 1, 1, "--resume") == 2
    assert f"{file} cannot be read: " in capsys.readouterr().err


KILLED = """
import sys
import dfkde_sklearn._cli.shards as shards
shards._IMAGES = 2
from dfkde_sklearn._cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_job_loses_and_doubles_nothing(fitted, images, folder, tmp_path):
    command = [sys.executable, "-c", KILLED, "score", str(fitted), *images, "--shard", "1/1", "--parquet", str(folder)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (folder.exists() and len(list(folder.iterdir())) > 2):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert list(folder.glob("[!.]*")) == []
    subprocess.run([*command, "--resume"], check=True, timeout=100, stderr=subprocess.DEVNULL)
    assert [path.name for path in folder.iterdir()] == ["scores-00001-of-00001.parquet"]
    assert run("score", fitted, *images, "--parquet", tmp_path / "all.parquet", "--sort", "input", "--quiet") == 0
    assert pq.read_table(folder).equals(pq.read_table(tmp_path / "all.parquet"))


def test_broken_images_are_rows_and_a_shard_of_nothing_else_is_an_error(fitted, with_broken, folder, capsys):
    files = sorted(map(str, with_broken.iterdir()))
    assert shard(fitted, files, folder, 1, 1) == 2
    assert "b.png" in capsys.readouterr().err
    assert list(folder.iterdir()) == []
    assert shard(fitted, files[1:2], folder, 1, 1, "--skip-broken") == 2
    assert "None of the 1 images of shard 1/1 can be read." in capsys.readouterr().err
    assert list(folder.iterdir()) == []
    assert shard(fitted, files, folder, 1, 1, "--skip-broken") == 0
    table = pq.read_table(folder)
    assert table["verdict"].to_pylist().count("broken") == 1
    assert table["score"].null_count == 1
    # Another job without --skip-broken fails as it would without the file.
    assert shard(fitted, files, folder, 1, 1, "--resume", "--skip-broken") == 0
    capsys.readouterr()
    assert shard(fitted, files, folder, 1, 1, "--resume") == 2
    assert "has 1 images that could not be read, the first for this: " in capsys.readouterr().err


def test_a_name_that_is_not_utf_8_has_a_way_out_that_shards_have(fitted, images, folder, tmp_path, capsys):
    name = os.fsencode(tmp_path) + b"/\xff.png"
    shutil.copy(images[0], name)
    assert shard(fitted, [os.fsdecode(name)], folder, 1, 1) == 2
    assert "is not UTF-8, which Parquet needs. Rename the image.\n" in capsys.readouterr().err
    assert run("score", fitted, os.fsdecode(name), "--parquet", tmp_path / "one.parquet") == 2
    assert "Rename the image, or use --csv.\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard", "0/4"], "'0/4' is not K/N with K from 1 to N, such as 3/16. Where jobs are counted from 0, add 1"),
        (["--shard", "5/4"], "'5/4' is not K/N"),
        (["--shard", "4"], "'4' is not K/N"),
        (["--shard", "1/4"], "Give --parquet FOLDER too."),
        (["--resume"], "Give --shard K/N too"),
        (["--shard", "1/4", "--parquet", "F", "--fdr", "0.1"], "--fdr is for all images at once"),
        (["--shard", "1/4", "--parquet", "F", "--csv", "-"], "--csv is for all images at once"),
        (["--shard", "1/4", "--parquet", "F", "--masks"], "--masks is for all images at once"),
        (["--shard", "1/4", "--parquet", "F", "--groups", "folder"], "--groups is for all images at once"),
        (["--shard", "1/4", "--parquet", "F", "--sort", "input"], "--sort is for all images at once"),
        (["--shard", "1/4", "--parquet", ""], "argument --parquet: the path is empty. For the current folder use '.'"),
        (["--files-from="], "argument --files-from: the value is empty. Leave the option out, or name something"),
        (["--weights="], "argument --weights: the value is empty"),
        (["--shard", "1/4", "--parquet", __file__], "with --shard it is a folder, and this is a file"),
    ],
)
def test_wrong_arguments_say_what_is_allowed(fitted, images, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("score", fitted, *images[:2], *arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
