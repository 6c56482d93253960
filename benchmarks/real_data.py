"""What the benchmarks on real images share: the data, splits, Ledoit-Wolf distances, tables, and intervals.

Nothing to run. The benchmarks take paths as options, or from the variables named there:

- ``--tiles`` (DFKDE_TILES), FOLDER: photographs of magnetic tiles [1]_ in the MVTec layout, with a file groups.csv
  (path, group) that names the tile that each image shows.
- ``--elpv`` (DFKDE_ELPV), FOLDER: electroluminescence images of solar cells [2]_ in the MVTec layout.
- ``--weights`` (DFKDE_WEIGHTS), FILE: weights of timm's `mobilenetv2_100` with ``pad_type="same"``; mean and standard
  deviation of its input 0.5. It describes the images of both folders.
- ``--mvtec`` (DFKDE_MVTEC), FOLDER: categories of MVTec AD as ResNet-18 features, files NAME.npz of ADBench [3]_ (X,
  and y with 1 = anomalous).

What is not given is left out, and its claims with it. With ``--quick``, every benchmark generates small data and random
weights in place of all paths, prints what it prints otherwise, and asserts no figure: that shows that it runs.

References
----------
.. [1] Huang, Qiu and Yuan (2020), Surface defect saliency of magnetic tile, doi:10.1007/s00371-018-1588-5
.. [2] Deitsch et al. (2019), Automatic classification of defective photovoltaic module cells in electroluminescence
   images, doi:10.1016/j.solener.2019.02.067
.. [3] Han et al. (2022), ADBench: anomaly detection benchmark, doi:10.48550/arXiv.2206.09426
"""

from __future__ import annotations

import argparse
import atexit
import csv
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from dfkde_sklearn.datasets import load_mvtec_folder, make_textures, write_mvtec_folder

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
# Written out, so that the tables say the same when a default changes.
SIXTEEN: dict[str, Any] = {"n_components": 16, "residual": None}
AUTO: dict[str, Any] = {"n_components": "auto", "residual": None}
AUTO_AND_BOX: dict[str, Any] = {"n_components": "auto", "residual": "box"}

N_BOOTSTRAP = 4000
QUICK_HELP = "small generated data in place of all paths, and no figure asserted: shows that it runs"


class ImageSet(NamedTuple):
    """Images of one product, those of one group side by side.

    Rows of one group share a fold of the detector, which cuts the training rows into consecutive runs, wherever no end
    of a run lies within the group.
    """

    paths: NDArray[np.str_]
    is_defect: NDArray[np.bool_]
    groups: NDArray[np.str_]
    # As foldered.
    is_train: NDArray[np.bool_]


# Options


def option_parser(description: str | None, *paths: str) -> argparse.ArgumentParser:
    """Return a parser for paths, of "tiles", "elpv", "weights" and "mvtec", and ``--quick``."""
    texts = {
        "tiles": "folder of the magnetic tiles in the MVTec layout, with groups.csv",
        "elpv": "folder of the solar cells in the MVTec layout",
        "weights": "weights of MobileNetV2, safetensors",
        "mvtec": "folder of ResNet-18 features, NAME.npz",
    }
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in paths:
        parser.add_argument(f"--{name}", type=Path, help=f"{texts[name]} (or the variable DFKDE_{name.upper()})")
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)
    parser.add_argument("--write", action="store_true", help="also write the tables that pages include to docs/figures")
    parser.set_defaults(paths=paths)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the options, with the paths from the environment or of generated data where they are not given."""
    global WRITES
    options = parser.parse_args()
    WRITES = options.write and not options.quick
    given = {name: getattr(options, name) for name in options.paths}
    if options.quick:
        if any(given.values()):
            parser.error("--quick generates its data: give it no path.")
        given = generated_data(options.paths)
    else:
        given = {name: path or environment_path(name) for name, path in given.items()}
        if not any(given.values()):
            parser.error(f"Give {', '.join(f'--{name}' for name in given)}, or some of them; or --quick.")
        if "weights" in given and bool(given["weights"]) != bool(given.get("tiles") or given.get("elpv")):
            parser.error("--weights goes with a folder of images, and a folder of images with --weights.")
    for path in filter(None, given.values()):
        if not path.exists():
            parser.error(f"{path} does not exist.")
    vars(options).update(given)
    return options


def parsed_options(description: str | None, *paths: str) -> argparse.Namespace:
    """Return the paths named, and the number of seeds."""
    parser = option_parser(description, *paths)
    parser.add_argument("--seeds", type=int, default=5, help="random splits (%(default)s; with --quick 1)")
    options = parse(parser)
    if options.quick:
        options.seeds = 1
    return options


def environment_path(name: str) -> Path | None:
    value = os.environ.get(f"DFKDE_{name.upper()}")
    return Path(value) if value else None


# Generated data


def generated_data(names: Iterable[str]) -> dict[str, Path]:
    """Return the paths of small data of the kinds named, which are removed at exit."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    write: dict[str, Callable[[Path], None]] = {
        "tiles": lambda path: write_images(path, 30, grouped=True),
        "elpv": lambda path: write_images(path, 16),
        "weights": write_weights,
        "mvtec": write_categories,
    }
    paths = {name: folder / ("random.safetensors" if name == "weights" else name) for name in names}
    for name, path in paths.items():
        write[name](path)
    return paths


