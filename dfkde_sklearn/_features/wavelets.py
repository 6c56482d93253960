"""The scattering transform: Morlet wavelets, and the maps and statistics that they make of images."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

STATISTICS = ("mean", "std", "max")

# The finest Morlet wavelet: radians a pixel, and pixels. Each coarser one is half and twice that.
FREQUENCY = 3 * np.pi / 4
WIDTH = 0.8
# A wavelet's spectrum is cut off this many standard deviations from its centre, and its map sampled no finer than
# what is left needs. Means and standard deviations would bear fewer samples; the maximum decides. At three, a lone
# peak in the middle of four samples is measured up to 24 % too low, and finer grids did not rank images better.
REACH = 3.0


def morlet_filters(size: int, scales: int, orientations: int) -> NDArray[np.float64]:
    """Return the Fourier transforms of the wavelets.

    Parameters
    ----------
    size : int
        Height and width of the images in pixels.
    scales, orientations : int
        How many there are of each.

    Returns
    -------
    ndarray of shape (scales, orientations, size, size)
        Real, vertical frequency first, in the order of ``numpy.fft``; zero at frequency zero. Scaled so that the
        first-order maps of a real image have no more energy than the image.
    """
    # Sampling in space adds up the spectrum's copies, one for each turn of the frequency circle.
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
    """Return how much narrower than long a wavelet's spectrum is: orientations share the half circle."""
    return min(1.0, 4 / orientations)


class Wavelet(NamedTuple):
    """A wavelet on the window of frequencies that it passes, which is all that its map is computed from.

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
        For each first scale, what its maps go through: coarser scales and, within each, orientations.
    gains : Tensor of shape (n_paths,)
        For each path, what its last wavelet makes of white noise of variance 1: root mean square.
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
def wavelet_cascade(size: int, scales: int, orientations: int) -> Cascade:
    """Return the wavelets of all paths through images of one size.

    Parameters
    ----------
    size : int
        Height and width of the images in pixels: a multiple of 2**`scales`, and at least twice that.
    scales, orientations : int
        How many there are of each.

    Returns
    -------
    Cascade
        On the CPU; kept for the next call, so not to be written to.
    """
    filters = morlet_filters(size, scales, orientations)
    angles = np.pi * np.arange(orientations) / orientations
    unit = 2**scales

    def samples(scale: int, angle: float) -> int:
        # How many for each 2**scales pixels along the horizontal: whole numbers, so that a border of so many
        # pixels falls between two samples.
        spread = np.hypot(np.cos(angle), np.sin(angle) * _slant(orientations)) / (WIDTH * 2**scale)
        return min(unit, int(np.ceil(REACH * spread * unit / np.pi)))

    def wavelet(scale: int, orientation: int, counts: tuple[int, int], source_count: int) -> Wavelet:
        windows, factors = [], []
        directions = np.sin(angles[orientation]), np.cos(angles[orientation])
        for direction, count in zip(directions, counts, strict=True):
            length = count * size // unit
            centre = round(FREQUENCY / 2**scale * direction * size / (2 * np.pi))
            window = np.r_[0 : centre - length // 2 + length, centre - length // 2 : 0]
            # Samples stand in the middle of their cells on every grid, and an even window goes without its lowest
            # frequency, which has no counterpart above: so a mirrored image is treated as the image is.
            shift = np.exp(1j * np.pi * window * (unit / count - unit / source_count) / size)
            factors.append(shift * ((np.abs(window - centre) < length / 2) | (length == size)))
            windows.append(window)
        transfer = filters[scale, orientation][np.ix_(*windows)] * np.multiply.outer(*factors)
        stop, start = zip(*((window.max() + 1, window.min()) for window in windows), strict=True)
        return Wavelet(stop, start, torch.from_numpy(transfer).to(torch.complex64))

    # The maps of the first order are stacked for the second and so share one size, that of the widest window.
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


def _filtered(spectra: Tensor, wavelet: Wavelet) -> Tensor:
    """Return the images with these spectra (..., h, w) after a wavelet: complex, on the wavelet's own grid."""
    window = spectra.new_empty(*spectra.shape[:-2], *wavelet.transfer.shape)
    (bottom, right), (top, left) = wavelet.stop, wavelet.start
    # Frequencies land modulo the window's size, which turns the phase of what comes out and nothing else.
    for rows in slice(None, bottom), slice(top, None):
        for columns in slice(None, right), slice(left, None):
            corner = ..., rows, columns
            torch.mul(spectra[corner], wavelet.transfer[corner], out=window[corner])
    return torch.fft.ifft2(window, norm="forward")


def _modulus(maps: Tensor) -> Tensor:
    # torch's abs guards against overflow, far from grey levels, and takes as long as the Fourier transform.
    return torch.addcmul(maps.real.square(), maps.imag, maps.imag).sqrt_()


def _inside(maps: Tensor, margin: float) -> Tensor:
    """Return maps (..., h, w) without this share of their height and width at each edge."""
    rows, columns = (round(margin * length) for length in maps.shape[-2:])
    return maps[..., rows : maps.shape[-2] - rows, columns : maps.shape[-1] - columns]


def _statistics(maps: Tensor) -> Tensor:
    """Return mean, standard deviation and maximum (..., 3) of maps (..., h, w)."""
    values = maps.flatten(-2)
    mean = values.mean(dim=-1, keepdim=True)
    std = (values - mean).square_().mean(dim=-1, keepdim=True).sqrt_()
    return torch.cat([mean, std, values.amax(dim=-1, keepdim=True)], dim=-1)
