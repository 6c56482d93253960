"""BatchScorer and BatchTransformer, without an engine."""

import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
import safetensors.torch
import sklearn
import timm
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import FeatureUnion

from dfkde_sklearn import (
    BatchScorer,
    BatchTransformer,
    DFKDEDetector,
    PatchDFKDEDetector,
    ScatteringFeatures,
    TimmFeatures,
)
from dfkde_sklearn._batch import models
from dfkde_sklearn._batch.columns import COLUMNS
from dfkde_sklearn._cli.tables import Row


@pytest.fixture(autouse=True)
def _none_loaded():
    models._models.clear()


def test_the_columns_are_those_of_the_command_line():
    assert ("path", *COLUMNS) == Row._fields


def test_every_kind_of_batch_has_the_answers_of_the_detector(model, paths, detector):
    pyarrow = pytest.importorskip("pyarrow")
    expected = detector.assess(paths)
    scorer = BatchScorer(model)
    records = scorer(paths)
    for batch in (
        scorer({"path": np.array(paths)}),
        scorer({"path": np.array(paths, dtype=object)}),
        scorer(pd.DataFrame({"path": paths})),
        scorer(pyarrow.table({"path": paths})).to_pydict(),
        pd.DataFrame(records),
        pd.DataFrame(scorer(iter(paths))),
        pd.DataFrame(scorer([{"path": path} for path in paths])),
        pd.DataFrame(scorer(pd.Series(paths))),
        pd.DataFrame(scorer(np.array(paths))),
    ):
        assert list(batch) == ["path", *COLUMNS]
        assert list(batch["path"]) == paths
        np.testing.assert_array_equal(batch["score"], expected.log_density)
        np.testing.assert_array_equal(batch["p_anomalous"], expected.p_anomalous)
        np.testing.assert_array_equal(batch["p_value"], expected.p_value)
        np.testing.assert_array_equal(np.array(batch["verdict"]) == "anomalous", expected.label == -1)
        assert set(batch["reason"]) == {""}


def test_other_columns_and_the_index_of_a_frame_stay(model, paths):
    frame = pd.DataFrame({"image": paths, "line": range(24)}, index=range(100, 124))
    found = BatchScorer(model, column="image")(frame)
    pd.testing.assert_frame_equal(found[["image", "line"]], frame)
    records = BatchScorer(model, column="image")(frame.to_dict("records"))
    assert [row["line"] for row in records] == list(range(24))


def test_images_may_be_bytes_or_arrays(model, paths, data, detector):
    encoded = {"bytes": [Path(path).read_bytes() for path in paths]}
    np.testing.assert_array_equal(BatchScorer(model, column="bytes")(encoded)["score"], detector.score_samples(paths))
    records = BatchScorer(model)(data.X_test)
    assert list(records[0]) == list(COLUMNS)
    assert [row["score"] for row in records] == detector.score_samples(data.X_test).astype(float).tolist()


@pytest.mark.parametrize("kind", [BatchScorer, BatchTransformer])
def test_an_empty_batch_has_the_columns_and_types_of_any_other(model, paths, kind):
    pyarrow = pytest.importorskip("pyarrow")
    call = kind(model)
    table = pyarrow.table({"path": paths})
    assert call(table[:0]).schema == call(table).schema
    some, none = call({"path": np.array(paths)}), call({"path": np.array(paths)[:0]})
    assert {name: (values.dtype.kind, values.shape[1:]) for name, values in none.items()} == {
        name: (values.dtype.kind, values.shape[1:]) for name, values in some.items()
    }
    assert call([]) == []
    frame = pd.DataFrame({"path": paths})
    assert call(frame[:0]).dtypes.equals(call(frame).dtypes)
    assert len(call(frame[:0])) == 0


