"""Callables that score or describe batches of images, in whatever process an engine runs them."""

from __future__ import annotations

import hashlib
import os
import pickle
from abc import ABCMeta, abstractmethod
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sklearn import config_context
from sklearn.utils.validation import check_is_fitted

from dfkde_sklearn._batch.columns import COLUMNS, assessed
from dfkde_sklearn._batch.models import here, load_detector, once_a_process, sha256_of
from dfkde_sklearn._inputs import lacks_image

if TYPE_CHECKING:
    from dfkde_sklearn._calibration import Assessment


class _OnBatches(metaclass=ABCMeta):
    """A callable that adds columns to batches of images, and loads its model at the first call in a process."""

    # The columns that it adds.
    _names: tuple[str, ...]

    def __init__(
        self,
        model: Any,
        *,
        column: str = "path",
        sha256: str | None = None,
        weights: str | os.PathLike[str] | None = None,
        device: Any = None,
        download: bool = False,
    ) -> None:
        name = type(self).__name__
        self.column = column
        self._options = {"weights": weights, "device": device, "download": download}
        self._path: Path | None = None
        self._pickle = b""
        if isinstance(model, str | os.PathLike):
            # In full, as workers may have another current folder.
            self._path = Path(model).absolute()
            self.sha256 = None if sha256 is None else sha256.lower()
            if sha256 is None and self._path.is_file():
                self.sha256 = sha256_of(self._path)
            return
        if not self._suits(model):
            raise TypeError(f"{name} needs a path or a detector; got a {type(model).__name__}: {model!r:.80}.")
        if sha256 is not None or any(self._options.values()):
            raise ValueError(
                f"{name}: sha256, weights, device and download are for a model in a file, and the model is a "
                f"{type(model).__name__}. Leave them out, or set the parameters of the {type(model).__name__}."
            )
        try:
            import cloudpickle  # as engines do: classes of a notebook are sent along
        except ImportError:  # joblib before 1.6 has a copy of it
            from joblib.externals import cloudpickle
        # Here and once: engines pickle this object at will, and would load the model each time.
        self._pickle = cloudpickle.dumps(model)
        self.sha256 = hashlib.sha256(self._pickle).hexdigest()

    def __call__(self, batch: Any) -> Any:
        """Return a batch with columns added.

        Parameters
        ----------
        batch : mapping, frame of pandas or polars, pyarrow.Table or iterable
            What an engine hands over; it may be empty. A mapping of columns, a frame or a table has the images in
            `column`. An iterable, such as a list, a Series or an array, holds images, or mappings with an image each
            under `column`.

        Returns
        -------
        dict, DataFrame, Table or list of dict
            Like the batch. Of an iterable, a dict for each image, with its path if it is one, or all of its mapping.

        Raises
        ------
        TypeError, ValueError
            If the batch has no such column, or has one of the new names.
        ValueError, OSError
            If the model cannot be loaded in this process, or fails on the images.
        """
        if isinstance(batch, Mapping):
            return {**batch, **self._added(batch, list(batch))}
        if hasattr(batch, "append_column"):
            for name, values in self._added(batch, batch.column_names).items():
                batch = batch.append_column(name, _arrow(values))
            return batch
        if hasattr(batch, "assign"):
            added = self._added(batch, list(batch.columns))
            return batch.assign(**{name: _of_frame(values) for name, values in added.items()})
        if hasattr(batch, "with_columns") and hasattr(batch, "shape"):  # of polars
            added = self._added(batch, list(batch.columns))
            return batch.with_columns(**{name: _series(values) for name, values in added.items()})
        if hasattr(type(batch), "columns"):
            raise TypeError(
                f"A batch is a list of images or a table, and this is a {type(batch).__name__}. Give a frame of pandas "
                "or polars, or a table of pyarrow."
            )
        if isinstance(batch, str | os.PathLike):
            raise TypeError(
                f"A batch is a list of images or a table, and this is one path: {batch!r:.80}. Give [path]."
            )
        images = _items(batch)
        known: Sequence[Mapping[str, Any]] = [{}] * len(images)
        if any(isinstance(row, Mapping) for row in images):
            # A row may be missing.
            known = [row if isinstance(row, Mapping) else {self.column: row} for row in images]
            for row in known:
                self._check(list(row))
            images = [row[self.column] for row in known]
        elif isinstance(images, list) and images and all(_is_path(image) or lacks_image(image) for image in images):
            known = [{"path": os.fspath(path) if _is_path(path) else None} for path in images]
        rows = zip(*map(_listed, self._columns(images).values()), strict=True)
        return [
            {**mapping, **dict(zip(self._names, row, strict=True))} for mapping, row in zip(known, rows, strict=True)
        ]

    @staticmethod
    @abstractmethod
    def _suits(model: Any) -> bool:
        """Return whether a model can answer."""

    @abstractmethod
    def _columns(self, images: Any) -> dict[str, NDArray[Any]]:
        """Return the new columns, arrays of length n; there may be no images."""

    def _added(self, batch: Any, present: list[str]) -> dict[str, NDArray[Any]]:
        """Return the new columns for a batch that has columns already."""
        self._check(present)
        images = batch[self.column]
        if isinstance(images, str | os.PathLike | bytes):
            raise TypeError(
                f"A batch has a column of images, and {self.column!r} is one: {images!r:.80}. Give several rows "
                "at a time, as map_batches does, or [path]."
            )
        return self._columns(images)

    def _check(self, present: list[str]) -> None:
        if self.column not in present:
            raise ValueError(
                f"The batch has no column {self.column!r}, only {present}. Say which one holds the images: "
                f"{type(self).__name__}(model, column=NAME)."
            )
        taken = [name for name in self._names if name in present]
        if taken:
            raise ValueError(f"The batch has columns {taken} already. Rename or drop them first.")

    def _model(self) -> Any:
        """Return the model, as this process has it."""
        if self._path is None:
            return once_a_process(self.sha256, lambda: pickle.loads(self._pickle))
        version: Any = self.sha256
        if version is None:
            status = self._status()
            version = (status.st_mtime_ns, status.st_size)
        return once_a_process((self._path, version, *self._options.values()), self._loaded)

    def _loaded(self) -> Any:
        path = self._path
        assert path is not None
        self._status()
        found = sha256_of(path)
        if self.sha256 not in (None, found):
            raise ValueError(
                f"{path} {here()} is another model: its SHA-256 is {found}, and that of this job is {self.sha256}. "
                "Copy the model of the job to this machine, or begin a new job."
            )
        try:
            return load_detector(path, **self._options)
        except (ValueError, OSError) as error:
            # Errors of other classes may not survive the way from process to process.
            kind = OSError if isinstance(error, OSError) else ValueError
            raise kind(f"{path} {here()}: {error}") from error

    def _status(self) -> os.stat_result:
        assert self._path is not None
        try:
            return self._path.stat()
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"There is no model {self._path} {here()}. Put the file there on every machine, or give "
                f"{type(self).__name__} the loaded detector, which is sent along."
            ) from error


