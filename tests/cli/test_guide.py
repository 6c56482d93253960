"""The page of the guide on the command line shows what the commands print."""

import doctest
import re
import shlex
import textwrap
from pathlib import Path

from command_line import run

from dfkde_sklearn._cli.demo import N_DEFECTIVE, N_GOOD, N_TRAIN
from dfkde_sklearn._cli.main import COMMANDS
from dfkde_sklearn.datasets import make_textures, write_mvtec_folder

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "command_line.rst"


def examples():
    """Return the commands on the page, but for those of blocks that are only shown, and what they print."""
    found = []
    for block in re.findall(r"^\.\. code-block:: console\n\n((?:    .*\n|\n)+)", PAGE.read_text(), re.MULTILINE):
        for command in re.split(r"^\$ ", textwrap.dedent(block), flags=re.MULTILINE)[1:]:
            words, _, printed = command.partition("\n")
            found.append((words, printed.strip() + "\n"))
    return found


def test_the_commands_of_the_page_print_what_it_shows(tmp_path, monkeypatch, capsys):
    n_test = N_GOOD + N_DEFECTIVE
    images = make_textures(N_TRAIN, n_test, material="weave", anomaly_fraction=N_DEFECTIVE / n_test, random_state=0)
    write_mvtec_folder(images, tmp_path / "cloth")
    monkeypatch.chdir(tmp_path)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert len(examples()) > 6
    for command, expected in examples():
        program, *words = shlex.split(command)
        assert program == "dfkde"
        run(*words)
        captured = capsys.readouterr()
        printed = captured.out + captured.err
        assert doctest.OutputChecker().check_output(expected, printed, flags), f"{command}\n{printed}"


def test_the_page_names_every_command():
    assert set(re.findall(r"^``dfkde (\w+)``  ", PAGE.read_text(), re.MULTILINE)) >= set(COMMANDS)
