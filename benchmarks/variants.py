"""What else could be done to features, components and bandwidth, without labels: what it is worth on real data.

    python benchmarks/variants.py --tiles FOLDER --weights FILE --mvtec FOLDER
    python benchmarks/variants.py --quick

The folders and the file are those of `real_data.py`, which see; all three are needed. The tiles are split by tile, as
foldered. Prints one table in markdown, and then the claim, asserted, that no variant does better than
``n_components="auto"`` and ``residual="box"`` on features as they are.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from quality import LAYER_SETS, columns_by_layer
from real_data import (
    AUTO_AND_BOX,
    SIXTEEN,
    TRAINING_ROWS,
    Matrix,
    auroc,
    check_claims,
    load_categories,
    load_images,
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

from dfkde_sklearn import DFKDEDetector
from dfkde_sklearn._density import held_out as _held_out

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
    images = load_images(options.tiles)
    columns, is_train, is_defect = columns_by_layer(images, options.weights), images.is_train, images.is_defect
    mvtec = load_categories(options.mvtec)
    torch.set_num_threads(1)
    table: dict[str, dict[str, float]] = {}
    with threadpool_limits(1):
        for name, detector in variants().items():
            _held_out._MAX_RATIO = RATIOS.get(name, RATIOS[AS_THEY_ARE])
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
                    X = np.concatenate([part / np.sqrt(part[is_train].var(0).sum()) for part in parts], axis=1)
                table[name][tile_set] = figure(detector, X[is_train], X[~is_defect & ~is_train], X[is_defect])
            table[name]["mean"] = float(np.mean(list(table[name].values())))
    print_heading(
        "Variants: image AUROC without labels",
        "--tiles FOLDER --weights FILE --mvtec FOLDER",
        f"MVTec AD: mean of {len(mvtec)} categories and {options.seeds} seeds, as many normal rows for training as it "
        "has. Tiles, by layers: as foldered, which is by tile.",
    )
    print_table("variant", table)
    reference = table[AS_THEY_ARE]["mean"]
    claims = {
        f"{name}: {row['mean']:.3f}, not above {reference:.3f} by more than 0.005": row["mean"] <= reference + 0.005
        for name, row in table.items()
        if name != AS_THEY_ARE
    }
    check_claims(claims, time.perf_counter() - start, quick=options.quick)


AS_THEY_ARE = "auto and box"
# How many times the variance of training rows held-out rows may have along an axis that "auto" keeps.
RATIOS = {
    f"{AS_THEY_ARE}, ratio 1.5": 1.5,
    AS_THEY_ARE: _held_out._MAX_RATIO,
    f"{AS_THEY_ARE}, ratio 2.5": 2.5,
    f"{AS_THEY_ARE}, ratio 4": 4.0,
}
LAYERS_ALIKE = f"{AS_THEY_ARE}, each layer of unit total variance"


def variants() -> dict[str, Any]:
    detector = DFKDEDetector(features=None, **AUTO_AND_BOX)

    def changed(**parameters: Any) -> DFKDEDetector:
        return clone(detector).set_params(**parameters)

    return {
        **dict.fromkeys(RATIOS, detector),
        "16 components": changed(**SIXTEEN),
        "16 components and box": changed(n_components=16),
        "95 % of the variance and box": changed(n_components=0.95),
        "99 % of the variance and box": changed(n_components=0.99),
        "auto": changed(residual=None),
        'auto, residual="gaussian"': changed(residual="gaussian"),
        f'{AS_THEY_ARE}, bandwidth="loo"': changed(bandwidth="loo"),
        f'{AS_THEY_ARE}, scaling="norm"': changed(scaling="norm"),
        f"{AS_THEY_ARE}, features of unit variance": make_pipeline(StandardScaler(), detector),
        f"{AS_THEY_ARE}, rows of unit length": make_pipeline(Normalizer(), detector),
        f"{AS_THEY_ARE}, square roots of features": make_pipeline(FunctionTransformer(signed_roots), detector),
        LAYERS_ALIKE: detector,
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
