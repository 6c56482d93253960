"""The report: its numbers are the detector's, it fetches nothing, its text is text, and it works in a browser."""

import csv
import io
import json
import os
import re
import shutil
import sys
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score

from dfkde_sklearn import AnomalyClassifier, DFKDEDetector, PatchDFKDEDetector, ScatteringFeatures, write_report
from dfkde_sklearn._calibration import threshold_at_rate
from dfkde_sklearn._images import as_images
from dfkde_sklearn._report import scored
from dfkde_sklearn._report.charts import Axis, Mark, Series, histogram, line_chart, ticks
from dfkde_sklearn._report.facts import promises
from dfkde_sklearn._report.gallery import Candidates, encoded, nearest, sections, shrunk
from dfkde_sklearn._report.overlay import OUTLINE
from dfkde_sklearn._report.quality import RATES, kinds_of_images, operating_points
from dfkde_sklearn.datasets import make_textures

MARKUP = "<img src=x onerror=alert(1)>.png"
# A file in a folder: its path holds the end of a script.
END_OF_SCRIPT = Path("a<", "script><script>alert(2)<", "script>.png")


class Greys(TransformerMixin, BaseEstimator):
    """Grey levels on a grid of 6 x 6, which keeps the number of images in each call."""

    def fit(self, X, y=None):
        self.calls_ = []
        return self

    def transform(self, X):
        images = as_images(X)
        self.calls_.append(len(images))
        small = [np.asarray(images[i].resize((12, 12)), np.float32)[..., 0] for i in range(len(images))]
        return np.stack(small).reshape(-1, 6, 2, 6, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 6, 6, 4)


class Page(HTMLParser):
    """A page: its elements as (name, attributes), its text, and the data of its script."""

    def __init__(self, file):
        super().__init__()
        self.elements, self.words, self.scripts, self._open = [], [], [], []
        self.feed(Path(file).read_text(encoding="utf-8"))
        self.data = json.loads(self.scripts[0])
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_data(self, data):
        if self._open and self._open[-1] == "script":
            self.scripts.append(data)
        else:
            self.words.append(data)

    def handle_endtag(self, tag):
        while self._open.pop() != tag:
            pass

    def named(self, name):
        return [attributes for tag, attributes in self.elements if tag == name]


@pytest.fixture(scope="module")
def data():
    return make_textures(60, 40, defects=["hole", "scratch"], image_size=64, random_state=0)


