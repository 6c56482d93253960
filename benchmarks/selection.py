"""Whether `select` keeps its false discovery rate in a batch of parts, and how many of the anomalous ones it finds.

    python benchmarks/selection.py --mvtec FOLDER
    python benchmarks/selection.py --quick

The folder is that of `real_data.py`, which see. A batch is normal rows that were kept aside and a fifth as many
anomalous ones, drawn at random. Beside the detector stand an isolation forest, calibrated on a half of the training
rows that it is not fitted to, and p-values of the detector that are continued below the lowest calibration score by a
generalised Pareto distribution of the scores in the lowest tenth. Prints a table: the realised share of normal rows
among those pulled out (none pulled out counts as 0), and the share of the anomalous rows that is, each with its
standard error over the batches. Then the claims, asserted.

Where nonconform is installed (``pip install nonconform``, which wants Python 3.12), its ``ConformalDetector.select`` is
in the table too, by ten folds whose fits are kept (`CrossValidation`), around our detector and the forest.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from real_data import (
    TRAINING_ROWS,
    check_claims,
    load_categories,
    parsed_options,
    print_heading,
    print_table,
    print_versions,
    split,
)
from scipy.stats import genpareto
from sklearn.ensemble import IsolationForest
from threadpoolctl import threadpool_limits

from dfkde_sklearn import DFKDEDetector
from dfkde_sklearn._calibration import conformal_p_values, discovered

RATES = (0.05, 0.1, 0.2)
# Anomalous rows of a batch, for each normal one.
SHARE = 0.2

Rows = NDArray[np.floating]
# Training rows and a batch -> for each of the rates, which of the batch are pulled out.
Method = Callable[[Rows, Rows], list[NDArray[np.bool_]]]


class Batch(NamedTuple):
    """Training rows, and a batch of which the last `n_anomalous` are anomalous."""

    train: Rows
    rows: Rows
    n_anomalous: int


def main() -> None:
    options = parsed_options(__doc__, "mvtec")
    start = time.perf_counter()
    warnings.simplefilter("ignore", UserWarning)
    print_versions(*["nonconform"] * bool(find_spec("nonconform")))
    torch.set_num_threads(1)
    n_batches = 2 if options.quick else 40 * options.seeds
    table: dict[str, dict[str, str]] = {}
    claims: dict[str, bool] = {}
    with threadpool_limits(1):
        sources = {f"generated, N = {n}": generated(n, n_batches) for n in (100, 400)}
        sources["MVTec AD"] = real(load_categories(options.mvtec), 4 * options.seeds)
        for source, batches in sources.items():
            for name, results in realised(list(batches)).items():
                table[f"{source}, {name}"] = {
                    f"{what}, {rate}": f"{figures.mean():.3f} ± {figures.std() / len(figures) ** 0.5:.3f}"
                    for rate, of_rate in results.items()
                    for what, figures in zip(("good", "found"), of_rate, strict=True)
                }
                if name == OURS:
                    for rate, (wrong, _) in results.items():
                        error = wrong.std() / len(wrong) ** 0.5
                        claim = f"{source}, fdr={rate}: {wrong.mean():.3f}, at most {rate} and three standard errors"
                        claims[claim] = bool(wrong.mean() <= rate + 3 * error)
    print_heading(
        "Shares of good rows among those pulled out, and of anomalous rows found, for each fdr",
        "--mvtec FOLDER",
        f"{n_batches} batches of generated rows, 100 normal ones each; {4 * options.seeds} of each category of MVTec.",
    )
    print_table("rows, method", table, "selection_rates")
    check_claims(claims, time.perf_counter() - start, quick=options.quick)


def generated(n: int, n_batches: int) -> Iterator[Batch]:
    """Yield batches of which anomalous rows lie off the directions of the normal ones."""
    for seed in range(n_batches):
        rng = np.random.default_rng(seed)
        directions = rng.normal(size=(6, 30))
        rows = rng.normal(size=(n + 120, 6)) @ directions + 0.3 * rng.normal(size=(n + 120, 30))
        rows[-20:] += rng.normal(size=(20, 30)) * rng.uniform(0.3, 1.2, size=(20, 1))
        yield Batch(rows[:n], rows[n:], 20)


def real(categories: dict[str, tuple[Rows, Rows]], n_seeds: int) -> Iterator[Batch]:
    """Yield batches of every category."""
    for category, (normal, anomalous) in categories.items():
        for seed in range(n_seeds):
            train, good = split(normal, TRAINING_ROWS[category], seed)
            n_anomalous = max(1, round(SHARE * len(good)))
            chosen = np.random.default_rng(seed).choice(len(anomalous), n_anomalous, replace=False)
            yield Batch(train, np.concatenate([good, anomalous[chosen]]), n_anomalous)


OURS = "`DFKDEDetector.select`"


def realised(batches: list[Batch]) -> dict[str, dict[float, tuple[NDArray[np.float64], NDArray[np.float64]]]]:
    """Return for each method and rate the share of good rows among those pulled out, and the share found, by batch."""
    methods: dict[str, Method] = {
        OURS: by_detector,
        "... with a Pareto tail": smoothed,
        "IsolationForest, half of the rows": forest,
    }
    if find_spec("nonconform"):
        methods |= {
            "nonconform, DFKDEDetector": partial(nonconform, DFKDEDetector(features=None)),
            "nonconform, IsolationForest": partial(nonconform, IsolationForest(random_state=0)),
        }
    found: dict[str, dict[float, list[tuple[float, float]]]] = {name: {rate: [] for rate in RATES} for name in methods}
    for batch in batches:
        is_anomalous = np.arange(len(batch.rows)) >= len(batch.rows) - batch.n_anomalous
        for name, method in methods.items():
            for rate, selected in zip(RATES, method(batch.train, batch.rows), strict=True):
                wrong = float((selected & ~is_anomalous).sum() / max(1, selected.sum()))
                found[name][rate].append((wrong, float(selected[is_anomalous].mean())))
    return {
        name: {rate: (np.array(of)[:, 0], np.array(of)[:, 1]) for rate, of in rates.items()}
        for name, rates in found.items()
    }


def by_detector(train: Rows, rows: Rows) -> list[NDArray[np.bool_]]:
    detector = DFKDEDetector(features=None).fit(train)
    return [detector.select(rows, fdr=rate) for rate in RATES]


def smoothed(train: Rows, rows: Rows) -> list[NDArray[np.bool_]]:
    detector = DFKDEDetector(features=None).fit(train)
    calibration = detector.calibration_scores_.astype(np.float64)
    scores = detector.score_samples(rows).astype(np.float64)
    p_values = detector.p_values(rows)
    border = np.quantile(calibration, 0.1)
    excesses = border - calibration[calibration < border]
    shape, _, scale = genpareto.fit(excesses, floc=0)
    is_low = scores < border
    p_values[is_low] = 0.1 * genpareto.sf(border - scores[is_low], shape, scale=scale)
    return [discovered(p_values, rate) for rate in RATES]


def forest(train: Rows, rows: Rows) -> list[NDArray[np.bool_]]:
    half = len(train) // 2
    fitted = IsolationForest(random_state=0).fit(train[:half])
    p_values = conformal_p_values(fitted.score_samples(rows), fitted.score_samples(train[half:]))
    return [discovered(p_values, rate) for rate in RATES]


def nonconform(detector: Any, train: Rows, rows: Rows) -> list[NDArray[np.bool_]]:
    from nonconform import ConformalDetector, CrossValidation

    fitted = ConformalDetector(detector, CrossValidation(10), score_polarity="higher_is_normal", seed=0).fit(train)
    return [fitted.select(rows, alpha=rate) for rate in RATES]


if __name__ == "__main__":
    main()
