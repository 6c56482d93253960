"""The figures of the guide "Choosing a detector" on real images: searches with labels and without, nested, and wrong.

    python benchmarks/choosing.py --tiles FOLDER --weights FILE

Photographs of magnetic tiles [1]_ in the MVTec layout, described by the MobileNetV2 whose weights are in FILE (timm's
`mobilenetv2_100` with ``pad_type="same"``; mean and standard deviation of its input 0.5), all images squashed to
224 x 224. Prints tables in markdown, and then asserts what the guide says of them.

References
----------
.. [1] Huang, Qiu and Yuan (2020), Surface defect saliency of magnetic tile, doi:10.1007/s00371-018-1588-5
"""

from __future__ import annotations

import argparse
import os
import platform
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
from real_data import mobilenet
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold, cross_val_score

from dfkde_sklearn import AnomalyClassifier, DFKDEDetector, TimmFeatures
from dfkde_sklearn.datasets import load_mvtec_folder

# Of MobileNetV2; "global_pool" is its pooled head.
LAYERS = ["blocks.2", "blocks.4", "blocks.6", "global_pool"]
N_COMPONENTS = [16, 64, "auto"]
RESIDUALS = [None, "box"]
# Without labels, where numbers of components are compared by likelihood.
MORE_COMPONENTS = [4, 8, 16, 32, 64]


def main() -> None:
    options = parsed_options()
    start = time.perf_counter()
    warnings.filterwarnings("ignore", message=".*training rows cannot be scored by a fit without them")
    packages = ("dfkde-sklearn", "scikit-learn", "timm", "torch", "numpy")
    print(", ".join(f"{name} {version(name)}" for name in packages), f"Python {platform.python_version()}", sep=", ")
    data = load_mvtec_folder(options.tiles)
    X = [*data.X_train, *data.X_test]
    y = np.concatenate([np.zeros(len(data.X_train), int), data.y_test])
    folds, outer = (StratifiedKFold(5, shuffle=True, random_state=seed) for seed in (0, 1))

    backbone = mobilenet(options.weights, crop_mode="squash", crop_pct=1.0)
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
    ).fit(X, y)
    results = search.cv_results_
    means, stds = (
        np.reshape(results[name], (len(LAYERS), len(N_COMPONENTS), 2)) for name in ("mean_test_score", "std_test_score")
    )
    print(
        f"\n## Magnetic tiles: {int((y == 0).sum())} good, {int(y.sum())} defective\n\n"
        "Command: `python benchmarks/choosing.py --tiles FOLDER --weights FILE`. Mean AUROC over five folds, with "
        f"n_components {', '.join(map(str, N_COMPONENTS))}.\n"
    )
    print("| layer | residual=None | residual='box' |\n|---|---|---|")
    for layer, of_layer in zip(LAYERS, means, strict=True):
        print(f"| {layer} | " + " | ".join(", ".join(f"{auroc:.3f}" for auroc in row) for row in of_layer.T) + " |")
    best = np.argsort(-means, axis=None)[:3]
    print(
        f"\nThe best three: {', '.join(f'{auroc:.3f}' for auroc in means.flat[best])}; their standard deviations over "
        f"the folds: {', '.join(f'{std:.3f}' for std in stds.flat[best])}. Best: {search.best_params_}."
    )

    honest = cross_val_score(search, X, y, scoring="roc_auc", cv=outer, error_score="raise")
    print(f"\nNested: mean {honest.mean():.3f}; folds {', '.join(f'{auroc:.3f}' for auroc in np.sort(honest))}.")

    good = [path for path, label in zip(X, y, strict=True) if label == 0]
    chosen = {}
    for layer in LAYERS:
        without_labels = GridSearchCV(
            DFKDEDetector(TimmFeatures(backbone, layers=[layer], cache=True)),
            {"n_components": MORE_COMPONENTS},
            cv=KFold(5, shuffle=True, random_state=0),
            error_score="raise",
        )
        chosen[layer] = without_labels.fit(good).best_params_["n_components"]
    print(f"\nBy held-out likelihood of the good tiles, of {MORE_COMPONENTS} components: {chosen}.")

    # Wrong on purpose: the best detector without the classifier around it.
    detector = search.best_estimator_.detector
    right = search.best_score_
    turned, contaminated = (
        cross_val_score(detector, X, labels, scoring="roc_auc", cv=folds, error_score="raise").mean()
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
    print(f"\n## Claims\n\n{time.perf_counter() - start:.0f} s in all.\n")
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
    return parser.parse_args()


if __name__ == "__main__":
    main()
