"""Processes forked from one that has used the package, and processes that are killed: each ends, and works."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")

USE = """
import multiprocessing, os, threading, numpy as np, threadpoolctl, torch
from dfkde_sklearn import DFKDEDetector, ScatteringFeatures
X = np.random.default_rng(0).normal(size=(1200, 30))
images = np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3), dtype=np.uint8)

def fit():
    return DFKDEDetector(ScatteringFeatures(scales=3, image_size=64), n_components=8, residual="box").fit(images)

def use(_):
    rows = DFKDEDetector(n_components=8).fit(X)
    return [*fit().score_samples(images)[:2], *rows.score_samples(X)[:2]]

def check(found):
    if not np.allclose(found, use(None), rtol=1e-9):
        raise AssertionError
"""


def run(script, timeout=300):
    command = [sys.executable, "-W", "ignore", "-c", USE + script]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)
    try:
        _, errors = process.communicate(timeout=timeout)
    finally:
        # With it the processes that it has forked, if these hang.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, errors.decode()


# With torch used in all its threads, as by a network, before the fork.
USED = """
a = torch.randn(2000, 500)
(a @ a.T).exp().sum()
use(None)
"""


@pytest.mark.parametrize("used", [USED, ""], ids=["used before", "not used before"])
def test_a_forked_process_fits_and_scores(used):
    run(f"""
{used}
child = os.fork()
if child == 0:
    use(None)
    (torch.ones(2000, 500) @ torch.ones(500, 2000)).exp().sum()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
""")


def test_the_processes_of_a_forked_pool_score():
    run(f"""
{USED}
with multiprocessing.get_context("fork").Pool(2) as pool:
    for found in pool.map(use, range(2)):
        check(found)
""")


def test_the_processes_of_joblib_score():
    run(f"""
{USED}
import joblib
multiprocessing.set_start_method("fork", force=True)
with joblib.parallel_config("multiprocessing", n_jobs=2):
    for found in joblib.Parallel()(joblib.delayed(use)(i) for i in range(2)):
        check(found)
""")


def test_processes_forked_while_other_threads_fit_and_score_have_all_they_need():
    run("""
def blas():
    return [library["num_threads"] for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"]

# What is imported at its first use is imported before the fork: Python leaves the lock of a module that another thread
# imports locked in the child.
use(None)
before, ended = blas(), threading.Event()

def work():
    while not ended.is_set():
        use(None)

workers = [threading.Thread(target=work) for _ in range(2)]
for worker in workers:
    worker.start()
try:
    for _ in range(6):
        child = os.fork()
        if child == 0:
            # Without what the other threads of the parent did: they are not in this process.
            is_right = blas() == before
            use(None)
            os._exit(0 if is_right and blas() == before else 1)
        assert os.waitpid(child, 0)[1] == 0
finally:
    ended.set()
    for worker in workers:
        worker.join()
assert blas() == before
""")


KILLED = """
import sys, numpy as np, warnings
from dfkde_sklearn import DFKDEDetector, ScatteringFeatures
folder, step = sys.argv[1:]
images = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
X = np.random.default_rng(0).normal(size=(2000, 60))
rows = DFKDEDetector(n_components=8)
seed = 0

def fit():
    global seed
    seed += 1
    noise = np.random.default_rng(seed).integers(0, 256, images.shape, dtype=np.uint8)
    features = ScatteringFeatures(scales=3, image_size=64, cache=folder)
    rows.fit(X)
    DFKDEDetector(features, n_components=4, residual="box").fit(noise)
    return DFKDEDetector(features, n_components=4, residual="box").fit(images)

if step == "once":
    print(float(fit().score_samples(images).sum()))
else:
    detector = fit()
    print("begun", flush=True)
    while True:
        fit() if step == "fit" else (detector.score_samples(images), rows.score_samples(X))
"""


def killed(folder, step, signum, delay):
    """Send the signal to a process that fits or scores on and on, and return its exit status."""
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", KILLED, folder, step],
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout.readline() == "begun\n", process.stderr.read()
            time.sleep(delay)
            process.send_signal(signum)
            process.communicate(timeout=120)
        finally:
            process.kill()
    return process.returncode


def once(folder):
    command = [sys.executable, "-W", "error", "-c", KILLED, folder, "once"]
    return float(subprocess.run(command, timeout=300, check=True, capture_output=True).stdout)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("step", ["fit", "score"])
def test_a_killed_process_ends_and_the_next_one_works(tmp_path, step, signum):
    assert killed(str(tmp_path / "cache"), step, signum, 0.3) == -signum
    assert once(str(tmp_path / "cache")) == pytest.approx(once(str(tmp_path / "new")), rel=1e-9)


@pytest.mark.long
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("step", ["fit", "score"])
def test_processes_killed_at_any_time_end_and_the_next_one_works(tmp_path, step, signum):
    expected = once(str(tmp_path / "new"))
    for delay in np.random.default_rng(0).uniform(0, 1.5, 20):
        assert killed(str(tmp_path / "cache"), step, signum, delay) == -signum
        assert once(str(tmp_path / "cache")) == pytest.approx(expected, rel=1e-9)
