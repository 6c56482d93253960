"""Threads of one core each, and BLAS held to one thread: what runs where, and what is left behind."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from threadpoolctl import threadpool_info

from dfkde_sklearn._threads import one_blas_thread, run_on_single_cores


@pytest.fixture(params=[1, 2, 3])
def n_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_each_item_is_done_once_on_a_single_core(n_threads):
    done = []
    together = threading.Barrier(n_threads)

    def task(item):
        if item < n_threads:
            together.wait(10)  # ends only if as many threads work at once
        done.append((item, torch.get_num_threads(), torch.is_inference_mode_enabled()))

    run_on_single_cores(99)(task, range(20))
    assert sorted(done) == [(i, 1, True) for i in range(20)]
    assert torch.get_num_threads() == n_threads


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


def blas_threads():
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def test_blas_has_its_threads_back_after_the_last_that_asks():
    before = blas_threads()
    with one_blas_thread():
        with one_blas_thread():
            assert blas_threads() == {1}
        assert blas_threads() == {1}
    assert blas_threads() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_process_has_threads_of_its_own():
    script = """
import os, torch
from dfkde_sklearn._threads import run_on_single_cores
found = []
run_on_single_cores(1)(found.append, [1])
child = os.fork()
if child == 0:
    run_on_single_cores(1)(found.append, [2])
    os._exit(0 if found == [1, 2] else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    assert subprocess.run(command, env=environment, timeout=60, check=False).returncode == 0
