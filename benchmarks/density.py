"""Pairs of queries and kernels a second: the density against other ways to compute it, and the limit of the machine.

    python benchmarks/density.py
    python benchmarks/density.py --quick
    python benchmarks/density.py --plot density.png
    python benchmarks/density.py --write

All ways score the same queries under the same Gaussian kernels, ours through the public ``score_samples`` of a fitted
detector, validation and projection included. They take turns, round by round; the tables have medians over the rounds.
A slow way scores a part of the queries, as its cost is theirs in proportion. "product + exp2" is what a bare matrix
product and a bare exp2 in place take in PyTorch for as many pairs, in tiles, threads and rounds alike. "limit" is what
the multiplications alone would take, one a dimension and one for each term of the power, at the rate of a large matrix
product of PyTorch. It can be passed only where that product does not use the processor's vectors at their full width.
KeOps takes part where pykeops is installed.

The last lines print what is claimed, as ratios taken in this run, and whether each holds. They are meant for an
otherwise idle machine.
"""

from __future__ import annotations

import argparse
import math
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy
import sklearn
import torch
from real_data import write_figure
from scipy.stats import gaussian_kde
from sklearn.neighbors import KernelDensity

from dfkde_sklearn import DFKDEDetector
from dfkde_sklearn._kernels.bandwidth import leave_one_out_bandwidth, scott_bandwidth
from dfkde_sklearn._kernels.density import leave_one_out
from dfkde_sklearn._kernels.sums_llvm import _POWER
from dfkde_sklearn._threads import run_on_single_cores

OURS, TORCH, LIMIT = "dfkde_sklearn", "product + exp2", "limit"
# In the table of the documentation.
IN_WORDS = {
    LIMIT: "limit: the multiplications alone",
    OURS: "DFKDEDetector.score_samples",
    TORCH: "a bare matrix product and a bare exp2 (PyTorch)",
    "cdist + logsumexp": "torch.cdist and logsumexp in tiles",
    "KeOps": "KeOps",
    "the original": "anomalib's loop over the queries",
    "SciPy": "SciPy, gaussian_kde.logpdf",
    "scikit-learn": "scikit-learn, KernelDensity.score_samples",
}
# What is claimed, at 40 000 rows in 16 dimensions: the pairs a second, in those of a peer, are at least these.
TIMES_FASTER = {
    "float64": {"SciPy": 20, "scikit-learn": 50, "the original": 12, "the best other": 4, TORCH: 1.1, LIMIT: 0.4},
    "float32": {"SciPy": 45, "scikit-learn": 100, "the original": 15, "the best other": 3.5, TORCH: 1.1, LIMIT: 0.4},
}
# Leave-one-out of 40 000 rows, in pairs of rows a second, against SciPy's scoring.
LEAVE_ONE_OUT_TIMES_SCIPY = {"float64": 30, "float32": 60}
# The search for a bandwidth, in leave-one-out passes over the same rows.
BANDWIDTH_PASSES = 7.0
# The most that a pair takes in any other shape, in seconds a pair of 40 000 x 16, after the product's own difference.
CLIFF = 3
# At least this number of times SciPy's speed, by the number of pairs of a call. Nothing is claimed of fewer.
SMALL_CALLS_TIMES_SCIPY = {100_000: 1, 1_000_000: 4}
# Most bytes that scoring 1e6 x 16 rows adds to its input and output.
ADDED_BYTES = 100e6

N, D, QUERIES = 40_000, 16, (2000, 10_000)
# Of the bare product and exp2, in the cache of a core.
_TILE_QUERIES, _TILE_ROWS = 512, 480
# Pairs of a slow way for each bare tile: 256 tiles in a full run, which take about as long.
_PAIRS_PER_TILE = 15_625


class Problem(NamedTuple):
    """A fitted detector, queries for it, and the same as whitened rows for the others."""

    detector: DFKDEDetector
    X: np.ndarray
    queries: np.ndarray
    support: np.ndarray
    bandwidth: float


