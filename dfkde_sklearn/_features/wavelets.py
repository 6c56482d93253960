"""The scattering transform: Morlet wavelets, and the maps and statistics that they make of images."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

STATISTICS = ("mean", "std", "max")

# Frequency and width of the finest Morlet wavelet, in radians a pixel and in pixels. From scale to scale the frequency
# halves and the width doubles.
FREQUENCY = 3 * np.pi / 4
WIDTH = 0.8
# A wavelet's spectrum is cut off at this number of standard deviations from its centre, and its map is sampled as
# finely as the remaining spectrum needs. The maximum needs the most samples. With 3, an isolated peak between four
# samples is measured up to 24 % too low; finer grids did not rank images better.
CUTOFF = 3.0


def morlet_filters(size: int, scales: int, orientations: int) -> NDArray[np.float64]:
    """Return the Fourier transforms of the wavelets.

    Parameters
    ----------
    size : int
        Height and width of the images in pixels.
    scales, orientations : int
        Number of each.

    Returns
    -------
    ndarray of shape (scales, orientations, size, size)
        Real, vertical frequency first, in the order of ``numpy.fft``; zero at frequency zero. Scaled so that the
        first-order maps of a real image have no more energy than the image.
    """
    # Sampling in space adds the copies of the spectrum that are a multiple of 2 pi apart.
    turns = 2 * np.pi * np.array([-1.0, 0.0, 1.0])
    frequency = turns[:, None] + 2 * np.pi * np.fft.fftfreq(size)
    vertical, horizontal = frequency[:, None, :, None], frequency[None, :, None, :]
    filters = np.empty((scales, orientations, size, size))
    for scale, orientation in np.ndindex(scales, orientations):
        angle = np.pi * orientation / orientations
        along = np.cos(angle) * horizontal + np.sin(angle) * vertical
        across = np.cos(angle) * vertical - np.sin(angle) * horizontal
        sharpness = (WIDTH * 2**scale) ** 2 / 2
        beam = np.exp(-sharpness * (across / _slant(orientations)) ** 2)
        wave = (np.exp(-sharpness * (along - FREQUENCY / 2**scale) ** 2) * beam).sum((0, 1))
        envelope = (np.exp(-sharpness * along**2) * beam).sum((0, 1))
        filters[scale, orientation] = wave - wave[0, 0] / envelope[0, 0] * envelope
    energy = (filters**2).sum((0, 1))
    opposite = np.roll(energy[::-1, ::-1], 1, (0, 1))
    return filters / np.sqrt((energy + opposite).max() / 2)


def _slant(orientations: int) -> float:
    """Return the ratio of width to length of a wavelet, by which `orientations` cover the half circle."""
    return min(1.0, 4 / orientations)


class Wavelet(NamedTuple):
    """A wavelet on the window of frequencies that it passes; its map is computed from these alone.

    Parameters
    ----------
    stop, start : tuple of int
        The window's vertical and horizontal frequencies, counted from zero: `start` (negative) to `stop`.
    transfer : Tensor of shape (height, width), complex64
        The factors of the frequencies 0, ..., `stop` - 1, `start`, ..., -1 on each axis.
    """

    stop: tuple[int, int]
    start: tuple[int, int]
    transfer: Tensor


class Cascade(NamedTuple):
    """The wavelets of all paths.

    Parameters
    ----------
    first : list of list of Wavelet
        For each scale, its orientations; all of one size.
    second : list of list of Wavelet
        For each first scale, the wavelets applied to its maps: by coarser scale and, within each, orientation.
    gains : Tensor of shape (n_paths,)
        For each path, the root mean square of its last wavelet's response to white noise of variance 1.
    """

    first: list[list[Wavelet]]
    second: list[list[Wavelet]]
    gains: Tensor

    def to(self, device: torch.device) -> Cascade:
        """Return the wavelets on another device."""
        first, second = (
            [[wavelet._replace(transfer=wavelet.transfer.to(device)) for wavelet in row] for row in order]
            for order in (self.first, self.second)
        )
        return Cascade(first, second, self.gains.to(device))


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # kept for passes that need gradients too
def wavelet_cascade(size: int, scales: int, orientations: int) -> Cascade:
    """Return the wavelets of all paths through images of one size.

    Parameters
    ----------
    size : int
        Height and width of the images in pixels: a multiple of 2**`scales`, and at least twice that.
    scales, orientations : int
        Number of each.

    Returns
    -------
    Cascade
        On the CPU. It is kept for the next call and must not be written to.
    """
    filters = morlet_filters(size, scales, orientations)
    angles = np.pi * np.arange(orientations) / orientations
    unit = 2**scales

    def samples(scale: int, angle: float) -> int:
        # Number of samples for every 2**scales pixels along the horizontal: an integer, so that a border of
        # 2**scales pixels ends between two samples.
        std = np.hypot(np.cos(angle), np.sin(angle) * _slant(orientations)) / (WIDTH * 2**scale)
        return min(unit, int(np.ceil(CUTOFF * std * unit / np.pi)))

    def wavelet(scale: int, orientation: int, counts: tuple[int, int], source_count: int) -> Wavelet:
        windows, factors = [], []
        directions = np.sin(angles[orientation]), np.cos(angles[orientation])
        for direction, count in zip(directions, counts, strict=True):
            length = count * size // unit
            centre = round(FREQUENCY / 2**scale * direction * size / (2 * np.pi))
            window = np.r_[0 : centre - length // 2 + length, centre - length // 2 : 0]
            # Samples lie in the middle of their cells on every grid, and an even window omits its lowest frequency,
            # which has no positive counterpart: so a mirrored image has mirrored maps.
            shift = np.exp(1j * np.pi * window * (unit / count - unit / source_count) / size)
            factors.append(shift * ((np.abs(window - centre) < length / 2) | (length == size)))
            windows.append(window)
        transfer = filters[scale, orientation][np.ix_(*windows)] * np.multiply.outer(*factors)
        stop, start = zip(*((window.max() + 1, window.min()) for window in windows), strict=True)
        return Wavelet(stop, start, torch.from_numpy(transfer).to(torch.complex64))

    # The first-order maps are stacked for the second order, so all have the size of the widest window.
    square = [samples(scale, 0.0) for scale in range(scales)]
    first = [
        [wavelet(scale, k, (square[scale], square[scale]), unit) for k in range(orientations)]
        for scale in range(scales)
    ]
    second = [
        [
            wavelet(coarser, k, (samples(coarser, angle - np.pi / 2), samples(coarser, angle)), square[scale])
            for coarser in range(scale + 1, scales)
            for k, angle in enumerate(angles)
        ]
        for scale in range(scales)
    ]
    gains = np.sqrt((filters**2).mean((2, 3)))
    last = [gains.ravel()] + [np.tile(gains[scale + 1 :].ravel(), orientations) for scale in range(scales)]
    return Cascade(first, second, torch.from_numpy(np.concatenate(last)).float())


def scattering_coefficients(images: Tensor, cascade: Cascade, border: int) -> Tensor:
    """Return mean, standard deviation and maximum of every scattering map.

    Parameters
    ----------
    images : Tensor of shape (n_images, size, size), float32
        Grey images, taken as periodic.
    cascade : Cascade
        The wavelets for this size, on the device of the images.
    border : int
        Pixels on each side that the statistics leave out: 0 or 2**scales.

    Returns
    -------
    Tensor of shape (n_images, n_paths, 3), float32
        In the unit of the images. Paths: the first order by scale and orientation, then the second by first
        scale, first orientation, second scale, second orientation.
    """
    margin = border / images.shape[-1]
    spectrum = torch.fft.fft2(images, norm="forward")
    first, second = [], []
    for scale, coarser in zip(cascade.first, cascade.second, strict=True):
        maps = torch.stack([_modulus(_filtered(spectrum, wavelet)) for wavelet in scale], dim=1)
        first.append(_statistics(_inside(maps, margin)))
        if coarser:
            spectra = torch.fft.fft2(maps, norm="forward")
            paths = [_statistics(_modulus(_inside(_filtered(spectra, wavelet), margin))) for wavelet in coarser]
            second.append(torch.stack(paths, dim=2).flatten(1, 2))
    return torch.cat(first + second, dim=1)


def local_means(images: Tensor, cascade: Cascade, border: int, grid: int) -> Tensor:
    """Return the mean of every first-order map in each cell of a grid.

    Parameters
    ----------
    images, cascade, border
        As in `scattering_coefficients`.
    grid : int
        Number of cells along each side.

    Returns
    -------
    Tensor of shape (n_images, n_paths, grid, grid), float32
        In the unit of the images. Paths by scale and orientation.
    """
    margin = border / images.shape[-1]
    spectrum = torch.fft.fft2(images, norm="forward")
    means = []
    for scale in cascade.first:
        maps = _inside(torch.stack([_modulus(_filtered(spectrum, wavelet)) for wavelet in scale], dim=1), margin)
        # Maps of coarse wavelets may have fewer samples than the grid has cells.
        if maps.shape[-1] >= grid:
            means.append(adaptive_avg_pool2d(maps, grid))
        else:
            means.append(interpolate(maps, size=(grid, grid), mode="bilinear", align_corners=False))
    return torch.cat(means, dim=1)


def _filtered(spectra: Tensor, wavelet: Wavelet) -> Tensor:
    """Return images, given by their spectra (..., h, w), after a wavelet: complex, on the wavelet's grid."""
    window = spectra.new_empty(*spectra.shape[:-2], *wavelet.transfer.shape)
    (bottom, right), (top, left) = wavelet.stop, wavelet.start
    # Frequencies are taken modulo the size of the window, which only changes the phase of the result.
    for rows in slice(None, bottom), slice(top, None):
        for columns in slice(None, right), slice(left, None):
            corner = ..., rows, columns
            if spectra.requires_grad:
                window[corner] = spectra[corner] * wavelet.transfer[corner]
            else:
                torch.mul(spectra[corner], wavelet.transfer[corner], out=window[corner])
    return torch.fft.ifft2(window, norm="forward")


def _modulus(maps: Tensor) -> Tensor:
    # torch.abs takes as long as the Fourier transform, as it avoids an overflow that grey levels cannot cause.
    squares = torch.addcmul(maps.real.square(), maps.imag, maps.imag)
    if squares.requires_grad:
        squares = squares.clamp_min(torch.finfo(squares.dtype).tiny)  # the root of zero has no gradient
    return squares.sqrt_()


def _inside(maps: Tensor, margin: float) -> Tensor:
    """Return maps (..., h, w) without the fraction `margin` of their height and width at each edge."""
    rows, columns = (round(margin * length) for length in maps.shape[-2:])
    return maps[..., rows : maps.shape[-2] - rows, columns : maps.shape[-1] - columns]


def _statistics(maps: Tensor) -> Tensor:
    """Return mean, standard deviation and maximum (..., 3) of maps (..., h, w)."""
    values = maps.flatten(-2)
    mean = values.mean(dim=-1, keepdim=True)
    std = (values - mean).square_().mean(dim=-1, keepdim=True).sqrt_()
    return torch.cat([mean, std, values.amax(dim=-1, keepdim=True)], dim=-1)
