"""Surfaces of materials, drawn from random numbers.

Lengths are in units of 1/128 of the side of the image, so that an image of any size shows the same extent. Albedo is
the share of light that is reflected: 0 is black, 1 is white.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

Field = NDArray[np.float64]
Mask = NDArray[np.bool_]

SIDE = 128.0


class Surface(NamedTuple):
    """A piece of material, before it is lit and photographed."""

    albedo: Field
    # For cloth: the albedo without the vertical threads, and the number of the vertical thread at each pixel.
    threads: tuple[Field, NDArray[np.int64]] | None = None


def pixels(size: int) -> tuple[Field, Field]:
    """Return how far each pixel lies to the right of the centre, and how far below it."""
    positions = (np.arange(size) + 0.5) * (SIDE / size) - SIDE / 2
    down, right = np.meshgrid(positions, positions, indexing="ij")
    return right, down


def rotated(right: Field, down: Field, angle: float) -> tuple[Field, Field]:
    """Return the coordinates along an axis that is rotated by `angle` radians, and across it."""
    return np.cos(angle) * right + np.sin(angle) * down, np.cos(angle) * down - np.sin(angle) * right


def noise(rng: RandomState, size: int, along: float, across: float | None = None, angle: float = 0.0) -> Field:
    """Return Gaussian noise of unit variance, smooth over `along` units in one direction and `across` in the other."""
    frequency = np.fft.fftfreq(size, d=SIDE / size)
    down, right = np.meshgrid(frequency, frequency, indexing="ij")
    right, down = rotated(right, down, angle)
    across = along if across is None else across
    gain = np.exp(-2 * np.pi**2 * ((right * along) ** 2 + (down * across) ** 2))
    smooth = np.fft.ifft2(np.fft.fft2(rng.standard_normal((size, size))) * gain).real
    # By the expected variance, not that of the sample: pieces of one material differ in contrast.
    return smooth / np.sqrt(np.mean(gain**2))


def _laid(rng: RandomState, size: int, pitch: tuple[float, float]) -> tuple[Field, Field]:
    """Return coordinates, in repeats of the pattern, on a cloth that was laid down by hand."""
    right, down = rotated(*pixels(size), np.deg2rad(rng.uniform(-3, 3)))
    scale = rng.uniform(0.97, 1.03, size=2)
    right = right * scale[0] + 0.6 * noise(rng, size, 25.0)
    down = down * scale[1] + 0.6 * noise(rng, size, 25.0)
    # Shifted by a hundred repeats, so that the numbers of threads are positive and index the arrays of tones.
    return right / pitch[0] + rng.uniform(100, 102), down / pitch[1] + rng.uniform(100, 102)


def _woven(
    rng: RandomState,
    size: int,
    pitch: float,
    warp_on_top: Callable[[NDArray[np.int64], NDArray[np.int64]], Mask],
    tones: tuple[float, float],
    width: float = 1.0,
    ground: float = 0.08,
) -> Surface:
    """Return a cloth of vertical (warp) and horizontal (weft) threads; `width` is their share of the pitch."""
    s, t = _laid(rng, size, (pitch, pitch))
    warp, weft = np.floor(s).astype(np.int64), np.floor(t).astype(np.int64)
    s, t = s - warp - 0.5, t - weft - 0.5
    top = warp_on_top(warp, weft)
    warp_profile = np.sqrt(np.clip(1 - (2 * s / width) ** 2, 0, None))
    weft_profile = np.sqrt(np.clip(1 - (2 * t / width) ** 2, 0, None))
    # A thread is brightest where it bulges over another one, and dark beside that.
    warp_shine = np.where(top, 1 - 1.2 * t**2, 0.75)
    weft_shine = np.where(top, 0.75, 1 - 1.2 * s**2)
    warp_tone = tones[0] * rng.normal(1, 0.03, 256)[warp] * (1 + 0.07 * noise(rng, size, 0.6, 3.0))
    weft_tone = tones[1] * rng.normal(1, 0.03, 256)[weft] * (1 + 0.07 * noise(rng, size, 3.0, 0.6))
    bare = np.where(weft_profile > 0, weft_tone * (0.45 + 0.55 * weft_profile) * weft_shine, ground)
    warp_albedo = warp_tone * (0.45 + 0.55 * warp_profile) * warp_shine
    warp_seen = (warp_profile > 0) & (top | (weft_profile == 0))
    albedo = np.where(warp_seen, warp_albedo, bare)
    soft = 0.45 * size / SIDE
    # Without its warp a weft thread hangs free: no bulges, and darker for the missing support.
    free = np.where(weft_profile > 0.5, 0.6 * weft_tone * weft_profile, ground)
    return Surface(gaussian_filter(albedo, soft), (gaussian_filter(free, soft), warp))


def _weave(rng: RandomState, size: int) -> Surface:
    return _woven(rng, size, 9.0, lambda warp, weft: (warp + weft) % 2 == 0, (0.75, 0.62))


def _twill(rng: RandomState, size: int) -> Surface:
    return _woven(rng, size, 5.5, lambda warp, weft: (warp + weft) % 4 < 2, (0.5, 0.8))


def _mesh(rng: RandomState, size: int) -> Surface:
    return _woven(rng, size, 9.0, lambda warp, weft: (warp + weft) % 2 == 0, (0.8, 0.75), width=0.4, ground=0.12)


def _knit(rng: RandomState, size: int) -> Surface:
    s, t = _laid(rng, size, (11.0, 8.0))
    wale = np.floor(s).astype(np.int64)
    s = s - wale - 0.5
    # Each stitch is a V: two legs that lean outwards as they rise.
    leg = np.sqrt(np.clip(1 - (4 * np.abs(s) - 1) ** 2, 0, None))
    yarn = np.cos(np.pi * (t + 0.9 * np.abs(s))) ** 2
    tone = 0.78 * rng.normal(1, 0.025, 256)[wale] * (1 + 0.08 * noise(rng, size, 0.8))
    albedo = tone * (0.15 + 0.85 * np.sqrt(yarn) * leg)
    # In a ladder, the yarn lies across, as rungs.
    ladder = tone * (0.1 + 0.6 * np.cos(np.pi * t) ** 6)
    soft = 0.5 * size / SIDE
    return Surface(gaussian_filter(albedo, soft), (gaussian_filter(ladder, soft), wale))


def _grit(rng: RandomState, size: int) -> Field:
    """Return grain and dark specks, which normal surfaces have too: without them every defect would stand out."""
    specks = np.clip(np.abs(noise(rng, size, 1.0)) - 3.0, 0, None)
    return 0.03 * noise(rng, size, 0.8) - 0.5 * specks


def _metal(rng: RandomState, size: int) -> Surface:
    angle = np.deg2rad(rng.uniform(-8, 8))
    strokes = np.sum([noise(rng, size, 12.0 * width, 0.4 * width, angle) for width in (1, 2, 4)], axis=0)
    across = rotated(*pixels(size), angle)[1]
    sheen = 0.1 * np.cos(2 * np.pi * (across / 150 + rng.uniform()))
    return Surface(0.58 + 0.05 * strokes + sheen + _grit(rng, size))


def _wood(rng: RandomState, size: int) -> Surface:
    angle = np.deg2rad(rng.uniform(-8, 8))
    across = rotated(*pixels(size), angle)[1]
    rings = across / rng.uniform(9, 11) + 0.35 * noise(rng, size, 60.0, 12.0, angle) + rng.uniform()
    phase = rings % 1
    # Early wood darkens slowly towards the late wood, which ends sharply.
    late = np.where(phase < 0.85, phase / 0.85, (1 - phase) / 0.15) ** 2
    pores = np.clip(noise(rng, size, 9.0, 0.5, angle) - 1.2, 0, None)
    fibres = noise(rng, size, 14.0, 0.5, angle)
    return Surface(0.68 - 0.18 * late - 0.07 * pores + 0.025 * fibres + _grit(rng, size))


def _leather(rng: RandomState, size: int) -> Surface:
    # Grains are cells around jittered points; creases run where two points are equally near.
    pitch = 7.0
    lattice = np.arange(-SIDE / 2 - 2 * pitch, SIDE / 2 + 3 * pitch, pitch)
    points = np.stack(np.meshgrid(lattice, lattice), axis=-1).reshape(-1, 2)
    points = points + rng.uniform(-0.45, 0.45, size=points.shape) * pitch
    right, down = pixels(size)
    right, down = right + 0.8 * noise(rng, size, 4.0), down + 0.8 * noise(rng, size, 4.0)
    distances, nearest = map(np.asarray, cKDTree(points).query(np.stack([right, down], axis=-1), k=2))
    crease = np.exp(-(((distances[..., 1] - distances[..., 0]) / 1.3) ** 2))
    dome = np.clip(1 - distances[..., 0] / pitch, 0, None)
    tone = rng.normal(0, 0.02, len(points))[nearest[..., 0]]
    depth = rng.uniform(0.7, 1.3) + 0.2 * noise(rng, size, 20.0)
    return Surface(0.45 + depth * (0.12 * dome - 0.16 * crease) + tone + 0.02 * noise(rng, size, 0.7))


def _granite(rng: RandomState, size: int) -> Surface:
    feldspar = 0.05 * np.tanh(2 * noise(rng, size, 1.5))
    mica = np.clip(2 * (noise(rng, size, 0.9) - 1.2), 0, 1)
    quartz = np.clip(2 * (noise(rng, size, 1.2) - 1.2), 0, 1)
    albedo = 0.55 + feldspar + 0.005 * noise(rng, size, 12.0) + 0.02 * noise(rng, size, 0.6)
    return Surface((albedo + 0.12 * quartz * (1 - mica)) * (1 - 0.35 * mica))


class Material(NamedTuple):
    """How a material is drawn, and the kinds of defects that it can have."""

    paint: Callable[[RandomState, int], Surface]
    defects: tuple[str, ...]


_ANY = ("scratch", "stain", "hole", "wear")
MATERIALS = {
    "weave": Material(_weave, (*_ANY, "distortion", "thread")),
    "twill": Material(_twill, (*_ANY, "distortion", "thread")),
    "knit": Material(_knit, (*_ANY, "distortion", "thread")),
    "mesh": Material(_mesh, (*_ANY, "distortion", "thread")),
    "metal": Material(_metal, (*_ANY, "distortion")),
    "wood": Material(_wood, (*_ANY, "distortion")),
    "leather": Material(_leather, _ANY),
    "granite": Material(_granite, _ANY),
}
