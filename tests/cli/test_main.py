"""The program itself: help, defaults, progress, and errors of the program."""

import io
import os
import re
import subprocess
import sys

import pytest
from command_line import SCATTERING, run

from dfkde_sklearn import DFKDEDetector, PatchDFKDEDetector, TimmFeatures
from dfkde_sklearn._cli import training
from dfkde_sklearn._cli.demo import MATERIALS
from dfkde_sklearn._cli.main import COMMANDS, parser
from dfkde_sklearn._features import network
from dfkde_sklearn.datasets import _surfaces

# Of what takes long to import.
HEAVY = ("torch", "timm", "numpy", "scipy", "sklearn", "PIL", "tqdm", "huggingface_hub")


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], *([name, "--help"] for name in COMMANDS), ["fit"]])
def test_help_and_wrong_arguments_import_nothing_that_takes_long(words):
    script = f"""if True:
        import sys
        from dfkde_sklearn.__main__ import main
        sys.argv = ["dfkde", *{words}]
        try:
            main()
        except SystemExit:
            pass
        found = sorted({set(HEAVY)} & sys.modules.keys())
        sys.exit(", ".join(found) or None)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_in_its_help(name, capsys):
    assert run(name, "--help") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(rf"Example: dfkde {name}\b", printed)
    assert name in parser().format_help()


@pytest.mark.parametrize("command", ["demo", "fit"])
def test_help_names_the_defaults_of_the_detectors(command, capsys):
    assert run(command, "--help") == 0
    printed = " ".join(capsys.readouterr().out.split())
    defaults = PatchDFKDEDetector().get_params() | DFKDEDetector().get_params()
    for name in ("n_components", "residual", "bandwidth", "target_fpr", "flips"):
        value = str(defaults[name]).lower()
        assert re.search(rf"--{name.replace('_', '-')} .*?\(default: {re.escape(value)}\)", printed), name
    if command == "fit":
        pooled, positions = DFKDEDetector().max_samples, PatchDFKDEDetector().max_samples
        assert f"if there are more than {positions}, with the pooled detector {pooled} (" in printed
        assert f"(default: {TimmFeatures().crop})" in printed
        assert f"(default: {TimmFeatures().white_level})" in printed


def test_the_choices_are_those_of_the_library():
    assert tuple(_surfaces.MATERIALS) == MATERIALS
    assert network.CROPS == training.CROPS
    assert TimmFeatures().backbone == training.DEFAULT_FEATURES


def test_debug_shows_where_an_error_arose(fitted, tmp_path, capsys):
    assert run("score", fitted, tmp_path / "missing") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert run("score", fitted, tmp_path / "missing", "--debug") == 2
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith("Traceback")
    assert last == line


def test_progress_shows_images_a_second_and_the_time_left_in_a_terminal_only(
    fitted, textures, tmp_path, monkeypatch, capsys
):
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    assert run("score", fitted, textures / "test" / "good") == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [line for line in captured.err.splitlines() if "images are anomalous" in line]
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 120))
    with os.fdopen(writer, "w", buffering=1) as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        assert run("score", fitted, textures / "test" / "good") == 0
        terminal.flush()
        shown = os.read(reader, 100_000).decode()
    os.close(reader)
    assert "Scoring 20 images" in shown
    assert re.search(r"20/20 \[\d\d:\d\d<\d\d:\d\d, .*image/s\]", shown)
    assert capsys.readouterr().out == captured.out


def test_a_model_keeps_no_progress_bar(textures, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    assert run("fit", textures / "train" / "good", *SCATTERING, "-o", tmp_path / "model") == 0
    assert "image/s" in sys.stderr.getvalue()
    assert not DFKDEDetector.load(tmp_path / "model").features_.verbose
