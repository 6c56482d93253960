"""The price of a search: images through the backbone and seconds, without a cache, with scikit-learn's, with ours.

    python benchmarks/search.py --tiles FOLDER --weights FILE
    python benchmarks/search.py --quick

A search with labels over 3 layers x 4 numbers of components x 2 bandwidths in 5 folds, with refit, on photographs of
magnetic tiles, described by a MobileNetV2; the folder and the file are those of `real_data.py`, which see. What is
compared is cost: the folds are by image, and no AUROC here tells how well defects are found. One run times

- (a) the search as it is written, without a cache;
- (b) the same, of a `Pipeline` with scikit-learn's own cache, ``memory=``;
- (c) the same, with ``TimmFeatures(cache=True)``, filled by one pass for all layers; that pass is in its time;

and (c) a second time, in two processes, and as a halving search; prints a table in markdown, and then asserts the
claims. A forward hook counts the images. (a) sends each image through about 90 times: of its 24 candidates, K
(``--plain-candidates``) are run in all folds, and its time is theirs times 24 / K. Of (b), whose cache is shared by
candidates with the same layer, all 8 of the middle layer are run, and its time is theirs times 3. All else is whole.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from real_data import check_claims, load_images, mobilenet, option_parser, parse, print_versions
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.model_selection import GridSearchCV, HalvingGridSearchCV, ParameterGrid
from sklearn.pipeline import Pipeline
from torch import Tensor, nn

from dfkde_sklearn import AnomalyClassifier, DFKDEDetector, TimmFeatures, cache_size, clear_cache

LAYERS = ["blocks.2", "blocks.4", "global_pool"]
N_COMPONENTS = [2, 4, 8, 16]
BANDWIDTHS = ["scott", "silverman"]
N_FOLDS = 5
# Images of a quick run, which searches one number of components.
QUICK = 12

Labels = NDArray[np.int64]
# The mean AUROC of each candidate, by layer, number of components and bandwidth.
Scores = dict[tuple[str, int, str], float]


class Run(NamedTuple):
    """What a search cost, and what it found; `whole` times as much is the whole search."""

    n_images: int
    seconds: float
    scores: Scores
    whole: float = 1


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
    start = time.perf_counter()
    warnings.filterwarnings("ignore", message=".*training rows cannot be scored by a fit without them")
    # The half of the tiles with which a halving search begins may leave a fold without defects.
    warnings.filterwarnings("ignore", message="Only one class is present in y_true|One or more of the test scores")
    print_versions("timm")
    print(f"{os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f} at the start")
    X, y = tiles(options.tiles, options.tiles_used)
    with tempfile.TemporaryDirectory() as folder:
        claims = compared(X, y, options.weights, Path(folder), options.plain_candidates, timed=not options.quick)
    check_claims(claims, time.perf_counter() - start)


def parsed_options() -> argparse.Namespace:
    parser = option_parser(__doc__, "tiles", "weights")
    parser.add_argument("--tiles-used", type=int, metavar="N", help="how many images (default: all)")
    parser.add_argument(
        "--plain-candidates",
        type=int,
        default=len(LAYERS),
        metavar="K",
        help=f"how many of the {n_candidates()} candidates of (a) are run, a multiple of {len(LAYERS)} (%(default)s)",
    )
    options = parse(parser)
    if options.quick:
        options.tiles_used = QUICK
        del N_COMPONENTS[1:]
    if options.tiles_used is not None and options.tiles_used < 2 * N_FOLDS:
        parser.error(f"--tiles-used {options.tiles_used}: at least {2 * N_FOLDS}, both kinds in all folds.")
    n = n_candidates()
    if options.plain_candidates % len(LAYERS) or n % options.plain_candidates:
        parser.error(f"--plain-candidates {options.plain_candidates}: a multiple of {len(LAYERS)} that divides {n}.")
    return options


def n_candidates() -> int:
    return len(LAYERS) * len(N_COMPONENTS) * len(BANDWIDTHS)


def tiles(folder: Path, n: int | None) -> tuple[list[str], Labels]:
    """Return the paths of `n` images and their labels, 1 = defective, in the proportion of all where folds get both."""
    images = load_images(folder)
    y = images.is_defect.astype(np.int64)
    rng = np.random.default_rng(0)
    n = len(y) if n is None else min(n, len(y))
    n_defective = max(N_FOLDS, round(n * y.mean()))
    chosen = np.concatenate(
        [rng.permutation(np.flatnonzero(y == label))[:size] for label, size in ((0, n - n_defective), (1, n_defective))]
    )
    return images.paths[chosen].tolist(), y[chosen]


def compared(X: list[str], y: Labels, weights: Path, folder: Path, n_plain: int, *, timed: bool) -> dict[str, bool]:
    """Print the table and return the claims on it, those on times if `timed`."""
    network = mobilenet(weights).eval()
    counter = Counter(folder / "counted")
    network.register_forward_pre_hook(counter)
    in_folder = str(folder / "cache")

    def run(search: Callable[[], Scores], whole: float = 1) -> Run:
        n_before, start = counter.total(), time.perf_counter()
        scores = search()
        found = Run(counter.total() - n_before, time.perf_counter() - start, scores, whole)
        print(f"{found.n_images} images, {found.seconds:.1f} s", file=sys.stderr, flush=True)
        return found

    def detector(cache: bool | str | None = None) -> DFKDEDetector:
        return DFKDEDetector(TimmFeatures(network, cache=cache))

    def filled_search(cache: bool | str, **options: Any) -> Scores:
        TimmFeatures(network, layers=LAYERS, cache=cache).fit_transform(X)
        return searched(detector(cache), grid(), X, y, **options)

    # What loads on first use shall count for none of them.
    whole = TimmFeatures(network, layers=LAYERS)
    whole.fit_transform(X[:2])
    clear_cache()
    features: dict[str, NDArray[np.float32]] = {}

    def extracted() -> Scores:
        parts = np.split(whole.fit_transform(X), np.cumsum(whole.layer_widths_)[:-1], axis=1)
        features.update(zip(LAYERS, parts, strict=True))
        return {}

    def density_work() -> Scores:
        found: Scores = {}
        for layer in LAYERS:
            found |= searched(DFKDEDetector(features=None), grid([]), features[layer], y, layer=layer)
        return found

    steps = [("features", TimmFeatures(network)), ("density", DFKDEDetector(features=None))]
    pipeline = Pipeline(steps, memory=str(folder / "memory"))
    some = [{name: [value] for name, value in c.items()} for c in ParameterGrid(grid())][:: n_candidates() // n_plain]
    runs = {
        "one pass for the features of all layers": run(extracted),
        "the density work: the search on the features": run(density_work),
        "(c) `TimmFeatures(cache=True)`": run(lambda: filled_search(True)),
        "(c) again: a second search": run(lambda: filled_search(True)),
        "(c) with a folder, `n_jobs=2`": run(lambda: filled_search(in_folder, n_jobs=2)),
        "(c) that folder, `HalvingGridSearchCV`": run(lambda: filled_search(in_folder, halving=True)),
        "(b) `Pipeline(memory=)`": run(lambda: searched(pipeline, grid(LAYERS[1:2], "density__"), X, y), len(LAYERS)),
        "(a) no cache": run(lambda: searched(detector(), some, X, y, refit=False), n_candidates() / n_plain),
    }
    extraction, density, ours, again, parallel, halving, _, plain = runs.values()
    print(
        f"\n## Magnetic tiles: what a search costs, {len(X)} images\n\n"
        f"Command: `python benchmarks/search.py --tiles FOLDER --weights FILE --tiles-used {len(X)} "
        f"--plain-candidates {n_plain}`. {int(y.sum())} of the N = {len(X)} images are defective. {len(LAYERS)} "
        f"layers x {len(N_COMPONENTS)} numbers of components x {len(BANDWIDTHS)} bandwidths, {N_FOLDS} folds, refit. "
        "(a) and (b) are run in part and multiplied, as the column `run` says. The density work is "
        f"{1000 * density.seconds / (n_candidates() * N_FOLDS):.0f} ms for each candidate and fold.\n"
    )
    print("| | run | images | seconds | images, whole search | of N | seconds, whole search | of (c) |")
    print("|---|---|---|---|---|---|---|---|")
    for name, found in runs.items():
        part = f"{len(found.scores)} of {n_candidates()} candidates, x {found.whole:.0f}" if found.whole > 1 else "all"
        n_whole, seconds = round(found.n_images * found.whole), found.seconds * found.whole
        print(
            f"| {name} | {part} | {found.n_images} | {found.seconds:.1f} | {n_whole} | {n_whole / len(X):.1f} | "
            f"{seconds:.1f} | {seconds / ours.seconds:.2f} |"
        )
    compared_runs = [found for found in runs.values() if found.scores and found is not halving]
    claims = {
        f"(c) sends {ours.n_images} images through the backbone, exactly N": ours.n_images == len(X),
        f"a second search sends {again.n_images}": again.n_images == 0,
        f"two processes send {parallel.n_images}, exactly N, and the cache has {cache_size(in_folder).n_rows} rows, "
        "one for each image and layer": parallel.n_images == len(X)
        and cache_size(in_folder).n_rows == len(X) * len(LAYERS),
        f"a halving search after them sends {halving.n_images}": halving.n_images == 0,
        "all find the same scores": all(same(found.scores, ours.scores) for found in compared_runs),
    }
    if timed:
        claims[f"the density work, {density.seconds:.1f} s, takes less than one pass, {extraction.seconds:.1f} s"] = (
            density.seconds < extraction.seconds
        )
        bound = 1.25 * (extraction.seconds + density.seconds)
        ratio = plain.seconds * plain.whole / ours.seconds
        claims |= {
            f"(c) takes {ours.seconds:.1f} s, at most 1.25 times one pass and the density work, {bound:.1f} s": (
                ours.seconds <= bound
            ),
            f"(c) is {ratio:.1f} times as fast as (a), at least 20 times": ratio >= 20,
        }
    return claims


def grid(layers: list[str] = LAYERS, density: str = "") -> dict[str, list[Any]]:
    """Return what is searched; `density` is the step of a pipeline that the density's parameters belong to."""
    found: dict[str, list[Any]] = {
        f"detector__{density}bandwidth": BANDWIDTHS,
        f"detector__{density}n_components": N_COMPONENTS,
    }
    return {"detector__features__layers": [[layer] for layer in layers]} | found if layers else found


def searched(
    detector: Any, candidates: Any, X: Any, y: Labels, *, layer: str = "", halving: bool = False, **options: Any
) -> Scores:
    """Return what a search finds; `layer` is the one that X describes, where that is not searched."""
    kind: Any = GridSearchCV
    if halving:
        kind, options = HalvingGridSearchCV, options | {"factor": 2, "min_resources": len(X) // 2, "random_state": 0}
    search = kind(
        AnomalyClassifier(detector), candidates, scoring="roc_auc", cv=N_FOLDS, error_score="raise", **options
    )
    results = search.fit(X, y).cv_results_
    return dict(zip((key(p, layer) for p in results["params"]), results["mean_test_score"].tolist(), strict=True))


def key(params: Mapping[str, Any], layer: str) -> tuple[str, int, str]:
    by_name = {name.rpartition("__")[2]: value for name, value in params.items()}
    return by_name.get("layers", [layer])[0], by_name["n_components"], by_name["bandwidth"]


def same(some: Scores, all_: Scores) -> bool:
    """Tell whether candidates that both have run have the same scores, up to ties that rounding decides."""
    return np.allclose([all_[candidate] for candidate in some], list(some.values()), atol=1e-6)


if __name__ == "__main__":
    main()
