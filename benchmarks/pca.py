"""Principal axes: time and error beside scikit-learn's solvers.

    python benchmarks/pca.py
    python benchmarks/pca.py --write

Prints two tables in markdown; ``--write`` also writes what the documentation shows of them. The first has for each
shape and dtype the time of the detector's principal axes (centring and, where there are far fewer rows than columns,
rotation onto the span included) and of each solver of `sklearn.decomposition.PCA`, and the sine of the largest angle
between the 16 axes found and those of a decomposition in float64. Its last column is how many times as long as this
library the fastest solver of equal accuracy takes: below 1 it is faster, as ARPACK may be, which finds the few axes
and nothing else.

A fit decomposes the rows 21 times: all of them, and all but one of 20 folds. That is the second table: this library
sums the scatter matrix of each fold once, and ARPACK, the fastest of equal accuracy there, starts anew for each.

The rounds are interleaved, with a rest between two calls, as threads spin on for a while; times are medians. At the end
it asserts the accuracy, that a full decomposition is slower, and that the 21 decompositions are as fast as by ARPACK.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import torch
from numpy.typing import NDArray
from real_data import write_figure
from scipy.linalg import subspace_angles
from sklearn.decomposition import PCA

from dfkde_sklearn._density.axes import principal_axes, span
from dfkde_sklearn._density.eigen import Scatter
from dfkde_sklearn._density.folds import N_FOLDS, Fold, Folds

SHAPES = [(40_000, 512), (40_000, 2048), (200, 2048), (1000, 1000)]
DTYPES = {"float32": 1e-6, "float64": 1e-12}
SOLVERS = ("full", "covariance_eigh", "arpack", "randomized")
N_COMPONENTS = 16
WORKING_MEMORY = 2**30  # scikit-learn's default
REFITTED = [(200, 2048), (1000, 1000), (2000, 512), (10_000, 512)]

Axes = NDArray[np.floating]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of all solvers (%(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="one round of the small shapes, and no claims: shows that it runs"
    )
    parser.add_argument("--write", action="store_true", help="also write the tables that pages include to docs/figures")
    options = parser.parse_args()
    if options.quick:
        options.rounds = 1
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "scikit-learn", "numpy", "scipy"))
    print(f"{packages}; {torch.get_num_threads()} threads, {N_COMPONENTS} components; milliseconds (error)\n")
    print(f"| rows x columns | dtype | this library | {' | '.join(SOLVERS)} | fastest equal / this library |")
    print(f"|---|---|---|{'---|' * len(SOLVERS)}---|")
    claims: dict[str, bool] = {}
    of_axes: list[dict[str, str]] = []
    of_folds: list[dict[str, str]] = []
    for shape in SHAPES[2:] if options.quick else SHAPES:
        wide = features(*shape)
        reference = exact_axes(wide)
        for dtype, tolerance in DTYPES.items():
            # Their float32 values are the data of both.
            X = wide.astype(dtype)
            expected = exact_axes(X.astype(np.float64)) if dtype == "float32" else reference
            solvers: dict[str, Callable[[NDArray[np.floating]], Axes]] = {"this library": own_axes}
            solvers |= {name: solver(name) for name in SOLVERS if name != "full" or min(shape) <= 1000}
            times, errors = measured(solvers, X, expected, options.rounds)
            equal = [name for name in times if name != "this library" and errors[name] <= tolerance]
            ratio = min((times[name] for name in equal), default=np.inf) / times["this library"]
            cells = [
                f"{times[n] * 1e3:.0f} ({errors[n]:.0e})" if n in times else "" for n in ("this library", *SOLVERS)
            ]
            if dtype == "float64":
                columns = ("this library", *SOLVERS)
                of_axes.append({"rows x columns": f"{shape[0]} x {shape[1]}"} | dict(zip(columns, cells, strict=True)))
            rival = f"{ratio:.2f}" if equal else "none is"
            print(f"| {shape[0]} x {shape[1]} | {dtype} | {' | '.join(cells)} | {rival} |", flush=True)
            name = f"{shape[0]} x {shape[1]}, {dtype}"
            claims[f"{name}: error {errors['this library']:.0e}, under {tolerance:.0e}"] = (
                errors["this library"] < tolerance
            )
            if "full" in equal:
                slower = times["full"] / times["this library"]
                claims[f"{name}: a full decomposition takes {slower:.1f} times as long, more than once"] = slower > 1
    print("\n| rows x columns, float64 | all and without each fold, seconds | ARPACK | ratio |")
    print("|---|---|---|---|")
    for shape in REFITTED[:1] if options.quick else REFITTED:
        ways: dict[str, Callable[[NDArray[np.floating]], Axes]] = {"own": own_refits, "arpack": arpack_refits}
        X = features(*shape)
        times, errors = measured(ways, X, exact_axes(X[: -shape[0] // N_FOLDS]), max(1, options.rounds // 2))
        ratio = times["arpack"] / times["own"]
        print(f"| {shape[0]} x {shape[1]} | {times['own']:.2f} | {times['arpack']:.2f} | {ratio:.1f} |", flush=True)
        cells = [f"{times['own']:.2f}", f"{times['arpack']:.2f}", f"{ratio:.1f}"]
        columns = ("all rows, and without each of 20", "arpack", "ratio")
        of_folds.append({"rows x columns": f"{shape[0]} x {shape[1]}"} | dict(zip(columns, cells, strict=True)))
        name = f"{shape[0]} x {shape[1]}, without each fold"
        claims[f"{name}: error {errors['own']:.0e}, under {DTYPES['float64']:.0e}"] = errors["own"] < DTYPES["float64"]
        claims[f"{name}: ARPACK takes {ratio:.1f} times as long, at least 1"] = ratio >= 1
    if options.write and not options.quick:
        write_figure("pca_axes", of_axes)
        write_figure("pca_folds", of_folds)
    print()
    for claim, holds in claims.items():
        print(f"- {'holds' if holds else 'FAILS'}: {claim}")
    if not options.quick:
        assert all(claims.values()), [claim for claim, holds in claims.items() if not holds]


def features(n: int, width: int) -> NDArray[np.float64]:
    """Return rows with an offset, whose spectrum falls as that of the features of a network."""
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(width, width)))[0]
    return (rng.normal(size=(n, width)) * np.arange(1, width + 1) ** -0.75) @ rotation + rng.uniform(0, 2, width)


def exact_axes(X: NDArray[np.float64]) -> Axes:
    centred = X - X.mean(0)
    centred -= centred.mean(0)
    if len(X) < 2 * X.shape[1]:
        return np.linalg.svd(centred, full_matrices=False)[2][:N_COMPONENTS].T
    return np.linalg.svd(np.linalg.qr(centred, mode="r"))[2][:N_COMPONENTS].T


def own_axes(X: NDArray[np.floating]) -> Axes:
    spanned = span(torch.from_numpy(X), WORKING_MEMORY)
    axes = principal_axes(spanned.rows, N_COMPONENTS, spanned.noise).axes
    return spanned.in_features(axes).numpy()


def own_refits(X: NDArray[np.floating]) -> Axes:
    """Return the axes without the last fold, after those of all rows and without each other fold."""
    spanned = span(torch.from_numpy(X), WORKING_MEMORY)
    scatter = Scatter(spanned.rows.scatter())
    principal_axes(spanned.rows, N_COMPONENTS, spanned.noise, scatter)

    def axes_of_others(fold: Fold) -> torch.Tensor:
        return principal_axes(fold.others, N_COMPONENTS, spanned.noise, fold.scatter).axes

    axes = Folds(spanned.rows, None, WORKING_MEMORY).map(axes_of_others)[-1]
    return spanned.in_features(axes).numpy()


def arpack_refits(X: NDArray[np.floating]) -> Axes:
    find = solver("arpack")
    find(X)
    for part in np.array_split(np.arange(len(X)), N_FOLDS):
        axes = find(np.delete(X, part, axis=0))
    return axes


def solver(name: str) -> Callable[[NDArray[np.floating]], Axes]:
    return lambda X: PCA(N_COMPONENTS, svd_solver=name, random_state=0).fit(X).components_.T


def measured(
    solvers: dict[str, Callable[[NDArray[np.floating]], Axes]], X: NDArray[np.floating], expected: Axes, n_rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the median time and the error of each solver."""
    times: dict[str, list[float]] = {name: [] for name in solvers}
    errors = {}
    for _ in range(n_rounds):
        for name, find in solvers.items():
            time.sleep(0.3)
            start = time.perf_counter()
            axes = find(X)
            times[name].append(time.perf_counter() - start)
            errors[name] = float(np.sin(subspace_angles(expected, axes.astype(np.float64)).max()))
    return {name: float(np.median(values)) for name, values in times.items()}, errors


if __name__ == "__main__":
    main()
