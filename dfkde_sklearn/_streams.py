"""Streams, in bounded memory: fits in one pass, fits to data that come part by part, and answers in order."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable, Iterator
from math import prod
from numbers import Integral, Number
from os import PathLike
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import _fit_context, clone
from sklearn.pipeline import FeatureUnion, Pipeline
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, validate_parameter_constraints
from sklearn.utils.validation import check_is_fitted

from dfkde_sklearn._batch.iterate import (
    answers_in_order,
    not_empty,
    parts_of_images,
    parts_of_rows,
    parts_of_stream,
    parts_of_table,
)
from dfkde_sklearn._calibration import Assessment
from dfkde_sklearn._callbacks import N_CALLS, one_task
from dfkde_sklearn._density.stream import RowSample
from dfkde_sklearn._features.extractor import FeatureExtractor
from dfkde_sklearn._groups import group_labels
from dfkde_sklearn._images import as_images, files_at
from dfkde_sklearn._inputs import is_stream, stream_items
from dfkde_sklearn._matrices import floats, is_matrix

# The size of training rows up to which `fit` keeps them for `partial_fit`.
_KEPT_BYTES = 2**26
# Parameters of transformers that do not change what they return.
_OF_A_RUN = ("batch_size", "cache", "device", "memory", "n_jobs", "verbose")
# Images to which any detector can be fitted.
_ENOUGH = 3


class StreamsMixin:
    """What a detector does with streams: `partial_fit`, `score_stream`, and a `fit` that reads some images at a time.

    A class that uses the mixin has the parameters and methods below.
    """

    features: Any
    max_samples: int | None
    random_state: Any
    features_: Any
    calibration_scores_: NDArray[np.floating]
    # Decides which rows are drawn.
    _seed: int
    # Where in X, or in all calls of `partial_fit`, the rows of the fit are; None for all of X.
    _places: NDArray[np.int64] | None = None
    # The state of the `RowSample` that `partial_fit` adds to, and with it the number of calibration scores of the fit.
    _sample: dict[str, Any]

    if TYPE_CHECKING:

        def _default_extractor(self) -> FeatureExtractor: ...
        def _validated(self, X: Any, *, reset: bool) -> NDArray[np.number]: ...
        def assess(self, X: Any) -> Assessment: ...
        def _whole_table(self, X: Any, *, reset: bool) -> NDArray[np.number]: ...
        def _reads_parts(self) -> bool: ...
        def _fit_table(self, table: NDArray[np.number], groups: Any) -> NDArray[np.floating]: ...

    @_fit_context(prefer_skip_nested_validation=False)
    @one_task
    def partial_fit(self, X: Any, y: Any = None, *, groups: Any = None) -> Self:
        """Fit to the data of all calls so far.

        The rows of all calls, or a random `max_samples` of them, are kept, and each call fits to these anew. The result
        does not depend on how the rows were divided into calls: up to `max_samples` rows, it is that of `fit` on all of
        them, unless `features` is a transformer that learns, such as a scaler, which learns from the first call only.
        A `fit` before it counts as the first call. A call takes as long as a `fit` on the kept rows. Scores that
        `recalibrate` added are left out: give its rows too.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or images
            New good data, as in `fit`; in the first call at least two distinct rows.
        y : None
            Ignored; there for the interface.
        groups : array-like of shape (n_samples,) or None, default=None
            What each row or image shows, as in `fit`: in all calls or in none. Labels are compared as text. Of more
            than `max_samples` rows, whole groups are kept.

        Returns
        -------
        detector
            The detector itself.

        Raises
        ------
        ValueError
            If `fit` kept no rows, as they take more than 64 MiB or are of groups that were drawn; if the detector was
            read from a file that was saved without ``training_rows=True``; if `groups` are given in some calls only; if
            parameters that decide how an image is described have changed since the first call; or as `fit`. The
            detector is then as it was.
        TypeError
            As `fit`.

        Warns
        -----
        UserWarning
            If scores that `recalibrate` added are left out; or as `fit`.

        See Also
        --------
        recalibrate : Moves the threshold only, and needs no rows of the fit.
        """
        kept = getattr(self, "_sample", None)
        if kept is None and hasattr(self, "calibration_scores_"):
            raise ValueError(
                f"This {type(self).__name__} has no training rows to add to: fit keeps up to 64 MiB of them, and none "
                "where it drew groups, and a file holds them if it is saved with training_rows=True. Give all data to "
                "partial_fit, from the first on; clone(detector) is a new detector. To move the threshold alone, use "
                "recalibrate."
            )
        n_added = 0 if kept is None else len(self.calibration_scores_) - kept["n_scores"]
        extended = copy.copy(self)
        if kept is None:
            extended._begin(X)
            sample = RowSample(self.max_samples, extended._seed)
        else:
            if changed := self._changed_parameters():
                names = ", ".join(f"{name}: {old!r:.80} became {new!r:.80}" for name, (old, new) in changed.items())
                raise ValueError(
                    f"The kept rows were computed with other parameters than this call has ({names}). Set them back, "
                    "or give all data to a new detector, clone(detector)."
                )
            sample = RowSample.from_state(kept, self.max_samples)
        _add(sample, extended._parts(X, reset=kept is None), groups, self.max_samples)
        # Also where no new row is kept, as parameters or calibration scores may have changed since.
        extended._fit_table(sample.rows, sample.labels if sample.has_labels else None)
        extended._places = sample.places
        extended._sample = sample.state() | {"n_scores": len(extended.calibration_scores_)}
        self._become(extended)
        if n_added > 0:
            warnings.warn(
                f"The {n_added} calibration scores that recalibrate added are left out, as partial_fit fits anew. Give "
                "the rows or images of recalibrate to partial_fit too.",
                UserWarning,
                stacklevel=3 + N_CALLS,
            )
        return self

    @_fit_context(prefer_skip_nested_validation=False)
    @one_task
    def fit_features(self, parts: Iterable[Any], y: Any = None, *, groups: Any = None) -> Self:
        """Fit to images whose features were computed elsewhere, as on a cluster.

        The same as `fit` on a stream of these images in the same order. Of more than `max_samples` rows, a random
        `max_samples` are kept, and no others are in memory.

        Parameters
        ----------
        parts : iterable of ndarray
            The features of some images each, of shape (n, n_features) or (n, h, w, C): what
            :class:`BatchTransformer`, or `transform` of a feature extractor like `features`, returns.
        y : None
            Ignored; there for the interface.
        groups : array-like of shape (n_samples,) or None, default=None
            What each image shows, as in `fit`.

        Returns
        -------
        detector
            The detector itself, which scores images.

        Raises
        ------
        ValueError
            If `features` is no feature extractor of this package, or describes images by another number of features;
            if a detector of positions has `flips`; if there are no parts; or as `fit`.

        Examples
        --------
        >>> from dfkde_sklearn import BatchTransformer, DFKDEDetector, ScatteringFeatures
        >>> from dfkde_sklearn.datasets import make_textures
        >>> images = make_textures(40, 1, image_size=32, random_state=0).X_train
        >>> extractor = ScatteringFeatures(scales=2, image_size=32)
        >>> transformer = BatchTransformer(extractor.fit(images))
        >>> parts = map(transformer.transform, [images[:25], images[25:]])  # or on a cluster
        >>> detector = DFKDEDetector(extractor).fit_features(parts)
        >>> bool((detector.score_samples(images) == DFKDEDetector(extractor).fit(images).score_samples(images)).all())
        True
        """
        fitted = copy.copy(self)
        fitted._begin("images")  # which is no matrix, for features="auto"
        extractor = fitted.features_
        if not isinstance(extractor, FeatureExtractor):
            raise ValueError(
                f"fit_features needs a feature extractor as features=; got features={self.features!r}. Give "
                "TimmFeatures(...) or ScatteringFeatures(...), or fit on the features, with features=None."
            )
        if not fitted._reads_parts():
            raise ValueError(
                "fit_features needs features of one pass, and flips= makes several. Set flips=None, or fit to the "
                "images."
            )
        # As its `fit`, which learns nothing from images.
        extractor._validate_params()
        extractor._fit()
        sample = RowSample(self.max_samples, fitted._seed)
        _add(sample, fitted._checked_parts(parts, extractor), groups, self.max_samples)
        if not sample.n_seen:
            raise ValueError("parts gave no features. A generator can be used once.")
        fitted._sample, fitted._places = sample.state(), sample.places
        fitted._fit_table(sample.rows, sample.labels if sample.has_labels else None)
        fitted._keep_rows(sample.rows, groups)
        self._become(fitted)
        return self

    def _checked_parts(self, parts: Iterable[Any], extractor: FeatureExtractor) -> Iterator[NDArray[np.number]]:
        """Yield the parts that have rows, each checked to be features of the extractor."""
        reset, few = True, list[NDArray[Any]]()
        for number, part in enumerate(parts):
            rows = np.asarray(part)
            shape = np.shape(rows)[1:]
            of_extractor = extractor.n_features_out_
            grid = extractor.grid_shape_
            expected = (of_extractor,) if grid is None else (*grid, of_extractor // prod(grid))
            if shape not in (expected, (of_extractor,)):
                raise ValueError(
                    f"Part {number} has shape {np.shape(rows)}, and features={self.features!r} gives (n, "
                    f"{', '.join(map(str, expected))}). Compute the parts with the same feature extractor."
                )
            if len(rows):
                few.append(rows.reshape(len(rows), *expected))
            # A fit checks that the first are enough.
            if few and (not reset or sum(map(len, few)) >= _ENOUGH):
                yield self._validated(np.concatenate(few), reset=reset)
                reset, few = False, []
        if few:
            yield self._validated(np.concatenate(few), reset=reset)

    def score_stream(self, X: Any, *, batch_size: int = 64) -> Iterator[Assessment]:
        """Return log density, p-value, P(anomalous) and label of each image of a stream, in order, one by one.

        In bounded memory, whatever the length: while the answers for some images are used, the next images are read,
        described and scored in a thread.

        Parameters
        ----------
        X : images, or iterable of array-likes
            Images as in `fit`, most often a generator, a folder or a ``DataLoader``. For a detector of feature rows, a
            feature matrix, or an iterable of rows (n_features,) or matrices.
        batch_size : int, default=64
            The number of images that are read and scored at a time.

        Returns
        -------
        iterator of Assessment
            Of a number each, for the next image or row.

        Raises
        ------
        NotFittedError
            If the detector is not fitted.
        ValueError, TypeError, OSError
            If the stream is empty, as a generator is that was used before; or as `assess`, once all answers before the
            item that is at fault have been yielded. An error of the stream itself comes as it is, after the answers for
            all that it gave. Of a list, types and shapes are checked before the first answer.

        See Also
        --------
        assess : The same as arrays, for images that are all there.

        Examples
        --------
        >>> import numpy as np
        >>> from dfkde_sklearn import DFKDEDetector
        >>> rng = np.random.default_rng(0)
        >>> detector = DFKDEDetector(n_components=4).fit(rng.normal(size=(200, 16)))
        >>> rows = (rng.normal(size=16) + shift for shift in [0, 0, 5])
        >>> [assessment.label for assessment in detector.score_stream(rows)]
        [1, 1, -1]
        """
        check_is_fitted(self)
        at_least_1 = [Interval(Integral, 1, None, closed="left")]
        validate_parameter_constraints({"batch_size": at_least_1}, {"batch_size": batch_size}, "score_stream")
        reads_images = _reads_images(self.features_)
        # Of several extractors, each has a white level of its own.
        white_level = getattr(self.features_, "white_level", None)

        def read(some: list[Any], first: int) -> Any:
            return as_images(some, white_level, first) if reads_images else some

        if self.features_ is None:
            parts = parts_of_rows(X)
        elif reads_images and not is_stream(X):
            parts = parts_of_images(as_images(X, white_level), batch_size)
        elif isinstance(X, str | PathLike):
            parts = parts_of_table([os.fspath(path) for path in files_at(Path(X))], batch_size)
        elif isinstance(X, list | tuple) or hasattr(X, "shape"):
            parts = parts_of_table(X, batch_size)
        else:
            parts = parts_of_stream(stream_items(X), batch_size, read)
        return answers_in_order(self.assess, not_empty(parts))

    def _become(self, fitted: Self) -> None:
        """Take over all of a copy that was fitted: after an error on the way, the detector is as it was."""
        self.__dict__ = vars(fitted)

    def _training_data(self, X: Any, groups: Any) -> tuple[NDArray[np.number], Any]:
        """Fit the feature extractor, and return the feature matrix with its groups.

        Of a stream, or of more images than `max_samples`, it has the rows that are drawn, and no others are kept.
        """
        self._begin(X)
        if isinstance(self.features_, FeatureExtractor) and self._reads_parts():
            X = X if is_stream(X) else as_images(X, self.features_.white_level)
            if is_stream(X) or (self.max_samples is not None and len(X) > self.max_samples):
                sample = RowSample(self.max_samples, self._seed)
                _add(sample, self._parts(X, reset=True), groups, self.max_samples)
                self._sample, self._places = sample.state(), sample.places
                return sample.rows, sample.labels if sample.has_labels else None
        return self._whole_table(X, reset=True), groups

    def _keep_rows(self, table: NDArray[np.number], groups: Any) -> None:
        """Keep the rows of a fit for `partial_fit`, if there are few."""
        kept = self.__dict__.pop("_sample", None)
        n_most = len(table) if self.max_samples is None else min(len(table), self.max_samples)
        is_of_all = groups is None or n_most == len(table)
        if kept is None and is_of_all and n_most * floats(table[:1]).nbytes <= _KEPT_BYTES:
            sample = RowSample(self.max_samples, self._seed)
            _add(sample, [floats(table)], groups, self.max_samples)
            kept = sample.state()
        if kept is not None and kept["rows"].nbytes <= _KEPT_BYTES:
            self._sample = kept | {"n_scores": len(self.calibration_scores_)}

    def _parts(self, X: Any, *, reset: bool) -> Iterator[NDArray[np.number]]:
        """Yield the feature matrix part by part; with `reset`, after `_begin`, the feature extractor is fitted."""
        if not isinstance(self.features_, FeatureExtractor) or not self._reads_parts():
            yield self._whole_table(X, reset=reset)
            return
        parts = self.features_.fit_transform_parts(X) if reset else self.features_.transform_parts(X)
        for part in parts:
            yield self._validated(part, reset=reset)
            reset = False

    def _changed_parameters(self) -> dict[str, tuple[Any, Any]]:
        """Return the parameters of the features that changed since the fit, by name: the old value and the new."""
        if isinstance(self.features, str):
            return {}
        if not isinstance(self.features, type(self.features_)):
            return {"features": (self.features_, self.features)}
        if self.features is None:
            return {}
        old, new = self.features_.get_params(), self.features.get_params()
        return {
            f"features__{name}": (old.get(name), new.get(name))
            for name in sorted(old.keys() | new.keys())
            if name.rpartition("__")[2] not in _OF_A_RUN and _differ(old.get(name), new.get(name))
        }

    def _begin(self, X: Any) -> None:
        """Begin anew: draw a seed, and set `features_` to a new feature extractor, or None for a feature matrix X."""
        self.__dict__.pop("_sample", None)
        self.__dict__.pop("_places", None)
        self._seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        if self.features is None or (isinstance(self.features, str) and is_matrix(X)):
            self.features_ = None
        elif isinstance(self.features, str):
            self.features_ = self._default_extractor()
        else:
            self.features_ = clone(self.features)
        self._read_arrays()

    def _read_arrays(self) -> None:
        """Have the feature extractor return arrays, whatever scikit-learn is configured to return."""
        if isinstance(self.features_, FeatureExtractor):
            self.features_.set_output(transform="default")


def _reads_images(transformer: Any) -> bool:
    """Return whether what takes the images in a transformer are feature extractors of this package."""
    if isinstance(transformer, Pipeline):
        steps = [step for _, step in transformer.steps if step not in (None, "passthrough")]
        return bool(steps) and _reads_images(steps[0])
    if isinstance(transformer, FeatureUnion):
        return all(part == "drop" or _reads_images(part) for _, part in transformer.transformer_list)
    return isinstance(transformer, FeatureExtractor)


def _differ(old: Any, new: Any) -> bool:
    """Return whether a parameter has changed, as far as one can see: copies of objects need not be equal."""
    if isinstance(old, list | tuple) and isinstance(new, list | tuple):
        return len(old) != len(new) or any(map(_differ, old, new))
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() != new.keys() or any(_differ(old[key], new[key]) for key in old)
    if hasattr(old, "__name__") and hasattr(new, "__name__"):  # functions, which are copied by name
        return old is not new
    plain = (str, PathLike, Number, NoneType)
    if isinstance(old, plain) and isinstance(new, plain):
        return bool(old != new and (old == old or new == new))  # unless both are NaN
    return type(old) is not type(new)


def _add(sample: RowSample, parts: Iterable[NDArray[Any]], groups: Any, max_samples: int | None) -> None:
    """Add feature matrices (n, ...) to a sample, with the labels of their groups."""
    labels = None if groups is None else group_labels(groups)
    if sample.n_seen and sample.has_labels != (labels is not None):
        raise ValueError(
            f"groups {'were' if sample.has_labels else 'were not'} given in earlier calls of partial_fit, and "
            f"{'are missing' if labels is None else 'are given'} in this one. Give them in all calls or in none."
        )
    n = 0
    for part in parts:
        if labels is not None and len(labels) < n + len(part):
            raise ValueError(f"groups has {len(labels)} labels, and X has more rows or images. Give one for each.")
        rows = floats(part.reshape(len(part), -1))
        sample.add(rows, None if labels is None else labels[n : n + len(part)])
        n += len(part)
    if labels is not None and len(labels) != n:
        raise ValueError(f"groups has {len(labels)} labels, and X has {n} rows or images. Give one for each.")
    if labels is not None and sample.n_seen > len(sample) and len(set(sample.labels)) < 2:
        raise ValueError(
            f"max_samples={max_samples} has no room for two whole groups of {sample.n_seen} rows. Raise max_samples, "
            "or give fewer rows of each group."
        )
