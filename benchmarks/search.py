"""The price of a search: images through the backbone and seconds, without a cache, with scikit-learn's, with ours.

    python benchmarks/search.py --tiles FOLDER --weights FILE

A search with labels over 3 layers x 4 numbers of components x 2 bandwidths in 5 folds, with refit, on photographs of
magnetic tiles [1]_ in the MVTec layout, described by the MobileNetV2 whose weights are in FILE (timm's
`mobilenetv2_100` with ``pad_type="same"``; mean and standard deviation of its input 0.5). One run times

- (a) the search as it is written, without a cache;
- (b) the same, of a `Pipeline` with scikit-learn's own cache, ``memory=``;
- (c) the same, with ``TimmFeatures(cache=True)``, filled by one pass for all layers; that pass is in its time;

prints tables in markdown, and then asserts the claims. (a) takes about 90 passes for each image: it and (b) run on a
part of the tiles, ``--images``; what (c) takes next to the features and the density alone is measured on all of them.
``--quick`` takes 20 tiles for both, on which times mean little.

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
    claims = {}
    for n, plain in ((QUICK if options.quick else ALL, False), (QUICK if options.quick else options.images, True)):
        with tempfile.TemporaryDirectory() as folder:
            X, y = tiles(options.tiles, n)
            claims |= compared(X, y, options.weights, Path(folder), plain=plain, quick=options.quick)
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
    parser.add_argument(
        "--images", type=int, default=60, help=f"how many tiles for (a) and (b), at most {ALL} (%(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} tiles for all, and no claims on times")
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


def compared(X: list[str], y: Labels, weights: Path, folder: Path, *, plain: bool, quick: bool) -> dict[str, bool]:
    """Print the table, with (a) and (b) if `plain`; return the claims on it."""
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
    ours = "(c) `TimmFeatures(cache=True)`"
    runs = {
        "one pass for the features of all layers": extraction,
        "the density work: the search on the features": density,
        ours: timed(lambda: filled_search(True)),
    }
    if plain:
        stages = [("features", stage), ("density", DFKDEDetector(features=None))]
        pipeline = Pipeline(stages, memory=str(folder / "memory"))
        runs["(b) `Pipeline(memory=)`"] = timed(lambda: scores_of(pipeline, "features__layers", X, y))
        runs["(a) no cache"] = timed(lambda: scores_of(DFKDEDetector(stage), "features__layers", X, y))
    else:
        cache = str(folder / "cache")
        runs["(c) again: a second search"] = timed(lambda: filled_search(True))
        runs["(c) with a folder"] = timed(lambda: filled_search(cache))
        runs["(c) with that folder, `n_jobs=2`"] = timed(lambda: filled_search(cache, n_jobs=2))
    print(
        f"\n## Magnetic tiles: what a search costs, {len(X)} of {ALL} tiles\n\n"
        "Command: `python benchmarks/search.py --tiles FOLDER --weights FILE"
        f"{' --quick' if quick else ''}`. {int(y.sum())} of the N = {len(X)} tiles are defective. "
        f"{len(LAYERS)} layers x {len(N_COMPONENTS)} numbers of components x {len(BANDWIDTHS)} bandwidths, "
        f"{N_FOLDS} folds, refit.\n"
    )
    print("| | images through the backbone | of N | seconds | of (c) |\n|---|---|---|---|---|")
    for name, run in runs.items():
        print(
            f"| {name} | {run.n_images} | {run.n_images / len(X):.1f} | {run.seconds:.1f} | "
            f"{run.seconds / runs[ours].seconds:.2f} |"
        )
    others = [run.scores for name, run in list(runs.items())[3:]]
    claims = {
        f"{len(X)} tiles: (c) sends {runs[ours].n_images} through the backbone, exactly N": runs[ours].n_images
        == len(X),
        f"{len(X)} tiles, {'with' if plain else 'without'} (a): all searches find the same scores": all(
            np.allclose(scores, runs[ours].scores, atol=1e-6) for scores in others
        ),
    }
    if not plain:
        n_again = runs["(c) again: a second search"].n_images
        claims[f"{len(X)} tiles: a second search sends {n_again}"] = n_again == 0
    if quick:
        return claims
    if plain:
        ratio = runs["(a) no cache"].seconds / runs[ours].seconds
        claims[f"{len(X)} tiles: (c) is {ratio:.1f} times as fast as (a), at least 20 times"] = ratio >= 20
    else:
        bound = 1.25 * (extraction.seconds + density.seconds)
        claims[
            f"{len(X)} tiles: (c) takes {runs[ours].seconds:.1f} s, at most 1.25 times one pass and the density work, "
            f"{bound:.1f} s"
        ] = runs[ours].seconds <= bound
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
