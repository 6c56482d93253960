"""BatchScorer and BatchTransformer in the processes of a Dask cluster, as the guide shows them."""

import logging

import numpy as np
import pytest

from dfkde_sklearn import BatchScorer, BatchTransformer, DFKDEDetector, ScatteringFeatures

dask = pytest.importorskip("dask")
distributed = pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def client(_quiet_and_on_single_cores):
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # of the worker that is killed
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def test_a_bag_of_paths_is_scored_though_a_worker_is_killed(client, model, paths, scores, die_once, tmp_path):
    import dask.bag as db

    scorer = BatchScorer(model)

    def score(part):
        rows = scorer(part)
        die_once()  # with the work of a partition done, and not delivered
        return rows

    rows = db.from_sequence(paths, npartitions=6).map_partitions(score).compute()
    assert (tmp_path / "killed").exists()
    assert [row["path"] for row in rows] == paths
    assert {row["path"]: row["score"] for row in rows} == scores


def test_arrays_of_images_and_of_rows_are_scored_and_described(client, model, data, detector):
    import dask.array as da

    scorer, transformer = BatchScorer(model), BatchTransformer(model)
    images = da.from_array(data.X_test, chunks=(5, -1, -1))
    found = images.map_blocks(
        lambda block: scorer.assess(block).log_density,
        drop_axis=[1, 2],
        dtype=np.float32,
        meta=np.empty(0, np.float32),
    )
    np.testing.assert_array_equal(found.compute(), detector.score_samples(data.X_test))
    n_features = detector.features_.n_features_out_
    features = images.map_blocks(
        transformer.transform,
        drop_axis=[1, 2],
        new_axis=1,
        chunks=(images.chunks[0], (n_features,)),
        dtype=np.float32,
        meta=np.empty((0, 0), np.float32),
    )
    assert features.shape == (24, n_features)
    np.testing.assert_array_equal(features.compute(), detector.features_.transform(data.X_test))


def test_delayed_calls_score_and_describe(client, model, paths, detector):
    scorer, transformer = BatchScorer(model), BatchTransformer(model)
    parts = [paths[start : start + 5] for start in range(0, 24, 5)]
    found = dask.compute(*(dask.delayed(scorer)(part) for part in parts))
    assert [row["path"] for part in found for row in part] == paths
    features = dask.compute(*(dask.delayed(transformer.transform)(part) for part in parts))
    np.testing.assert_array_equal(np.concatenate(features), detector.features_.transform(paths))


def test_a_fit_out_of_core_is_the_local_one(client, data, paths):
    extractor = ScatteringFeatures(scales=2, image_size=32)
    transformer = BatchTransformer(extractor.fit(data.X_train))
    futures = client.map(transformer.transform, [paths[start : start + 5] for start in range(0, 24, 5)])
    found = DFKDEDetector(extractor, max_samples=15, random_state=0).fit_features(
        futures.pop(0).result() for _ in range(len(futures))
    )
    local = DFKDEDetector(extractor, max_samples=15, random_state=0).fit(path for path in paths)
    np.testing.assert_array_equal(found.score_samples(data.X_test), local.score_samples(data.X_test))


def test_empty_partitions_and_missing_models_are_what_they_are(client, model, paths, tmp_path):
    import dask.bag as db

    bag = db.from_sequence(paths, npartitions=6)
    assert bag.map_partitions(BatchScorer(model)).count().compute() == 24
    assert bag.filter(lambda _: False).map_partitions(BatchScorer(model)).compute() == []
    with pytest.raises(FileNotFoundError, match=r"no model .*none on .*, in process \d+"):
        bag.map_partitions(BatchScorer(tmp_path / "none")).compute()
