"""What `reducing_gap` saves when large images are read, and what it changes.

    python benchmarks/reading.py --tiles FOLDER --elpv FOLDER --weights FILE
    python benchmarks/reading.py --quick

A generated photograph is stored in several sizes, as JPEG (quality 90) and as PNG, and read as `TimmFeatures` reads
it for a network of 224 x 224 pixels: decoded, resized and normalised, in one thread. The settings take turns; the table
has the median milliseconds, and in brackets the largest difference in grey levels of 255 from the image that is resized
from all pixels. The folders and the file are those of `real_data.py`, which see. Their photographs are small: seen at
128 x 128 with the smallest gap, 1, most are halved first, and the second table has what that changes.
It is asserted that a gap of 2 makes JPEG files of 5 megapixels three times as fast to read and changes no grey level by
more than 4, and that no AUROC changes by more than 0.01 with a gap of 1. Takes about three minutes on two cores.
"""

from __future__ import annotations

import argparse
import io
import time
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from positions import detector, row, shown, split_by_group
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

from dfkde_sklearn import TimmFeatures
from dfkde_sklearn._images import as_images
from dfkde_sklearn.datasets import make_textures

SIZES = ((640, 480), (1000, 1000), (2448, 2048), (4000, 3000))
LARGE = (2448, 2048)
GAPS = (None, 3.0, 2.0, 1.0)
# In one standard deviation of a channel, to which images are normalised here.
GREY_LEVELS = 255 * 0.5


def main() -> None:
    parser = option_parser(__doc__, "tiles", "elpv", "weights")
    parser.add_argument("--splits", type=int, default=3, help="random splits by group (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each setting (%(default)s)")
    options = parse(parser)
    start = time.perf_counter()
    print_versions("timm", "pillow")
    torch.set_num_threads(1)
    network = mobilenet(options.weights)
    claims = of_reading(network, options) | of_detection(network, options)
    check_claims(claims, time.perf_counter() - start, quick=options.quick)


def of_reading(network: Any, options: argparse.Namespace) -> dict[str, bool]:
    """Print how long images take to read, and return the claims."""
    blank = np.zeros((1, 8, 8, 3), np.uint8)
    extractors = {gap: TimmFeatures(network, image_size=224, reducing_gap=gap).fit(blank) for gap in GAPS}
    transforms = {gap: (extractor.image_transform(), extractor._reduction()) for gap, extractor in extractors.items()}
    table: dict[str, dict[str, float | str]] = {}
    claims: dict[str, bool] = {}
    for size in SIZES[:2] if options.quick else SIZES:
        for form in ("JPEG", "PNG"):
            images = as_images([photograph(size, form)])
            seconds: dict[float | None, list[float]] = {gap: [] for gap in GAPS}
            seen: dict[float | None, torch.Tensor] = {}
            for _ in range(1 if options.quick else options.rounds):
                for gap, (transform, reduction) in transforms.items():
                    start = time.perf_counter()
                    seen[gap] = transform(images.picture(0, reduction))
                    seconds[gap].append(time.perf_counter() - start)
            took = {gap: 1000 * median(of_gap) for gap, of_gap in seconds.items()}
            change = {gap: float((seen[gap] - seen[None]).abs().max()) * GREY_LEVELS for gap in GAPS}
            name = f"{size[0]} x {size[1]}, {form}"
            table[name] = {"all pixels": f"{took[None]:.1f}"}
            table[name] |= {f"gap {gap:g}": f"{took[gap]:.1f} ({change[gap]:.0f})" for gap in GAPS if gap}
            if size == LARGE and form == "JPEG":
                claims[f"{name}: {took[None] / took[2]:.1f} times as fast, at least 3"] = took[None] >= 3 * took[2]
                claims[f"{name}: {change[2]:.1f} grey levels, at most 4"] = change[2] <= 4
    print_heading(
        "Reading",
        "--tiles FOLDER --elpv FOLDER --weights FILE",
        "Milliseconds an image, and largest change in grey levels.",
    )
    print_table("image", table, "reading_times")
    return claims


def photograph(size: tuple[int, int], form: str) -> bytes:
    """Return an encoded photograph of leather, with the noise of a camera."""
    (pixels,) = make_textures(1, 1, material="leather", image_size=512, random_state=0).X_train
    picture = Image.fromarray(pixels).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    noise = np.random.default_rng(0).normal(0, 3, (size[1], size[0], 3))
    file = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8)).save(file, form, quality=90)
    return file.getvalue()


def of_detection(network: Any, options: argparse.Namespace) -> dict[str, bool]:
    """Print what the smallest gap changes in the detection of defects, and return the claims."""
    table: dict[str, dict[str, float | str]] = {}
    claims: dict[str, bool] = {}
    n_images, n_splits = (6, 1) if options.quick else (200, options.splits)
    for name, folder in {"magnetic tiles": options.tiles, "solar cells": options.elpv}.items():
        if folder is None:
            continue
        images = load_images(folder)
        splits = [split_by_group(images, n_images, seed) for seed in range(n_splits)]
        found: dict[str, float] = {}
        for setting, gap in {"all pixels": None, "gap 1": 1}.items():
            features = TimmFeatures(network, pooling=None, image_size=128, reducing_gap=gap)
            maps = features.fit_transform(images.paths.tolist())
            figures = row(lambda *of: detector({}, *of), images, maps, None, splits)
            table[f"{name}, {setting}"] = {column: shown(figures)[column] for column in COLUMNS}
            found[setting] = float(figures["image AUROC"].mean())
        change = found["gap 1"] - found["all pixels"]
        claims[f"{name}: AUROC {change:+.4f}, at most 0.01 in size"] = abs(change) <= 0.01
    text = f"{n_images} training images, mean of {n_splits} splits by group; images of 128 x 128 pixels."
    print_heading("Detection", "--tiles FOLDER --elpv FOLDER --weights FILE", text)
    print_table("images, resized from", table, "reading_detection")
    return claims


COLUMNS = ("image AUROC", "false alarms", "found", "found at 5 %")


if __name__ == "__main__":
    main()
