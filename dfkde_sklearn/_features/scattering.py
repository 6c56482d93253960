"""ScatteringFeatures: images to feature rows by fixed wavelets, with nothing to download."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from functools import partial
from math import prod
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from torch.nn.functional import pad

from dfkde_sklearn._device import as_device
from dfkde_sklearn._document import is_integer_from
from dfkde_sklearn._features.extractor import IS_GRID, MAX_SIDE, FeatureExtractor
from dfkde_sklearn._features.modules import ScatteringModule
from dfkde_sklearn._features.wavelets import STATISTICS, local_means, scattering_coefficients, wavelet_cascade
from dfkde_sklearn._images import FULL_RANGE, Images

# Standard deviation of the rounding to 8 bits, for grey levels in [0, 1].
ROUNDING = 1 / 255 / np.sqrt(12)


class ScatteringFeatures(FeatureExtractor):
    """Features of images from fixed wavelets: log scattering coefficients, nothing to train or to download.

    A scattering transform [1]_ is a small convolutional network whose filters are Morlet wavelets of several
    scales and orientations and whose non-linearity is the complex modulus. A map of the first order is the modulus
    of the image after one wavelet: it shows where there is structure of one scale and orientation. A map of the
    second order is the modulus of a first-order map after a coarser wavelet: it shows how that structure is arranged.
    The features are the mean, the standard deviation and the maximum of every map, on a logarithmic scale; or, for a
    :class:`PatchDFKDEDetector`, the local means of the first-order maps.

    Parameters
    ----------
    scales : int, default=4
        Number of scales, an octave apart: the wavelets of scale j = 0, 1, ... have a period of 2.7 * 2**j
        pixels. With 1 there is no second order.
    orientations : int, default=8
        Number of orientations: the waves of orientation k run at k * 180 / `orientations` degrees, clockwise
        from the horizontal. Orientation 0 responds to vertical lines.
    image_size : int, default=128
        Height and width in pixels that every image is resized to: a multiple of 2**`scales`, and at least
        twice that.
    pooling : {"statistics"} or None, default="statistics"
        "statistics": the mean, the standard deviation and the maximum of every map. None keeps positions: the mean of
        every first-order map in each cell of a grid, of 2**(`scales` - 1) pixels a side. The second order is left out
        there: on generated materials it found fewer defects (AUROC .95 for .99 on the weave).
    white_level : int, default=65535
        The 16-bit value that becomes white, as do all above it: 4095 for files that hold the 12 bits of a camera,
        1023 for 10 bits. Other samples are not affected. ``fit_transform``, and so the ``fit`` of a detector, warns
        if no value in the 16-bit images comes near the white level.
    batch_size : int, default=32
        Number of images that are transformed at once. Does not change the result.
    cache : bool, str, PathLike or None, default=None
        Whether to keep features and to reuse them. True: in the memory of this process, up to 1 GiB for all feature
        extractors. A path: in this folder, for any number of processes of this machine, until :func:`clear_cache`.
        The key of a feature is the content of the image, the parameters and the versions of the libraries.
    cache_dtype : {"float32", "float16"}, default="float32"
        How features are kept with `cache`. "float16" takes half the space, and rounds features to 11 bits, also where
        they are computed for the first time.
    device : str, torch.device or None, default=None
        Where the filters run. None is the first CUDA GPU if there is one, else the CPU.
    verbose : bool, default=False
        Whether to show a progress bar.

    Attributes
    ----------
    grid_shape_ : tuple (h, w) or None
        With ``pooling=None`` the positions that are described: 16 x 16 by default.
    n_features_out_ : int
        Number of features of an image, three for each of J L + L**2 J (J - 1) / 2 maps (J scales, L orientations): 1248
        by default. With ``pooling=None`` J L at each position.

    See Also
    --------
    TimmFeatures : Features from a pretrained network, often better where its weights are available.

    Notes
    -----
    Colour is converted to grey (ITU-R 601-2 luma). The image is resized with an antialiasing Lanczos filter, without
    keeping its proportions: a crop would lose the edges.

    The image is continued by reflection, 2**`scales` pixels wide, and the statistics leave that border out. Without it
    the transform would be periodic, and the step between opposite edges would dominate the maps.

    A coefficient c becomes log(1 + c / e), where e is the root mean square that rounding to 8 bits gives this
    coefficient. A change of contrast then adds a constant to each feature, down to the contrast at which 8 bits end.
    An image of one colour has features of zero.

    The maps of coarse wavelets are computed on coarse grids. Compared with full resolution, that changes means by
    0.3 %, standard deviations by 0.7 % and maxima, which may lie between samples, by 6 % (root mean square;
    ``benchmarks/scattering.py``). It does not noticeably change the ranking of images.

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

    _fitted_attributes = {  # noqa: RUF012 (read by the base class)
        "grid_shape_": lambda value: value is None or IS_GRID(value),
        "n_features_out_": is_integer_from(1),
    }
    sees_whole_images = True
    _export_obstacle = "other runtimes lack its complex Fourier transforms"

    _parameter_constraints: dict[str, Any] = {  # noqa: RUF012 (scikit-learn's protocol)
        **FeatureExtractor._parameter_constraints,
        "scales": [Interval(Integral, 1, 13, closed="both")],
        "orientations": [Interval(Integral, 1, None, closed="left")],
        "image_size": [Interval(Integral, 1, MAX_SIDE, closed="both")],
        "pooling": [StrOptions({"statistics"}), None],
    }

    def __init__(
        self,
        *,
        scales: int = 4,
        orientations: int = 8,
        image_size: int = 128,
        pooling: Literal["statistics"] | None = "statistics",
        white_level: int = FULL_RANGE,
        batch_size: int = 32,
        cache: bool | str | os.PathLike[str] | None = None,
        cache_dtype: Literal["float32", "float16"] = "float32",
        device: str | torch.device | None = None,
        verbose: bool = False,
    ) -> None:
        self.scales = scales
        self.orientations = orientations
        self.image_size = image_size
        self.pooling = pooling
        self.white_level = white_level
        self.batch_size = batch_size
        self.cache = cache
        self.cache_dtype = cache_dtype
        self.device = device
        self.verbose = verbose

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return the names of the features: order, scale and orientation of each wavelet of the path, statistic.

        Parameters
        ----------
        input_features : None
            Ignored: images have no names of features.

        Returns
        -------
        ndarray of str objects of shape (`n_features_out_`,)
            For example "order1_scale0_orientation3_mean", "order2_scale0_orientation3_scale2_orientation1_max"; at a
            position "order1_scale0_orientation3_at_0_15".
        """
        check_is_fitted(self)
        return self._at_positions(self._feature_names())

    def as_module(self) -> ScatteringModule:
        """Return the fitted extractor as a torch module.

        Returns
        -------
        torch.nn.Module
            Grey levels (n, `image_size`, `image_size`) to features.
        """
        return ScatteringModule(self)

    def summary(self) -> str:
        """Return the name of the features.

        Returns
        -------
        str
            "scattering".
        """
        return "scattering"

    def image_transform(self) -> Callable[[Image.Image], Tensor]:
        """Return the function from a picture to grey levels.

        Returns
        -------
        callable
            A PIL image to a float32 tensor (`image_size`, `image_size`), from 0 to 1.
        """
        return partial(grey_levels, size=self.image_size)

    def _set_fitted(self) -> None:
        as_device(self.device)
        self._check_size()
        self.grid_shape_ = self._grid_shape()
        self.n_features_out_ = self._n_features()

    def _block_widths(self) -> list[int]:
        return [self.n_features_out_]

    def _block_recipes(self, fingerprint: str | None) -> list[dict[str, Any]]:
        return [{"scattering": [self.scales, self.orientations, self.image_size, self.grid_shape_]}]

    def _computed(self, images: Images, blocks: list[int]) -> Generator[NDArray[np.float32], None, None]:
        device = as_device(self.device)
        for batch in self.batches(images, self.batch_size, "scattering"):
            with torch.inference_mode():
                rows = self._rows(batch.to(device)).flatten(1)
            yield rows.cpu().numpy()

    def _check_fitted(self) -> None:
        if self.n_features_out_ != self._n_features() or self.grid_shape_ != self._grid_shape():
            raise ValueError(
                "the parameters of ScatteringFeatures and its n_features_out_ are of different numbers of features"
            )
        self._check_size()

    def _rows(self, batch: Tensor) -> Tensor:
        """Return the features (n, n_features) or (n, h, w, C) of grey levels (n, size, size) from 0 to 1."""
        border = 2**self.scales
        cascade = wavelet_cascade(self.image_size + 2 * border, self.scales, self.orientations).to(batch.device)
        framed = pad(batch[:, None], (border,) * 4, mode="reflect")[:, 0]
        if self.grid_shape_ is not None:
            means = local_means(framed, cascade, border, self.grid_shape_[0])
            gains = cascade.gains[: means.shape[1], None, None]
            return torch.log1p(means / (ROUNDING * gains)).permute(0, 2, 3, 1)
        coefficients = scattering_coefficients(framed, cascade, border)
        return torch.log1p(coefficients / (ROUNDING * cascade.gains[:, None])).flatten(1)

    def _check_size(self) -> None:
        """Raise a ValueError unless the filters fit the image size."""
        unit = 2**self.scales
        if self.image_size % unit or self.image_size < 2 * unit:
            raise ValueError(
                f"image_size={self.image_size} does not go with scales={self.scales}: a multiple of 2**scales is"
                f" needed, and at least two of them. Use image_size={unit * max(2, round(self.image_size / unit))},"
                " or fewer scales."
            )

    def _n_features(self) -> int:
        first, pairs = self.scales * self.orientations, self.scales * (self.scales - 1) // 2
        if self.pooling is None:
            return first * prod(self._grid_shape() or (1,))
        return (first + self.orientations**2 * pairs) * len(STATISTICS)

    def _grid_shape(self) -> tuple[int, int] | None:
        if self.pooling is not None:
            return None
        n_cells = self.image_size // 2 ** (self.scales - 1)
        return n_cells, n_cells

    def _feature_names(self) -> list[str]:
        waves = [[f"scale{j}_orientation{k}" for k in range(self.orientations)] for j in range(self.scales)]
        first = [f"order1_{wave}" for scale in waves for wave in scale]
        if self.pooling is None:
            return first
        second = [
            f"order2_{wave}_{coarser}"
            for j, scale in enumerate(waves)
            for wave in scale
            for coarser_scale in waves[j + 1 :]
            for coarser in coarser_scale
        ]
        return [f"{path}_{statistic}" for path in first + second for statistic in STATISTICS]


def grey_levels(picture: Image.Image, size: int) -> Tensor:
    """Return a picture as grey levels (size, size) in float32, 0 to 1."""
    # Mode "F" keeps the resized levels from being rounded to 8 bits once more. reducing_gap averages large
    # photographs down to three times the size first: the same to the eye, at a tenth of the time.
    grey = picture.convert("F").resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return torch.from_numpy(np.array(grey)) / 255
