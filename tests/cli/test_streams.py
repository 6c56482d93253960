"""Names of files, terminals, pipes and signals."""

import csv
import io
import os
import re
import signal
import subprocess
import sys
import textwrap

import pytest
from command_line import SCATTERING, is_png, rows_of, run

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
