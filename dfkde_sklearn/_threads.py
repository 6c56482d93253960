"""Threads on the CPU: some that each run torch on one core, and BLAS held to one.

torch, NumPy and SciPy each have threads of their own, which wait for more work by spinning. Where two of them take
turns on small matrices, each waits for a core on which the other spins: ten times slower than with one thread.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

# Multiplications for which OpenBLAS wakes no threads either.
_SMALL_PRODUCT = 2**18

Run = Callable[[Callable[[Any], None], Iterable[Any]], None]

# torch's number of threads is the process's until a thread has one of its own: it is borrowed to start ours.
_starting = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}
_of_thread = threading.local()
_limiting = threading.Lock()
_limits: list[Any] = []
_n_limited = 0


def run_in_turn(task: Callable[[Any], None], items: Iterable[Any]) -> None:
    """Run the task of every item, in order."""
    with torch.inference_mode():
        for item in items:
            task(item)


def run_on_single_cores(n_threads: int) -> Run:
    """Return ``run(task, items)``: the task of every item, in any order, in threads that each use one core.

    No more threads than torch is given, and at most `n_threads`. A task that runs others in this way does so in turn.
    """
    if getattr(_of_thread, "is_ours", False):
        return run_in_turn
    n_most = torch.get_num_threads()
    pool = _single_core_pool(n_most)

    def run(task: Callable[[Any], None], items: Iterable[Any]) -> None:
        queue = deque(items)

        @torch.inference_mode()
        def drain() -> None:
            while True:
                try:
                    item = queue.popleft()
                except IndexError:
                    return
                task(item)

        try:
            for drained in [pool.submit(drain) for _ in range(max(1, min(n_threads, n_most, len(queue))))]:
                drained.result()
        finally:
            queue.clear()

    return run


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b``; a small one on the CPU by NumPy, as torch wakes threads for it, which may take milliseconds."""
    if a.is_cpu and len(a) * b.numel() < _SMALL_PRODUCT:
        return torch.from_numpy(np.matmul(a.detach().numpy(), b.detach().numpy()))
    return a @ b


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Hold NumPy's and SciPy's linear algebra to one thread, in all threads of the process, as long as any asks."""
    global _n_limited
    with _limiting:
        if _n_limited == 0:
            _limits.append(_controller().limit(limits=1, user_api="blas"))
            _limits[0].__enter__()
        _n_limited += 1
    try:
        yield
    finally:
        with _limiting:
            _n_limited -= 1
            if _n_limited == 0:
                _limits.pop().__exit__(None, None, None)


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


def _single_core_pool(n_threads: int) -> ThreadPoolExecutor:
    """Return threads that each use one core, the same ones for the same number: starting them takes milliseconds."""
    with _starting:
        if n_threads not in _pools:
            _pools[n_threads] = _started_pool(n_threads)
        return _pools[n_threads]


def _started_pool(n_threads: int) -> ThreadPoolExecutor:
    ready = threading.Barrier(n_threads + 1)
    found: list[int] = []

    def start() -> None:
        # A new thread takes over the process's number at its first use of it, which must not come after the next line.
        found.append(torch.get_num_threads())
        torch.set_num_threads(1)
        # In these threads alone. Numbers below the normal range cost 3 to 5 times as much, and count for nothing here.
        torch.set_flush_denormal(True)
        _of_thread.is_ours = True
        ready.wait()

    pool = ThreadPoolExecutor(n_threads, "dfkde_sklearn")
    for _ in range(n_threads):
        pool.submit(start)
    ready.wait()
    # In a thread of its own, as it would set the number of the calling thread too.
    restore = threading.Thread(target=torch.set_num_threads, args=(max(found),))
    restore.start()
    restore.join()
    return pool


def _forget_threads() -> None:
    """Begin anew in a forked process, which has none of the threads."""
    global _starting, _limiting
    _starting, _limiting = threading.Lock(), threading.Lock()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