def write_images(folder: Path, n: int, *, grouped: bool = False) -> None:
    """Write `n` training and `n` test images in the MVTec layout, if `grouped` with a groups.csv of pairs."""
    write_mvtec_folder(make_textures(n, n, material="metal", image_size=64, random_state=0), folder)
    if grouped:
        paths = sorted(path.relative_to(folder) for path in folder.glob("t*/*/*.png"))
        with (folder / "groups.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["path", "group"])
            rows.writerows((path.as_posix(), f"{path.parent.as_posix()} {int(path.stem) // 2}") for path in paths)


def write_weights(file: Path, backbone: str = "mobilenetv2_100") -> None:
    """Write random weights."""
    import timm
    import torch
    from safetensors.torch import save_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(timm.create_model(backbone, num_classes=0).state_dict(), file)


def write_categories(folder: Path) -> None:
    """Write one category of features, with the normal rows that the splits need."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    name = next(iter(TRAINING_ROWS))
    normal = rng.normal(size=(TRAINING_ROWS[name] + 40, 48)) / np.arange(1, 49)
    anomalous = rng.normal(size=(40, 48)) / np.arange(1, 49) ** 0.8
    y = np.repeat([0, 1], [len(normal), len(anomalous)])
    np.savez(folder / f"{name}.npz", X=np.concatenate([normal, anomalous]).astype(np.float32), y=y)


# Data


def load_images(folder: Path) -> ImageSet:
    """Return the images of a folder in the order of their groups; without groups.csv each is a group of its own."""
    data = load_mvtec_folder(folder)
    paths = np.concatenate([data.X_train, data.X_test])
    names = [Path(path).relative_to(folder).as_posix() for path in paths]
    if (folder / "groups.csv").exists():
        with (folder / "groups.csv").open(newline="") as file:
            group_of = {row["path"]: row["group"] for row in csv.DictReader(file)}
        groups = np.array([group_of[name] for name in names])
    else:
        groups = np.array(names)
    is_defect = np.concatenate([data.y_train, data.y_test]) == 1
    is_train = np.arange(len(paths)) < len(data.X_train)
    order = np.argsort(groups, kind="stable")
    return ImageSet(paths[order], is_defect[order], groups[order], is_train[order])


def group_splits(images: ImageSet, n_seeds: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return normal images for training and for the test: as foldered, and with as many groups drawn at random."""
    normal = ~images.is_defect
    groups, n_train = np.unique(images.groups[normal]), len(np.unique(images.groups[images.is_train]))
    drawn = [np.random.default_rng(seed).permutation(groups)[:n_train] for seed in range(n_seeds)]
    trains = [images.is_train, *(normal & np.isin(images.groups, some) for some in drawn)]
    return [(np.flatnonzero(train), np.flatnonzero(normal & ~train)) for train in trains]


def load_categories(folder: Path) -> dict[str, NormalAndAnomalous]:
    """Return the normal and the anomalous rows of each category that is there."""
    files = {name: folder / f"{name}.npz" for name in TRAINING_ROWS}
    found = {name: load_rows(file) for name, file in files.items() if file.exists()}
    assert found, f"{folder} holds none of {', '.join(file.name for file in files.values())}."
    return found


def print_versions(*packages: str) -> None:
    names = ("dfkde-sklearn", "scikit-learn", *packages, "torch", "numpy")
    print(", ".join(f"{name} {version(name)}" for name in names), f"Python {platform.python_version()}", sep=", ")


def check_claims(claims: Mapping[str, bool], seconds: float, *, quick: bool = False) -> None:
    """Print the claims and whether they hold; raise AssertionError if one does not, unless the data are generated."""
    print(f"\n## Claims\n\n{seconds:.0f} s in all.{' Of generated data: nothing is asserted.' if quick else ''}\n")
    for claim, holds in claims.items():
        print(f"- {'holds' if holds else 'FAILS'}: {claim}")
    assert quick or all(claims.values()), [claim for claim, holds in claims.items() if not holds]


def mobilenet(weights: Path) -> Any:
    """Return the backbone."""
    import timm

    return timm.create_model(
        "mobilenetv2_100",
        pretrained=True,
        num_classes=0,
        pad_type="same",
        pretrained_cfg_overlay={"file": str(weights), "mean": (0.5,) * 3, "std": (0.5,) * 3},
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


def ledoit_wolf_scores(train: NDArray[np.float64], test: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what `sklearn.covariance.LedoitWolf` does as squared Mahalanobis distances.

    From inner products of rows, as there are far fewer rows than features: thousands of features are decomposed in
    milliseconds, not in seconds.
    """
    centred, deviations = train - train.mean(0), test - train.mean(0)
    n, n_features = centred.shape
    gram = centred @ centred.T
    squares = gram.diagonal()
    mean_variance = squares.sum() / n / n_features
    of_covariance = (gram**2).sum() / n**2
    noise = ((squares**2).sum() / n - of_covariance) / n_features / n
    shrinkage = min(1.0, noise / (of_covariance / n_features - mean_variance**2))
    eigenvalues, vectors = np.linalg.eigh(gram)
    spans = eigenvalues > n * np.finfo(np.float64).eps * eigenvalues[-1]
    eigenvalues, vectors = eigenvalues[spans], vectors[:, spans]
    coordinates = deviations @ centred.T @ vectors / np.sqrt(eigenvalues)
    floor = shrinkage * mean_variance
    scores = (coordinates**2 / ((1 - shrinkage) * eigenvalues / n + floor)).sum(1)
    if len(eigenvalues) < n_features:
        # All directions that the rows do not span have one variance.
        scores += ((deviations**2).sum(1) - (coordinates**2).sum(1)) / floor
    return scores


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


def group_interval(
    scores: tuple[NDArray[Any], NDArray[Any]], groups: tuple[NDArray[np.str_], NDArray[np.str_]]
) -> tuple[float, float, float]:
    """Return the AUROC of (normal, anomalous), and the bounds of its 95 % bootstrap interval over test groups."""
    rng = np.random.default_rng(0)
    members = [[np.flatnonzero(of == group) for group in np.unique(of)] for of in groups]

    def drawn() -> list[NDArray[Any]]:
        picks = [rng.integers(len(rows), size=len(rows)) for rows in members]
        return [
            of[np.concatenate([rows[i] for i in pick])] for of, rows, pick in zip(scores, members, picks, strict=True)
        ]

    return auroc(*scores), *np.quantile([auroc(*drawn()) for _ in range(1000)], [0.025, 0.975]).tolist()


def print_heading(title: str, options: str, text: str) -> None:
    command = f"python benchmarks/{Path(sys.argv[0]).name} {options}"
    print(f"\n## {title}\n\nCommand: `{command}`. {text}\n", flush=True)


# Whether tables become figures of the pages: ``--write``, and not of generated data.
WRITES = False


def write_figure(name: str, rows: Sequence[Mapping[str, str]]) -> None:
    """Write a table to `docs/figures`, from where the pages include it."""
    file = Path(__file__).parents[1] / "docs" / "figures" / f"{name}.csv"
    file.parent.mkdir(exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"\nWritten to {file.relative_to(file.parents[2])}.")


def print_table(
    corner: str,
    rows: Mapping[str, Mapping[str, float | str]],
    figure: str | None = None,
    shown: Sequence[str] | None = None,
) -> None:
    """Print a table in markdown; with ``--write`` its columns `shown`, or all, become the `figure` of a page."""
    columns: Sequence[str] = list(next(iter(rows.values())))
    print(f"| {corner} | {' | '.join(columns)} |")
    print(f"|---|{'---|' * len(columns)}")
    written: list[dict[str, str]] = []
    for name, row in rows.items():
        cells = {
            column: value if isinstance(value, str) else f"{value:.3f}"
            for column, value in ((column, row[column]) for column in columns)
        }
        print(f"| {name} | {' | '.join(cells.values())} |", flush=True)
        # Two backquotes are code in the pages.
        of_page = {column: cells[column] for column in shown or columns}
        written.append({corner: name.replace("`", "``")} | of_page)
    if figure is not None and WRITES:
        write_figure(figure, written)
