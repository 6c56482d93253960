"""What else could be done to features, components and bandwidth, without labels: what it is worth on real data.

    python benchmarks/variants.py --tiles FOLDER --weights FILE --mvtec FOLDER

The folders and the file are those of `real_data.py`, which see; all three are needed. Prints one table in markdown, and
then the claim, asserted, that no variant does better than ``n_components="auto"`` on features as they are.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from quality import LAYER_SETS, tile_columns
from real_data import (
    TRAINING_ROWS,
    Matrix,
    auroc,
    check_claims,
    load_rows,
    parsed_options,
    print_heading,
    print_table,
    print_versions,
    split,
)
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, Normalizer, StandardScaler
from threadpoolctl import threadpool_limits

from dfkde_sklearn import DFKDEDetector, _training

TILE_SETS = [
    "pooled head",
    "`blocks.4`",
    "`blocks.2` + `blocks.4` + `blocks.6`",
    "`blocks.4` + `blocks.5` + scattering",
]


def main() -> None:
    options = parsed_options(__doc__, "tiles", "weights", "mvtec")
    start = time.perf_counter()
    warnings.filterwarnings("ignore", message=".*training rows cannot be scored by a fit without them")
    print_versions("timm")
    torch.set_num_threads(2)
    columns, is_defect, n_train = tile_columns(options.tiles, options.weights)
    mvtec = {name: load_rows(options.mvtec / f"{name}.npz") for name in TRAINING_ROWS}
    torch.set_num_threads(1)
    table: dict[str, dict[str, float]] = {}
    with threadpool_limits(1):
        for name, detector in variants().items():
            _training._MAX_RATIO = RATIOS.get(name, RATIOS[AS_THEY_ARE])
            runs = [
                figure(detector, *split(normal, TRAINING_ROWS[category], seed), anomalous)
                for category, (normal, anomalous) in mvtec.items()
                for seed in range(options.seeds)
            ]
            table[name] = {"MVTec AD": float(np.mean(runs))}
            for tile_set in TILE_SETS:
                X = np.concatenate([columns[layer] for layer in LAYER_SETS[tile_set]], axis=1)
                if name == LAYERS_ALIKE:
                    parts = [columns[layer] for layer in LAYER_SETS[tile_set]]
                    X = np.concatenate([part / np.sqrt(part[:n_train].var(0).sum()) for part in parts], axis=1)
                good = X[~is_defect]
                table[name][tile_set] = figure(detector, good[:n_train], good[n_train:], X[is_defect])
            table[name]["mean"] = float(np.mean(list(table[name].values())))
    print_heading(
        "Variants: image AUROC without labels",
        "--tiles FOLDER --weights FILE --mvtec FOLDER",
        f"MVTec AD: mean of 8 categories and {options.seeds} seeds, as many normal rows for training as it has. Tiles, "
        "by layers: as foldered.",
    )
    print_table("variant", table)
    reference = table[AS_THEY_ARE]["mean"]
    claims = {
        f"{name}: {row['mean']:.3f}, not above {reference:.3f} by more than 0.005": row["mean"] <= reference + 0.005
        for name, row in table.items()
        if name != AS_THEY_ARE
    }
    check_claims(claims, time.perf_counter() - start)


AS_THEY_ARE = "auto"
# How many times the variance of training rows unseen rows may have along an axis that "auto" keeps.
RATIOS = {"auto, ratio 1.5": 1.5, AS_THEY_ARE: _training._MAX_RATIO, "auto, ratio 2.5": 2.5, "auto, ratio 4": 4.0}
LAYERS_ALIKE = "auto, each layer of unit total variance"


def variants() -> dict[str, Any]:
    auto = DFKDEDetector(features=None, n_components="auto")
    return {
        **dict.fromkeys(RATIOS, auto),
        "16 components": DFKDEDetector(features=None),
        "95 % of the variance": DFKDEDetector(features=None, n_components=0.95),
        "99 % of the variance": DFKDEDetector(features=None, n_components=0.99),
        'auto, bandwidth="loo"': clone(auto).set_params(bandwidth="loo"),
        'auto, scaling="norm"': clone(auto).set_params(scaling="norm"),
        'auto, residual="gaussian"': clone(auto).set_params(residual="gaussian"),
        'auto, residual="box"': clone(auto).set_params(residual="box"),
        "auto, features of unit variance": make_pipeline(StandardScaler(), auto),
        "auto, rows of unit length": make_pipeline(Normalizer(), auto),
        "auto, square roots of features": make_pipeline(FunctionTransformer(signed_roots), auto),
        LAYERS_ALIKE: auto,
    }


def signed_roots(X: Matrix) -> Matrix:
    return np.sign(X) * np.sqrt(np.abs(X))


def figure(detector: Any, train: Matrix, normal: Matrix, anomalous: Matrix) -> float:
    fitted = clone(detector).fit(train)

    def scores(rows: Matrix) -> NDArray[np.floating]:
        return -fitted.score_samples(rows)

    return auroc(scores(normal), scores(anomalous))


if __name__ == "__main__":
    main()
