"""Threads on the CPU that each run torch on one core, and what a forked process has to reset.

torch's own threads wait for more work by spinning. On small matrices, and beside other work, they mostly wait for one
another: ten times slower than one thread. torch keeps a number of threads for each calling thread, so that the threads
here can be set to one core without an effect on others. NumPy's and SciPy's BLAS has one number for the process, which
is not changed.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, ParamSpec, TypeVar
from weakref import WeakSet

import joblib
import numpy as np
import torch
from torch import Tensor

# Multiplications for which OpenBLAS wakes no threads either.
_SMALL_PRODUCT = 2**18

Run = Callable[[Callable[[Any], None], Iterable[Any]], None]

_P = ParamSpec("_P")
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Threads:
    """Threads that make calls. If the system refuses to start any, the caller makes the calls itself.

    In place of ``concurrent.futures.ThreadPoolExecutor``, which takes no calls once the main thread has ended, even
    if others still run. And if that cannot start a thread, a call may never be made, and its result never comes.

    Parameters
    ----------
    name : str
        What the names of the threads begin with.
    prepare : callable, default=None
        Called once in each thread before all else.
    """

    def __init__(self, name: str, prepare: Callable[[], object] | None = None) -> None:
        self._name = name
        self._prepare = prepare
        self.forget()
        _all_threads.add(self)

    def forget(self) -> None:
        """Start over in a forked process, which has none of the threads."""
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._started: list[threading.Thread] = []

    def start(self, n: int) -> None:
        """Start threads until there are `n`, or the system refuses."""
        while len(self._started) < n:
            ready = threading.Event()
            # Daemons, as the end of the process need not wait for threads that wait: `_dismiss_all` ends them.
            thread = threading.Thread(
                target=self._serve, args=(self._calls, ready), name=f"{self._name}_{len(self._started)}", daemon=True
            )
            try:
                thread.start()
            except RuntimeError:  # a limit on threads, or the end of the process
                return
            self._started.append(thread)
            ready.wait()

    def __len__(self) -> int:
        """Return the number of threads."""
        return len(self._started)

    def submit(self, function: Callable[_P, _Result], *args: _P.args, **kwargs: _P.kwargs) -> Future[_Result]:
        """Return the future result of a call."""
        future: Future[_Result] = Future()
        call = partial(_fulfil, future, partial(function, *args, **kwargs))
        if self._started:
            self._calls.put(call)
        else:
            call()
        return future

    def dismiss(self) -> None:
        """End the threads, each after the call that it makes; other calls are not made."""
        try:
            while True:
                self._calls.get_nowait()
        except Empty:
            pass
        started, self._started = self._started, []
        for _ in started:
            self._calls.put(None)
        for thread in started:
            thread.join()

    def _serve(self, calls: SimpleQueue[Callable[[], None] | None], ready: threading.Event) -> None:
        try:
            if self._prepare is not None:
                self._prepare()
        finally:
            ready.set()
        while (call := calls.get()) is not None:
            call()
            del call  # it would keep its arguments until the next


def _fulfil(future: Future[_Result], call: Callable[[], _Result]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)


class Lock:
    """A lock that a forked process finds open, whichever thread held it: that thread is not in the new process.

    Parameters
    ----------
    make : callable, default=threading.Lock
        What makes the lock: also ``threading.RLock``.
    """

    def __init__(self, make: Callable[[], Any] = threading.Lock) -> None:
        self._make = make
        self.forget()
        _all_locks.add(self)

    def forget(self) -> None:
        """Make a new lock."""
        self._lock = self._make()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()


def run_in_turn(task: Callable[[Any], None], items: Iterable[Any]) -> None:
    """Run the task of every item, in order."""
    with torch.inference_mode():
        for item in items:
            task(item)


def run_on_single_cores(n_threads: int) -> Run:
    """Return ``run(task, items)``: the task of every item, in any order, in threads that each use one core.

    There are at most `n_threads` of them, and at most torch's own number. A task that calls this itself runs its own
    tasks in turn.
    """
    if _is_on_single_core():
        return run_in_turn
    n_most = max(1, min(n_threads, n_single_cores()))
    _start_single_cores(n_most)

    def run(task: Callable[[Any], None], items: Iterable[Any]) -> None:
        queue = deque(items)

        @torch.inference_mode()
        def drain() -> None:
            try:
                while True:
                    try:
                        item = queue.popleft()
                    except IndexError:
                        return
                    task(item)
            finally:
                queue.clear()

        _run_to_the_end([drain] * min(n_most, len(queue)), queue.clear)

    return run


def mapped_on_single_cores(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """Return ``function(item)`` for every item, in order, computed in as many threads of one core as are useful."""
    results: dict[int, _Result] = {}

    def compute(i: int) -> None:
        results[i] = function(items[i])

    run_on_single_cores(len(items))(compute, range(len(items)))
    return [results[i] for i in range(len(items))]


def n_single_cores() -> int:
    """Return how many threads compute side by side: 1 in such a thread, else torch's number.

    It is at most the number of cores that the process may use, by its affinity and by a container's quota of processor
    time, which torch does not know.
    """
    return 1 if _is_on_single_core() else max(1, min(torch.get_num_threads(), joblib.cpu_count()))


def on_single_core(function: Callable[_P, _Result], *args: _P.args, **kwargs: _P.kwargs) -> _Result:
    """Return ``function(*args, **kwargs)``, computed in a thread that uses one core."""
    if _is_on_single_core():
        return function(*args, **kwargs)
    _start_single_cores(1)
    return _run_to_the_end([partial(function, *args, **kwargs)])[0]


def computed_ahead(
    function: Callable[[_Item], _Result], items: Iterable[_Item], n_threads: int, n_ahead: int
) -> Generator[_Result, None, None]:
    """Yield ``function(item)`` for every item, in order; up to `n_ahead` are computed in advance, in threads."""
    threads = Threads("dfkde_sklearn_ahead")
    futures: deque[Future[_Result]] = deque()
    try:
        threads.start(n_threads)
        for item in items:
            futures.append(threads.submit(function, item))
            if len(futures) == n_ahead:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        threads.dismiss()


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b``; small ones on the CPU by NumPy, since torch wakes threads, which takes up to milliseconds."""
    if a.is_cpu and len(a) * b.numel() < _SMALL_PRODUCT:
        return torch.from_numpy(np.matmul(a.detach().numpy(), b.detach().numpy()))
    return a @ b


