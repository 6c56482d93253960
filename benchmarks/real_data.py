"""What the benchmarks on real images share: the data, the other detectors, tables, and intervals.

Nothing to run. The benchmarks take paths as options, or from the variables named there:

- ``--tiles`` (DFKDE_TILES), FOLDER: photographs of magnetic tiles [1]_ in the MVTec layout.
- ``--weights`` (DFKDE_WEIGHTS), FILE: weights of timm's `mobilenetv2_100` with ``pad_type="same"``; mean and standard
  deviation of its input 0.5.
- ``--mvtec`` (DFKDE_MVTEC), FOLDER: categories of MVTec AD as ResNet-18 features, files NAME.npz of ADBench [2]_ (X,
  and y with 1 = anomalous).

What is not given is left out, and its claims with it.

References
----------
.. [1] Huang, Qiu and Yuan (2020), Surface defect saliency of magnetic tile, doi:10.1007/s00371-018-1588-5
.. [2] Han et al. (2022), ADBench: anomaly detection benchmark, doi:10.48550/arXiv.2206.09426
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

Matrix = NDArray[np.float32]
NormalAndAnomalous = tuple[Matrix, Matrix]
# A figure of each detector: an array (categories, seeds).
Table = dict[str, NDArray[np.float64]]

# Layers of MobileNetV2; "global_pool" is its pooled head.
LAYERS = [*(f"blocks.{i}" for i in range(1, 7)), "global_pool"]
# Normal images that MVTec AD itself has for training.
TRAINING_ROWS = {
    "bottle": 209,
    "cable": 224,
    "carpet": 280,
    "grid": 264,
    "hazelnut": 391,
    "screw": 320,
    "tile": 230,
    "zipper": 240,
}


N_BOOTSTRAP = 4000


def parsed_options(description: str, *options: str) -> argparse.Namespace:
    """Return the paths named, of "tiles", "weights" and "mvtec", and the number of seeds."""
    texts = {
        "tiles": "folder of the magnetic tiles in the MVTec layout",
        "weights": "weights of MobileNetV2, safetensors",
        "mvtec": "folder of ResNet-18 features, NAME.npz",
    }
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in options:
        variable = f"DFKDE_{option.upper()}"
        default = os.environ.get(variable)
        text = f"{texts[option]} (or the variable {variable})"
        parser.add_argument(f"--{option}", type=Path, default=default and Path(default), help=text)
    parser.add_argument("--seeds", type=int, default=5, help="random splits (%(default)s)")
    found = parser.parse_args()
    paths = [getattr(found, option) for option in options]
    if not any(paths):
        parser.error(f"Give {', '.join(f'--{option}' for option in options)}, or some of them.")
    if "tiles" in options and bool(found.tiles) != bool(found.weights):
        parser.error("--tiles and --weights go together.")
    for path in filter(None, paths):
        if not path.exists():
            parser.error(f"{path} does not exist.")
    return found


def print_versions(*packages: str) -> None:
    names = ("dfkde-sklearn", "scikit-learn", *packages, "torch", "numpy")
    print(", ".join(f"{name} {version(name)}" for name in names), f"Python {platform.python_version()}", sep=", ")


def check_claims(claims: Mapping[str, bool], seconds: float) -> None:
    """Print the claims and whether they hold; raise AssertionError if one does not."""
    print(f"\n## Claims\n\n{seconds:.0f} s in all.\n")
    for claim, holds in claims.items():
        print(f"- {'holds' if holds else 'FAILS'}: {claim}")
    assert all(claims.values()), [claim for claim, holds in claims.items() if not holds]


def mobilenet(weights: Path, **preprocessing: Any) -> Any:
    """Return the backbone; `preprocessing` replaces what timm says on crops."""
    import timm

    return timm.create_model(
        "mobilenetv2_100",
        pretrained=True,
        num_classes=0,
        pad_type="same",
        pretrained_cfg_overlay={"file": str(weights), "mean": (0.5,) * 3, "std": (0.5,) * 3, **preprocessing},
    )


def load_rows(file: Path) -> tuple[Matrix, Matrix]:
    """Return the normal and the anomalous rows of a category."""
    with np.load(file) as arrays:
        X, y = arrays["X"], arrays["y"]
    return X[y == 0], X[y == 1]


def split(normal: Matrix, n_train: int, seed: int) -> tuple[Matrix, Matrix]:
    """Return `n_train` rows drawn at random, and the others."""
    order = np.random.default_rng(seed).permutation(len(normal))
    return normal[order[:n_train]], normal[order[n_train:]]


def auroc(normal: NDArray[Any], anomalous: NDArray[Any]) -> float:
    return float(roc_auc_score(np.repeat([0, 1], [len(normal), len(anomalous)]), np.concatenate([normal, anomalous])))


def collected(rows: Mapping[str, Any], n_seeds: int, figures: Callable[[str, int], Mapping[str, float]]) -> Table:
    """Return each figure as an array (categories, seeds)."""
    found = [[figures(category, seed) for seed in range(n_seeds)] for category in rows]
    return {name: np.array([[run[name] for run in runs] for runs in found]) for name in found[0][0]}


def interval(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return the mean of figures (categories, seeds), and the bounds of its 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    n_groups, n_seeds = values.shape
    groups = rng.integers(n_groups, size=(N_BOOTSTRAP, n_groups, 1))
    seeds = rng.integers(n_seeds, size=(N_BOOTSTRAP, n_groups, n_seeds))
    means = values[groups, seeds].mean((1, 2))
    return float(values.mean()), *np.quantile(means, [0.025, 0.975]).tolist()


def image_interval(normal: NDArray[Any], anomalous: NDArray[Any]) -> tuple[float, float, float]:
    """Return the AUROC, and the bounds of its 95 % bootstrap interval over test images."""
    rng = np.random.default_rng(0)
    drawn = [auroc(rng.choice(normal, len(normal)), rng.choice(anomalous, len(anomalous))) for _ in range(1000)]
    return auroc(normal, anomalous), *np.quantile(drawn, [0.025, 0.975]).tolist()


def print_heading(title: str, options: str, text: str) -> None:
    command = f"python benchmarks/{Path(sys.argv[0]).name} {options}"
    print(f"\n## {title}\n\nCommand: `{command}`. {text}\n", flush=True)


def print_table(corner: str, rows: Mapping[str, Mapping[str, float]]) -> None:
    columns: Sequence[str] = list(next(iter(rows.values())))
    print(f"| {corner} | {' | '.join(columns)} |")
    print(f"|---|{'---|' * len(columns)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{row[column]:.3f}' for column in columns)} |")
