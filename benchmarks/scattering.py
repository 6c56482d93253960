"""Scattering coefficients on coarse grids, against every path at full resolution.

    python benchmarks/scattering.py
    python benchmarks/scattering.py --quick

Both transform the same generated textures with the same wavelets, modulus and statistics, in float32. The
reference keeps all maps at the size of the image and computes them path after path, each for the whole batch; the
Fourier transform of a first-order map is shared by its second-order paths. The two take turns in pairs; the
table has the medians over the pairs and the difference of the statistics, as natural logarithms. The last lines
assert what is claimed: at least five times the speed.

One thread by default: the ratio then tells about the arithmetic, not about how torch shares out small and large
transforms among cores.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import numpy as np
import torch

from dfkde_sklearn._features.wavelets import (
    STATISTICS,
    _inside,
    _modulus,
    _statistics,
    morlet_filters,
    scattering_coefficients,
    wavelet_cascade,
)
from dfkde_sklearn.datasets import make_textures

SCALES, ORIENTATIONS, IMAGE_SIZE = 4, 8, 128
BORDER = 2**SCALES
SIZE = IMAGE_SIZE + 2 * BORDER


def full_resolution_coefficients(images: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """Return what `scattering_coefficients` does, from maps that all have the size of the images."""
    margin = BORDER / SIZE
    spectrum = torch.fft.fft2(images, norm="forward")
    first, second = [], []
    for scale, orientation in np.ndindex(SCALES, ORIENTATIONS):
        maps = _modulus(torch.fft.ifft2(spectrum * filters[scale, orientation], norm="forward"))
        first.append(_statistics(_inside(maps, margin)))
        spectra = torch.fft.fft2(maps, norm="forward") if scale + 1 < SCALES else None
        for coarser in filters[scale + 1 :].flatten(0, 1):
            maps_after = _modulus(_inside(torch.fft.ifft2(spectra * coarser, norm="forward"), margin))
            second.append(_statistics(maps_after))
    return torch.stack(first + second, dim=1)


def seconds(call: Callable[[], torch.Tensor]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8, help="images in the batch (default: 8)")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of timings (default: 7)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--quick", action="store_true", help="one pair of two images: shows that it runs")
    options = parser.parse_args()
    if options.quick:
        options.images, options.pairs = 2, 1
    torch.set_num_threads(options.threads)

    textures = make_textures(options.images, 1, image_size=SIZE, random_state=0).X_train
    images = torch.from_numpy(textures).float() / 255
    filters = torch.from_numpy(morlet_filters(SIZE, SCALES, ORIENTATIONS)).float()
    cascade = wavelet_cascade(SIZE, SCALES, ORIENTATIONS)

    def coarse() -> torch.Tensor:
        return scattering_coefficients(images, cascade, BORDER)

    def full() -> torch.Tensor:
        return full_resolution_coefficients(images, filters)

    with torch.inference_mode():
        error = torch.log(coarse() / full())
        times = np.array([(seconds(full), seconds(coarse)) for _ in range(options.pairs)])
    full_ms, coarse_ms = 1000 * np.median(times, axis=0) / options.images
    ratio = np.median(times[:, 0] / times[:, 1])
    rms = error.square().mean((0, 1)).sqrt()

    print(
        f"{options.images} images, {IMAGE_SIZE} x {IMAGE_SIZE} and a border of {BORDER}; {SCALES} scales, "
        f"{ORIENTATIONS} orientations: {error.shape[1]} paths. {options.pairs} pairs, {options.threads} thread(s); "
        f"torch {torch.__version__}, {platform.machine()}.\n"
    )
    print("| maps | ms an image |")
    print("|---|---|")
    print(f"| all at full resolution | {full_ms:.1f} |")
    print(f"| on coarse grids | {coarse_ms:.1f} |")
    print(
        f"\nRatio: {ratio:.1f} (median of pairs; {(times[:, 0] / times[:, 1]).min():.1f} to "
        f"{(times[:, 0] / times[:, 1]).max():.1f})\n"
    )
    print("| statistic | difference, root mean square | largest |")
    print("|---|---|---|")
    for name, one_rms, largest in zip(STATISTICS, rms, error.abs().amax((0, 1)), strict=True):
        print(f"| {name} | {one_rms:.4f} | {largest:.3f} |")

    assert rms[0] < 0.005, f"means differ by {rms[0]:.4f}"
    assert rms[1] < 0.015, f"standard deviations differ by {rms[1]:.4f}"
    assert rms[2] < 0.12, f"maxima differ by {rms[2]:.4f}"
    assert options.quick or ratio >= 5, f"{ratio:.2f} times as fast as full resolution, 5 claimed"


if __name__ == "__main__":
    main()
