"""What a density at each position of the image is worth: the rivals on the same maps, by group.

    python benchmarks/positions.py --tiles FOLDER --elpv FOLDER --weights FILE
    python benchmarks/positions.py --quick

The folders and the file are those of `real_data.py`, which see. Each split draws the groups of the training images, and
of these the images; the other good images and all defective ones are the test. Prints one table in markdown for each
set and number of training images: the image AUROC (mean, least and largest of the splits), the AUROC of the pixels and
the AUPRO where there are masks, and the shares of good and defective test images below a threshold for 5 % false alarms
from scores of training images by fits without their groups. "Found at 5 %" has its threshold from the good test images:
what a method could find with the right threshold.

The rivals are written from their papers: PaDiM [1]_ with all dimensions, PatchCore [2]_ without its re-weighting, and
Ledoit-Wolf and nearest-neighbour distances of the features' means over the positions.

References
----------
.. [1] Defard et al. (2021), PaDiM, doi:10.1007/978-3-030-68799-1_35
.. [2] Roth et al. (2022), Towards total recall in industrial anomaly detection, doi:10.1109/CVPR52688.2022.01392
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from real_data import (
    ImageSet,
    auroc,
    check_claims,
    ledoit_wolf_scores,
    load_images,
    option_parser,
    parse,
    print_heading,
    print_table,
    print_versions,
    write_figure,
)
from torch import Tensor

from dfkde_sklearn import DFKDEDetector, PatchDFKDEDetector, TimmFeatures
from dfkde_sklearn._calibration import threshold_at_rate
from dfkde_sklearn._maps import image_maps
from dfkde_sklearn.datasets import load_mvtec_folder, read_mask
from dfkde_sklearn.metrics import aupro, pixel_roc_auc

# A fitted rival: vectors (n, positions, channels) -> values (n, positions), or (n, 1) if pooled; lower is anomalous.
Scorer = Callable[[Tensor], Tensor]

# Networks, and what timm has to be told of them.
BACKBONES: dict[str, dict[str, Any]] = {"mobilenetv2_100": {"pad_type": "same"}, "tf_efficientnet_lite0": {}}
N_FOLDS = 10
RATE = 0.05
# Of scoring, in units of the time of the network.
MAX_COST = 1.1


def main() -> None:
    parser = option_parser(__doc__, "tiles", "elpv", "weights")
    parser.add_argument(
        "--backbone",
        choices=BACKBONES,
        default=next(iter(BACKBONES)),
        help="what the weights are of (%(default)s)",
    )
    parser.add_argument("--splits", type=int, default=3, help="random splits by group (%(default)s)")
    options = parse(parser)
    start = time.perf_counter()
    print_versions("timm")
    sizes, n_splits = ((6,), 1) if options.quick else ((20, 60, 200), options.splits)
    claims: dict[str, bool] = {}
    for name, folder in {"tiles": options.tiles, "elpv": options.elpv}.items():
        if folder is None:
            continue
        images = load_images(folder)
        extractor = TimmFeatures(backbone(options.backbone, options.weights), pooling=None)
        maps = extractor.fit_transform(images.paths.tolist())
        masks = masks_of(folder, images)
        written: list[dict[str, str]] = []
        for n in sizes:
            splits = [split_by_group(images, n, seed) for seed in range(n_splits)]
            table = {name: row(method, images, maps, masks, splits) for name, method in methods().items()}
            print_heading(
                f"{name}, {n} training images, {options.backbone}",
                f"--{name} FOLDER --weights FILE",
                f"Splits by group: {n_splits}.",
            )
            print_table("method", {method: shown(figures) for method, figures in table.items()})
            written += [{"images": str(n), "method": method} | shown(figures) for method, figures in table.items()]
            ours, *others = (
                table[method]["image AUROC"].mean()
                for method in ("density at each position", "PaDiM", "PatchCore 4 %", "Ledoit-Wolf, pooled")
            )
            claims[f"{name}, {n}: {ours:.3f} is within .01 of the best rival, {max(others):.3f}"] = bool(
                ours > max(others) - 0.01
            )
        if options.write and not options.quick:
            write_figure(f"positions_{name}_{options.backbone}", written)
        ratio = cost(extractor, images)
        claims[f"{name}: an image takes {ratio:.3f} times what its features take"] = ratio <= MAX_COST
    check_claims(claims, time.perf_counter() - start, quick=options.quick)


def cost(extractor: TimmFeatures, images: ImageSet) -> float:
    """Return the time of scoring images, with the network, over that of the network alone; the median of pairs."""
    paths = images.paths[:64].tolist()
    is_drawn = np.flatnonzero(images.is_train)[:200]
    fitted = PatchDFKDEDetector(extractor).fit(images.paths[is_drawn].tolist(), groups=images.groups[is_drawn])
    ratios = []
    for _ in range(5):
        start = time.perf_counter()
        fitted.features_.transform(paths)
        middle = time.perf_counter()
        fitted.score_samples(paths)
        ratios.append((time.perf_counter() - middle) / (middle - start))
    return float(np.median(ratios))


class Result(NamedTuple):
    """What a method says of test images: scores (n,) and maps (n, positions), lower is anomalous, and a threshold."""

    scores: NDArray[np.floating]
    maps: NDArray[np.floating] | None
    threshold: float


# Features of training images (n, h, w, C), their groups, features of test images -> what it says of these.
Method = Callable[[NDArray[np.float32], NDArray[np.str_], NDArray[np.float32]], Result]


def methods() -> dict[str, Method]:
    return {
        "density at each position": partial(detector, {}),
        "... as one Gaussian": partial(detector, {"density": "gaussian"}),
        "... not normalised": partial(detector, {"normalization": 0.0}),
        "... pooled share 0": partial(detector, {"pooled_share": 0.0}),
        "... pooled share .5": partial(detector, {"pooled_share": 0.5}),
        "... not mirrored": partial(detector, {"mirror": False}),
        "DFKDEDetector, pooled": pooled_detector,
        "PaDiM": partial(rival, padim, 1),
        "PaDiM, lowest 3 %": partial(rival, padim, 6),
        "PatchCore 4 %": partial(rival, partial(patchcore, share=0.04), 1),
        "PatchCore 4 %, lowest 3 %": partial(rival, partial(patchcore, share=0.04), 6),
        "Ledoit-Wolf, pooled": partial(rival, ledoit_wolf, 1),
        "nearest neighbour, pooled": partial(rival, nearest, 1),
    }


def detector(
    settings: dict[str, Any], train: NDArray[np.float32], groups: NDArray[np.str_], test: NDArray[np.float32]
) -> Result:
    """Return what PatchDFKDEDetector says."""
    fitted = PatchDFKDEDetector(features=None, **({"normalization": 0.5} | settings)).fit(train, groups=groups)
    assessment, maps = fitted.assess_with_maps(test, resolution="grid")
    return Result(assessment.log_density, np.asarray(maps).reshape(len(test), -1), fitted.offset_)


def pooled_detector(train: NDArray[np.float32], groups: NDArray[np.str_], test: NDArray[np.float32]) -> Result:
    """Return what DFKDEDetector says of the features' means over the positions."""
    fitted = DFKDEDetector().fit(train.mean((1, 2)), groups=groups)
    return Result(fitted.score_samples(test.mean((1, 2))), None, fitted.offset_)


