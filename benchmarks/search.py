"""The price of a search: images through the backbone and seconds, without a cache, with scikit-learn's, with ours.

    python benchmarks/search.py --tiles FOLDER --weights FILE

A search with labels over 3 layers x 4 numbers of components x 2 bandwidths in 5 folds, with refit, on photographs of
magnetic tiles [1]_ in the MVTec layout, described by the MobileNetV2 whose weights are in FILE (timm's
`mobilenetv2_100` with ``pad_type="same"``; mean and standard deviation of its input 0.5). One run times

- (a) the search as it is written, without a cache;
- (b) the same, of a `Pipeline` with scikit-learn's own cache, ``memory=``;
- (c) the same, with ``TimmFeatures(cache=True)``, filled by one pass for all layers; that pass is in its time;

prints a table in markdown, and then asserts the claims. (a) takes 121 passes for each image, hence a part of the tiles:
``--images 380`` takes all, ``--quick`` takes 20, on which times mean little.

References
----------
.. [1] Huang, Qiu and Yuan (2020), Surface defect saliency of magnetic tile, doi:10.1007/s00371-018-1588-5
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from real_images import mobilenet
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline
from torch import Tensor, nn

from dfkde_sklearn import AnomalyClassifier, DFKDEDetector, TimmFeatures, clear_cache
from dfkde_sklearn.datasets import load_mvtec_folder

LAYERS = ["blocks.2", "blocks.4", "global_pool"]
N_COMPONENTS = [2, 4, 8, 16]
BANDWIDTHS = ["scott", "silverman"]
N_FOLDS = 5
ALL = 380
QUICK = 20

Labels = NDArray[np.int64]


class Run(NamedTuple):
    """What a search cost, and what it found."""

    n_images: int
    seconds: float
    scores: NDArray[np.float64]


class Counter:
    """A forward hook that counts images, in any process: each writes to the same file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.file.touch()

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Count a batch; not the blank images, by which fit finds out what layers return."""
        if inputs[0].any():
            with self.file.open("a") as file:
                file.write(f"{len(inputs[0])}\n")

    def total(self) -> int:
        """Return the number of images so far."""
        return sum(map(int, self.file.read_text().split()))


def main() -> None:
    options = parsed_options()
    warnings.filterwarnings("ignore", message=".*training rows cannot be scored by a fit without them")
    packages = ("dfkde-sklearn", "scikit-learn", "timm", "torch", "numpy")
    print(", ".join(f"{name} {version(name)}" for name in packages), f"Python {platform.python_version()}", sep=", ")
    print(f"{os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f} at the start")
    X, y = tiles(options.tiles, QUICK if options.quick else options.images)
    with tempfile.TemporaryDirectory() as folder:
        claims = compared(X, y, options.weights, Path(folder), quick=options.quick)
    print()
    for claim, holds in claims.items():
        print(f"- {'holds' if holds else 'FAILS'}: {claim}.")
    assert all(claims.values())


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, variable, text in (
        ("--tiles", "DFKDE_TILES", "folder of the magnetic tiles in the MVTec layout"),
        ("--weights", "DFKDE_WEIGHTS", "weights of MobileNetV2, safetensors"),
    ):
        default = os.environ.get(variable)
        parser.add_argument(
            option, type=Path, default=default, required=not default, help=f"{text} (or the variable {variable})"
        )
    parser.add_argument("--images", type=int, default=40, help=f"how many tiles, at most {ALL} (%(default)s)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} tiles, and no claims on times")
    return parser.parse_args()


def tiles(folder: Path, n: int) -> tuple[list[str], Labels]:
    """Return the paths of `n` tiles and their labels, 1 = defective, in the proportion of all of them."""
    data = load_mvtec_folder(folder)
    paths = np.concatenate([data.X_train, data.X_test])
    y = np.concatenate([np.zeros(len(data.X_train), int), data.y_test])
    rng = np.random.default_rng(0)
    n_defective = round(n * y.mean())
    chosen = np.concatenate(
        [rng.permutation(np.flatnonzero(y == label))[:size] for label, size in ((0, n - n_defective), (1, n_defective))]
    )
    return paths[chosen].tolist(), y[chosen]


def compared(X: list[str], y: Labels, weights: Path, folder: Path, *, quick: bool) -> dict[str, bool]:
    """Print the table; return the claims on it."""
    network = mobilenet(weights, crop_mode="squash", crop_pct=1.0)
    counter = Counter(folder / "counted")
    network.register_forward_pre_hook(counter)
    stage = TimmFeatures(network)

    def timed(call: Callable[[], Any]) -> Run:
        n_before, start = counter.total(), time.perf_counter()
        scores = call()
        run = Run(counter.total() - n_before, time.perf_counter() - start, scores)
        print(f"{run.n_images} images, {run.seconds:.1f} s", file=sys.stderr, flush=True)
        return run

    def filled_search(cache: bool | str, n_jobs: int | None = None) -> NDArray[np.float64]:
        TimmFeatures(network, layers=LAYERS, cache=cache).fit_transform(X)
        return scores_of(DFKDEDetector(clone(stage).set_params(cache=cache)), "features__layers", X, y, n_jobs=n_jobs)

    # What loads on first use shall count for none of them.
    TimmFeatures(network, layers=LAYERS).fit_transform(X[:2])
    clear_cache()
    whole = TimmFeatures(network, layers=LAYERS)
    extraction = timed(lambda: whole.fit_transform(X))
    features = np.split(extraction.scores, np.cumsum(whole.layer_widths_)[:-1], axis=1)
    density = timed(lambda: np.concatenate([scores_of(DFKDEDetector(), None, part, y) for part in features]))
    runs = {
        "one pass for the features of all layers": extraction,
        "the density work: the search on the features": density,
        "**(c) `TimmFeatures(cache=True)`**": timed(lambda: filled_search(True)),
        "(c) again: a second search": timed(lambda: filled_search(True)),
        "(c) with a folder": timed(lambda: filled_search(str(folder / "cache"))),
        "(c) with that folder, `n_jobs=2`": timed(lambda: filled_search(str(folder / "cache"), n_jobs=2)),
    }
    pipeline = Pipeline([("features", stage), ("density", DFKDEDetector(features=None))], memory=str(folder / "memory"))
    runs["(b) `Pipeline(memory=)`"] = timed(lambda: scores_of(pipeline, "features__layers", X, y))
    runs["(a) no cache"] = timed(lambda: scores_of(DFKDEDetector(stage), "features__layers", X, y))

    plain, ours, again = (runs[name] for name in ("(a) no cache", list(runs)[2], list(runs)[3]))
    part = "all" if len(X) == ALL else f"{len(X)} of the {ALL}"
    print(
        "\n## Magnetic tiles: what a search costs\n\n"
        "Command: `python benchmarks/search.py --tiles FOLDER --weights FILE"
        f"{' --quick' if quick else f' --images {len(X)}'}`. N = {len(X)} images, {part} tiles, {int(y.sum())} of them "
        f"defective. {len(LAYERS)} layers x {len(N_COMPONENTS)} numbers of components x {len(BANDWIDTHS)} bandwidths, "
        f"{N_FOLDS} folds, refit.\n"
    )
    print("| | images through the backbone | of N | seconds | (a) takes |\n|---|---|---|---|---|")
    for name, run in runs.items():
        print(
            f"| {name} | {run.n_images} | {run.n_images / len(X):.1f} | {run.seconds:.1f} | "
            f"{plain.seconds / run.seconds:.1f} times as long |"
        )
    searches = [run for name, run in runs.items() if name != "one pass for the features of all layers"]
    bound = 1.25 * (extraction.seconds + density.seconds)
    claims = {
        f"(c) sends {ours.n_images} images through the backbone, exactly N = {len(X)}": ours.n_images == len(X),
        f"a second search sends {again.n_images}": again.n_images == 0,
        "all searches find the same scores": all(
            np.allclose(np.sort(run.scores), np.sort(plain.scores), atol=1e-6) for run in searches
        ),
    }
    if not quick:
        claims |= {
            f"(c) takes {ours.seconds:.1f} s, at most 1.25 times one pass and the density work, {bound:.1f} s": (
                ours.seconds <= bound
            ),
            f"(c) is {plain.seconds / ours.seconds:.1f} times as fast as (a), at least 20 times": (
                plain.seconds >= 20 * ours.seconds
            ),
        }
    return claims


def scores_of(
    detector: Any, layers: str | None, X: Any, y: Labels, *, n_jobs: int | None = None
) -> NDArray[np.float64]:
    """Return the AUROC of each candidate; `layers` is the parameter that names the layer, None where X is of one."""
    density = "density__" if isinstance(detector, Pipeline) else ""
    grid: dict[str, list[Any]] = {
        f"detector__{density}n_components": N_COMPONENTS,
        f"detector__{density}bandwidth": BANDWIDTHS,
    }
    if layers is not None:
        grid[f"detector__{layers}"] = [[layer] for layer in LAYERS]
    search = GridSearchCV(
        AnomalyClassifier(detector), grid, scoring="roc_auc", cv=N_FOLDS, n_jobs=n_jobs, error_score="raise"
    )
    found: NDArray[np.float64] = search.fit(X, y).cv_results_["mean_test_score"]
    return found


if __name__ == "__main__":
    main()