def _run_to_the_end(calls: list[Callable[[], _Result]], give_up: Callable[[], object] = lambda: None) -> list[_Result]:
    """Return what the calls return, in threads that use one core each; when this returns or raises, none still runs."""
    futures: list[Future[_Result]] = []
    try:
        for call in calls:
            futures.append(_single_cores.submit(call))  # noqa: PERF401 (those submitted before an interrupt count)
        return [future.result() for future in futures]
    except BaseException:  # Ctrl-C too
        give_up()
        wait([future for future in futures if not future.cancel()])
        raise


def _is_on_single_core() -> bool:
    return getattr(_of_thread, "is_on_single_core", False)


def _start_single_cores(n: int) -> None:
    """Start threads until there are `n`, or the system refuses."""
    with _starting:
        if len(_single_cores) >= n:
            return
        is_known, may_restore = threading.Event(), threading.Event()

        def restore() -> None:
            n_of_process = torch.get_num_threads()
            is_known.set()
            may_restore.wait()
            torch.set_num_threads(n_of_process)

        # In a thread of its own, as it would set the number of the calling thread too. It is started first: without it,
        # new threads of others would be left with one core.
        restoring = threading.Thread(target=restore, daemon=True)
        try:
            restoring.start()
        except RuntimeError:
            return
        try:
            is_known.wait()
            _single_cores.start(n)
        finally:
            may_restore.set()
            restoring.join()


def _use_one_core() -> None:
    # A new thread takes over the process's number at its first use of it, which must not come after the next line.
    torch.get_num_threads()
    torch.set_num_threads(1)
    # In these threads alone. Numbers below the normal range cost 3 to 5 times as much, and make no difference here.
    torch.set_flush_denormal(True)
    _of_thread.is_on_single_core = True


def _begin_anew() -> None:
    for threads in _all_threads:
        threads.forget()
    for lock in _all_locks:
        lock.forget()
    # OpenMP's threads are gone as well, and torch would wait for them without end.
    torch.set_num_threads(1)


def _dismiss_all() -> None:
    for threads in list(_all_threads):
        threads.dismiss()


_all_threads: WeakSet[Threads] = WeakSet()
_all_locks: WeakSet[Lock] = WeakSet()
_of_thread = threading.local()
_single_cores = Threads("dfkde_sklearn", _use_one_core)
# torch's number of threads is the process's until a thread has one of its own: it is borrowed to start ours.
_starting = Lock()
# A thread that still computes while the interpreter is taken down may crash it.
atexit.register(_dismiss_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