def problem(n: int, m: int, d: int, dtype: str) -> Problem:
    """Return normal data. What a fit costs is not measured here: its kernels are put in place after a fit of a few."""
    rng = np.random.default_rng(0)
    train = rng.normal(size=(max(200, 4 * d), d)).astype(dtype)
    detector = DFKDEDetector(features=None, n_components=d, scaling=None).fit(train)
    rows = rng.normal(size=(n, d))
    # Exactly white, as SciPy estimates a covariance of its own.
    rows = np.linalg.solve(np.linalg.cholesky(np.cov(rows.T)), rows.T).T
    detector.kernel_centers_ = np.ascontiguousarray(rows, dtype=dtype)
    detector.bandwidth_ = scott_bandwidth(n, d)
    X = rng.normal(size=(m, d)).astype(dtype)
    deviations = detector.singular_values_ / math.sqrt(len(train) - 1)
    queries = ((X - detector.mean_) @ detector.components_.T / deviations).astype(dtype)
    return Problem(detector, X, queries, detector.kernel_centers_, detector.bandwidth_)


Scorer = Callable[[], object]


def scipy_scorer(p: Problem, m: int) -> Scorer:
    kde = gaussian_kde(p.support.T, bw_method=p.bandwidth)
    points = p.queries[:m].T
    return lambda: kde.logpdf(points)


def sklearn_scorer(p: Problem, m: int) -> Scorer:
    kde = KernelDensity(bandwidth=p.bandwidth).fit(p.support)
    return lambda: kde.score_samples(p.queries[:m])


def original_scorer(p: Problem, m: int) -> Scorer:
    """Return anomalib's loop over the queries, which computes densities and then their logarithm."""
    support, queries = (torch.from_numpy(x) / p.bandwidth for x in (p.support, p.queries[:m]))
    norm = (2 * math.pi * p.bandwidth**2) ** (-support.shape[1] / 2)

    def score() -> torch.Tensor:
        estimate = torch.zeros(len(queries), dtype=queries.dtype)
        for i in range(len(queries)):
            embedding = ((support - queries[i]) ** 2).sum(dim=1)
            estimate[i] = torch.mean(torch.exp(-embedding / 2) * norm)
        return torch.log(estimate)

    return score


def cdist_scorer(p: Problem, m: int) -> Scorer:
    support, queries = (torch.from_numpy(x) / p.bandwidth for x in (p.support, p.queries[:m]))
    shift = math.log(len(support)) + support.shape[1] * math.log(math.sqrt(2 * math.pi) * p.bandwidth)

    def score() -> torch.Tensor:
        parts = [torch.cdist(q, support).square_().mul_(-0.5).logsumexp(1) for q in queries.split(128)]
        return torch.cat(parts) - shift

    return score


def keops_scorer(p: Problem, m: int) -> Scorer:
    from pykeops.torch import LazyTensor

    support, queries = (torch.from_numpy(x) / p.bandwidth for x in (p.support, p.queries[:m]))
    shift = math.log(len(support)) + support.shape[1] * math.log(math.sqrt(2 * math.pi) * p.bandwidth)

    def score() -> torch.Tensor:
        differences = LazyTensor(queries[:, None, :]) - LazyTensor(support[None, :, :])
        return (differences.square().sum(-1) * -0.5).logsumexp(1)[:, 0] - shift

    return score


def our_scorer(p: Problem, m: int) -> Scorer:
    return lambda: p.detector.score_samples(p.X[:m])


PEERS: dict[str, Callable[[Problem, int], Scorer]] = {
    "SciPy": scipy_scorer,
    "scikit-learn": sklearn_scorer,
    "the original": original_scorer,
    "cdist + logsumexp": cdist_scorer,
}


def bare_tiles(n_tiles: int, d: int, dtype: str) -> Scorer:
    """Return what computes `n_tiles` tiles of nothing but a product and its power."""
    left, right = (torch.rand(k, d + 2, dtype=getattr(torch, dtype)) for k in (_TILE_QUERIES, _TILE_ROWS))
    return in_threads(
        n_tiles, lambda tile: torch.mm(left, right.T, out=tile).exp2_(), (_TILE_QUERIES, _TILE_ROWS), dtype
    )


def bare_multiplications(n_tiles: int, dtype: str) -> Scorer:
    """Return what computes `n_tiles` tiles of 512 x 512 x 512 multiplications."""
    left, right = torch.rand(2, 512, 512, dtype=getattr(torch, dtype))
    return in_threads(n_tiles, lambda tile: torch.mm(left, right, out=tile), (512, 512), dtype)


