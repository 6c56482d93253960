"""BatchScorer and BatchTransformer in the processes of Daft, as the guide shows them."""

import subprocess
import sys
import textwrap

import pytest

daft = pytest.importorskip("daft")

# In a process of its own: Daft takes one runner a process.
SCRIPT = """
import json, os, sys
import daft
from daft import DataType
from dfkde_sklearn import BatchScorer

runner, model, marker, *paths = sys.argv[1:]
if runner == "ray":
    import ray
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    daft.set_runner_ray()
number, text = DataType.float64(), DataType.string()
row = DataType.struct({
    "path": text, "score": number, "p_anomalous": number, "p_value": number, "verdict": text, "reason": text,
    "pid": DataType.int64(),
})

def die_once():
    import signal
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)

@daft.cls(max_concurrency=2, use_process=True)
class Scorer:
    def __init__(self, model):
        self.scorer = BatchScorer(model)

    @daft.method.batch(return_dtype=row, unnest=True, batch_size=4)
    def score(self, path):
        rows = self.scorer(path)
        if marker:
            die_once()
        return [{**found, "pid": os.getpid()} for found in rows]

frame = daft.from_pydict({"path": paths})
if runner == "ray":
    frame = frame.into_partitions(4)
print("ROWS", json.dumps(frame.select(Scorer(model).score(daft.col("path"))).to_pylist()))
"""


def run(runner, model, marker, paths):
    """Return the rows, or None and what was printed about the error."""
    import json

    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), runner, str(model), str(marker), *paths]
    done = subprocess.run(command, timeout=150, capture_output=True, text=True)
    printed = [line for line in done.stdout.splitlines() if line.startswith("ROWS ")]
    assert (done.returncode == 0) == (len(printed) == 1), done.stderr
    return json.loads(printed[0].removeprefix("ROWS ")) if printed else None, done.stderr


def check(rows, paths, scores):
    assert len({row["pid"] for row in rows}) == 2
    assert sorted(row["path"] for row in rows) == paths
    assert {row["path"]: row["score"] for row in rows} == scores


def test_without_a_cluster_a_killed_process_is_an_error_and_the_next_run_scores_all(model, paths, scores, tmp_path):
    rows, error = run("native", model, tmp_path / "killed", paths)
    assert rows is None
    assert "UDF process closed the connection unexpectedly" in error
    rows, _ = run("native", model, tmp_path / "killed", paths)
    check(rows, paths, scores)


@pytest.mark.long
def test_on_ray_each_image_is_scored_once_though_an_actor_is_killed(model, paths, scores, tmp_path):
    pytest.importorskip("ray")
    rows, _ = run("ray", model, tmp_path / "killed", paths)
    assert (tmp_path / "killed").exists()
    check(rows, paths, scores)


@pytest.mark.long
def test_a_machine_without_the_model_says_so(paths, tmp_path):
    rows, error = run("native", tmp_path / "none", "", paths)
    assert rows is None
    assert f"There is no model {tmp_path / 'none'} on " in error
