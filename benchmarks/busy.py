"""Fits, searches and features on a machine that is busy with something else.

    python benchmarks/busy.py
    python benchmarks/busy.py --quick

Each task runs in turn as it is, and with every library limited to one thread by threadpoolctl: first as the machine is,
and then beside one busy process for each core. The table has the median seconds. Threads that wait for one another
would make a task many times slower beside busy processes than in one thread; it is asserted that none takes more than
twice as long.
Takes about three minutes on two cores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import joblib
import numpy as np
from sklearn.model_selection import GridSearchCV
from threadpoolctl import threadpool_limits

from dfkde_sklearn import DFKDEDetector, TimmFeatures


@contextmanager
def busy_processes(n: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def seconds(task: Callable[[], object], one_thread: bool) -> float:
    start = time.perf_counter()
    with threadpool_limits(1) if one_thread else nullcontext():
        task()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timings (default: 5)")
    parser.add_argument("--quick", action="store_true", help="one round of small tasks: shows that it runs")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    X = rng.normal(size=(300, 30))
    images = rng.integers(0, 256, (4 if options.quick else 16, 96, 96, 3), np.uint8)
    network = "test_resnet" if options.quick else "mobilenetv2_100"
    features = TimmFeatures(network, pretrained=False, random_state=0).fit(images)
    grid = {"n_components": [2, 4] if options.quick else [2, 4, 8, 16], "bandwidth": ["scott", "silverman"]}
    tasks: dict[str, Callable[[], object]] = {
        "fit to 300 x 30": lambda: DFKDEDetector().fit(X),
        f"search of {2 * len(grid['n_components'])} candidates": lambda: GridSearchCV(DFKDEDetector(), grid).fit(X),
        f"features of {len(images)} images, {network}": lambda: features.transform(images),
    }
    if options.quick:
        options.rounds = 1
    for task in tasks.values():
        task()
    print("| task | busy processes | seconds | in one thread | ratio |\n|---|---|---|---|---|")
    for n in (0, joblib.cpu_count()):
        with busy_processes(n):
            for name, task in tasks.items():
                times = [[seconds(task, one_thread) for one_thread in (False, True)] for _ in range(options.rounds)]
                as_is, one = np.median(times, axis=0)
                print(f"| {name} | {n} | {as_is:.2f} | {one:.2f} | {as_is / one:.2f} |", flush=True)
                assert options.quick or as_is < 2 * one, f"{name}: {as_is / one:.1f} times one thread's time"


if __name__ == "__main__":
    main()