def in_threads(n: int, work: Callable[[torch.Tensor], object], shape: tuple[int, int], dtype: str) -> Scorer:
    """Return what does the work `n` times, each thread on a tile of its own, on as many cores as torch has threads."""

    def repeat(times: int) -> None:
        tile = torch.zeros(shape, dtype=getattr(torch, dtype))
        for _ in range(times):
            work(tile)

    def compute() -> None:
        n_parts = 4 * torch.get_num_threads()
        run_on_single_cores(n_parts)(repeat, [(i + 1) * n // n_parts - i * n // n_parts for i in range(n_parts)])

    return compute


def seconds(call: Scorer) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def medians(calls: dict[str, Scorer], rounds: int) -> dict[str, float]:
    """Return the median seconds of each call, taken in turns."""
    for call in calls.values():
        call()
    taken = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            taken[name].append(seconds(call))
    return {name: float(np.median(times)) for name, times in taken.items()}


def rates(p: Problem, names: Iterable[str], rounds: int, slow_pairs: float) -> dict[str, float]:
    """Return pairs a second: our own, of the peers of these names, of bare tiles, and at the limit."""
    n, (m, d), dtype = len(p.support), p.X.shape, str(p.X.dtype)
    few = max(1, min(m, round(slow_pairs / n)))
    n_tiles = round(slow_pairs / _PAIRS_PER_TILE)
    calls = {OURS: our_scorer(p, m), **{name: PEERS[name](p, few) for name in names}}
    calls |= {TORCH: bare_tiles(n_tiles, d, dtype), LIMIT: bare_multiplications(n_tiles, dtype)}
    taken = medians(calls, rounds)
    found = {OURS: m * n / taken[OURS], **{name: few * n / taken[name] for name in names}}
    found[TORCH] = n_tiles * _TILE_QUERIES * _TILE_ROWS / taken[TORCH]
    found[LIMIT] = n_tiles * 512**3 / taken[LIMIT] / (d + len(_POWER[getattr(torch, dtype)]) - 1)
    return found


def check_agreement(dtype: str, names: Iterable[str]) -> None:
    p = problem(3000, 50, D, dtype)
    log_volume = np.log(p.detector.singular_values_ / math.sqrt(max(200, 4 * D) - 1)).sum()
    ours = p.detector.score_samples(p.X) + log_volume
    for name in names:
        theirs = np.asarray(PEERS[name](p, 50)())
        # scikit-learn adds up on a tree, to 5e-6 here.
        tolerance = 1e-5 if dtype == "float64" else 1e-3
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance, err_msg=name)


def print_table(title: str, label: str, columns: dict[object, dict[str, float]]) -> None:
    names = list(next(iter(columns.values())))
    print(f"\n{title}, 1e9 pairs a second\n")
    print("| " + label + " | " + " | ".join(str(key) for key in columns) + " |")
    print("|---|" + "---|" * len(columns))
    for name in names:
        print(f"| {name} | " + " | ".join(f"{found[name] / 1e9:.3g}" for found in columns.values()) + " |")


class Claim(NamedTuple):
    """A figure of this run, its bound, and whether that is the least or the most that it may be."""

    what: str
    value: float
    bound: float
    is_least: bool

    def __bool__(self) -> bool:
        return self.value >= self.bound if self.is_least else self.value <= self.bound

    def __str__(self) -> str:
        bound = f"at {'least' if self.is_least else 'most'} {self.bound:g}"
        return f"{'PASS' if self else 'FAIL'}  {self.what}: {self.value:.3g} ({bound} claimed)"


def at_least(what: str, value: float, bound: float) -> Claim:
    return Claim(what, value, bound, True)


def at_most(what: str, value: float, bound: float) -> Claim:
    return Claim(what, value, bound, False)


def headline(
    claims: list[Claim], rounds: int, slow_pairs: float
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Measure 40 000 rows in 16 dimensions; return SciPy's pairs a second by dtype, and all of many queries."""
    of_scipy, of_many = {}, {}
    for dtype, times in TIMES_FASTER.items():
        found = {m: rates(problem(N, m, D, dtype), PEERS, rounds, slow_pairs) for m in QUERIES}
        print_table(f"{dtype}, {N} rows in {D} dimensions", "queries", found)
        for m, rate in found.items():
            others = [rate[name] for name in PEERS if name not in ("SciPy", "scikit-learn", "the original")]
            for name, bound in times.items():
                peer = max(others) if name == "the best other" else rate[name]
                claims.append(at_least(f"{dtype}, {m} queries, {name}", rate[OURS] / peer, bound))
        of_scipy[dtype] = found[QUERIES[0]]["SciPy"]
        of_many[dtype] = found[QUERIES[-1]]
    return of_scipy, of_many


def write_methods(of_many: dict[str, dict[str, float]]) -> None:
    """Write 1e9 pairs a second by method and dtype, the fastest first, as the table of the processor's vectors."""
    fastest_first = sorted(of_many["float64"], key=of_many["float64"].__getitem__, reverse=True)
    rows = [
        {"method": IN_WORDS[name]} | {dtype: f"{rate[name] / 1e9:#.3g}" for dtype, rate in of_many.items()}
        for name in fastest_first
    ]
    write_figure(f"density_{torch.backends.cpu.get_cpu_capability().lower()}", rows)


def sweeps(
    claims: list[Claim], rounds: int, slow_pairs: float, pairs: float
) -> dict[str, dict[object, dict[str, float]]]:
    """Measure other numbers of rows, queries, dimensions and threads, in float64."""
    dtype = "float64"
    by_rows = {
        n: rates(problem(n, round(pairs / n), D, dtype), PEERS, rounds, slow_pairs) for n in (1000, 5000, N, 200_000)
    }
    by_queries = {m: rates(problem(N, m, D, dtype), PEERS, rounds, slow_pairs) for m in (1, 16, 200, 2000)}
    by_dimensions = {
        d: rates(problem(N, round(pairs / N), d, dtype), PEERS, rounds, slow_pairs) for d in (2, 8, D, 32, 64)
    }
    number, by_threads = torch.get_num_threads(), {}
    try:
        for n_threads in sorted({1, 2, number}):
            torch.set_num_threads(n_threads)
            by_threads[n_threads] = rates(problem(N, round(pairs / N), D, dtype), PEERS, rounds, slow_pairs)
    finally:
        torch.set_num_threads(number)
    found = {"rows": by_rows, "queries": by_queries, "dimensions": by_dimensions, "threads": by_threads}
    for label, columns in found.items():
        print_table(f"{dtype}, by {label}", label, columns)
    for label, columns, usual in (("rows", by_rows, N), ("dimensions", by_dimensions, D)):
        base = columns[usual]
        for key, rate in columns.items():
            allowed = 1 / base[OURS] + max(0.0, 1 / rate[LIMIT] - 1 / base[LIMIT])
            if key != usual:
                claims.append(
                    at_most(f"seconds a pair for {key} {label}, of those for {usual}", 1 / rate[OURS] / allowed, CLIFF)
                )
    return found


def small_calls(claims: list[Claim], rounds: int) -> None:
    print("\nSmall calls, microseconds (SciPy's)\n")
    shapes = [(100, 100), (1000, 10), (20, 500), (10_000, 1), (200, 200), (1000, 100), (1000, 1000), (5000, 1000)]
    print("| rows x queries | " + " | ".join(f"{n} x {m}" for n, m in shapes) + " |")
    print("|---|" + "---|" * len(shapes))
    for dtype in TIMES_FASTER:
        for d in (2, D):
            cells = []
            for n, m in shapes:
                p = problem(n, m, d, dtype)
                taken = medians({OURS: our_scorer(p, m), "SciPy": scipy_scorer(p, m)}, rounds)
                cells.append(f"{taken[OURS] * 1e6:.0f} ({taken['SciPy'] * 1e6:.0f})")
                bounds = [times for pairs, times in SMALL_CALLS_TIMES_SCIPY.items() if n * m >= pairs]
                if bounds:
                    what = f"{dtype}, {n} x {m} in {d} dimensions, of SciPy's speed"
                    claims.append(at_least(what, taken["SciPy"] / taken[OURS], max(bounds)))
            print(f"| {dtype}, {d} dimensions | " + " | ".join(cells) + " |")


def leave_one_out_and_bandwidth(claims: list[Claim], of_scipy: dict[str, float], rounds: int, n: int) -> None:
    print(f"\nLeave-one-out of {n} rows in {D} dimensions\n")
    print("| | seconds | SciPy's for as many pairs | search for the bandwidth, seconds | in passes |")
    print("|---|---|---|---|---|")
    for dtype, bound in LEAVE_ONE_OUT_TIMES_SCIPY.items():
        rows = torch.from_numpy(problem(n, 1, D, dtype).support)
        h = scott_bandwidth(n, D)
        # Dear and long enough to be taken in turns once or twice.
        calls = {
            "pass": lambda rows=rows, h=h: leave_one_out(rows, h),
            "search": lambda r=rows: leave_one_out_bandwidth(r),
        }
        taken = medians(calls, max(1, rounds // 3))
        of_peer, passes = n * n / of_scipy[dtype], taken["search"] / taken["pass"]
        print(f"| {dtype} | {taken['pass']:.2f} | {of_peer:.0f} | {taken['search']:.2f} | {passes:.1f} |")
        claims.append(at_least(f"{dtype}, leave-one-out, SciPy for as many pairs", of_peer / taken["pass"], bound))
        claims.append(at_most(f"{dtype}, leave-one-out passes for the bandwidth", passes, BANDWIDTH_PASSES))


# Of the process itself: what getrusage says of a new process starts at the memory of the one that started it.
SCORE_MANY = """
import re, sys
from pathlib import Path
import numpy as np
sys.path.insert(0, {folder!r})
from density import problem

def peak():
    return 1024 * int(re.search("VmHWM:[^0-9]*([0-9]+) kB", Path("/proc/self/status").read_text())[1])

detector = problem({n}, 1, 16, "float64").detector
X = np.random.default_rng(1).normal(size=({m}, 16))
detector.score_samples(X[:1000])
before = peak()
output = detector.score_samples(X)
print(peak() - before - output.nbytes)
"""


def memory(claims: list[Claim], n: int, m: int) -> None:
    if not Path("/proc/self/status").exists():
        print("\nThe peak of memory is read from Linux's /proc, which is not here.")
        return
    script = SCORE_MANY.format(folder=str(Path(__file__).parent), n=n, m=m)
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    print(f"\nScoring {m} x {D} float64 against {n} rows added {int(ran.stdout) / 1e6:.0f} MB to input and output.")
    claims.append(at_most("bytes that scoring adds to input and output", int(ran.stdout), ADDED_BYTES))


def plot(found: dict[str, dict[object, dict[str, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    for axes, (label, columns) in zip(figure.subplots(2, 2).flat, found.items(), strict=True):
        for name in next(iter(columns.values())):
            style = {OURS: "o-", TORCH: "k:", LIMIT: "k--"}.get(name, ".-")
            axes.loglog(list(columns), [rate[name] for rate in columns.values()], style, label=name)
        axes.set_xlabel(label)
        axes.set_xticks(list(columns), [str(x) for x in columns])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.set_ylabel("pairs a second")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(f"Gaussian kernel density, float64, {N} rows in {D} dimensions unless varied")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of small parts: shows that it runs")
    parser.add_argument("--rounds", type=int, default=7, help="rounds over all peers (default: 7)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="threads of torch (default: its own)"
    )
    parser.add_argument("--plot", type=Path, help="image file to draw the speeds into")
    parser.add_argument("--write", action="store_true", help="also write the table of methods to docs/figures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rounds, slow_pairs, pairs = (1, 1e5, 1e6) if options.quick else (options.rounds, 4e6, 8e7)
    # Training rows of the benchmark are few, and its detectors never decide.
    warnings.simplefilter("ignore", UserWarning)

    try:
        import pykeops
    except ImportError:
        print("pykeops is not installed: KeOps is left out.")
    else:
        pykeops.set_verbose(False)
        PEERS["KeOps"] = keops_scorer
    print(
        f"{options.threads} thread(s) of torch, {rounds} round(s); torch {torch.__version__}, "
        f"SciPy {scipy.__version__}, scikit-learn {sklearn.__version__}, {platform.machine()}."
    )
    start = time.perf_counter()
    claims: list[Claim] = []
    for dtype in TIMES_FASTER:
        check_agreement(dtype, PEERS)
    of_scipy, of_many = headline(claims, rounds, slow_pairs)
    found = sweeps(claims, max(1, rounds // 2), slow_pairs, pairs)
    small_calls(claims, 1 if options.quick else 20 * rounds)
    leave_one_out_and_bandwidth(claims, of_scipy, rounds, 2000 if options.quick else N)
    memory(claims, *((1000, 100_000) if options.quick else (N, 1_000_000)))
    if options.write and not options.quick:
        write_methods(of_many)
    if options.plot:
        plot(found, options.plot)
    print("\nClaims\n")
    for claim in claims:
        print(claim)
    print(f"\n{time.perf_counter() - start:.0f} s")
    if not all(claims) and not options.quick:
        sys.exit("Not all claims hold.")


if __name__ == "__main__":
    main()