class BatchScorer(_OnBatches):
    """A small callable that scores batches of images in any process: for Dask, Ray Data, Daft and the like.

    It is pickled with a path or a few hundred kilobytes, loads its detector at the first call in a process, and keeps
    it there. Results are those of the detector's `assess` on the same batch.

    Parameters
    ----------
    model : str, PathLike, or object with `assess`
        A file that a detector's `save` wrote, which lies at the same path on all machines; or a fitted detector, which
        is sent along, without the weights of a network by name.
    column : str, default="path"
        Where a batch has columns, the one of the images: paths that all machines can read, the bytes of image files,
        or arrays.
    skip_broken : bool, default=False
        Whether an image that cannot be read, is not there, or is missing in a column (None, NaN, ""), is no error: its
        verdict is "broken", with the reason, and its numbers are NaN.
    sha256 : str, default=None
        The SHA-256 that the file must have wherever it is loaded, as ``sha256sum`` prints it, or in capital letters.
        None: that of the file when this object is made, if it is there.
    weights : str or PathLike, default=None
        For a file: where the weights of the network are, on all machines, if not where they were at the fit.
    device : str or torch.device, default=None
        For a file: as in the constructor of a detector.
    download : bool, default=False
        For a file: whether each machine may download pretrained weights that it lacks.

    Attributes
    ----------
    sha256 : str or None
        Of the model's file, or of the pickled model.

    See Also
    --------
    BatchTransformer : The same for features.

    Notes
    -----
    The columns are those of ``dfkde score``: `score` (natural log of a density; higher is more normal), `p_anomalous`,
    `p_value`, `verdict` ("normal", "anomalous" or "broken") and `reason`.

    Examples
    --------
    >>> import numpy as np
    >>> from dfkde_sklearn import BatchScorer, DFKDEDetector, ScatteringFeatures
    >>> from dfkde_sklearn.datasets import make_textures
    >>> data = make_textures(20, 4, image_size=32, random_state=0)
    >>> detector = DFKDEDetector(ScatteringFeatures(scales=2, image_size=32)).fit(data.X_train)
    >>> scorer = BatchScorer(detector, column="image")
    >>> batch = scorer({"id": np.arange(4), "image": data.X_test})
    >>> list(batch)
    ['id', 'image', 'score', 'p_anomalous', 'p_value', 'verdict', 'reason']
    >>> bool((batch["score"] == detector.score_samples(data.X_test)).all())
    True
    """

    # The public path, which pickles name.
    __module__ = "dfkde_sklearn"
    _names = COLUMNS

    def __init__(
        self,
        model: Any,
        *,
        column: str = "path",
        skip_broken: bool = False,
        sha256: str | None = None,
        weights: str | os.PathLike[str] | None = None,
        device: Any = None,
        download: bool = False,
    ) -> None:
        super().__init__(model, column=column, sha256=sha256, weights=weights, device=device, download=download)
        self.skip_broken = skip_broken

    def assess(self, X: Any) -> Assessment:
        """Return the answers of the detector, in this process.

        Parameters
        ----------
        X : images or array-like of shape (n_samples, n_features)
            What the detector takes.

        Returns
        -------
        Assessment
            The detector's.
        """
        assessment: Assessment = self._model().assess(X)
        return assessment

    @staticmethod
    def _suits(model: Any) -> bool:
        return hasattr(model, "assess")

    def _columns(self, images: Any) -> dict[str, NDArray[Any]]:
        return assessed(self, images, skip_broken=self.skip_broken)