@pytest.fixture(scope="module")
def detector(data):
    return PatchDFKDEDetector(ScatteringFeatures(pooling=None, image_size=64)).fit(data.X_train)


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """Files of the test images; two of them have names that are markup."""
    root = tmp_path_factory.mktemp("parts")
    for i, image in enumerate(data.X_test):
        path = root / ({0: MARKUP, 1: END_OF_SCRIPT}.get(i) or f"{data.defects_test[i]}, {i:03}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return root


@pytest.fixture(scope="module")
def labelled(data, detector, folder, tmp_path_factory):
    """A report with all that there can be in one, and the order of its images."""
    paths = [str(folder / MARKUP), str(folder / END_OF_SCRIPT)]
    paths += [str(folder / f"{kind}, {i:03}.png") for i, kind in enumerate(data.defects_test) if i > 1]
    file = write_report(
        detector,
        paths,
        tmp_path_factory.mktemp("report") / "report.html",
        y=data.defects_test,
        masks=list(data.masks_test),
        training_images=data.X_train,
        title="<b>Line 7</b>",
    )
    return file, paths


# What it says


def test_the_rows_are_the_answers_of_the_detector(labelled, detector):
    file, paths = labelled
    page = Page(file)
    rows = page.data["rows"]
    assert [page.data["folder"] + name for name in rows["name"]] == paths
    answers = detector.assess(paths)
    for column, expected in {
        "score": answers.log_density,
        "p_value": answers.p_value,
        "p_anomalous": answers.p_anomalous,
    }.items():
        np.testing.assert_allclose(rows[column], expected, rtol=1e-5)
    verdicts = [page.data["verdicts"][verdict] for verdict in rows["verdict"]]
    assert verdicts == ["anomalous" if label == -1 else "normal" for label in answers.label]


def test_the_quality_is_that_of_scikit_learn(labelled, data, detector):
    file, paths = labelled
    answers = detector.assess(paths)
    text = Page(file).text
    assert f"AUROC {roc_auc_score(data.y_test, -answers.log_density):.3f}" in text
    for kind in ("hole", "scratch"):
        called = answers.label[data.defects_test == kind] == -1
        assert f"· {kind} {(~called).sum()} {called.sum()} {100 * called.mean():.3g} %" in text


def test_the_operating_table_agrees_with_a_loop(labelled, data, detector):
    file, paths = labelled
    scores = detector.score_samples(paths).astype(float)
    points = operating_points(RATES, detector.calibration_scores_, scores, data.y_test == 1)
    text = Page(file).text
    for rate, point in zip(RATES, points, strict=True):
        threshold = threshold_at_rate(detector.calibration_scores_, rate)
        called = [score < threshold for score in scores]
        assert point.called == sum(called) / len(called)
        for share, kind in ((point.false_alarms, 0), (point.found, 1)):
            of_kind = [c for c, y in zip(called, data.y_test, strict=True) if y == kind]
            assert share == sum(of_kind) / len(of_kind)
        assert f"{100 * rate:.3g} % {threshold:.4g} {100 * point.false_alarms:.3g} %" in text


def test_a_report_without_labels_has_no_word_of_them(folder, detector, tmp_path):
    page = Page(write_report(detector, folder, tmp_path / "report.html"))
    assert page.data["rows"]["kind"] is None
    assert "AUROC" not in page.text
    assert "Confusion" not in page.text
    assert "called anomalous" in page.text


def test_labels_of_one_kind_have_no_roc_curve(data, detector, tmp_path):
    good = data.X_test[data.y_test == 0]
    page = Page(write_report(detector, good, tmp_path / "report.html", y=np.zeros(len(good), int)))
    assert "AUROC" not in page.text
    assert "False alarms held" in page.text
    assert "images[3]" in page.data["rows"]["name"]


@pytest.mark.parametrize(
    ("parameters", "groups", "expected"),
    [
        ({}, False, "About 5 % of new good images are called anomalous, on average over training sets."),
        ({}, True, "About 5 % of new good images of new groups are called anomalous, on average"),
        ({"target_fpr": 0.01}, False, "But 60 images cannot tell a rate below 1.64 %."),
        (
            {"target_fpr": 0.1, "confidence": 0.9},
            False,
            "At most 10 % of new good images are called anomalous, with a probability of 0.9 over training sets.",
        ),
        (
            {"target_fpr": 0.2, "confidence": 0.9},
            True,
            "Of at most 20 % of new groups of good images, any image is called anomalous, with a probability of 0.9",
        ),
        ({"contamination": 0.1}, False, "about 10 % of new images from the same source"),
        ({"threshold_offset": -40.0}, False, "threshold_offset=-40.0: no rate of false alarms is promised"),
    ],
)
def test_what_the_threshold_promises_is_said_as_it_was_set(parameters, groups, expected):
    rows = np.random.default_rng(0).normal(size=(60, 5))
    fitted = DFKDEDetector(**parameters).fit(rows, groups=np.arange(60) // 3 if groups else None)
    said = " ".join(promises(fitted))
    assert expected in said
    assert ("drawn as the training images were" in said) == ("threshold_offset" not in parameters)


# What it shows


def test_the_gallery_holds_the_worst_the_borderline_and_the_mistakes():
    rng = np.random.default_rng(0)
    scores, is_defective = rng.normal(size=200), rng.random(200) < 0.3
    chosen = sections(0.1, labelled=True, n_most=7)
    # Offered a few at a time, as a pass does.
    for start in range(0, 200, 30):
        block = slice(start, start + 30)
        indices = range(200)[block]
        for section in chosen:
            section.offer(indices, Candidates(scores[block], scores[block] < 0.1, is_defective[block]))
    worst, borderline, missed, alarms = (section.indices() for section in chosen)
    assert worst == np.argsort(scores)[:7].tolist()
    assert borderline == np.argsort(np.abs(scores - 0.1))[:7].tolist()
    by_score = np.argsort(scores).tolist()
    assert missed == [i for i in by_score[::-1] if is_defective[i] and scores[i] >= 0.1][:7]
    assert alarms == [i for i in by_score if not is_defective[i] and scores[i] < 0.1][:7]


def decoded(text):
    return Image.open(io.BytesIO(b64decode(text)))


def test_images_in_the_gallery_come_with_maps_masks_and_neighbours(labelled, data):
    page = Page(labelled[0])
    for i, shown in page.data["large"].items():
        assert set(shown) == {"image", "map"} | ({"truth"} if data.y_test[int(i)] else set())
        assert decoded(shown["image"]).size == decoded(shown["map"]).size == (64, 64)
        near = page.data["neighbours"][i]
        assert len(near) == 4
        assert [distance for _, distance in near] == sorted(distance for _, distance in near)
        assert {str(j) for j, _ in near} <= page.data["training"].keys()
    worst = page.data["rows"]["score"].index(min(page.data["rows"]["score"]))
    assert str(worst) in page.data["large"]
    lines = np.abs(np.asarray(decoded(page.data["large"][str(worst)]["map"]).convert("RGB"), float) - OUTLINE).sum(-1)
    assert lines.min() < 150


def test_every_image_of_a_small_set_has_a_picture_in_the_table(labelled, data):
    small = Page(labelled[0]).data["small"]
    assert sorted(map(int, small)) == list(range(40))
    shown = np.asarray(decoded(small["5"]).convert("L"), float)
    expected = Image.fromarray(data.X_test[5]).convert("L").resize(shown.shape[::-1])
    assert np.corrcoef(shown.ravel(), np.asarray(expected, float).ravel())[0, 1] > 0.9


def test_the_nearest_training_images_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(150, 3, 2)) * rng.uniform(0.1, 9, size=(3, 2))
    features[:, 2, 1] = 4.0
    asked = rng.normal(size=(5, 3, 2))
    of_images = {f"{i}.png": row for i, row in enumerate(features)} | {f"q{i}.png": row for i, row in enumerate(asked)}
    training = as_images([f"{i}.png" for i in range(150)])

    def transform(names):
        return np.stack([of_images[name] for name in names])

    blocks = [range(0, 70), range(70, 140), range(140, 150)]
    indices, distances = nearest(transform, [f"q{i}.png" for i in range(5)], training, 3, blocks)
    sample = np.unique(np.linspace(0, 149, 64).round().astype(int))
    deviations = features[sample].std(axis=0)
    deviations[2, 1] = 1
    for row, found, lengths in zip(asked, indices, distances, strict=True):
        expected = [np.sqrt(np.mean(((row - known) / deviations) ** 2)) for known in features]
        assert found.tolist() == np.argsort(expected)[:3].tolist()
        np.testing.assert_allclose(lengths, np.sort(expected)[:3], rtol=1e-5)


def test_a_pooled_detector_and_cropped_features_have_pictures_without_maps(data, tmp_path):
    pooled = DFKDEDetector(ScatteringFeatures(image_size=32)).fit(data.X_train)
    page = Page(write_report(pooled, data.X_test[:6], tmp_path / "report.html"))
    assert all(set(shown) == {"image"} for shown in page.data["large"].values())
    assert "yellow line" not in page.text
    # Such maps would lie beside their images.
    cropped = PatchDFKDEDetector(Greys()).fit(data.X_train)
    cropped.features_.sees_whole_images = False
    page = Page(write_report(cropped, data.X_test[:6], tmp_path / "report.html"))
    assert all(set(shown) == {"image"} for shown in page.data["large"].values())
    np.testing.assert_allclose(page.data["rows"]["score"], cropped.score_samples(data.X_test[:6]), rtol=1e-5)


# How large it is


def test_the_images_are_read_in_one_pass_a_few_at_a_time(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (200, 16, 16), np.uint8)
    detector = PatchDFKDEDetector(Greys()).fit(images[:50])
    detector.features_.calls_.clear()
    page = Page(write_report(detector, images, tmp_path / "report.html"))
    assert detector.features_.calls_ == [64, 64, 64, 8]
    np.testing.assert_allclose(page.data["rows"]["score"], detector.score_samples(images), rtol=1e-5)
    assert len(page.data["large"]) <= 24


@pytest.mark.parametrize("n_images", [1, 100, 5_000, 100_000])
def test_all_pictures_together_have_a_budget(n_images):
    _, small = scored.small_size(n_images)
    n_large = 4 * scored.N_SHOWN
    total = small * min(n_images, scored.N_SMALL) + 3 * n_large * scored.LARGE_BYTES
    total += n_large * scored.N_NEAREST * scored.NEIGHBOUR_BYTES
    assert 4 / 3 * total < 18e6


def test_of_many_images_the_least_normal_ones_have_pictures(monkeypatch, tmp_path):
    monkeypatch.setattr(scored, "N_SMALL", 30)
    images = np.random.default_rng(0).integers(0, 256, (100, 16, 16), np.uint8)
    detector = PatchDFKDEDetector(Greys()).fit(images[:50])
    page = Page(write_report(detector, images, tmp_path / "report.html"))
    assert sorted(map(int, page.data["small"])) == sorted(np.argsort(page.data["rows"]["score"])[:30].tolist())


@pytest.mark.parametrize("size", [(128, 128), (1, 128), (128, 1), (7, 90)])
def test_a_picture_fits_whatever_it_shows(size):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
    text = encoded(noise, 700)
    assert len(b64decode(text)) <= 700
    assert 1 <= max(decoded(text).size) <= 128
    assert decoded(encoded(noise, 10**6)).size == size


def test_pictures_are_made_smaller_and_never_larger():
    assert shrunk(Image.new("RGB", (300, 100)), 60).size == (60, 20)
    assert shrunk(Image.new("RGB", (30, 10)), 60).size == (30, 10)
    assert shrunk(Image.new("RGB", (5000, 3)), 60).size == (60, 1)


# That it stands alone, and text is text


def test_the_page_refers_to_nothing_outside(labelled):
    page = Page(labelled[0])
    targets = [
        attributes[name] for _, attributes in page.elements for name in ("src", "href", "action") if name in attributes
    ]
    assert targets
    assert all(target.startswith(("data:", "#")) for target in targets)
    assert {tag for tag, _ in page.elements}.isdisjoint({"iframe", "object", "embed", "base"})
    style = labelled[0].read_text(encoding="utf-8").split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "//" not in style
    assert "@import" not in style


def test_names_and_titles_are_text_and_no_markup(labelled):
    page = Page(labelled[0])
    assert page.data["rows"]["name"][:2] == [MARKUP, str(END_OF_SCRIPT)]
    assert page.words.count("<b>Line 7</b>") == 2
    assert len(page.named("script")) == 2
    assert not any({"onerror", "onload", "onclick"} & attributes.keys() for _, attributes in page.elements)
    assert not page.named("b")
    assert "<script>alert" not in labelled[0].read_text(encoding="utf-8")


def test_kinds_settings_and_reasons_are_text_too(data, tmp_path):
    class Named(Greys):
        def __init__(self, name="</dd><script>alert(3)</script>"):
            self.name = name

    (tmp_path / "broken<script>alert(4)<").mkdir()
    (tmp_path / "broken<script>alert(4)<" / "script>.png").write_bytes(b"no image")
    Image.fromarray(data.X_test[0]).save(tmp_path / "fine.png")
    Image.fromarray(data.X_test[1]).save(tmp_path / "fine too.png")
    detector = PatchDFKDEDetector(Named()).fit(data.X_train)
    kinds = ["</option><script>alert(5)</script>", "good", "good"]
    report = write_report(detector, tmp_path, tmp_path / "report.html", y=kinds, skip_broken=True)
    page = Page(report)
    assert len(page.named("script")) == 2
    assert "<script>alert" not in report.read_text(encoding="utf-8")
    assert kinds[0] in page.words


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux")
def test_a_name_that_is_not_utf_8_is_shown_with_escapes(data, detector, tmp_path):
    name = os.fsdecode(b"\xe9 \xe2\x80\xae.png")
    Image.fromarray(data.X_test[0]).save(tmp_path / name)
    page = Page(write_report(detector, tmp_path, tmp_path / "report.html"))
    assert page.data["rows"]["name"] == ["\\udce9 \\u202e.png"]


# Bad input


def test_an_image_that_cannot_be_read_is_an_error_or_is_listed(data, detector, tmp_path):
    for i in range(3):
        Image.fromarray(data.X_test[i]).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1\.png: the file is not an image"):
        write_report(detector, tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
    page = Page(write_report(detector, tmp_path, tmp_path / "report.html", skip_broken=True))
    rows = page.data["rows"]
    assert [page.data["verdicts"][verdict] for verdict in rows["verdict"]][1] == "broken"
    assert rows["score"][1] is None
    assert "not an image" in rows["reason"]["1"]
    assert "1 of 3 could not be read." in page.text
    np.testing.assert_allclose(
        [rows["score"][0], rows["score"][2]], detector.score_samples(data.X_test[[0, 2]]), rtol=1e-5
    )
    (tmp_path / "0.png").write_bytes(b"")
    (tmp_path / "2.png").unlink()
    with pytest.raises(ValueError, match="None of the 2 images can be read"):
        write_report(detector, tmp_path, tmp_path / "other.html", skip_broken=True)


def test_an_error_leaves_an_earlier_report_as_it_was(data, detector, tmp_path):
    file = tmp_path / "report.html"
    file.write_text("earlier")
    with pytest.raises(ValueError, match="There are 3 masks for 40 images"):
        write_report(detector, data.X_test, file, masks=[None] * 3)
    assert file.read_text() == "earlier"
    assert [*tmp_path.iterdir()] == [file]


def test_a_place_that_cannot_be_written_to_is_noticed_before_the_work(data, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_report(None, data.X_test, tmp_path / "missing" / "report.html")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"y": [0, 1]}, r"y has shape \(2,\), and there are 40 images"),
        ({"y": np.where(np.arange(40) < 3, -1, 1)}, r"y holds -1, 1\. Allowed: 0 for good .* \(1 - y\) // 2"),
        ({"y": [None] * 40}, r"y holds None"),
        ({"masks": [np.ones((3, 5))] * 40}, r"The mask of images\[\d+\] has shape \(3, 5\), and the image \(64, 64\)"),
        ({"training_images": []}, r"0 images; at least one"),
    ],
)
def test_labels_and_masks_that_do_not_fit_are_refused(data, detector, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_report(detector, data.X_test, tmp_path / "report.html", **arguments)
    assert not (tmp_path / "report.html").exists()


def test_labels_may_be_numbers_truths_or_names():
    for y in ([0, 1, 0], [False, True, False], np.array([0.0, 1.0, 0.0])):
        assert kinds_of_images(y, 3).tolist() == ["good", "defective", "good"]
    assert kinds_of_images(["scratch", "good"], 2).tolist() == ["scratch", "good"]


def test_a_report_of_nothing_is_refused(detector, tmp_path):
    with pytest.raises(ValueError, match="0 images; at least one"):
        write_report(detector, [], tmp_path / "report.html")


def test_detectors_without_images_and_other_models_are_refused(data, tmp_path):
    rows = np.random.default_rng(0).normal(size=(30, 4))
    with pytest.raises(ValueError, match="DFKDEDetector was fitted on features, and a report shows images"):
        write_report(DFKDEDetector().fit(rows), data.X_test, tmp_path / "report.html")
    with pytest.raises(NotFittedError):
        write_report(DFKDEDetector(), data.X_test, tmp_path / "report.html")
    with pytest.raises(TypeError, match="not on AnomalyClassifier"):
        write_report(AnomalyClassifier(DFKDEDetector()), data.X_test, tmp_path / "report.html")


def test_a_missing_extra_is_named_before_the_work(data, detector, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"jinja2: pip install 'dfkde-sklearn\[report\]'"):
        write_report(detector, data.X_test, tmp_path / "report.html")


# Charts


def test_ticks_are_round_numbers_within_the_axis():
    for low, high in [(0, 1), (-12.3, 4.5), (0, 0.3), (1e-4, 9e-4), (-3.4e38, 10), (99.9, 100.1)]:
        found = ticks(low, high)
        assert 3 <= len(found) <= 11
        assert low - 1e-9 * abs(low) <= found[0]
        assert found[-1] <= high + 1e-9 * abs(high)
        steps = np.diff(found)
        np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
        assert f"{steps[0]:.0e}"[0] in "125"
    assert ticks(0, 1) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]


