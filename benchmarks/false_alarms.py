"""Whether the thresholds of DFKDE keep their false-alarm rate on rows, and on parts, that it has not seen.

    python benchmarks/false_alarms.py --mvtec FOLDER
    python benchmarks/false_alarms.py --tiles FOLDER --weights FILE
    python benchmarks/false_alarms.py --quick

Folders and file are those of `real_data.py`, which see. Prints tables in markdown, and then the claims, asserted.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from real_data import (
    AUTO,
    AUTO_AND_BOX,
    SIXTEEN,
    TRAINING_ROWS,
    ImageSet,
    NormalAndAnomalous,
    check_claims,
    group_splits,
    load_categories,
    load_images,
    mobilenet,
    parsed_options,
    print_heading,
    print_table,
    print_versions,
    split,
)
from threadpoolctl import threadpool_limits

from dfkde_sklearn import DFKDEDetector, PatchDFKDEDetector, TimmFeatures

# Training rows; None is as many as MVTec AD has.
SIZES = {"40": 40, "60": 60, "100": 100, "official": None}
# What is asked for, as a multiple of the seeds it is averaged over, and between which bounds the mean rate on rows not
# seen shall lie. A given share of anomalies promises a share of the training rows, and nothing of rows not seen.
PROMISES: dict[str, tuple[dict[str, Any], int, tuple[float, float]]] = {
    "`target_fpr=0.05`": (SIXTEEN, 4, (0.04, 0.06)),
    "`target_fpr=0.1`": (SIXTEEN | {"target_fpr": 0.1}, 4, (0.085, 0.115)),
    "`target_fpr=0.05`, auto": (AUTO, 4, (0.04, 0.06)),
    "`target_fpr=0.05`, auto and box": (AUTO_AND_BOX, 4, (0.04, 0.06)),
    "`contamination=0.1`": (SIXTEEN | {"contamination": 0.1}, 1, (0.0, 1.0)),
}
# Detectors, and what they take of features at positions (n, h, w, C).
DETECTORS: dict[str, tuple[Any, Callable[[NDArray[np.float32]], NDArray[np.float32]]]] = {
    "PatchDFKDEDetector": (PatchDFKDEDetector, lambda maps: maps),
    "DFKDEDetector": (DFKDEDetector, lambda maps: maps.mean((1, 2))),
}
# Of the training images: those of a part side by side, and anywhere, without groups; anywhere with groups. And the
# multiple of the seeds that rates are averaged over.
ORDERS = {"adjacent": 1, "in random order": 1, "with groups": 4}


def main() -> None:
    options = parsed_options(__doc__, "mvtec", "tiles", "weights")
    start = time.perf_counter()
    warnings.filterwarnings("ignore", message=".*training rows cannot be scored by a fit without them")
    print_versions()
    claims: dict[str, bool] = {}
    if options.tiles:
        images = load_images(options.tiles)
        network = TimmFeatures(mobilenet(options.weights), pooling=None)
        claims |= false_alarms_of_parts(images, network.fit_transform(images.paths.tolist()), options.seeds)
    if options.mvtec:
        categories = load_categories(options.mvtec)
        # Matrices as small as these are done sooner by one thread, and much sooner where other work runs beside.
        torch.set_num_threads(1)
        with threadpool_limits(1):
            claims |= false_alarms(categories, options.seeds)
    check_claims(claims, time.perf_counter() - start, quick=options.quick)


def false_alarms(categories: Mapping[str, NormalAndAnomalous], n_seeds: int) -> dict[str, bool]:
    """Print the share of unseen normal rows that is called anomalous; return the claims on it."""
    rows: dict[str, dict[str, float]] = {}
    means: dict[str, dict[str, float]] = {}
    claims = {}
    for promise, (parameters, times, (low, high)) in PROMISES.items():
        for size, n_train in SIZES.items():
            name = f"{promise}, N = {size}"
            rates, found, of_training = alarm_rates(categories, n_train, times * n_seeds, parameters)
            rows[name] = rates | {"mean": float(np.mean(list(rates.values())))}
            column = "as MVTec AD" if n_train is None else f"N = {size}"
            means.setdefault(promise, {})[column] = rows[name]["mean"]
            if "contamination" in parameters:
                claims[f"{name}: flags that share of the training rows, exactly, in every run"] = of_training
            else:
                mean = rows[name]["mean"]
                claims[f"{name}: mean false-alarm rate {mean:.4f}, in [{low}, {high}]"] = low <= mean <= high
        means[promise]["found"] = found
    print_heading(
        "MVTec AD, ResNet-18 features: false-alarm rate on normal rows not seen in training",
        "--mvtec FOLDER",
        "Split: N normal rows, drawn at random, for training (official: as many as MVTec AD has), all other normal "
        "rows for the test. 16 components; auto: n_components='auto', box: residual='box'; mean of "
        f"{4 * n_seeds} seeds; `contamination`, on training rows that are all normal, mean of {n_seeds} seeds.",
    )
    print_table("setting", rows)
    print("\nMeans over the categories, and the share of the anomalous rows found with as many rows as MVTec AD has:\n")
    print_table("setting", means, "false_alarms_mvtec")
    return claims


def alarm_rates(
    categories: Mapping[str, NormalAndAnomalous], n_train: int | None, n_seeds: int, parameters: Mapping[str, Any]
) -> tuple[dict[str, float], float, bool]:
    """Return the rate on unseen rows of each category, the mean share of anomalous rows found, and a check.

    The check is whether `contamination` is always the rate in training.
    """
    rates: dict[str, float] = {}
    found = []
    exact = True
    for category, (normal, anomalous) in categories.items():
        alarms = []
        for seed in range(n_seeds):
            train, held_out = split(normal, n_train or TRAINING_ROWS[category], seed)
            detector = DFKDEDetector(features=None, **parameters).fit(train)
            alarms.append(np.mean(detector.predict(held_out) == -1))
            found.append(np.mean(detector.predict(anomalous) == -1))
            n_flagged = np.sum(detector.predict(train) == -1)
            exact &= bool(n_flagged == round(parameters.get("contamination", 0) * len(train)))
        rates[category] = float(np.mean(alarms))
    return rates, float(np.mean(found)), exact


def false_alarms_of_parts(images: ImageSet, maps: NDArray[np.float32], n_seeds: int) -> dict[str, bool]:
    """Print the share of good images of new parts that is called anomalous; return the claims on it."""
    defects = maps[images.is_defect]
    rows: dict[str, dict[str, float]] = {}
    claims: dict[str, bool] = {}
    # Drawn at random, since those as foldered are one split of many.
    splits = group_splits(images, 4 * n_seeds)[1:]
    for name, (make, pool) in DETECTORS.items():
        for order, times in ORDERS.items():
            runs = []
            for seed, (train, held_out) in enumerate(splits[: times * n_seeds]):
                if order != "adjacent":
                    train = np.random.default_rng(seed).permutation(train)
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    groups = images.groups[train] if order == "with groups" else None
                    detector = make(features=None).fit(pool(maps[train]), groups=groups)
                warned = any("near-duplicate" in str(warning.message) for warning in caught)
                is_alarm, is_found = (detector.predict(pool(X)) == -1 for X in (maps[held_out], defects))
                runs.append((is_alarm.mean(), is_found.mean(), warned))
            alarms, found, warned = np.mean(runs, axis=0)
            rows[f"`{name}`, {order}"] = {"false alarms": alarms, "found": found, "warned": warned}
            if order == "with groups":
                claims[f"{name}, {order}: false alarms {alarms:.3f}, in [0.02, 0.08]"] = bool(0.02 <= alarms <= 0.08)
            if order == "in random order":
                claims[f"{name}, {order}: false alarms {alarms:.3f}, at least 0.2"] = bool(alarms >= 0.2)
                claims[f"{name}, {order}: {warned:.0%} of fits warn of near-duplicates"] = warned == 1
    print_heading(
        "Magnetic tiles: false-alarm rate on good photographs of new tiles, for target_fpr=0.05",
        "--tiles FOLDER --weights FILE",
        f"Trained on the good photographs of {len(np.unique(images.groups[images.is_train]))} tiles drawn at random, "
        f"tested on those of all others, mean of {n_seeds} seeds, with groups of {4 * n_seeds}; found: "
        "the share of all defective ones; warned: the share of fits that warn of near-duplicates. MobileNetV2, layers "
        "for positions; DFKDEDetector: their mean over positions.",
    )
    print_table("detector", rows, "false_alarms_tiles")
    return claims


if __name__ == "__main__":
    main()