def rival(
    fit: Callable[[Tensor], Scorer],
    n_lowest: int,
    train: NDArray[np.float32],
    groups: NDArray[np.str_],
    test: NDArray[np.float32],
) -> Result:
    """Return what a rival says: scores are means of the lowest values, and the threshold is by fits without a fold."""
    vectors = torch.from_numpy(train).flatten(1, 2)

    def scored(values: Tensor) -> NDArray[np.floating]:
        k = min(n_lowest, values.shape[1])
        return values.topk(k, dim=1, largest=False).values.mean(1).numpy()

    values = fit(vectors)(torch.from_numpy(test).flatten(1, 2))
    calibration = np.empty(len(train), dtype=np.float64)
    for fold in folds_by_group(groups, N_FOLDS):
        others = np.setdiff1d(np.arange(len(train)), fold)
        calibration[fold] = scored(fit(vectors[others])(vectors[fold]))
    return Result(scored(values), values.numpy() if values.shape[1] > 1 else None, threshold_at_rate(calibration, RATE))


# Rivals


def padim(train: Tensor) -> Scorer:
    """Return negated Mahalanobis distances by a Gaussian at each position."""
    means = train.mean(0)
    deviations = (train - means).transpose(0, 1)
    covariances = deviations.mT @ deviations / (len(train) - 1) + 0.01 * torch.eye(train.shape[2])
    factors = torch.linalg.cholesky(covariances)

    def scores(vectors: Tensor) -> Tensor:
        white = torch.linalg.solve_triangular(factors, (vectors - means).permute(1, 2, 0), upper=False)
        return -white.square().sum(1).sqrt().T

    return scores


def patchcore(train: Tensor, share: float) -> Scorer:
    """Return negated distances to the nearest of a coreset of the vectors of all positions."""
    vectors = train.flatten(0, 1)
    generator = torch.Generator().manual_seed(0)
    # Distances survive a random projection (Johnson and Lindenstrauss), as in the paper.
    projected = vectors @ torch.randn(vectors.shape[1], 64, generator=generator) / 8
    bank = vectors[k_centers(projected, max(1, round(share * len(vectors))))]

    def scores(test: Tensor) -> Tensor:
        return -torch.cat(
            [torch.cdist(some.flatten(0, 1), bank).amin(1).view(len(some), -1) for some in test.split(16)]
        )

    return scores


def k_centers(vectors: Tensor, k: int) -> Tensor:
    """Return the indices of `k` vectors: the first, then always the one that is farthest from those before."""
    chosen = torch.zeros(k, dtype=torch.int64)
    squares = vectors.square().sum(1)
    distances = torch.full_like(squares, torch.inf)
    for i in range(1, k):
        last = chosen[i - 1]
        to_last = squares + squares[last] - 2 * (vectors @ vectors[last])
        distances = torch.minimum(distances, to_last)
        chosen[i] = distances.argmax()
    return chosen