def test_charts_are_xml_with_a_description_whatever_the_text():
    chart = line_chart(
        'a "<b>"',
        Axis("<x>", 0, 1),
        Axis("&y", -1, 1, in_percent=True),
        [Series("</svg>", "new", [0, 0.5, 2], [0, -5, 1])],
        [Mark("<m>", 0.3), Mark("p", 0.9, 0.9)],
    )
    root = ElementTree.fromstring(chart)
    assert root.get("aria-label") == 'a "<b>"'
    assert {"<x>", "&y", "</svg>", "<m>", "50 %"} <= {element.text for element in root.iter() if element.text}
    numbers = [float(number) for path in root.iter("path") for number in re.findall(r"-?\d+\.?\d*", path.get("d"))]
    assert min(numbers) >= -22  # relative moves of the legend
    assert max(numbers) <= 420


def test_the_histogram_counts_every_image():
    rng = np.random.default_rng(0)
    calibration, new = rng.normal(size=300), np.concatenate([rng.normal(size=80), [-1e6, -500.0, 70.0]])
    chart, n_beyond = histogram("", calibration, [("new", "new", new)], -1.6)
    assert n_beyond == 3
    heights = {}
    for path in ElementTree.fromstring(chart).iter("path"):
        # The others with this class are samples in the legend.
        if path.get("class") in ("line calibration", "line new") and "L" in path.get("d"):
            points = np.array([[float(v) for v in point.split()] for point in path.get("d")[1:].split("L")])
            heights[path.get("class")] = (points[:, 1].max() - points[:, 1])[1:-1:2]
    of_new = heights["line new"]
    assert len(of_new) == 36
    # Shares of each set, on one axis, to the rounding of a tenth of a unit.
    assert of_new.sum() == pytest.approx(heights["line calibration"].sum(), rel=0.02)
    assert of_new[[0, -1]] / of_new.sum() == pytest.approx([2 / 83, 1 / 83], abs=2e-3)