@pytest.mark.parametrize("pooling", ["statistics", None])
def test_features_are_those_of_the_extractor(data, paths, pooling):
    pyarrow = pytest.importorskip("pyarrow")
    extractor = ScatteringFeatures(scales=2, image_size=32, pooling=pooling).fit(data.X_train)
    expected = extractor.transform(data.X_test)
    call = BatchTransformer(extractor, column="image")
    batch = {"image": data.X_test}
    np.testing.assert_array_equal(call(batch)["features"], expected)
    assert call({"image": data.X_test[:0]})["features"].shape == (0, *expected.shape[1:])
    np.testing.assert_array_equal(np.stack(call(pd.DataFrame({"image": list(data.X_test)}))["features"]), expected)
    table = BatchTransformer(extractor)(pyarrow.table({"path": paths}))
    np.testing.assert_array_equal(
        np.array(table["features"].to_pylist(), np.float32), extractor.transform(paths).reshape(24, -1)
    )
    np.testing.assert_array_equal(np.stack([row["features"] for row in call(data.X_test)]), expected)


def test_no_images_have_features_of_a_union_and_none_of_what_is_not_fitted(data):
    parts = [(str(scales), ScatteringFeatures(scales=scales, image_size=32)) for scales in (2, 3)]
    union = FeatureUnion(parts).fit(data.X_train)
    expected = union.transform(data.X_test)
    assert BatchTransformer(union, column="image")({"image": []})["features"].shape == (0, expected.shape[1])
    with pytest.raises(NotFittedError, match="not fitted yet"):
        BatchTransformer(ScatteringFeatures())([])


def test_features_come_from_the_detector_of_a_file(model, paths, detector):
    call = pickle.loads(pickle.dumps(BatchTransformer(model)))
    np.testing.assert_array_equal(call.transform(paths), detector.features_.transform(paths))


def test_a_detector_is_sent_along_small(data):
    detector = DFKDEDetector(TimmFeatures("resnet18", pretrained=False, random_state=0, image_size=32)).fit(
        data.X_train
    )
    sent = pickle.dumps(BatchScorer(detector))
    assert len(sent) < 200_000  # the network has 45 MB
    np.testing.assert_array_equal(
        pickle.loads(sent).assess(data.X_test[:4]).log_density, detector.score_samples(data.X_test[:4])
    )


def test_a_detector_of_positions_loads_by_its_file(data, tmp_path):
    detector = PatchDFKDEDetector(ScatteringFeatures(scales=2, image_size=32, pooling=None)).fit(data.X_train)
    detector.save(tmp_path / "positions")
    found = BatchScorer(tmp_path / "positions", column="image")({"image": data.X_test})
    np.testing.assert_array_equal(found["score"], detector.score_samples(data.X_test))


