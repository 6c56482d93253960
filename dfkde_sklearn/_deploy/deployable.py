"""What every fitted detector can do for use elsewhere: save, load, and export to other runtimes."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from dfkde_sklearn._deploy.buffers import StateBuffers

if TYPE_CHECKING:
    from dfkde_sklearn._deploy.export import Expected
    from dfkde_sklearn._deploy.saved import File


class DeployableMixin:
    """Save, load and export, for a detector whose fitted state is in buffers.

    A class that uses the mixin has the parameters `features` and `device`, the attribute `features_`, `to_torch`, and
    the methods below that raise NotImplementedError.
    """

    # The name of the class in files; a subclass is saved under it too.
    _saved_as: ClassVar[str]
    features_: Any
    feature_names_in_: NDArray[np.object_]
    # What `partial_fit` adds to, and the seed that decides which rows it keeps.
    _sample: dict[str, Any]
    _seed: int

    if TYPE_CHECKING:

        def __init__(self, features: Any, *, device: Any = None, **parameters: Any) -> None: ...
        def get_params(self, deep: bool = True) -> dict[str, Any]:
            """Return the parameters."""

        def _validate_params(self) -> None: ...
        def to_torch(self) -> Any:
            """Return the fitted detector as a torch module."""

    def _buffers(self) -> StateBuffers:
        """Return the fitted state as buffers of a torch module, on the CPU."""
        raise NotImplementedError

    @classmethod
    def _empty_buffers(cls, parameters: Mapping[str, Any]) -> StateBuffers:
        """Return buffers for the state of a detector with these parameters."""
        raise NotImplementedError

    def _take(self, buffers: Any, extractor: Any) -> None:
        """Set all fitted attributes from copies of buffers, and a fitted feature extractor or None."""
        raise NotImplementedError

    def _exported_answers(self, X: Any) -> Expected:
        """Return what an exported file must answer for X."""
        raise NotImplementedError

    def save(self, path: str | PathLike[str], *, training_rows: bool = False) -> None:
        """Write the fitted detector to a file that later versions read, and that holds no code.

        One safetensors file, with a header in JSON. A backbone is stored by its name, tag and the hash of its weights.
        A file that exists is replaced only once the new one is complete.

        Parameters
        ----------
        path : str or PathLike
            The file, of any name.
        training_rows : bool, default=False
            Whether the file also holds what `partial_fit` adds to: the features of the training images, which `fit`
            keeps up to 64 MiB of, and `partial_fit` all that it uses.

        Raises
        ------
        NotFittedError
            If the detector is not fitted.
        TypeError
            If the feature extractor is neither :class:`TimmFeatures` nor :class:`ScatteringFeatures`, or a parameter is
            an object that the file cannot hold. Pickle and joblib keep any.
        ValueError
            If a parameter that was set after the fit is not allowed, or contradicts the fit; or if `training_rows` are
            asked for and the fit kept none: see `partial_fit`.

        Notes
        -----
        Not kept are `device` and the `device` and `cache` of the feature extractor, which belong to the machine, and a
        `random_state` that is a generator.
        """
        check_is_fitted(self)
        self._validate_params()
        from dfkde_sklearn._deploy.saved import Saved, save

        parameters = self.get_params(deep=False)
        features = parameters.pop("features")
        names = getattr(self, "feature_names_in_", np.array([])).tolist()
        sample = getattr(self, "_sample", None) if training_rows else None
        if training_rows and sample is None:
            raise ValueError(
                f"training_rows=True, and this {type(self).__name__} has none: a fit keeps up to 64 MiB of them, and "
                "none where it drew groups; a file has them if it was saved with them. Fit by partial_fit, which keeps "
                "all that it uses, or leave training_rows out."
            )
        save(path, self._saved_as, Saved(parameters, features, self.features_, names, self._buffers(), sample))

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        *,
        backbone: Any = None,
        weights: str | PathLike[str] | None = None,
        device: str | torch.device | None = None,
        download: bool = False,
    ) -> Self:
        """Read a detector that `save` wrote.

        Nothing in the file is run. The backbone is loaded too, and its weights are compared with those of the fit.

        Parameters
        ----------
        path : str or PathLike
            The file.
        backbone : torch.nn.Module, default=None
            The network, for a detector whose backbone was a module.
        weights : str or PathLike, default=None
            File with the backbone's weights, where they lie elsewhere than at the fit.
        device : str, torch.device or None, default=None
            As in the constructor, for the detector and for its feature extractor.
        download : bool, default=False
            Whether pretrained weights that this machine lacks may be downloaded.

        Returns
        -------
        detector
            As it was saved, except for what belongs to the machine.

        Raises
        ------
        ValueError
            If the file is damaged, of a newer version, or of something else, such as a detector
            of another class, or the backbone's weights are not those
            of the fit.
        OSError
            If there is no such file, or the backbone's weights are not on this machine and may not be downloaded.
        """
        from dfkde_sklearn._deploy.saved import read

        return cls._of_file(read(path), backbone=backbone, weights=weights, device=device, download=download)

    @classmethod
    def _of_file(cls, file: File, *, device: Any, **other: Any) -> Self:
        """Return the detector in a file that was read; see `load`."""
        from dfkde_sklearn._deploy.saved import detector_in

        saved = detector_in(file, cls._saved_as, cls, cls._empty_buffers, device=device, **other)
        detector = cls(saved.features, device=device, **saved.parameters)
        detector._take(saved.buffers, saved.extractor)
        if saved.feature_names:
            detector.feature_names_in_ = np.array(saved.feature_names, dtype=object)
        if saved.sample is not None:
            detector._sample, detector._seed = saved.sample, saved.sample["seed"]
        return detector

    def to_onnx(
        self, path: str | PathLike[str], *, image_shape: tuple[int, int] | None = None, check: Any = None
    ) -> None:
        """Write the fitted detector as one ONNX file; needs the extra ``onnx``.

        The input is ``images``, float32 of shape (n, 3, H, W), as `read_images` of the `to_torch` module gives them;
        ``features`` of shape (n, n_features), or (n, h, w, C) at positions, where the feature extractor is not
        :class:`TimmFeatures`. The outputs are ``log_density`` and ``p_anomalous`` in the dtype of the features, and
        ``label``, int64, 1 or -1, all of shape (n,); from a :class:`PatchDFKDEDetector` also ``log_density_map`` of
        shape (n, h, w), at each position. n may be any number of rows.

        Parameters
        ----------
        path : str or PathLike
            The file to write.
        image_shape : tuple (height, width), default=None
            Put the resizing, cropping and normalisation into the graph, for images of this size in pixels: the
            input is then uint8 of shape (n, height, width, 3), RGB.
        check : images, default=None
            Run the exported file on these images in ONNX Runtime, and compare with this detector: as in `fit`, and
            with `image_shape` all of that size. A file that is wrong is not written.

        Raises
        ------
        ImportError
            If the extra is not installed.
        ValueError
            If the feature extractor cannot be exported, `image_shape` is given and there is none, or the exported file
            differs on `check` by more than rounding: 0.001 of a log density behind a network, 0.0001 with features of
            float32, 1e-8 with features of float64; in nats where the log density is below 1.
        """
        check_is_fitted(self)
        from dfkde_sklearn._deploy.export import write_onnx

        write_onnx(self.to_torch(), path, image_shape, None if check is None else self._exported_answers(check))

    def to_pt2(
        self, path: str | PathLike[str], *, image_shape: tuple[int, int] | None = None, check: Any = None
    ) -> None:
        """Write the fitted detector as a program of ``torch.export``, read by ``torch.export.load``.

        Inputs and outputs are those of `to_onnx`.

        Parameters
        ----------
        path : str or PathLike
            The file to write, usually named ``.pt2``.
        image_shape : tuple (height, width), default=None
            As in `to_onnx`.
        check : images, default=None
            As in `to_onnx`, but run by torch.

        Raises
        ------
        ValueError
            As in `to_onnx`.
        """
        check_is_fitted(self)
        from dfkde_sklearn._deploy.export import write_program

        write_program(self.to_torch(), path, image_shape, None if check is None else self._exported_answers(check))
