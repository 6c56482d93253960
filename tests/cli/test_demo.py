"""``dfkde demo``."""

import io
from contextlib import redirect_stdout

import pytest
from command_line import fact, run
from PIL import Image

from dfkde_sklearn._report.contact_sheet import ANOMALOUS, NORMAL
from dfkde_sklearn._report.overlay import DEFECT


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What `demo` printed, and the folder that it wrote to."""
    folder = tmp_path_factory.mktemp("demo") / "made by it"
    with redirect_stdout(io.StringIO()) as printed:
        assert run("demo", "--out", folder, "--material", "mesh") == 0
    return printed.getvalue(), folder


def test_demo_distinguishes_good_from_defective_and_keeps_its_rate_of_false_alarms(demo):
    printed, _ = demo
    assert float(fact(printed, "AUROC")) > 0.95
    assert fact(printed, "False alarms asked for") == "5 %"
    assert float(fact(printed, "False alarms held").split()[0]) < 8
    assert "of 300 good images" in fact(printed, "False alarms held")


def test_demo_lists_the_worst_images_in_order(demo):
    printed, _ = demo
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:2] == ["rank", "index"])
    table = [line.split() for line in lines[start + 1 : start + 13]]
    assert [row[0] for row in table] == [str(rank) for rank in range(1, 13)]
    scores = [float(row[3]) for row in table]
    assert scores == sorted(scores)
    assert all(row[2] != "good" for row in table)


def test_demo_draws_a_picture_where_it_says(demo):
    printed, folder = demo
    assert [path.name for path in folder.iterdir()] == ["dfkde-demo.png"]
    assert fact(printed, "Picture") == str(folder / "dfkde-demo.png")
    with Image.open(folder / "dfkde-demo.png") as picture:
        colours = {colour for _, colour in picture.getcolors(picture.width * picture.height)}
    assert {DEFECT, ANOMALOUS, NORMAL} <= colours


def test_demo_keeps_a_picture_that_the_user_named(tmp_path, capsys):
    (tmp_path / "mine.png").write_bytes(b"mine")
    assert run("demo", "--out", tmp_path / "mine.png") == 2
    assert "mine.png exists" in capsys.readouterr().err
    assert (tmp_path / "mine.png").read_bytes() == b"mine"
