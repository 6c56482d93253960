"""Detection quality of DFKDE without labels, with few rows, with dirty rows, and with labels, beside other detectors.

    python benchmarks/quality.py --tiles FOLDER --weights FILE --mvtec FOLDER

The folders and the file are those of `real_data.py`, which see. Prints tables in markdown with confidence intervals,
and then the claims, asserted. Needs PyOD for two of the other detectors (``pip install ".[benchmark]"``).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyod.models.ecod import ECOD
from pyod.models.kde import KDE
from real_data import (
    LAYERS,
    TRAINING_ROWS,
    Matrix,
    Table,
    auroc,
    check_claims,
    collected,
    image_interval,
    interval,
    load_rows,
    mobilenet,
    parsed_options,
    print_heading,
    print_table,
    print_versions,
    split,
)
from sklearn.covariance import LedoitWolf
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.neighbors import LocalOutlierFactor, NearestNeighbors
from sklearn.preprocessing import FunctionTransformer
from sklearn.svm import OneClassSVM
from threadpoolctl import threadpool_limits

from dfkde_sklearn import AnomalyClassifier, DFKDEDetector, ScatteringFeatures, TimmFeatures
from dfkde_sklearn.datasets import load_mvtec_folder

FIXED: dict[str, Any] = {}  # the defaults: 16 components, Scott's bandwidth
AUTO = {"n_components": "auto"}
SMALL = {"n_components": "auto", "residual": "box"}
DETECTORS: dict[str, Mapping[str, Any]] = {
    "DFKDE, defaults": FIXED,
    "DFKDE, 64": {"n_components": 64},
    "DFKDE, auto": AUTO,
    "DFKDE, auto and box": SMALL,
}
Scores = NDArray[np.floating]

OTHERS = ("Ledoit-Wolf", "1-NN", "LOF", "IsolationForest", "OneClassSVM", "PyOD KDE", "PyOD ECOD")
SIZES = (20, 40, 60, 100)
SHARES = (0.01, 0.05, 0.10, 0.20)
WAVES = "scattering"
CROPPED = "`blocks.4`, centre crop"
LAYER_SETS: dict[str, list[str]] = {
    "pooled head": ["global_pool"],
    "`blocks.4`": ["blocks.4"],
    CROPPED: [CROPPED],
    "`blocks.4` + `blocks.5`": ["blocks.4", "blocks.5"],
    "`blocks.2` + `blocks.4` + `blocks.6`": ["blocks.2", "blocks.4", "blocks.6"],
    "scattering": [WAVES],
    "`blocks.4` + scattering": ["blocks.4", WAVES],
    "`blocks.4` + `blocks.5` + scattering": ["blocks.4", "blocks.5", WAVES],
    "`blocks.1` to `blocks.6` + scattering": [*LAYERS[:-1], WAVES],
}
RECOMMENDED = "`blocks.4` + `blocks.5` + scattering"


def main() -> None:
    options = parsed_options(__doc__, "tiles", "weights", "mvtec")
    start = time.perf_counter()
    warnings.filterwarnings("ignore", message=".*training rows cannot be scored by a fit without them")
    print_versions("pyod", "timm")
    claims: dict[str, bool] = {}
    # Matrices as small as these are done sooner by one thread, and much sooner where other work runs beside.
    if options.mvtec:
        rows = {name: load_rows(options.mvtec / f"{name}.npz") for name in TRAINING_ROWS}
        torch.set_num_threads(1)
        with threadpool_limits(1):
            claims |= without_labels(rows, options.seeds)
            claims |= with_few_rows(rows, options.seeds)
            claims |= with_dirty_rows(rows, options.seeds)
    if options.tiles and options.weights:
        torch.set_num_threads(2)
        columns, is_defect, n_train = tile_columns(options.tiles, options.weights)
        torch.set_num_threads(1)
        with threadpool_limits(1):
            claims |= tiles_without_labels(columns, is_defect, n_train, options.seeds)
            claims |= tiles_with_labels(columns, is_defect, n_train, options.seeds)
    check_claims(claims, time.perf_counter() - start)


# MVTec AD


def without_labels(rows: Mapping[str, tuple[Matrix, Matrix]], n_seeds: int) -> dict[str, bool]:
    """Print the AUROC of settings that need no labels and of other detectors; return the claims."""

    def aurocs(category: str, seed: int) -> dict[str, float]:
        train, normal = split(rows[category][0], TRAINING_ROWS[category], seed)
        scores = dfkde_scores(train, normal, rows[category][1]) | rival_scores(train, normal, rows[category][1], seed)
        return {name: auroc(*values) for name, values in scores.items()}

    table = collected(rows, n_seeds, aurocs)
    print_heading(
        "MVTec AD, ResNet-18 features: image AUROC without labels",
        "--mvtec FOLDER",
        f"Split: as many normal rows, drawn at random, for training as MVTec AD has; mean of {n_seeds} seeds. "
        + interval_text("categories and seeds"),
    )
    print_means(table, reference="DFKDE, auto")
    print("\nBy category:\n")
    categories = {f"{name} ({TRAINING_ROWS[name]})": i for i, name in enumerate(rows)}
    print_table("category", {name: {k: v[i].mean() for k, v in table.items()} for name, i in categories.items()})
    gain, low, _ = interval(table["DFKDE, auto"] - table["DFKDE, defaults"])
    claims = {
        f"MVTec AD, auto is at least 0.03 above the defaults ({gain:+.3f}, 95 % interval above {low:+.3f})": gain
        >= 0.03
    }
    for other in OTHERS:
        ahead = float(np.mean(table["DFKDE, auto"] - table[other]))
        claims[f"MVTec AD, auto is ahead of {other} ({ahead:+.3f})"] = ahead > 0
    worst = float((table["DFKDE, auto"] - table["DFKDE, defaults"]).mean(1).min())
    claims[f"MVTec AD, auto is nowhere more than 0.02 below the defaults (worst category {worst:+.3f})"] = worst > -0.02
    return claims


def with_few_rows(rows: Mapping[str, tuple[Matrix, Matrix]], n_seeds: int) -> dict[str, bool]:
    """Print AUROC and false-alarm rates against the number of training rows; return the claims."""
    tables: dict[str, Table] = {}
    for n in SIZES:

        def figures(category: str, seed: int, n: int = n) -> dict[str, float]:
            train, normal = split(rows[category][0], n, seed)
            fitted = {name: DFKDEDetector(features=None, **setting).fit(train) for name, setting in DETECTORS.items()}
            scores = dfkde_scores(train, normal, rows[category][1], fitted)
            scores |= rival_scores(train, normal, rows[category][1], seed)
            alarms = {f"{name}: alarms": np.mean(found.predict(normal) < 0) for name, found in fitted.items()}
            return {name: auroc(*values) for name, values in scores.items()} | alarms

        tables[f"N = {n}"] = collected(rows, n_seeds, figures)
    print_heading(
        "MVTec AD, ResNet-18 features: few training rows",
        "--mvtec FOLDER",
        f"N normal rows, drawn at random, for training, all others for the test; mean AUROC of 8 categories and "
        f"{n_seeds} seeds, and in the last columns the share of new normal rows called anomalous at target_fpr=0.05.",
    )
    print_table("rows", {n: {name: values.mean() for name, values in table.items()} for n, table in tables.items()})
    claims = {}
    for n, table in tables.items():
        best = max(OTHERS, key=lambda name: table[name].mean())
        ahead = float(np.mean(table["DFKDE, auto and box"] - table[best]))
        claim = f"MVTec AD, {n}: auto and box is at most 0.005 behind the best of the others ({best}, {ahead:+.3f})"
        claims[claim] = ahead > -0.005
        for name in DETECTORS:
            rate = table[f"{name}: alarms"].mean()
            claims[f"MVTec AD, {n}, {name}: false-alarm rate {rate:.3f}, in [0.03, 0.07]"] = 0.03 <= rate <= 0.07
    return claims


def with_dirty_rows(rows: Mapping[str, tuple[Matrix, Matrix]], n_seeds: int) -> dict[str, bool]:
    """Print figures where anomalous rows are among the training rows; return the claims."""
    aurocs, alarms, found_shares = {}, {}, {}
    for share in SHARES:

        def figures(category: str, seed: int, share: float = share) -> dict[str, float]:
            normal, anomalous = rows[category]
            # At least half of the anomalies are left for the test.
            n_dirty = min(round(share * TRAINING_ROWS[category]), len(anomalous) // 2)
            n = min(TRAINING_ROWS[category], round(n_dirty / share))
            clean, test = split(normal, n - n_dirty, seed)
            dirty, anomalies = split(anomalous, n_dirty, seed)
            train = np.random.default_rng(seed).permutation(np.concatenate([clean, dirty]))
            settings = {
                "not given": AUTO,
                "given": AUTO | {"contamination": share},
                "given half": AUTO | {"contamination": share / 2},
                "given double": AUTO | {"contamination": 2 * share},
                "defaults, not given": FIXED,
                "defaults, given": {"contamination": share},
            }
            fitted = {name: DFKDEDetector(features=None, **setting).fit(train) for name, setting in settings.items()}
            scores = dfkde_scores(train, test, anomalies, fitted) | rival_scores(train, test, anomalies, seed)
            rates = {f"alarms {name}": np.mean(found.predict(test) < 0) for name, found in fitted.items()}
            rates |= {f"found {name}": np.mean(found.predict(anomalies) < 0) for name, found in fitted.items()}
            return {name: auroc(*values) for name, values in scores.items()} | rates

        means = {name: float(values.mean()) for name, values in collected(rows, n_seeds, figures).items()}
        of_alarms = {name.removeprefix("alarms "): value for name, value in means.items() if name.startswith("alarms ")}
        of_found = {name.removeprefix("found "): value for name, value in means.items() if name.startswith("found ")}
        alarms[f"{share:.0%}"], found_shares[f"{share:.0%}"] = of_alarms, of_found
        aurocs[f"{share:.0%}"] = {name: means[name] for name in (*of_alarms, *OTHERS)}
    print_heading(
        "MVTec AD, ResNet-18 features: anomalies among the training rows",
        "--mvtec FOLDER",
        "As many training rows as MVTec AD has, fewer where that takes more than half of the anomalies; a share of "
        f"them is anomalous, unlabelled; all other rows for the test. Means of 8 categories and {n_seeds} seeds. DFKDE "
        "with n_components='auto' and contamination not given, given, and wrong by a factor of two; and with the "
        "defaults. AUROC:",
    )
    print_table("share", aurocs)
    print("\nThe share of new normal rows called anomalous (target_fpr=0.05 where contamination is not given):\n")
    print_table("share", alarms)
    print("\nThe share of anomalous test rows called anomalous:\n")
    print_table("share", found_shares)
    claims = {}
    for share in list(aurocs)[:3]:
        best = max(OTHERS, key=lambda name: aurocs[share][name])
        ahead = aurocs[share]["not given"] - aurocs[share][best]
        claims[f"MVTec AD, {share} anomalies: auto is ahead of all others (of {best} by {ahead:.3f})"] = ahead > 0
    for share in list(aurocs)[1:]:
        given, other = found_shares[share]["given"], found_shares[share]["not given"]
        claim = f"MVTec AD, {share} anomalies, contamination given: {given:.2f} of new ones are found, else {other:.2f}"
        claims[claim] = given > other
    return claims


# Magnetic tiles


def tile_columns(folder: Path, weights: Path) -> tuple[dict[str, Matrix], NDArray[np.bool_], int]:
    """Return the features of all images by layer, which images have a defect, and how many train as foldered."""
    data = load_mvtec_folder(folder)
    images = [*data.X_train, *data.X_test]
    network = TimmFeatures(mobilenet(weights, crop_mode="squash", crop_pct=1.0), layers=LAYERS)
    found = network.fit_transform(images)
    of_layer = np.repeat(LAYERS, network.layer_widths_)
    columns = {layer: found[:, of_layer == layer] for layer in LAYERS}
    columns[CROPPED] = TimmFeatures(mobilenet(weights), layers="blocks.4").fit_transform(images)
    columns[WAVES] = ScatteringFeatures().fit_transform(images)
    return columns, np.r_[np.zeros(len(data.X_train)), data.y_test] == 1, len(data.X_train)


def tiles_without_labels(
    columns: Mapping[str, Matrix], is_defect: NDArray[np.bool_], n_train: int, n_seeds: int
) -> dict[str, bool]:
    """Print the AUROC of label-free settings on each set of layers; return the claims."""
    names = [*DETECTORS, "Ledoit-Wolf", "1-NN"]
    figures: dict[str, dict[str, float]] = {}
    recommended: list[tuple[float, float, float]] = []
    for name, layers in LAYER_SETS.items():
        X = np.concatenate([columns[layer] for layer in layers], axis=1)
        normal, anomalous = X[~is_defect], X[is_defect]
        splits = [(normal[:n_train], normal[n_train:])] + [split(normal, n_train, seed) for seed in range(n_seeds)]
        runs = []
        for seed, (train, test) in enumerate(splits):
            scores = dfkde_scores(train, test, anomalous) | rival_scores(train, test, anomalous, seed)
            runs.append({detector: auroc(*scores[detector]) for detector in names})
            if name == RECOMMENDED and seed == 0:
                recommended.append(image_interval(*scores["DFKDE, auto"]))
        at_random = {detector: np.array([[run[detector] for run in runs[1:]]]) for detector in names}
        if name == RECOMMENDED:
            recommended.append(interval(at_random["DFKDE, auto"]))
        row = {f"{detector} (folders)": runs[0][detector] for detector in names}
        figures[f"{name} ({X.shape[1]})"] = row | {f"{d} (random)": v.mean() for d, v in at_random.items()}
    print_heading(
        "Magnetic tiles: image AUROC without labels",
        "--tiles FOLDER --weights FILE",
        "MobileNetV2 on whole images, squashed to 224 x 224 (centre crop: on what timm's own preprocessing leaves of "
        "them), layers averaged over positions, and `ScatteringFeatures`, "
        f"side by side as they are. (folders): trained on the {n_train} images of train/good, tested on test/. "
        f"(random): mean of {n_seeds} seeds, {n_train} of the normal images drawn at random for training.",
    )
    print_table("features", figures)
    claims = {}
    for of, (found, low, high) in zip(("folders", "random splits"), recommended, strict=True):
        claim = f"tiles, {RECOMMENDED}, auto, without labels, {of}: {found:.3f} [{low:.3f}, {high:.3f}], at least 0.92"
        claims[claim] = found >= 0.92
    return claims


def tiles_with_labels(
    columns: Mapping[str, Matrix], is_defect: NDArray[np.bool_], n_train: int, n_seeds: int
) -> dict[str, bool]:
    """Print the AUROC of a search with labels, nested; return the claim."""
    names = list(columns)
    widths = np.cumsum([0] + [columns[name].shape[1] for name in names])
    X = np.concatenate([columns[name] for name in names], axis=1)
    picks = {
        name: np.concatenate([np.arange(*widths[names.index(layer) :][:2]) for layer in layers])
        for name, layers in LAYER_SETS.items()
        if len(layers) > 1 or layers == ["blocks.4"]
    }
    grid = {
        "detector__features__kw_args": [{"columns": pick} for pick in picks.values()],
        "detector__n_components": [32, "auto"],
    }
    by_columns = {pick.tobytes(): name for name, pick in picks.items()}
    test = np.arange(n_train, len(X))
    means, chosen = [], []
    for seed in range(n_seeds):
        figures: list[float] = []
        for labelled, held_out in StratifiedKFold(5, shuffle=True, random_state=seed).split(test, is_defect[test]):
            train = np.concatenate([np.arange(n_train), test[labelled]])
            search = GridSearchCV(
                AnomalyClassifier(DFKDEDetector(FunctionTransformer(taken, kw_args={"columns": picks["`blocks.4`"]}))),
                grid,
                scoring="roc_auc",
                cv=StratifiedKFold(3, shuffle=True, random_state=seed),
                error_score="raise",
            ).fit(X[train], is_defect[train].astype(int))
            scores = search.decision_function(X[test[held_out]])
            figures.append(roc_auc_score(is_defect[test[held_out]], scores))
            best = search.best_params_
            columns_name = by_columns[best["detector__features__kw_args"]["columns"].tobytes()]
            chosen.append(f"{columns_name}, {best['detector__n_components']}")
        means.append(figures)
    found, low, high = interval(np.array(means))
    print_heading(
        "Magnetic tiles: image AUROC of a search with labels, nested",
        "--tiles FOLDER --weights FILE",
        f"The images of test/ are cut into 5 stratified folds, {n_seeds} times. For each fold a `GridSearchCV` over "
        f"{len(picks)} sets of layers and n_components 32 and 'auto' sees train/good and the other four folds with "
        "their labels (3 inner folds), refits, and ranks the images of the fold, which it has not seen.",
    )
    print(f"AUROC {found:.3f}, 95 % interval [{low:.3f}, {high:.3f}] over seeds and folds. Chosen:\n")
    print_table("setting", {name: {"times": float(chosen.count(name))} for name in sorted(set(chosen))})
    return {f"tiles, nested search with labels: {found:.3f} [{low:.3f}, {high:.3f}], at least 0.94": found >= 0.94}


def taken(X: Matrix, columns: NDArray[np.int64]) -> Matrix:
    return X[:, columns]


# Detectors and figures


def dfkde_scores(
    train: Matrix, normal: Matrix, anomalous: Matrix, fitted: Mapping[str, DFKDEDetector] | None = None
) -> dict[str, tuple[Scores, Scores]]:
    """Return the anomaly scores of normal and anomalous test rows by DFKDE in each setting."""
    fitted = fitted or {name: DFKDEDetector(features=None, **setting).fit(train) for name, setting in DETECTORS.items()}
    return {name: (-found.score_samples(normal), -found.score_samples(anomalous)) for name, found in fitted.items()}


def rival_scores(train: Matrix, normal: Matrix, anomalous: Matrix, seed: int) -> dict[str, tuple[Scores, Scores]]:
    """Return the anomaly scores of normal and anomalous test rows by the other detectors.

    In float64: a Ledoit-Wolf covariance of wide float32 features with an offset loses what tells defects.
    """
    train, normal, anomalous = (rows.astype(np.float64) for rows in (train, normal, anomalous))
    test = np.concatenate([normal, anomalous])
    scores = {
        "1-NN": NearestNeighbors(n_neighbors=1).fit(train).kneighbors(test)[0][:, 0],
        "Ledoit-Wolf": LedoitWolf().fit(train).mahalanobis(test),
        "LOF": -LocalOutlierFactor(novelty=True).fit(train).score_samples(test),
        "IsolationForest": -IsolationForest(random_state=seed).fit(train).score_samples(test),
        "OneClassSVM": -OneClassSVM().fit(train).score_samples(test),
        "PyOD KDE": KDE().fit(train).decision_function(test),
        "PyOD ECOD": ECOD().fit(train).decision_function(test),
    }
    return {name: (values[: len(normal)], values[len(normal) :]) for name, values in scores.items()}


def interval_text(over: str) -> str:
    return f"In brackets 95 % intervals of a bootstrap over {over}, paired in the last column."


def print_means(table: Table, reference: str) -> None:
    """Print the mean of each detector, and by how much the reference is ahead of it."""
    print(f"| detector | AUROC | {reference} is ahead by |\n|---|---|---|")
    for name, values in table.items():
        mean, low, high = interval(values)
        gain, gain_low, gain_high = interval(table[reference] - values)
        ahead = "" if name == reference else f"{gain:+.3f} [{gain_low:+.3f}, {gain_high:+.3f}]"
        print(f"| {name} | {mean:.3f} [{low:.3f}, {high:.3f}] | {ahead} |")


if __name__ == "__main__":
    main()