def test_a_process_loads_a_model_once(model, paths, monkeypatch):
    loads = []

    def load(path, **options):
        loads.append(path)
        return DFKDEDetector.load(path)

    monkeypatch.setattr("dfkde_sklearn._batch.scorer.load_detector", load)
    scorer = BatchScorer(model)

    def score():
        pickle.loads(pickle.dumps(scorer))(paths[:2])

    threads = [threading.Thread(target=score) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    score()
    assert loads == [model]


def test_to_make_and_to_pickle_one_does_not_load_the_model(model, detector):
    for scorer in (BatchScorer(model), BatchTransformer(detector)):
        assert pickle.loads(pickle.dumps(scorer)).sha256 == scorer.sha256
    assert not models._models


def test_a_file_that_was_replaced_is_an_error_that_names_both_models(model, paths, tmp_path, detector):
    copy = tmp_path / "model"
    copy.write_bytes(model.read_bytes())
    scorer, free = BatchScorer(copy), BatchScorer(tmp_path / "later")
    clone = DFKDEDetector.load(model).recalibrate(paths)
    clone.save(copy)
    with pytest.raises(ValueError, match=f"another model: its SHA-256 is .*{scorer.sha256}"):
        scorer(paths)
    with pytest.raises(ValueError, match="another model"):
        BatchScorer(copy, sha256="0" * 64)(paths)
    assert len(BatchScorer(model, sha256=scorer.sha256.upper())(paths[:2])) == 2
    # Without a file when it was made, there is none to compare with, and a new file is loaded anew.
    with pytest.raises(FileNotFoundError, match=r"no model .*later on .*, in process \d+\. Put the file there"):
        free(paths)
    detector.save(tmp_path / "later")
    first = free(paths)
    clone.save(tmp_path / "later")
    assert [row["p_value"] for row in free(paths)] != [row["p_value"] for row in first]


def test_a_machine_without_the_weights_says_so_and_works_once_they_are_there(data, paths, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model("test_resnet", num_classes=0)
    weights = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(network.state_dict(), weights)
    detector = DFKDEDetector(TimmFeatures("test_resnet", weights=weights, image_size=32)).fit(data.X_train)
    detector.save(tmp_path / "model")
    scorer = BatchScorer(tmp_path / "model")
    kept = weights.read_bytes()
    weights.unlink()
    script = f"""
from dfkde_sklearn import BatchScorer
try:
    BatchScorer({str(tmp_path / "model")!r})({paths[:2]!r})
except OSError as error:
    assert type(error) is OSError, type(error)
    print(error)
"""
    # In a new process: this one has the network in memory.
    done = subprocess.run([sys.executable, "-c", script], check=True, timeout=100, capture_output=True, text=True)
    assert str(weights) in done.stdout
    assert ", in process " in done.stdout
    weights.write_bytes(kept)
    assert len(scorer(paths)) == 24


def test_broken_images_are_an_error_or_rows_of_their_own(model, paths, tmp_path, detector):
    cut = tmp_path / "cut.png"
    cut.write_bytes(Path(paths[0]).read_bytes()[:300])
    batch = [paths[0], str(cut), paths[1], str(tmp_path / "none.png")]
    with pytest.raises((ValueError, OSError), match=r"cut\.png|none\.png"):
        BatchScorer(model)(batch)
    rows = BatchScorer(model, skip_broken=True)(batch)
    assert [row["path"] for row in rows] == batch
    assert [row["verdict"] == "broken" for row in rows] == [False, True, False, True]
    assert "cut.png" in rows[1]["reason"]
    assert "there is no such file" in rows[3]["reason"]
    assert np.isnan([rows[1]["score"], rows[3]["p_value"]]).all()
    assert [rows[0]["score"], rows[2]["score"]] == detector.score_samples(paths[:2]).astype(float).tolist()
    # A batch of nothing else is no error either: others have the same job.
    assert BatchScorer(model, skip_broken=True)([str(cut)])[0]["verdict"] == "broken"


@pytest.mark.parametrize("missing", [None, "", np.nan, pd.NA])
@pytest.mark.parametrize("kind", [list, pd.Series, "frame", "array"])
def test_missing_entries_of_a_table_are_broken_images(model, paths, detector, kind, missing):
    entries = [missing, *paths[:2], missing]
    batch = entries if kind is list else pd.Series(entries, dtype=object)
    if kind == "frame":
        batch = pd.DataFrame({"path": batch})
    elif kind == "array":
        batch = {"path": batch.to_numpy()}
    with pytest.raises((TypeError, ValueError), match=r"images\[0\]"):
        BatchScorer(model)(batch)
    found = BatchScorer(model, skip_broken=True)(batch)
    rows = found if isinstance(found, list) else pd.DataFrame(found).to_dict("records")
    assert [row["verdict"] == "broken" for row in rows] == [True, False, False, True]
    assert rows[3]["reason"] == f"images[3] is {missing!r}: there is no image."
    assert [row["score"] for row in rows[1:3]] == detector.score_samples(paths[:2]).astype(float).tolist()
    if isinstance(found, list):
        assert [row["path"] or None for row in found] == [None, *paths[:2], None]


def test_broken_images_beside_missing_ones_keep_their_places(model, data, detector):
    nan = np.full((32, 32, 3), np.nan)
    rows = BatchScorer(model, skip_broken=True)([None, data.X_test[0], nan, data.X_test[1]])
    assert [row["verdict"] == "broken" for row in rows] == [True, False, True, False]
    assert rows[2]["reason"].startswith("images[2]: NaN")
    expected = detector.score_samples(data.X_test[:2]).astype(float).tolist()
    assert [rows[1]["score"], rows[3]["score"]] == expected


def test_missing_rows_are_an_error_or_broken_and_no_others(model, data):
    rows = np.random.default_rng(0).normal(size=(50, 6))
    of_rows = BatchScorer(DFKDEDetector(n_components=2).fit(rows), column="features", skip_broken=True)
    with pytest.raises(ValueError, match="inhomogeneous"):
        of_rows([rows[0], None, rows[2]])
    assert [row["verdict"] for row in of_rows([None, None])] == ["broken"] * 2
    # The columns of the rest of a bag.
    assert BatchScorer(model, skip_broken=True)([None])[0]["path"] is None
    found = BatchScorer(model, column="image", skip_broken=True)([None, {"image": data.X_test[0]}])
    assert [row["verdict"] == "broken" for row in found] == [True, False]


@pytest.mark.parametrize("strange", [np.ones(2), np.zeros((32, 32, 5), np.uint8), np.zeros((32, 32), np.int64), 3])
def test_what_is_no_image_beside_images_is_broken(model, data, strange):
    rows = BatchScorer(model, skip_broken=True)([*data.X_test[:2], None, strange])
    assert [row["verdict"] == "broken" for row in rows] == [False, False, True, True]
    assert rows[3]["reason"].startswith("images[3]: ")


def test_frames_of_polars_are_tables_too(model, paths, detector):
    frame = pl.DataFrame({"path": [paths[0], None, paths[1]], "k": [1, 2, 3]})
    found = BatchScorer(model, skip_broken=True)(frame)
    assert found.columns == ["path", "k", *COLUMNS]
    assert (found["verdict"] == "broken").to_list() == [False, True, False]
    assert found["score"].to_list()[::2] == detector.score_samples(paths[:2]).astype(float).tolist()
    features = BatchTransformer(model)(frame[[0, 2]])["features"]
    np.testing.assert_array_equal(np.array(features.to_list(), np.float32), detector.features_.transform(paths[:2]))
    for call in (BatchScorer(model), BatchTransformer(model)):
        none = call(frame[:0])
        assert none.shape == (0, 2 + len(call._names))
        assert none.schema == call(frame[:1]).schema
    with pytest.raises(TypeError, match=r"this is a LazyFrame\. Give a frame of pandas or polars"):
        BatchScorer(model)(frame.lazy())


def test_features_are_arrays_whatever_scikit_learn_is_configured_to_return(model, paths, detector):
    expected = detector.features_.transform(paths)
    with sklearn.config_context(transform_output="pandas"):
        np.testing.assert_array_equal([row["features"] for row in BatchTransformer(model)(paths)], expected)
    extractor = clone(detector.features_).fit(paths).set_output(transform="pandas")
    np.testing.assert_array_equal([row["features"] for row in BatchTransformer(extractor)(paths)], expected)


def test_errors_of_the_detector_are_not_taken_for_broken_images(model, paths):
    class Failing:
        def assess(self, X):
            raise ValueError("the detector fails")

    with pytest.raises(ValueError, match="the detector fails"):
        BatchScorer(Failing(), skip_broken=True)(paths)
    rows = np.random.default_rng(0).normal(size=(50, 6))
    of_rows = BatchScorer(DFKDEDetector(n_components=2).fit(rows), column="features", skip_broken=True)
    with pytest.raises(ValueError, match="Input X contains NaN"):
        of_rows({"features": np.full((2, 6), np.nan)})
    with pytest.raises(ValueError, match="X has 5 features, but DFKDEDetector is expecting 6"):
        of_rows({"features": rows[:, :5]})


@pytest.mark.parametrize(
    ("make", "batch", "error", "message"),
    [
        (BatchScorer, {"image": []}, ValueError, r"no column 'path', only \['image'\].*column=NAME"),
        (BatchScorer, [{"image": "a.png"}], ValueError, "no column 'path'"),
        (BatchScorer, {"path": [], "score": []}, ValueError, r"columns \['score'\] already"),
        (BatchScorer, "a.png", TypeError, r"one path: 'a.png'. Give \[path\]"),
        (BatchScorer, {"path": "a.png"}, TypeError, "'path' is one: 'a.png'. Give several rows at a time"),
        (BatchScorer, {"path": b"GIF"}, TypeError, "'path' is one: b'GIF'. Give several rows at a time"),
        (BatchScorer, [None], TypeError, r"images\[0\]: None"),
        (lambda _: BatchScorer(3), [], TypeError, "needs a path or a detector; got a int: 3"),
        (lambda _: BatchTransformer(3), [], TypeError, "needs a path or a detector; got a int: 3"),
        (lambda _: BatchScorer(DFKDEDetector(), weights="w"), [], ValueError, "for a model in a file"),
    ],
)
def test_wrong_batches_and_models_say_what_is_allowed(model, make, batch, error, message):
    with pytest.raises(error, match=message):
        make(model)(batch)


def test_a_detector_of_feature_rows_scores_rows_and_has_no_features_to_compute(tmp_path):
    rows = np.random.default_rng(0).normal(size=(50, 4))
    detector = DFKDEDetector().fit(rows)
    detector.save(tmp_path / "rows")
    found = BatchScorer(tmp_path / "rows")(rows)
    assert [row["score"] for row in found] == detector.score_samples(rows).tolist()
    with pytest.raises(ValueError, match="no feature extractor"):
        BatchTransformer(tmp_path / "rows")(["a.png"])


def test_the_oldest_models_of_a_long_process_are_forgotten():
    for key in range(10):
        assert models.once_a_process(key, lambda: object()) is models.once_a_process(key, lambda: None)
    assert list(models._models) == [6, 7, 8, 9]


@pytest.mark.parametrize("max_samples", [15, 40_000])
@pytest.mark.parametrize(
    "make",
    [
        lambda **more: DFKDEDetector(ScatteringFeatures(scales=2, image_size=32), random_state=0, **more),
        lambda **more: PatchDFKDEDetector(
            ScatteringFeatures(scales=2, image_size=32, pooling=None), random_state=0, **more
        ),
    ],
)
def test_a_fit_to_features_from_elsewhere_is_that_to_the_images(data, make, max_samples, tmp_path):
    local = make(max_samples=max_samples).fit(image for image in data.X_train)
    transformer = BatchTransformer(local)
    parts = (transformer.transform(data.X_train[start : start + 7]) for start in range(0, 20, 7))
    found = make(max_samples=max_samples).fit_features(parts)
    np.testing.assert_array_equal(found.calibration_scores_, local.calibration_scores_)
    np.testing.assert_array_equal(found.score_samples(data.X_test), local.score_samples(data.X_test))
    found.save(tmp_path / "found")
    assert BatchScorer(tmp_path / "found")(data.X_test) == BatchScorer(local)(data.X_test)


@pytest.mark.parametrize(
    ("detector", "parts", "message"),
    [
        (DFKDEDetector(ScatteringFeatures(scales=2, image_size=32)), [], "parts gave no features"),
        (
            DFKDEDetector(ScatteringFeatures(scales=2, image_size=32)),
            [np.zeros((5, 3))],
            r"Part 0 has shape \(5, 3\), and features=ScatteringFeatures.* gives \(n, 240\)",
        ),
        (DFKDEDetector(None), [np.zeros((5, 3))], "fit_features needs a feature extractor"),
        (
            PatchDFKDEDetector(ScatteringFeatures(pooling=None), flips="all"),
            [np.zeros((5, 3))],
            "needs features of one pass, and flips= makes several. Set flips=None",
        ),
    ],
)
def test_features_of_another_kind_are_an_error_and_the_detector_is_as_it_was(detector, parts, message):
    before = dict(vars(detector))
    with pytest.raises(ValueError, match=message):
        detector.fit_features(parts)
    assert vars(detector) == before