def ledoit_wolf(train: Tensor) -> Scorer:
    pooled = train.mean(1).double().numpy()
    return lambda vectors: -torch.from_numpy(ledoit_wolf_scores(pooled, vectors.mean(1).double().numpy()))[:, None]


def nearest(train: Tensor) -> Scorer:
    return lambda vectors: -torch.cdist(vectors.mean(1), train.mean(1)).amin(1, keepdim=True)


# The protocol


def split_by_group(images: ImageSet, n: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return `n` training images, and the good images of all groups that could have been drawn for training."""
    good = ~images.is_defect
    rng = np.random.default_rng(seed)
    n_train = np.count_nonzero(images.is_train)
    drawn: list[int] = []
    for group in rng.permutation(np.unique(images.groups[good])):
        if len(drawn) >= n_train:
            break
        drawn += np.flatnonzero(good & (images.groups == group)).tolist()
    test = np.setdiff1d(np.flatnonzero(good), drawn)
    # The same test images for every n.
    return np.sort(rng.permutation(drawn)[:n]), test


def folds_by_group(groups: NDArray[np.str_], n_folds: int) -> list[NDArray[np.int64]]:
    """Return the rows of each fold: whole groups, the largest first, each to the smallest fold."""
    names, counts = np.unique(groups, return_counts=True)
    folds: list[list[int]] = [[] for _ in range(min(n_folds, len(names)))]
    for i in np.argsort(-counts, kind="stable"):
        min(folds, key=len).extend(np.flatnonzero(groups == names[i]).tolist())
    return [np.array(fold) for fold in folds]


def row(
    method: Method,
    images: ImageSet,
    maps: NDArray[np.float32],
    masks: list[NDArray[np.bool_] | None] | None,
    splits: list[tuple[NDArray[np.int64], NDArray[np.int64]]],
) -> dict[str, NDArray[np.float64]]:
    """Return each figure by split."""
    defective = np.flatnonzero(images.is_defect)
    figures: dict[str, list[float]] = {}
    for train, good in splits:
        test = np.concatenate([good, defective])
        result = method(maps[train], images.groups[train], maps[test])
        good_scores, defect_scores = result.scores[: len(good)], result.scores[len(good) :]
        found = figures_of_scores(good_scores, defect_scores, result.threshold)
        if masks is not None and result.maps is not None:
            shapes = [size_of(str(images.paths[i])) for i in test]
            anomaly_maps = list(image_maps(result.maps.reshape(-1, *maps.shape[1:3]), shapes))
            test_masks = [masks[i] for i in test]
            found["pixel AUROC"] = pixel_roc_auc(test_masks, anomaly_maps)
            found["AUPRO"] = aupro(test_masks, anomaly_maps)
        for name, figure in found.items():
            figures.setdefault(name, []).append(figure)
    return {name: np.array(of_splits) for name, of_splits in figures.items()}


def figures_of_scores(
    good: NDArray[np.floating], defective: NDArray[np.floating], threshold: float
) -> dict[str, float]:
    """Return the figures that follow from scores of good and of defective test images, and a threshold."""
    return {
        "image AUROC": auroc(-good, -defective),
        "false alarms": float(np.mean(good < threshold)),
        "found": float(np.mean(defective < threshold)),
        # What could be found with a threshold that the good test images themselves set.
        "found at 5 %": float(np.mean(defective < threshold_at_rate(good, RATE))),
    }


def shown(figures: dict[str, NDArray[np.float64]]) -> dict[str, str]:
    """Return the cells of a row."""
    of_images = figures["image AUROC"]
    cells = {"image AUROC": f"{of_images.mean():.3f} ({of_images.min():.3f} to {of_images.max():.3f})"}
    for name in ("pixel AUROC", "AUPRO", "false alarms", "found", "found at 5 %"):
        cells[name] = f"{figures[name].mean():.3f}" if name in figures else "-"
    return cells


# Images


def backbone(name: str, weights: Path) -> Any:
    """Return the network, for images from -1 to 1."""
    import timm

    overlay = {"file": str(weights), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, **BACKBONES[name])


def size_of(path: str) -> tuple[int, int]:
    """Return height and width."""
    with Image.open(path) as image:
        return image.height, image.width


def masks_of(folder: Path, images: ImageSet) -> list[NDArray[np.bool_] | None] | None:
    """Return the mask of each image, None for good ones; or None if a defective image has none."""
    data = load_mvtec_folder(folder)
    file_of = dict(zip(data.X_test, data.masks_test, strict=True))
    files = [file_of.get(path) if bad else None for path, bad in zip(images.paths, images.is_defect, strict=True)]
    if any(file is None for file, bad in zip(files, images.is_defect, strict=True) if bad):
        return None
    return [None if file is None else np.asarray(read_mask(file)) != 0 for file in files]


if __name__ == "__main__":
    main()