@pytest.mark.parametrize("scores", [np.full(9, -3.0), np.array([np.finfo(np.float32).min] * 3 + [1.0] * 6)])
def test_scores_that_do_not_vary_or_are_as_low_as_can_be_are_drawn(scores):
    chart, _ = histogram("", scores.astype(np.float32), [("new", "new", scores.astype(np.float32))], -3.0)
    assert "nan" not in chart
    ElementTree.fromstring(chart)


# In a browser


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, where playwright and a browser are installed."""
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
        found = own if Path(own).exists() else next(filter(None, map(shutil.which, names)), None)
        if found is None:
            pytest.skip("no Chromium is installed")
        # Chromium refuses its sandbox to root; the page is our own.
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def opened(browser, labelled):
    """The labelled report in a browser, which has fetched nothing and complained of nothing when the test ends."""
    context = browser.new_context(viewport={"width": 1400, "height": 900}, accept_downloads=True)
    page = context.new_page()
    requests, complaints = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.goto(labelled[0].as_uri())
    yield page
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == [labelled[0].as_uri()]
    assert complaints == []
    context.close()


def column(page, number):
    return page.locator(f"#table tbody td:nth-child({number})").all_inner_texts()


def test_the_table_sorts(opened, labelled):
    rows = Page(labelled[0]).data["rows"]
    assert [float(text) for text in column(opened, 4)] == pytest.approx(sorted(rows["score"]), rel=1e-4)
    assert opened.get_attribute("th:has([data-column=score])", "aria-sort") == "ascending"
    opened.click("[data-column=score]")
    assert [float(text) for text in column(opened, 4)] == pytest.approx(sorted(rows["score"])[::-1], rel=1e-4)
    assert opened.get_attribute("th:has([data-column=score])", "aria-sort") == "descending"
    opened.click("[data-column=kind]")
    kinds = column(opened, 3)
    assert kinds == sorted(kinds)
    opened.focus("[data-column=name]")
    opened.keyboard.press("Enter")
    assert column(opened, 2)[0] == MARKUP
    assert opened.get_attribute("th:has([data-column=score])", "aria-sort") == "none"


def test_the_filters_filter(opened, labelled):
    rows = Page(labelled[0]).data["rows"]
    opened.fill("#filter-name", "SCRATCH, 03")
    names = column(opened, 2)
    assert sorted(names) == sorted(name for name in rows["name"] if "scratch, 03" in name)
    assert opened.inner_text("#status") == f"1 to {len(names)} of {len(names)} of 40 images"
    opened.fill("#filter-name", "nothing has this name")
    assert opened.inner_text("#status") == "None of 40 images"
    opened.fill("#filter-name", "")
    opened.select_option("#filter-kind", "hole")
    opened.select_option("#filter-verdict", "anomalous")
    expected = [kind == "hole" and v == 1 for kind, v in zip(rows["kind"], rows["verdict"], strict=True)]
    assert len(column(opened, 2)) == sum(expected) > 0
    assert set(column(opened, 3)) == {"hole"}
    assert {text.strip() for text in column(opened, 7)} == {"anomalous"}


def test_what_the_filters_leave_is_saved_as_csv(opened, labelled, tmp_path):
    opened.select_option("#filter-kind", "good")
    with opened.expect_download() as download:
        opened.click("#export")
    download.value.save_as(tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as lines:
        table = list(csv.DictReader(lines))
    page = Page(labelled[0])
    rows = page.data["rows"]
    order = [i for i in np.argsort(rows["score"], kind="stable") if rows["kind"][i] == "good"]
    assert [row["path"] for row in table] == [labelled[1][i] for i in order]
    assert [float(row["score"]) for row in table] == [rows["score"][i] for i in order]
    assert list(table[0]) == ["path", "score", "p_anomalous", "p_value", "verdict", "reason", "kind"]


def test_a_click_opens_a_larger_picture_with_its_neighbours(opened):
    cards = opened.locator(".cards").first.locator(".card")
    cards.nth(1).click()
    viewer = opened.locator("#viewer")
    assert viewer.is_visible()
    assert opened.inner_text("#viewer-name") == cards.nth(1).locator(".name").inner_text()
    assert opened.locator("#viewer-pictures img").count() == 3
    assert opened.locator("#viewer-neighbours img").count() == 4
    assert opened.evaluate(
        "[...document.querySelectorAll('#viewer img')].every(i => i.complete && i.naturalWidth > 0 && i.alt)"
    )
    opened.keyboard.press("ArrowRight")
    assert opened.inner_text("#viewer-name") == cards.nth(2).locator(".name").inner_text()
    opened.keyboard.press("Escape")
    assert not viewer.is_visible()
    opened.locator("#table td.picture button").first.focus()
    opened.keyboard.press("Enter")
    assert viewer.is_visible()


def test_names_that_are_markup_are_shown_as_they_are(opened):
    assert {MARKUP, str(END_OF_SCRIPT)} <= set(column(opened, 2))
    assert opened.locator("img[src=x]").count() == 0
    assert opened.inner_text("h1") == "<b>Line 7</b>"


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_window(opened, width, scheme):
    opened.set_viewport_size({"width": width, "height": 800})
    opened.emulate_media(color_scheme=scheme)
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    cells = "[...document.querySelectorAll('#table td')]"
    assert opened.evaluate(f"{cells}.every(cell => cell.scrollWidth <= cell.clientWidth)")
    brightness = [
        sum(map(int, re.findall(r"\d+", opened.evaluate(f"getComputedStyle(document.body).{name}"))[:3]))
        for name in ("backgroundColor", "color")
    ]
    assert (brightness[0] > brightness[1]) == (scheme == "light")


def test_pages_of_the_table_follow_one_another(browser, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (120, 16, 16), np.uint8)
    detector = PatchDFKDEDetector(Greys()).fit(images[:50])
    page = browser.new_page()
    page.goto(write_report(detector, images, tmp_path / "report.html").as_uri())
    seen = column(page, 2)
    for expected in ("51 to 100 of 120 images", "101 to 120 of 120 images"):
        page.click("#page-after")
        assert page.inner_text("#status") == expected
        seen += column(page, 2)
    assert page.locator("#page-after").is_disabled()
    assert sorted(seen) == sorted(f"images[{i}]" for i in range(120))
    page.close()
