"""Images to a feature matrix through fixed filters: log scattering coefficients, with nothing to download."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from functools import lru_cache, partial
from numbers import Integral
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.base import BaseEstimator, TransformerMixin, _fit_context
from sklearn.utils import Tags
from sklearn.utils._param_validation import Interval
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from torch.nn.functional import pad

from dfkde_sklearn._device import as_device
from dfkde_sklearn._features.cache import check_cache, feature_matrix, numerics
from dfkde_sklearn._images import FULL_RANGE, Images, as_images, image_batches

STATISTICS = ("mean", "std", "max")

# The finest Morlet wavelet: radians a pixel, and pixels. Each coarser one is half and twice that.
FREQUENCY = 3 * np.pi / 4
WIDTH = 0.8
# A wavelet's spectrum is cut off this many standard deviations from its centre, and its map sampled no finer than
# what is left needs. Means and standard deviations would bear fewer samples; the maximum decides. At three, a lone
# peak in the middle of four samples is measured up to 24 % too low, and finer grids did not rank images better.
REACH = 3.0

# Standard deviation of the rounding to 8 bits, for grey levels in [0, 1].
ROUNDING = 1 / 255 / np.sqrt(12)


class ScatteringFeatures(TransformerMixin, BaseEstimator):
    """Describe images by log scattering coefficients: fixed wavelets, nothing to train or to download.

    A scattering transform [1]_ is a small convolutional network whose filters are Morlet wavelets of several
    scales and orientations and whose non-linearity is the complex modulus. A map of the first order, the modulus
    of the image after one wavelet, shows where there is structure of one scale and orientation; a map of the
    second order, a first one that went through a coarser wavelet and the modulus once more, how that structure
    is arranged. The features are the mean, the standard deviation and the maximum of every map, on a logarithmic
    scale.

    Parameters
    ----------
    scales : int, default=4
        Number of scales, an octave apart: the wavelets of scale j = 0, 1, ... have a period of 2.7 * 2**j
        pixels. With 1 there is no second order.
    orientations : int, default=8
        Number of orientations: the waves of orientation k run at k * 180 / `orientations` degrees, clockwise
        from the horizontal. Orientation 0 answers to vertical lines.
    image_size : int, default=128
        Height and width in pixels that every image is resized to: a multiple of 2**`scales`, and at least
        twice that.
    white_level : int, default=65535
        The value of 16-bit samples that is white, as all above it is: 4095 for files of 16 bits that hold the 12 bits
        of a camera, 1023 for 10 bits. Other samples are as they are. ``fit_transform``, and so the ``fit`` of a
        detector, warns where no value of the 16-bit images that it reads comes near it.
    batch_size : int, default=32
        Images that are transformed at once. Does not change the result.
    cache : bool, str, PathLike or None, default=None
        Whether to keep features and read those that are there. True: in the memory of this process, up to 1 GiB,
        for all feature extractors. A path: in this folder, for any number of processes of this machine, until
        :func:`clear_cache`. They are found by the content of the image, the parameters and the versions of the
        libraries.
    device : str, torch.device or None, default=None
        Where the filters run. None is the first CUDA GPU where there is one, else the CPU.
    verbose : bool, default=False
        Whether to show a progress bar.

    Attributes
    ----------
    n_features_out_ : int
        Number of features, three for each of J L + L**2 J (J - 1) / 2 maps (J scales, L orientations): 1248 by
        default.

    See Also
    --------
    TimmFeatures : Describe images by a pretrained network, which tells more where its weights are to be had.

    Notes
    -----
    Colour is read as grey (ITU-R 601-2 luma), and the image is resized with an antialiasing Lanczos filter,
    its proportions not kept: a crop would not see all of the image.

    The image is continued beyond its borders by reflection, 2**`scales` pixels wide, and the statistics are
    taken inside of them. Without that, left meets right and top meets bottom, and the step between them
    outshines what there is to see.

    A coefficient c becomes log(1 + c / e), e being what the last wavelet on the way to it makes, root mean
    square, of the rounding to 8 bits: a change of contrast shifts a feature by a constant, as the logarithm
    does, down to where 8 bits end. An image of one colour has features of zero.

    The maps of coarse wavelets are computed on coarse grids. Next to all maps at full resolution that changes
    means by 0.3 %, standard deviations by 0.7 % and maxima, which may lie between samples, by 6 %
    (root mean square; ``benchmarks/scattering.py``), and the ranking of images by nothing to speak of.

    References
    ----------
    .. [1] J. Bruna and S. Mallat, "Invariant scattering convolution networks", IEEE Transactions on Pattern
       Analysis and Machine Intelligence 35 (2013) 1872-1886, :doi:`10.1109/TPAMI.2012.230`.

    Examples
    --------
    >>> import numpy as np
    >>> from dfkde_sklearn import ScatteringFeatures
    >>> images = np.random.default_rng(0).integers(0, 256, (5, 48, 48), dtype=np.uint8)
    >>> features = ScatteringFeatures(scales=2, orientations=4, image_size=32).fit(images)
    >>> features.transform(images).shape
    (5, 72)
    >>> features.get_feature_names_out()[[0, -1]].tolist()
    ['order1_scale0_orientation0_mean', 'order2_scale0_orientation3_scale1_orientation3_max']
    """

    # The public path, which pickles and lists of trusted types name.
    __module__ = "dfkde_sklearn"

    _parameter_constraints: dict[str, Any] = {  # noqa: RUF012 (scikit-learn's protocol)
        "scales": [Interval(Integral, 1, None, closed="left")],
        "orientations": [Interval(Integral, 1, None, closed="left")],
        "image_size": [Interval(Integral, 1, None, closed="left")],
        "white_level": [Interval(Integral, 1, FULL_RANGE, closed="both")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "cache": ["boolean", str, os.PathLike, None],
        "device": [str, torch.device, None],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        *,
        scales: int = 4,
        orientations: int = 8,
        image_size: int = 128,
        white_level: int = FULL_RANGE,
        batch_size: int = 32,
        cache: bool | str | os.PathLike[str] | None = None,
        device: str | torch.device | None = None,
        verbose: bool = False,
    ) -> None:
        self.scales = scales
        self.orientations = orientations
        self.image_size = image_size
        self.white_level = white_level
        self.batch_size = batch_size
        self.cache = cache
        self.device = device
        self.verbose = verbose

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any = None) -> Self:
        """Check the parameters; nothing is learnt from the images.

        Parameters
        ----------
        X : images
            A list of paths, PIL images or arrays; an array or tensor of images; a folder; a column of paths.
        y : None
            Ignored.

        Returns
        -------
        ScatteringFeatures
            The fitted transformer.

        Raises
        ------
        ValueError
            If a parameter is out of range, or X holds no images.
        OSError
            If the cache cannot be written to.
        """
        as_images(X)
        check_cache(self.cache)
        as_device(self.device)
        self._check_size()
        self.n_features_out_ = self._n_features()
        return self

    @_fit_context(prefer_skip_nested_validation=True)
    def fit_transform(self, X: Any, y: Any = None) -> np.ndarray:
        """Do what `fit` and then `transform` do; warn where the white level does not go with the images.

        Parameters
        ----------
        X : images
            A list of paths, PIL images or arrays; an array or tensor of images; a folder; a column of paths.
        y : None
            Ignored.

        Returns
        -------
        ndarray of shape (n_images, `n_features_out_`), float32
            A row for each image, in their order.
        """
        images = as_images(X, self.white_level)
        features = self.fit(images).transform(images)
        images.warn_of_white_level()
        return features

    def transform(self, X: Any) -> np.ndarray:
        """Return the features of the images.

        Parameters
        ----------
        X : images
            A list of paths, PIL images or arrays; an array or tensor of images; a folder; a column of paths.

        Returns
        -------
        ndarray of shape (n_images, `n_features_out_`), float32
            A row for each image, in their order: logarithms without a unit, 0 or more.

        Raises
        ------
        ValueError
            If an image cannot be read; the message names it.
        """
        check_is_fitted(self)
        images = as_images(X, self.white_level)
        return feature_matrix(images, [self.n_features_out_], self._recipes, self._computed, self.cache)

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return the names: order, scale and orientation of each wavelet on the way, statistic.

        Parameters
        ----------
        input_features : None
            Ignored: images have no names of features.

        Returns
        -------
        ndarray of str objects of shape (`n_features_out_`,)
            For example "order1_scale0_orientation3_mean", "order2_scale0_orientation3_scale2_orientation1_max".
        """
        check_is_fitted(self)
        return np.array(self._feature_names(), dtype=object)

    def _recipes(self) -> list[str]:
        """Return all that decides the features beside the image."""
        filters = [self.scales, self.orientations, self.image_size]
        of_all = {
            "scattering": filters,
            "white_level": int(self.white_level),
            "numerics": numerics(as_device(self.device)),
        }
        return [json.dumps(of_all, default=str)]

    def _computed(self, images: Images, blocks: list[int]) -> Generator[np.ndarray, None, None]:
        """Yield the features of the images batch by batch."""
        device = as_device(self.device)
        for batch in image_batches(
            images,
            partial(grey_levels, size=self.image_size),
            self.batch_size,
            verbose=bool(self.verbose),
            description="scattering",
        ):
            with torch.inference_mode():
                rows = self._rows(batch.to(device))
            yield rows.cpu().numpy()

    def _rows(self, batch: Tensor) -> Tensor:
        """Return the features (n, n_features) of grey levels (n, image_size, image_size) from 0 to 1."""
        border = 2**self.scales
        cascade = wavelet_cascade(self.image_size + 2 * border, self.scales, self.orientations).to(batch.device)
        framed = pad(batch[:, None], (border,) * 4, mode="reflect")[:, 0]
        coefficients = scattering_coefficients(framed, cascade, border)
        return torch.log1p(coefficients / (ROUNDING * cascade.gains[:, None])).flatten(1)

    def _check_size(self) -> None:
        """Raise a ValueError unless the filters fit into images of this size."""
        unit = 2**self.scales
        if self.image_size % unit or self.image_size < 2 * unit:
            raise ValueError(
                f"image_size={self.image_size} does not go with scales={self.scales}: a multiple of 2**scales is"
                f" needed, and at least two of them. Use image_size={unit * max(2, round(self.image_size / unit))},"
                " or fewer scales."
            )

    def _n_features(self) -> int:
        first, pairs = self.scales * self.orientations, self.scales * (self.scales - 1) // 2
        return (first + self.orientations**2 * pairs) * len(STATISTICS)

    def _feature_names(self) -> list[str]:
        waves = [[f"scale{j}_orientation{k}" for k in range(self.orientations)] for j in range(self.scales)]
        first = [f"order1_{wave}" for scale in waves for wave in scale]
        second = [
            f"order2_{wave}_{coarser}"
            for j, scale in enumerate(waves)
            for wave in scale
            for coarser_scale in waves[j + 1 :]
            for coarser in coarser_scale
        ]
        return [f"{path}_{statistic}" for path in first + second for statistic in STATISTICS]

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.no_validation = True
        return tags


def grey_levels(picture: Image.Image, size: int) -> Tensor:
    """Return a picture as grey levels (size, size) in float32, 0 to 1."""
    # Mode "F" keeps the resized levels from being rounded to 8 bits once more. reducing_gap averages large
    # photographs down to three times the size first: the same to the eye, at a tenth of the time.
    grey = picture.convert("F").resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return torch.from_numpy(np.array(grey)) / 255


# The filters


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


# The transform


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
