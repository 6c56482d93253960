"""What a density at each position of the image is worth: the rivals on the same maps, by group.

    python benchmarks/positions.py --tiles FOLDER --elpv FOLDER --weights FILE
    python benchmarks/positions.py --quick

The folders and the file are those of `real_data.py`, which see. Each split draws the groups of the training images, and
of these the images; the other good images and all defective ones are the test. Prints one table in markdown for each
set and number of training images: the image AUROC (mean, least and largest of the splits), the AUROC of the pixels and
the AUPRO where there are masks, and the shares of good and defective test images below a threshold for 5 % false alarms
from scores of training images by fits without their groups.

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
    mobilenet,
    option_parser,
    parse,
    print_heading,
    print_table,
    print_versions,
)
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from dfkde_sklearn._calibration import threshold_at_rate
from dfkde_sklearn.datasets import load_mvtec_folder, read_mask
from dfkde_sklearn.metrics import aupro, pixel_roc_auc

# A fitted rival: vectors (n, positions, channels) -> values (n, positions), or (n, 1) if pooled; lower is anomalous.
Scorer = Callable[[Tensor], Tensor]

# Strides 8 and 16.
LAYERS = ("blocks.2", "blocks.4")
N_FOLDS = 10
RATE = 0.05
# Of the smoothing of the maps, as a share of the image's height: 4 pixels of 224.
SIGMA = 4 / 224


def main() -> None:
    parser = option_parser(__doc__, "tiles", "elpv", "weights")
    parser.add_argument("--splits", type=int, default=3, help="random splits by group (%(default)s)")
    options = parse(parser)
    start = time.perf_counter()
    torch.set_num_threads(1)
    print_versions("timm")
    sizes, n_splits = ((6,), 1) if options.quick else ((20, 60, 200), options.splits)
    claims: dict[str, bool] = {}
    for name, folder in {"tiles": options.tiles, "elpv": options.elpv}.items():
        if folder is None:
            continue
        images = load_images(folder)
        maps = grid_features(images.paths.tolist(), mobilenet(options.weights))
        masks = masks_of(folder, images)
        for n in sizes:
            splits = [split_by_group(images, n, seed) for seed in range(n_splits)]
            table = {method: row(fit, images, maps, masks, splits) for method, fit in rivals().items()}
            print_heading(
                f"{name}, {n} training images", f"--{name} FOLDER --weights FILE", f"Splits by group: {n_splits}."
            )
            print_table("method", {method: shown(figures) for method, figures in table.items()})
            by_position, pooled = (table[method]["image AUROC"].mean() for method in ("PaDiM", "Ledoit-Wolf, pooled"))
            claims[f"{name}, {n}: PaDiM {by_position:.3f} is above pooled {pooled:.3f}"] = bool(by_position > pooled)
    check_claims(claims, time.perf_counter() - start, quick=options.quick)


def rivals() -> dict[str, Callable[[Tensor], Scorer]]:
    return {
        "PaDiM": padim,
        "PatchCore 4 %": partial(patchcore, share=0.04),
        "PatchCore 1 %": partial(patchcore, share=0.01),
        "Ledoit-Wolf, pooled": ledoit_wolf,
        "nearest neighbour, pooled": nearest,
    }


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
    fit: Callable[[Tensor], Scorer],
    images: ImageSet,
    maps: Tensor,
    masks: list[NDArray[np.bool_] | None] | None,
    splits: list[tuple[NDArray[np.int64], NDArray[np.int64]]],
) -> dict[str, NDArray[np.float64]]:
    """Return each figure by split."""
    defective = np.flatnonzero(images.is_defect)
    figures: dict[str, list[float]] = {}
    for train, good in splits:
        scorer = fit(maps[train].flatten(1, 2))
        values = scorer(maps[np.concatenate([good, defective])].flatten(1, 2))
        scores = values.amin(1).numpy()
        good_scores, defect_scores = scores[: len(good)], scores[len(good) :]
        calibration = np.empty(len(train), dtype=scores.dtype)
        for fold in folds_by_group(images.groups[train], N_FOLDS):
            without = fit(maps[np.delete(train, fold)].flatten(1, 2))
            calibration[fold] = without(maps[train[fold]].flatten(1, 2)).amin(1).numpy()
        threshold = threshold_at_rate(calibration, RATE)
        found = {
            "image AUROC": auroc(-good_scores, -defect_scores),
            "false alarms": float(np.mean(good_scores < threshold)),
            "found": float(np.mean(defect_scores < threshold)),
        }
        if masks is not None and values.shape[1] > 1:
            test = np.concatenate([good, defective])
            anomaly_maps = [
                in_pixels(of_image.view(maps.shape[1:3]), size_of(str(images.paths[i])))
                for i, of_image in zip(test, values, strict=True)
            ]
            test_masks = [masks[i] for i in test]
            found["pixel AUROC"] = pixel_roc_auc(test_masks, anomaly_maps)
            found["AUPRO"] = aupro(test_masks, anomaly_maps)
        for name, figure in found.items():
            figures.setdefault(name, []).append(figure)
    return {name: np.array(of_splits) for name, of_splits in figures.items()}


def shown(figures: dict[str, NDArray[np.float64]]) -> dict[str, str]:
    """Return the cells of a row."""
    of_images = figures["image AUROC"]
    cells = {"image AUROC": f"{of_images.mean():.3f} ({of_images.min():.3f} to {of_images.max():.3f})"}
    for name in ("pixel AUROC", "AUPRO", "false alarms", "found"):
        cells[name] = f"{figures[name].mean():.3f}" if name in figures else "-"
    return cells


# Images


def grid_features(paths: list[str], network: nn.Module) -> Tensor:
    """Return the maps of the layers, 3 x 3 means, on the grid of the coarsest, side by side: (n, h, w, C)."""
    network.eval()
    outputs: dict[str, Tensor] = {}
    hooks = [
        network.get_submodule(layer).register_forward_hook(
            lambda _, __, output, layer=layer: outputs.update({layer: output})
        )
        for layer in LAYERS
    ]
    batches = []
    with torch.inference_mode():
        for i in range(0, len(paths), 16):
            network(torch.stack([as_input(path) for path in paths[i : i + 16]]))
            means = [nn.functional.avg_pool2d(outputs[layer], 3, 1, 1, count_include_pad=False) for layer in LAYERS]
            grid = min((of_layer.shape[2:] for of_layer in means), key=lambda shape: shape[0])
            on_grid = [nn.functional.interpolate(of_layer, grid, mode="bilinear") for of_layer in means]
            batches.append(torch.cat(on_grid, 1).permute(0, 2, 3, 1))
    for hook in hooks:
        hook.remove()
    return torch.cat(batches).clone()


def as_input(path: str) -> Tensor:
    """Return the whole image, squashed, as the network takes it: from -1 to 1."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)


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


def in_pixels(values: Tensor, size: tuple[int, int]) -> NDArray[np.float32]:
    """Return a map in the pixels of the image, smoothed."""
    map_ = nn.functional.interpolate(values.float()[None, None], size, mode="bilinear")[0, 0].numpy()
    return gaussian_filter(map_, (SIGMA * size[0], SIGMA * size[1]))


if __name__ == "__main__":
    main()
