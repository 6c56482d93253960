"""What larger images, and tiles of them, are worth to densities at every position, above all for small defects.

    python benchmarks/resolution.py --tiles FOLDER --elpv FOLDER --weights FILE
    python benchmarks/resolution.py --quick

The folders and the file are those of `real_data.py`, which see; the weights are of a MobileNetV2, which was trained
at 224 x 224. "weave", "metal" and "leather" are generated photographs, put together from 4 x 4 pieces of 128 pixels
of which one may have a defect: small defects in large images. Prints the table, and the claims, asserted.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from positions import detector, figures_of_scores, masks_of, row, shown, split_by_group
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

from dfkde_sklearn import PatchDFKDEDetector, TimmFeatures
from dfkde_sklearn.datasets import make_textures
from dfkde_sklearn.metrics import aupro

# How images are seen.
SETTINGS: dict[str, dict[str, Any]] = {
    "224": {},
    "320": {"image_size": 320},
    "448": {"image_size": 448},
    "448, tiles of 224": {"image_size": 448, "tile_size": 224},
}
MATERIALS = ("weave", "metal", "leather")
PIECES, SIDE = 4, 128


class Mosaics(NamedTuple):
    """Large images with small defects; a mask is None where there is no defect."""

    train: NDArray[np.uint8]
    test: NDArray[np.uint8]
    masks: list[NDArray[np.bool_] | None]


def main() -> None:
    parser = option_parser(__doc__, "tiles", "elpv", "weights")
    parser.add_argument("--splits", type=int, default=3, help="random splits by group (%(default)s)")
    options = parse(parser)
    start = time.perf_counter()
    print_versions("timm")
    network = mobilenet(options.weights)
    settings = dict(list(SETTINGS.items())[:1]) if options.quick else SETTINGS
    n_images, n_mosaics, n_splits = (6, 8, 1) if options.quick else (200, 60, options.splits)

    def features(setting: dict[str, Any]) -> TimmFeatures:
        return TimmFeatures(network, pooling=None, **setting)

    table: dict[str, dict[str, float | str]] = {}
    for name, folder in {"magnetic tiles": options.tiles, "solar cells": options.elpv}.items():
        if folder is None:
            continue
        images = load_images(folder)
        masks = masks_of(folder, images)
        splits = [split_by_group(images, n_images, seed) for seed in range(n_splits)]
        for size, setting in settings.items():
            maps = features(setting).fit_transform(images.paths.tolist())
            figures = shown(row(lambda *of: detector({}, *of), images, maps, masks, splits))
            figures["image AUROC"] = figures["image AUROC"].split()[0]
            table[f"{name}, {size}"] = {column: figures[column] for column in COLUMNS}
    claims: dict[str, bool] = {}
    for material in MATERIALS:
        data = mosaics(material, n_mosaics)
        for size, setting in settings.items():
            table[f"{material}, {size}"] = of_mosaics(data, features(setting))
        if not options.quick:
            whole, tiled = (table[f"{material}, {size}"] for size in ("224", "448, tiles of 224"))
            gain = {column: float(tiled[column]) - float(whole[column]) for column in ("image AUROC", "AUPRO")}
            claims[f"{material}: tiles gain {gain['AUPRO']:.3f} in AUPRO, at least 0.04"] = gain["AUPRO"] >= 0.04
            claims[f"{material}: and {gain['image AUROC']:.3f} in AUROC, more than -0.02"] = gain["image AUROC"] > -0.02
    print_heading(
        "Resolution and tiles, MobileNetV2",
        "--tiles FOLDER --elpv FOLDER --weights FILE",
        f"{n_images} training images, mean of {n_splits} splits by group; generated: {n_mosaics} for training and as "
        "many for the test, half of them with a defect in one of 16 pieces.",
    )
    print_table("images, pixels", table, "resolution_tiles")
    check_claims(claims, time.perf_counter() - start, quick=options.quick)


COLUMNS = ("image AUROC", "AUPRO", "false alarms", "found", "found at 5 %")


def mosaics(material: str, n: int) -> Mosaics:
    """Return `n` training and `n` test images of 4 x 4 pieces; every second test image has a defect in one of them."""
    pieces = make_textures(n * PIECES**2, n, material=material, image_size=SIDE, random_state=0)
    good = make_textures(n * PIECES**2, 1, material=material, image_size=SIDE, random_state=1)
    test = joined(good.X_train)
    masks: list[NDArray[np.bool_] | None] = []
    rng = np.random.default_rng(0)
    for image, piece, defect in zip(test, pieces.X_test, pieces.masks_test, strict=True):
        if not defect.any():
            masks.append(None)
            continue
        y, x = rng.integers(PIECES, size=2) * SIDE
        image[y : y + SIDE, x : x + SIDE] = piece
        mask = np.zeros(image.shape, dtype=bool)
        mask[y : y + SIDE, x : x + SIDE] = defect
        masks.append(mask)
    return Mosaics(joined(pieces.X_train), test, masks)


def joined(pieces: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return images of 4 x 4 consecutive pieces each."""
    grid = pieces.reshape(-1, PIECES, PIECES, SIDE, SIDE)
    return grid.transpose(0, 1, 3, 2, 4).reshape(-1, PIECES * SIDE, PIECES * SIDE).copy()


def of_mosaics(data: Mosaics, features: TimmFeatures) -> dict[str, float | str]:
    """Return the figures of the default detector."""
    fitted = PatchDFKDEDetector(features).fit(data.train)
    assessment, maps = fitted.assess_with_maps(data.test)
    is_defect = np.array([mask is not None for mask in data.masks])
    good, bad = assessment.log_density[~is_defect], assessment.log_density[is_defect]
    figures = figures_of_scores(good, bad, fitted.offset_) | {"AUPRO": aupro(data.masks, list(maps))}
    return {column: f"{figures[column]:.3f}" for column in COLUMNS}


if __name__ == "__main__":
    main()
