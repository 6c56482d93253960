"""Threads of one core each: what runs where, what is left behind, and what holds where threads cannot be had."""

import os
import subprocess
import sys
import threading

import joblib
import pytest
import torch

from dfkde_sklearn._threads import computed_ahead, on_single_core, run_on_single_cores


@pytest.fixture(params=[1, 2, 3])
def n_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_each_item_is_done_once_on_a_single_core(n_threads):
    done = []
    n_at_once = min(n_threads, joblib.cpu_count())
    together = threading.Barrier(n_at_once)

    def task(item):
        if item < n_at_once:
            together.wait(10)  # ends only if as many threads work at once
        done.append((item, torch.get_num_threads(), torch.is_inference_mode_enabled()))

    run_on_single_cores(99)(task, range(20))
    assert sorted(done) == [(i, 1, True) for i in range(20)]
    assert torch.get_num_threads() == n_threads


@pytest.mark.parametrize("limit", ["os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})", "None"])
def test_no_more_threads_than_cores_that_the_process_may_use(limit):
    # A quota of processor time counts in the same way, by joblib: here by the variable that stands for one.
    script = f"""
import os, threading, torch
from dfkde_sklearn._threads import run_on_single_cores
{limit}
torch.set_num_threads(4)
threads = set()
run_on_single_cores(99)(lambda _: threads.add(threading.get_ident()), range(200))
print(len(threads))
"""
    assert outcome(script, **({} if limit != "None" else {"LOKY_MAX_CPU_COUNT": "1"})) == ["1"]


def test_no_more_threads_than_asked_for():
    threads = set()
    run_on_single_cores(1)(lambda _: threads.add(threading.get_ident()), range(50))
    assert len(threads) == 1


def test_a_task_runs_others_in_its_own_thread(n_threads):
    done = []

    def task(item):
        own = threading.get_ident()
        run_on_single_cores(99)(lambda i: done.append((item, i, threading.get_ident() == own)), range(3))

    run_on_single_cores(99)(task, range(5))
    assert sorted(done) == [(item, i, True) for item in range(5) for i in range(3)]


def test_an_error_ends_the_run_and_not_the_threads(n_threads):
    run = run_on_single_cores(99)
    done = []

    def task(item):
        if item == 0:
            raise KeyError("item 0")
        done.append(item)

    with pytest.raises(KeyError, match="item 0"):
        run(task, range(10_000))
    assert len(done) < 10_000
    run(done.append, [-1])
    assert done[-1] == -1


def test_what_is_computed_on_one_core_comes_back_or_raises(n_threads):
    assert on_single_core(lambda x: (x, torch.get_num_threads()), 5) == (5, 1)
    assert on_single_core(on_single_core, torch.get_num_threads) == 1
    with pytest.raises(ZeroDivisionError):
        on_single_core(divmod, 1, 0)
    assert torch.get_num_threads() == n_threads


def test_results_computed_ahead_come_in_order_and_end_with_the_first_error():
    begun = []

    def reciprocal(i):
        begun.append(i)
        return 1 / (20 - i)

    results = computed_ahead(reciprocal, range(100), n_threads=3, n_ahead=5)
    assert [next(results) for _ in range(20)] == [1 / (20 - i) for i in range(20)]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert max(begun) <= 25


def test_nothing_runs_on_where_results_are_no_longer_asked_for():
    results = computed_ahead(lambda i: i, range(10), n_threads=3, n_ahead=2)
    next(results)
    results.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("dfkde_sklearn_ahead")]


def outcome(script, *, timeout=300, **environment):
    """Run a script in a process of its own, and return what it prints."""
    command = [sys.executable, "-W", "ignore", "-c", script]
    ended = subprocess.run(
        command, env=os.environ | environment, timeout=timeout, check=False, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.split()


def test_fits_side_by_side_leave_blas_its_threads():
    script = """
import threading, numpy as np, scipy.linalg, threadpoolctl
from dfkde_sklearn import DFKDEDetector
X = np.random.default_rng(0).normal(size=(300, 40))

def numbers():
    libraries = threadpoolctl.threadpool_info()
    return sorted(library["num_threads"] for library in libraries if library["user_api"] == "blas")

before = numbers()
seen = []
for n in (None, 1):
    with threadpoolctl.threadpool_limits(n):
        limited = numbers()
        fits = [threading.Thread(target=DFKDEDetector(n_components=8).fit, args=(X,)) for _ in range(3)]
        for fit in fits:
            fit.start()
        while any(fit.is_alive() for fit in fits):
            seen.append(numbers() == limited)
        for fit in fits:
            fit.join()
print(before[-1], all(seen), numbers() == before)
"""
    assert outcome(script, OPENBLAS_NUM_THREADS="2", OMP_NUM_THREADS="2")[1:] == ["True", "True"]


USE = """
import numpy as np, threading, torch
from PIL import Image
from dfkde_sklearn import DFKDEDetector, ScatteringFeatures
X = np.random.default_rng(0).normal(size=(1200, 30))
images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)

def use():
    detector = DFKDEDetector(n_components=8).fit(X)
    rows = ScatteringFeatures(scales=2, image_size=32).fit_transform(images)
    return [float(detector.score_samples(X).sum()), float(np.sum(rows))]
"""


@pytest.mark.parametrize("failing", ["[0]", "[1]", "[2]", "[3]", "range(1000)"])
def test_threads_that_cannot_be_started_are_done_without(failing):
    script = f"""
{USE}
start, n_started = threading.Thread.start, 0

def start_or_fail(thread):
    global n_started
    n_started += 1
    if n_started - 1 in {failing}:
        raise RuntimeError("can't start new thread")
    start(thread)

threading.Thread.start = start_or_fail
found = use()
threading.Thread.start = start
expected = use()
others = []
thread = threading.Thread(target=lambda: others.append(torch.get_num_threads()))
thread.start()
thread.join()
print(np.allclose(found, expected, rtol=1e-9), others == [2], torch.get_num_threads() == 2)
"""
    assert outcome(script, OMP_NUM_THREADS="2") == ["True"] * 3


@pytest.mark.parametrize("before", ["use()", "None"], ids=["used before", "not used before"])
def test_scores_do_not_need_the_main_thread(before):
    script = f"""
{USE}
{before}

def later():
    threading.main_thread().join()
    print(len(use()))

threading.Thread(target=later).start()
"""
    assert outcome(script, OMP_NUM_THREADS="2") == ["2"]


@pytest.mark.parametrize("run", ["on_single_core(task)", "run_on_single_cores(2)(lambda _: task(), range(2))"])
def test_a_process_ends_after_what_the_threads_are_at(run):
    # Not a daemon that computes with torch itself: as Python ends it, torch ends the process, whatever it computes.
    script = f"""
import os, threading, time, torch
from dfkde_sklearn._threads import on_single_core, run_on_single_cores
begun = threading.Event()

def task():
    begun.set()
    until = time.monotonic() + 1
    while time.monotonic() < until:
        torch.ones(50, 50) @ torch.ones(50, 50)
    os.write(1, b"done\\n")  # whole, as two threads print at a time

def wait_for_ever():
    {run}
    threading.Event().wait()

threading.Thread(target=wait_for_ever, daemon=True).start()
begun.wait()
"""
    assert set(outcome(script, OMP_NUM_THREADS="2")) == {"done"}
