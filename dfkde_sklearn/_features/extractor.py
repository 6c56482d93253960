"""FeatureExtractor: what all transformers from images to feature rows share."""

from __future__ import annotations

import copy
import json
import os
from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from numbers import Integral
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.base import BaseEstimator, TransformerMixin, _fit_context
from sklearn.utils import Tags
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from dfkde_sklearn._callbacks import CallbackSupportMixin, one_task
from dfkde_sklearn._device import as_device
from dfkde_sklearn._document import Check, as_json, checked_parameters, is_integer_from, is_tuple_of, set_fitted
from dfkde_sklearn._features.cache import Cache, check_cache, feature_matrix, numerics
from dfkde_sklearn._features.modules import FeatureModule
from dfkde_sklearn._images import FULL_RANGE, Images, Reduction, as_images, image_batches
from dfkde_sklearn._inputs import STREAMED, is_stream, stream_items

# Pixels on a side of what an extractor resizes images to: more would not fit into memory, and a file may ask for more.
MAX_SIDE = 2**14
# A grid of positions, in a saved file.
IS_GRID = is_tuple_of(is_integer_from(1), 2)
# Parameters that belong to the machine, and that no file may set.
_OF_THE_MACHINE = ("device", "cache")


class FeatureExtractor(TransformerMixin, CallbackSupportMixin, BaseEstimator, metaclass=ABCMeta):
    """Base class of the transformers from images to feature rows.

    A subclass has a constructor with at least the parameters below, and says what its features are by the methods
    that raise NotImplementedError here. Reading images, the cache, saving and the protocol of scikit-learn are the same
    for all.

    Attributes
    ----------
    n_features_out_ : int
        Number of features of an image.
    grid_shape_ : tuple (h, w) or None
        The positions that are described; None for one vector for each image.
    """

    pooling: str | None
    white_level: int
    batch_size: int
    cache: Cache
    cache_dtype: Literal["float32", "float16"]
    device: str | torch.device | None
    verbose: bool | int
    n_features_out_: int
    grid_shape_: tuple[int, int] | None
    # Axes of an image, 0 for its height and 1 for its width, that are reversed before its features are computed.
    _flipped_axes: tuple[int, ...] = ()

    # The fitted attributes, and which values a saved file may give them.
    _fitted_attributes: ClassVar[Mapping[str, Check]]
    # Why other runtimes cannot compute the features; None where they can.
    _export_obstacle: ClassVar[str | None] = None

    _parameter_constraints: dict[str, Any] = {  # noqa: RUF012 (scikit-learn's protocol)
        "white_level": [Interval(Integral, 1, FULL_RANGE, closed="both")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "cache": ["boolean", str, os.PathLike, None],
        "cache_dtype": [StrOptions({"float32", "float16"})],
        "device": [str, torch.device, None],
        "verbose": ["verbose"],
    }

    @_fit_context(prefer_skip_nested_validation=True)
    @one_task
    def fit(self, X: Any, y: Any = None) -> Self:
        """Check the parameters and set the fitted attributes; nothing is learnt from the images.

        Parameters
        ----------
        X : images
            A list of paths, PIL images or arrays; an array or tensor of images; a folder; a column of paths; a data set
            or a stream: see :ref:`inputs`.
        y : None
            Ignored.

        Returns
        -------
        FeatureExtractor
            The fitted transformer.

        Raises
        ------
        ValueError
            If a parameter or the images are not what is allowed.
        OSError
            If pretrained weights are not on this machine and cannot be downloaded, or the cache cannot be
            written to.
        """
        if not is_stream(X):  # whose images would be lost
            as_images(X)
        self._fit()
        return self

    @_fit_context(prefer_skip_nested_validation=True)
    @one_task
    def fit_transform(self, X: Any, y: Any = None) -> NDArray[np.float32]:
        """Fit, and return the features of the images.

        Parameters
        ----------
        X : images
            A list of paths, PIL images or arrays; an array or tensor of images; a folder; a column of paths; a data set
            or a stream: see :ref:`inputs`.
        y : None
            Ignored.

        Returns
        -------
        ndarray of shape (n_images, `n_features_out_`), or (n_images, h, w, C) at positions, float32
            The features of the images, in their order.

        Warns
        -----
        UserWarning
            If the 16-bit images stay far below the white level, or exceed it.
        """
        if is_stream(X):
            return self._described_stream(X, self._fit(), warns=True)
        images = as_images(X, self.white_level)
        features = self._described(images, self._fit())
        images.warn_of_white_level()
        return features

    def transform(self, X: Any) -> NDArray[np.float32]:
        """Return the features of the images.

        Parameters
        ----------
        X : images
            A list of paths, PIL images or arrays; an array or tensor of images; a folder; a column of paths; a data set
            or a stream: see :ref:`inputs`.

        Returns
        -------
        ndarray of shape (n_images, `n_features_out_`), or (n_images, h, w, C) at positions, float32
            The features of the images, in their order.

        Raises
        ------
        ValueError
            If an image cannot be read, its features are not finite, or the weights of a network are not those
            of ``fit``.
        OSError
            If the weights of a network have to be loaded again and are not available.
        """
        self._check_is_fitted()
        if is_stream(X):
            return self._described_stream(X)
        return self._described(as_images(X, self.white_level))

    def transform_flipped(self, X: Any, axes: tuple[int, ...]) -> NDArray[np.float32]:
        """Return the features of the images after reversing axes of them.

        Parameters
        ----------
        X : images
            As in `transform`.
        axes : tuple of int
            0 reverses the height and 1 the width of the images.

        Returns
        -------
        ndarray of shape (n_images, `n_features_out_`), or (n_images, h, w, C) at positions, float32
            The features of the flipped images. Positions are those of the flipped images too.
        """
        flipping = copy.copy(self)
        flipping._flipped_axes = axes
        return flipping.transform(X)

    def fit_transform_parts(self, X: Any) -> Iterator[NDArray[np.float32]]:
        """Fit, and return the features of the images part by part, in bounded memory.

        Parameters
        ----------
        X : images
            As in `fit_transform`.

        Returns
        -------
        iterator of ndarray of shape (n, `n_features_out_`), or (n, h, w, C) at positions, float32
            The features of the next images, as `fit_transform` returns them for all.
        """
        self._validate_params()
        return self._parts(X, self._fit())

    def transform_parts(self, X: Any) -> Iterator[NDArray[np.float32]]:
        """Return the features of the images part by part, in bounded memory.

        Parameters
        ----------
        X : images
            As in `transform`.

        Returns
        -------
        iterator of ndarray of shape (n, `n_features_out_`), or (n, h, w, C) at positions, float32
            The features of the next images, as `transform` returns them for all.
        """
        self._check_is_fitted()
        return self._parts(X)

    def _check_is_fitted(self) -> None:
        check_is_fitted(self, "n_features_out_")
        if (self.pooling is None) != (self.grid_shape_ is not None):
            raise ValueError(
                f"pooling={self.pooling!r} was set after the fit, which "
                f"{'pooled the positions' if self.grid_shape_ is None else 'kept the positions'}. Fit anew, or set it "
                "back."
            )

    # What a subclass says.

    @abstractmethod
    def as_module(self) -> FeatureModule:
        """Return the fitted extractor as a torch module, with weights of its own."""

    @abstractmethod
    def summary(self) -> str:
        """Return what the features are, in a few words for people."""

    @abstractmethod
    def image_transform(self) -> Callable[[Image.Image], Tensor]:
        """Return the function from a picture to the tensor that the module takes."""

    @abstractmethod
    def _set_fitted(self) -> str | None:
        """Set the fitted attributes; return the fingerprint of the network, None where there is none."""

    @abstractmethod
    def _block_widths(self) -> list[int]:
        """Return the numbers of columns of the blocks that the cache keeps one by one."""

    @abstractmethod
    def _block_recipes(self, fingerprint: str | None) -> list[dict[str, Any]]:
        """Return for each block what decides its features, beside the image and what decides all features."""

    @abstractmethod
    def _computed(self, images: Images, blocks: list[int]) -> Generator[NDArray[np.float32], None, None]:
        """Yield the features of the images, of the blocks at these positions, batch by batch."""

    @abstractmethod
    def _check_fitted(self) -> None:
        """Raise a ValueError where fitted attributes from a file contradict one another or the parameters."""

    def check_weights(self, *, download: bool) -> None:
        """Load what ``transform`` needs, and check that it is what was there in ``fit``.

        Parameters
        ----------
        download : bool
            Whether weights may be downloaded.

        Raises
        ------
        ValueError
            If the weights are not those of ``fit``.
        OSError
            If they are not available.
        """

    # The saved file.

    def document(self) -> dict[str, Any]:
        """Return parameters and fitted attributes as values of JSON.

        Returns
        -------
        dict
            "class", "parameters", without those of the machine, and "fitted".

        Raises
        ------
        TypeError
            If a parameter has no counterpart in JSON.
        """
        name = type(self).__name__
        parameters = {key: value for key, value in self.get_params(deep=False).items() if key not in _OF_THE_MACHINE}
        # A module is code, which files do not hold; `from_document` is given it.
        parameters = {key: None if isinstance(value, nn.Module) else value for key, value in parameters.items()}
        fitted = {key: value for key, value in vars(self).items() if key.endswith("_")}
        return {"class": name, "parameters": as_json(parameters, name), "fitted": as_json(fitted, name)}

    @classmethod
    def from_document(
        cls,
        document: Mapping[str, Any],
        *,
        backbone: nn.Module | None = None,
        weights: str | os.PathLike[str] | None = None,
        device: str | torch.device | None = None,
    ) -> Self:
        """Return the fitted extractor of a document.

        Parameters
        ----------
        document : mapping
            What `document` returned.
        backbone : torch.nn.Module or None, default=None
            The network, where the document has none.
        weights : str, PathLike or None, default=None
            File with the weights of a named network, in place of where ``fit`` had them from.
        device : str, torch.device or None, default=None
            Where features are computed.

        Returns
        -------
        FeatureExtractor
            Fitted. The weights are not loaded yet: see `check_weights`.

        Raises
        ------
        ValueError
            If the document contradicts itself, or does not go with `backbone` or `weights`.
        """
        parameters = checked_parameters(document["parameters"], cls, _OF_THE_MACHINE)
        parameters |= cls._network_parameters(document, backbone, weights)
        extractor = cls(device=device, **parameters)
        extractor._validate_params()
        set_fitted(extractor, document["fitted"], cls._fitted_attributes)
        extractor._check_fitted()
        return extractor

    @classmethod
    def _network_parameters(
        cls,
        document: Mapping[str, Any],  # noqa: ARG003 (of the backbone where there is one)
        backbone: nn.Module | None,
        weights: str | os.PathLike[str] | None,
    ) -> dict[str, Any]:
        """Return the parameters that `backbone` and `weights` replace in a document."""
        if backbone is not None or weights is not None:
            raise ValueError(f"{cls.__name__} has no backbone: load it without backbone= and weights=.")
        return {}

    # What is the same for all.

    def check_exportable(self) -> None:
        """Raise a ValueError where other runtimes cannot compute the features."""
        if self._export_obstacle is not None:
            raise ValueError(
                f"features={type(self).__name__}(...) cannot be exported: {self._export_obstacle}. "
                "Export a detector that is fitted on the features (features=None), and compute them outside."
            )

    def _fit(self) -> str | None:
        """Set the fitted attributes, and return the fingerprint of the network where there is one."""
        check_cache(self.cache)
        return self._set_fitted()

    def _described_stream(
        self, X: Iterable[Any], fingerprint: str | None = None, *, warns: bool = False
    ) -> NDArray[np.float32]:
        """Return the features of the images of a stream, of which only some are in memory at a time."""
        return np.concatenate(list(self._parts(X, fingerprint, warns=warns)))

    def _parts(self, X: Any, fingerprint: str | None = None, *, warns: bool = True) -> Iterator[NDArray[np.float32]]:
        """Yield the features of some images at a time; a fingerprint that is known need not be computed.

        With `warns`, a warning says at the end if the white level is not that of the images.
        """
        from tqdm import tqdm

        if is_stream(X):
            all_images, n_images = Images([], self.white_level), None
            images = _parts_of_stream(X, all_images)
        else:
            all_images = as_images(X, self.white_level)
            n_images = len(all_images)
            images = (all_images.part(start, start + STREAMED) for start in range(0, n_images, STREAMED))
        quiet = copy.copy(self)
        quiet.verbose = False  # one bar for all parts
        with tqdm(total=n_images, desc=self.summary(), unit="image", disable=not self.verbose) as progress:
            for part in images:
                rows = quiet._described(part, fingerprint)
                progress.update(len(rows))
                yield rows
        if warns:
            all_images.warn_of_white_level()

    def _described(self, images: Images, fingerprint: str | None = None) -> NDArray[np.float32]:
        """Return the features of the images; a fingerprint that is known already need not be computed."""
        rows = feature_matrix(
            images,
            self._block_widths(),
            partial(self._recipes, fingerprint),
            self._computed,
            self.cache,
            is_half=self.cache_dtype == "float16",
        )
        return rows if self.grid_shape_ is None else rows.reshape(len(rows), *self.grid_shape_, -1)

    def _recipes(self, fingerprint: str | None = None) -> list[str]:
        """Return for each block all that decides its features beside the image."""
        of_all = {"numerics": numerics(as_device(self.device)), "white_level": int(self.white_level)}
        if self._flipped_axes:
            of_all["flipped_axes"] = self._flipped_axes
        return [json.dumps(of_all | recipe, default=str) for recipe in self._block_recipes(fingerprint)]

    def batches(self, images: Images, batch_size: int, description: str = "") -> Iterator[Tensor]:
        """Yield the images as the module takes them, batch by batch, read ahead in threads.

        Parameters
        ----------
        images : Images
            The pictures.
        batch_size : int
            Number of images in a batch; the last one may be smaller.
        description : str, default=""
            Label of the progress bar that is shown with `verbose`.

        Returns
        -------
        iterator of Tensor of shape (n, ...), float32
            As `image_transform` returns them, of each axis that is flipped the reverse.
        """
        transform = self.image_transform()
        dims = [axis - 2 for axis in self._flipped_axes]  # of a tensor, whose last axes are height and width

        def flipped(picture: Image.Image) -> Tensor:
            return transform(picture).flip(dims)

        return image_batches(
            images,
            flipped if dims else transform,
            batch_size,
            reduction=self._reduction(),
            verbose=bool(self.verbose),
            description=description,
        )

    def _reduction(self) -> Reduction | None:
        """Return by how much the decoder of JPEG may divide pictures; None where it may not."""
        return None

    def _at_positions(self, names: list[str]) -> NDArray[np.object_]:
        """Return the names of the channels, at every position if there are any."""
        if self.grid_shape_ is not None:
            names = [f"{name}_at_{i}_{j}" for i, j in np.ndindex(*self.grid_shape_) for name in names]
        return np.array(names, dtype=object)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.no_validation = True
        return tags


def _parts_of_stream(X: Iterable[Any], none_yet: Images) -> Iterator[Images]:
    """Yield some images of a stream at a time, at least one in all, each as what follows on `none_yet`."""
    items = stream_items(X)
    n_read = 0
    while some := list(islice(items, STREAMED)):
        yield none_yet.followed_by(some, n_read)
        n_read += len(some)
    if not n_read:
        as_images([])  # raises
