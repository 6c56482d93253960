"""The figures of the guide "Choosing a detector" on real images: searches with labels and without, nested, and wrong.

    python benchmarks/choosing.py --tiles FOLDER --weights FILE
    python benchmarks/choosing.py --quick

The folder and the file are those of `real_data.py`, which see; all images are squashed to 224 x 224, and all folds are
by tile. Prints tables in markdown, and then asserts what the guide says of them.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from real_data import (
    check_claims,
    load_images,
    mobilenet,
    option_parser,
    parse,
    print_heading,
    print_table,
    print_versions,
)
from sklearn.base import clone
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, GroupKFold, StratifiedGroupKFold, cross_val_score

from dfkde_sklearn import AnomalyClassifier, DFKDEDetector, TimmFeatures

# Of MobileNetV2; "global_pool" is its pooled head.
LAYERS = ["blocks.2", "blocks.4", "blocks.6", "global_pool"]
N_COMPONENTS = [16, 64, "auto"]
RESIDUALS = [None, "box"]
# Without labels, where numbers of components are compared by likelihood.
MORE_COMPONENTS = [4, 8, 16, 32, 64]


def main() -> None:
    options = parse(option_parser(__doc__, "tiles", "weights"))
    start = time.perf_counter()
    warnings.filterwarnings("ignore", message=".*training rows cannot be scored by a fit without them")
    # Rankings are compared, for which no threshold is needed.
    warnings.filterwarnings("ignore", message=".*have a near-duplicate")
    print_versions("timm")
    images = load_images(options.tiles)
    X, y, groups = images.paths, images.is_defect.astype(int), images.groups
    n_folds = 2 if options.quick else 5
    folds, outer = (StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed) for seed in (0, 1))

    backbone = mobilenet(options.weights)
    TimmFeatures(backbone, layers=LAYERS, cache=True).fit_transform(X)
    search = GridSearchCV(
        AnomalyClassifier(DFKDEDetector(TimmFeatures(backbone, cache=True))),
        {
            "detector__features__layers": [[layer] for layer in LAYERS],
            "detector__n_components": N_COMPONENTS,
            "detector__residual": RESIDUALS,
        },
        scoring="roc_auc",
        cv=folds,
        error_score="raise",
    ).fit(X, y, groups=groups)
    results = search.cv_results_
    means, stds = (
        np.reshape(results[name], (len(LAYERS), len(N_COMPONENTS), 2)) for name in ("mean_test_score", "std_test_score")
    )
    print_heading(
        f"Magnetic tiles: {int((y == 0).sum())} good images, {int(y.sum())} defective",
        "--tiles FOLDER --weights FILE",
        f"Mean AUROC over {n_folds} folds, by tile, with n_components {', '.join(map(str, N_COMPONENTS))}.",
    )
    cells = {
        layer: {
            f"residual={residual!r}": ", ".join(f"{auroc:.3f}" for auroc in row)
            for residual, row in zip(RESIDUALS, of_layer.T, strict=True)
        }
        for layer, of_layer in zip(LAYERS, means, strict=True)
    }
    print_table("layer", cells)
    best = np.argsort(-means, axis=None)[:3]
    print(
        f"\nThe best three: {', '.join(f'{auroc:.3f}' for auroc in means.flat[best])}; their standard deviations over "
        f"the folds: {', '.join(f'{std:.3f}' for std in stds.flat[best])}. Best: {search.best_params_}."
    )

    honest = nested(search, X, y, groups, outer)
    print(f"\nNested: mean {honest.mean():.3f}; folds {', '.join(f'{auroc:.3f}' for auroc in np.sort(honest))}.")

    good = y == 0
    chosen = {}
    for layer in LAYERS:
        without_labels = GridSearchCV(
            DFKDEDetector(TimmFeatures(backbone, layers=[layer], cache=True)),
            {"n_components": MORE_COMPONENTS},
            cv=GroupKFold(n_folds),
            error_score="raise",
        )
        chosen[layer] = without_labels.fit(X[good], groups=groups[good]).best_params_["n_components"]
    print(f"\nBy held-out likelihood of the good tiles, of {MORE_COMPONENTS} components: {chosen}.")

    # Wrong on purpose: the best detector without the classifier around it.
    detector = search.best_estimator_.detector
    right = search.best_score_
    turned, contaminated = (
        cross_val_score(detector, X, labels, groups=groups, scoring="roc_auc", cv=folds, error_score="raise").mean()
        for labels in (y, 1 - 2 * y)
    )
    print(
        f"\nThe best detector: {right:.3f}. Without AnomalyClassifier, which keeps the defects out of the training "
        f"folds: {contaminated:.3f} with labels 1 and -1, {turned:.3f} with labels 0 and 1."
    )

    claims = {
        "the search finds a middle layer and more than 16 components": search.best_params_["detector__n_components"]
        != 16
        and search.best_params_["detector__features__layers"][0] in LAYERS[1:3],
        "the best three lie within half a standard deviation": np.ptp(means.flat[best]) < stds.flat[best].min() / 2,
        "the nested figure is below the best score": honest.mean() < right,
        "training on defects costs more than the choice between the best three": right - contaminated
        > np.ptp(means.flat[best]),
        "labels 0 and 1 turn the AUROC around": abs(turned + contaminated - 1) < 1e-9,
    }
    check_claims(claims, time.perf_counter() - start, quick=options.quick)


def nested(
    search: GridSearchCV, X: NDArray[np.str_], y: NDArray[np.int64], groups: NDArray[np.str_], outer: Any
) -> NDArray[np.float64]:
    """Return the AUROC of each fold by a search that has seen neither its images nor their tiles."""
    aurocs = []
    for seen, held_out in outer.split(X, y, groups):
        fitted = clone(search).fit(X[seen], y[seen], groups=groups[seen])
        aurocs.append(roc_auc_score(y[held_out], fitted.decision_function(X[held_out])))
    return np.array(aurocs)


if __name__ == "__main__":
    main()