class BatchTransformer(_OnBatches):
    """A small callable that computes the features of batches of images in any process.

    As :class:`BatchScorer`, for features in place of scores. The column that it adds is `features`: an array of shape
    (n, n_features), or (n, h, w, C) at positions; in tables and frames a list for each image.

    Parameters
    ----------
    model : str, PathLike, or object with `transform`
        As in :class:`BatchScorer`: of a detector, its feature extractor is taken.
    column : str, default="path"
        As in :class:`BatchScorer`.
    sha256 : str, default=None
        As in :class:`BatchScorer`.
    weights : str or PathLike, default=None
        As in :class:`BatchScorer`.
    device : str or torch.device, default=None
        As in :class:`BatchScorer`.
    download : bool, default=False
        As in :class:`BatchScorer`.

    Attributes
    ----------
    sha256 : str or None
        Of the model's file, or of the pickled model.

    See Also
    --------
    BatchScorer : The same for scores.

    Examples
    --------
    >>> from dfkde_sklearn import BatchTransformer, ScatteringFeatures
    >>> from dfkde_sklearn.datasets import make_textures
    >>> images = make_textures(3, 1, image_size=32, random_state=0).X_train
    >>> extractor = ScatteringFeatures(scales=2, image_size=32).fit(images)
    >>> [row["features"].shape for row in BatchTransformer(extractor)(images)]
    [(240,), (240,), (240,)]
    """

    __module__ = "dfkde_sklearn"
    _names = ("features",)

    def transform(self, X: Any) -> NDArray[Any]:
        """Return the features of images, in this process.

        Parameters
        ----------
        X : images
            What the feature extractor takes.

        Returns
        -------
        ndarray of shape (n_images, n_features), or (n_images, h, w, C) at positions
            The features.
        """
        with config_context(transform_output="default"):
            return np.asarray(self._extractor().transform(X))

    @staticmethod
    def _suits(model: Any) -> bool:
        return hasattr(getattr(model, "features_", model), "transform")

    def _extractor(self) -> Any:
        model = self._model()
        extractor = getattr(model, "features_", model)
        if extractor is None:
            raise ValueError(
                f"The detector in {self._path} was fitted on a feature matrix: it has no feature extractor."
            )
        return extractor

    def _columns(self, images: Any) -> dict[str, NDArray[Any]]:
        if len(images):
            return {"features": self.transform(images)}
        extractor = self._extractor()
        check_is_fitted(extractor)
        grid = getattr(extractor, "grid_shape_", None) or ()
        n_features = getattr(extractor, "n_features_out_", None)
        if n_features is None:  # of scikit-learn's, such as a union
            n_features = len(extractor.get_feature_names_out())
        return {"features": np.empty((0, *grid, n_features // prod(grid)), np.float32)}


def _items(batch: Any) -> Any:
    """Return the images of a batch by index: an array of numbers as it is, and a list of all else."""
    if hasattr(batch, "to_pylist"):  # of pyarrow and Daft
        return batch.to_pylist()
    return batch if isinstance(batch, np.ndarray) and batch.dtype.kind not in "OUT" else list(batch)


def _is_path(image: Any) -> bool:
    return isinstance(image, str | os.PathLike)


def _listed(values: NDArray[Any]) -> list[Any]:
    """Return a list of plain numbers or strings, or of an array for each image."""
    return values.tolist() if values.ndim == 1 else list(values)


def _of_frame(values: NDArray[Any]) -> Any:
    """Return a column of pandas, which takes an empty list for numbers."""
    if values.ndim == 1:
        return values
    return list(values) if len(values) else np.empty(0, object)


def _series(values: NDArray[Any]) -> Any:
    import polars

    return polars.Series(values if values.ndim == 1 else values.reshape(len(values), prod(values.shape[1:])))


def _arrow(values: NDArray[Any]) -> Any:
    import pyarrow

    if values.ndim == 1:
        return pyarrow.array(values)
    return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.ravel()), prod(values.shape[1:]))
