"""BatchScorer and BatchTransformer in the actors of Ray Data, as the guide shows them."""

import warnings

import numpy as np
import pytest
from sklearn.base import clone

from dfkde_sklearn import BatchScorer, BatchTransformer, DFKDEDetector

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")

# Its own child processes and sockets, which it leaves to the interpreter.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def ray_data(_quiet_and_on_single_cores):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(num_cpus=3, include_dashboard=False, logging_level="error", log_to_driver=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield ray.data
        ray.shutdown()


def test_an_actor_pool_scores_each_image_once_though_an_actor_is_killed(
    ray_data, model, paths, scores, die_once, tmp_path
):
    class Scorer(BatchScorer):
        def __call__(self, batch):
            import os

            found = super().__call__(batch)
            die_once()
            return {**found, "pid": np.full(len(found["path"]), os.getpid())}

    rows = (
        ray_data.from_items([{"path": path} for path in paths], override_num_blocks=6)
        .map_batches(
            Scorer,
            fn_constructor_args=(str(model),),
            fn_constructor_kwargs={"sha256": BatchScorer(model).sha256},
            batch_size=4,
            compute=ray_data.ActorPoolStrategy(size=2),
        )
        .take_all()
    )
    assert (tmp_path / "killed").exists()
    assert len({row["pid"] for row in rows}) == 2
    assert sorted(row["path"] for row in rows) == paths
    assert {row["path"]: row["score"] for row in rows} == scores


@pytest.mark.long
def test_an_actor_pool_describes_images(ray_data, model, paths, detector):
    rows = (
        ray_data.from_items([{"path": path} for path in paths], override_num_blocks=6)
        .map_batches(
            BatchTransformer,
            fn_constructor_args=(str(model),),
            batch_size=4,
            compute=ray_data.ActorPoolStrategy(size=2),
        )
        .take_all()
    )
    rows.sort(key=lambda row: row["path"])
    assert [row["path"] for row in rows] == paths
    np.testing.assert_array_equal(np.stack([row["features"] for row in rows]), detector.features_.transform(paths))


@pytest.mark.long
def test_a_fit_out_of_core_is_the_local_one(ray_data, model, data, paths, detector):
    ray_data.DataContext.get_current().execution_options.preserve_order = True
    dataset = ray_data.from_items([{"path": path} for path in paths], override_num_blocks=6).map_batches(
        BatchTransformer,
        fn_constructor_args=(str(model),),
        batch_size=4,
        compute=ray_data.ActorPoolStrategy(size=2),
    )
    new = DFKDEDetector(detector.features, max_samples=15, random_state=0)
    found = clone(new).fit_features(batch["features"] for batch in dataset.iter_batches(batch_size=8))
    local = new.fit(path for path in paths)
    np.testing.assert_array_equal(found.score_samples(data.X_test), local.score_samples(data.X_test))


def test_no_image_gives_no_row_and_another_model_an_error(ray_data, model, paths):
    from ray.data.expressions import col

    data = ray_data.from_items([{"path": path} for path in paths])
    pool = {"batch_size": 4, "compute": ray_data.ActorPoolStrategy(size=1), "fn_constructor_args": (str(model),)}
    assert data.filter(expr=col("path") == "none").map_batches(BatchScorer, **pool).take_all() == []
    with pytest.raises(Exception, match="is another model: its SHA-256 is"):
        data.map_batches(BatchScorer, **pool, fn_constructor_kwargs={"sha256": "0" * 64}).take_all()
