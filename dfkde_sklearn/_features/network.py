"""TimmFeatures: images to feature rows by a pretrained network of timm, or any module."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil, floor, prod
from numbers import Integral, Real
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from dfkde_sklearn._device import as_device
from dfkde_sklearn._document import is_integer_from, is_list_of, is_number, is_one_of, is_positive, is_text, is_tuple_of
from dfkde_sklearn._features.backbones import Backbone, borrowed, full_name, module_name, named_backbone
from dfkde_sklearn._features.engines import ENGINES, engine_version
from dfkde_sklearn._features.extractor import IS_GRID, MAX_SIDE, FeatureExtractor
from dfkde_sklearn._features.layers import (
    LayersRead,
    check_layers,
    layer_formats,
    layers_for_positions,
    micro_batch_size,
    on_grid,
    pooled,
    visit_layers,
)
from dfkde_sklearn._features.modules import NetworkModule
from dfkde_sklearn._features.tiles import Tiling, tiling
from dfkde_sklearn._images import FULL_RANGE, Images, Reduction, as_images
from dfkde_sklearn._threads import mapped_on_single_cores, n_single_cores

CROPS = ("squash", "center", "border")


def _is_side(value: Any) -> bool:
    return is_integer_from(1)(value) and value <= MAX_SIDE


class TimmFeatures(FeatureExtractor):
    """Features of images from a pretrained network: pooled layers, or the pooled embedding.

    Each image is resized and normalised as the backbone's configuration in timm says, and goes through the network
    once. The forward pass ends after the last of the `layers`.

    Parameters
    ----------
    backbone : str or torch.nn.Module, default="resnet18.tv_in1k"
        The network. A name is any that ``timm.create_model`` takes. A module is used as it is and shared between
        clones, not copied; after each method its training flags and its device are as before. Size, mean, standard
        deviation and interpolation come from its ``pretrained_cfg``, which every model of ``timm.create_model`` has.
        Without it they are timm's defaults: 224 x 224 and ImageNet's statistics.
    layers : str, list of str or None, default=None
        Names of submodules as in ``backbone.named_modules()``. Their outputs are pooled and concatenated in this
        order. None is the pooled embedding: what a timm model returns with ``num_classes=0``, and the output of any
        other module. With ``pooling=None`` it is the layers of stride 8 and 16 that timm's `feature_info` states, and
        of a transformer the blocks at half and three quarters of its depth.
    pooling : {"avg", "max", "gem"} or None, default="avg"
        How the positions of a layer become one vector: their mean, their maximum, or the generalised mean
        with exponent 3 of values clamped to at least 1e-6 [1]_. Class and register tokens are left out: those whose
        number does not grow with the image. They are assumed to come first. None keeps all positions: each layer is
        averaged over 3 x 3 positions and interpolated to the coarsest grid of the layers, so that every position has a
        vector.
    crop : {"squash", "center", "border"}, default="squash"
        Which part of an image the network sees. "squash": all of it, resized to the input size without keeping the
        proportions. "center": what timm shows by default; the image is resized with its proportions, and the centre
        is cut out, with the backbone's own ``crop_pct``. "border": all of it, resized with its proportions, and the
        missing borders filled with the mean colour. See Notes.
    pretrained : bool, default=True
        Whether a named backbone gets timm's pretrained weights, downloaded at the first use. Incomplete weights are an
        error. False gives random weights, drawn with `random_state`.
    weights : str, PathLike or None, default=None
        File with the weights of a named backbone, instead of the pretrained ones: safetensors, or a state dict
        of ``torch.save``, read with ``weights_only=True``, bare or under one of the keys "state_dict",
        "model_state_dict" and "model". Prefixes "module.", "model.", "backbone.", "encoder." and "_orig_mod." are
        removed if the remaining names fit, and names without the prefix are ignored. Weights of a classifier may be
        present or not; any other difference to the network is an error.
    image_size : int, tuple (height, width) or None, default=None
        Size in pixels that images are resized to, and that the network sees. None is the backbone's own.
    tile_size : int, tuple (height, width) or None, default=None
        Size in pixels of overlapping tiles of the resized image, each of which goes through the network on its own, for
        defects that are small in a large image. Only with ``pooling=None``: the positions of all tiles become one grid.
        Neighbours share a quarter of a tile at least; where they overlap, vectors are averaged, with weights that fall
        towards the borders of a tile. None is the image as a whole.
    reducing_gap : float or None, default=None
        From 1 on: large images are first divided by an integer that leaves them at least this many times as large as
        they are resized to. The decoder of JPEG does that itself, by 2, 4 or 8 where that divides width and height.
        Images of a camera then take a fraction of the time to read, and some grey levels change by a few of 255: see
        Notes. None resizes from all pixels.
    white_level : int, default=65535
        The 16-bit value that becomes white, as do all above it: 4095 for files that hold the 12 bits of a camera,
        1023 for 10 bits. Other samples are not affected. ``fit_transform``, and so the ``fit`` of a detector, warns
        if no value in the 16-bit images comes near the white level.
    engine : {"torch", "onnxruntime", "openvino"}, default="torch"
        What computes a named backbone on the CPU; the latter two need the extras ``onnx`` and ``openvino``. They are
        faster on single images and on networks without batch norms, and take some seconds to prepare in each process:
        see Notes.
    batch_size : int, default=32
        Number of images that are read ahead, and largest number that goes through the network at once. On a CPU it is
        divided among the cores, and fewer images go at once where that is faster: as many as keep the largest
        activation within 20 MiB. Changes the result by rounding only.
    cache : bool, str, PathLike or None, default=None
        Whether to keep features, layer by layer, and to reuse them. True: in the memory of this process, up to 1 GiB
        for all feature extractors. A path: in this folder, for any number of processes of this machine, until
        :func:`clear_cache`. See Notes.
    cache_dtype : {"float32", "float16"}, default="float32"
        How features are kept with `cache`. "float16" takes half the space, and rounds features to 11 bits, also where
        they are computed for the first time.
    device : str, torch.device or None, default=None
        Where the network runs. None is the first CUDA GPU if there is one, else the CPU.
    random_state : int, RandomState instance or None, default=None
        Draws the random weights if ``pretrained=False``.
    verbose : bool, default=False
        Whether to show a progress bar.

    Attributes
    ----------
    backbone_name_ : str
        Full name of the backbone, for example "resnet18.tv_in1k"; for other modules the name of their class.
    weights_hash_ : str
        SHA-256 of the weights: of names, dtypes, shapes and values.
    layers_ : list of str
        The layers that are read; empty for the pooled embedding.
    layer_formats_ : list of str
        Axes of each layer's output: "NC", "NCHW", "NHWC", "NLC" or "NCL" (L are tokens).
    layer_prefix_tokens_ : list of int
        Number of class and register tokens that are left out of each layer.
    layer_widths_ : list of int
        Number of features of each layer.
    layer_grids_ : list of list [h, w]
        The positions of each layer, in a tile where there are tiles; an empty list for a layer without.
    grid_shape_ : tuple (h, w) or None
        With ``pooling=None`` the positions that are described: the coarsest grid of the layers, of all tiles.
    n_features_out_ : int
        Number of features of an image: with ``pooling=None`` h times w times the sum of `layer_widths_`.
    activation_bytes_ : int
        Bytes per image of the largest tensor in a forward pass.
    input_size_ : tuple of int
        Height and width that images are resized to.
    tile_size_ : tuple of int or None
        Height and width of a tile; None where the network sees the image as a whole.
    mean_, std_ : tuple of float
        Mean and standard deviation by which the channels, scaled to [0, 1], are normalised.
    interpolation_, crop_mode_ : str
        How an image is resized and cropped, in timm's words.
    crop_pct_ : float
        Fraction of the resized image that the crop keeps; 1 unless ``crop="center"``.
    seed_ : int or None
        Seed of the random weights; None for weights that are not random.
    engine_version_ : str or None
        Version of `engine` in ``fit``; None for torch.

    See Also
    --------
    ScatteringFeatures : Fixed filters; nothing to download.

    Notes
    -----
    The default of `crop` differs from timm, which cuts out the centre: a defect at the edge of an image is then outside
    of what the network sees. On photographs of magnetic tiles (MobileNetV2, layer ``blocks.4``) the AUROC was lower by
    0.06 with "center" and by 0.10 with "border": see :ref:`the table in the guide <whole-images>`.

    `reducing_gap` is that of Pillow's ``thumbnail``, with the "draft mode" of JPEG. Pixels of JPEG files then differ
    from those of the same image in another format, or in an array. How much time it saves, and how little it changes:
    :ref:`the guide <large-images>`.

    Named backbones are shared in memory, and a pickle contains only their name. They are loaded again where
    they are needed; weights that differ from those of ``fit`` are an error. A module goes into the pickle itself.

    On a CPU a named backbone with batch norms runs as a copy that computes the same in less time, with each batch norm
    folded into its convolution, channels last, and several images side by side on a core each. If its results differ by
    more than 1e-4 of the largest value, a warning says so, and the backbone itself is used. A module runs as it is.

    ONNX Runtime and OpenVINO run what torch exports of the backbone, up to the last of the layers. It is compared with
    the backbone when it is made, in each process, which takes seconds; a difference of more than 1e-4 of the largest
    value is an error. Features differ from those of torch by rounding, about 1e-6. The version at the fit is kept;
    another one may round otherwise. What is exported or differentiated is always torch's network. How fast they are:
    :ref:`the guide <cpu-networks>`.

    With `cache`, an image goes through the network only if a layer is not in the cache yet, and only as far
    as the last missing layer. The key of a feature is the content of the image (the bytes of its file, not its path)
    and what determines the feature: weights and structure of the network, layer, pooling, preprocessing, device,
    versions of the libraries. A cached feature is bit for bit the one that was computed first. Computed again without
    the cache, the last bit of a float32 may differ if the image shares its batch with other images. To fill the cache
    in one pass for a search over layers, compute the features of all layers once:
    ``TimmFeatures(layers=[...], cache=...).fit_transform(images)``.

    The structure of a network is: the classes of its modules, by name, and those of their attributes that are numbers,
    text, tensors or functions, or tuples and lists of them. The code of classes and functions, and attributes of
    other types, are not part of it: after editing the code of your own module, clear the cache. A module that counts
    its calls in such an attribute differs after each call, so that its features are never reused; a dictionary
    avoids that. The structure of a named backbone is read once. That of a module, which may change at any time, is
    read in every ``fit`` and ``transform``: with `cache`, about a second for 2 GB of weights.

    References
    ----------
    .. [1] F. Radenović, G. Tolias, O. Chum, "Fine-tuning CNN image retrieval with no human annotation",
       IEEE Transactions on Pattern Analysis and Machine Intelligence 41 (2019) 1655-1668,
       :doi:`10.1109/TPAMI.2018.2846566`.

    Examples
    --------
    A tiny network with random weights, so that nothing is downloaded:

    >>> import numpy as np
    >>> from dfkde_sklearn import TimmFeatures
    >>> images = np.random.default_rng(0).integers(0, 256, (4, 48, 48, 3), np.uint8)
    >>> features = TimmFeatures("test_resnet", layers=["layer1", "layer3"], pretrained=False, random_state=0)
    >>> features.fit_transform(images).shape
    (4, 224)
    >>> features.layer_widths_
    [32, 192]
    """

    # The public path, which pickles and lists of trusted types name.
    __module__ = "dfkde_sklearn"

    _fitted_attributes = {  # noqa: RUF012 (read by the base class)
        "backbone_name_": is_text,
        "seed_": lambda value: value is None or is_integer_from(0)(value),
        "weights_hash_": is_text,
        "input_size_": is_tuple_of(_is_side, 2),
        "tile_size_": lambda value: value is None or is_tuple_of(_is_side, 2)(value),
        "mean_": is_tuple_of(is_number, 3),
        "std_": is_tuple_of(is_positive, 3),
        "interpolation_": is_text,
        "crop_mode_": is_one_of(*CROPS),
        "crop_pct_": is_positive,
        "layers_": is_list_of(is_text),
        "layer_formats_": is_list_of(is_one_of("NC", "NCHW", "NHWC", "NLC", "NCL")),
        "layer_prefix_tokens_": is_list_of(is_integer_from(0)),
        "layer_widths_": is_list_of(is_integer_from(1)),
        "layer_grids_": is_list_of(is_list_of(is_integer_from(1))),
        "grid_shape_": lambda value: value is None or IS_GRID(value),
        "activation_bytes_": is_integer_from(0),
        "engine_version_": lambda value: value is None or is_text(value),
        "n_features_out_": is_integer_from(1),
    }

    _parameter_constraints: dict[str, Any] = {  # noqa: RUF012 (scikit-learn's protocol)
        **FeatureExtractor._parameter_constraints,
        "backbone": [str, nn.Module],
        "layers": [str, list, tuple, None],
        "pooling": [StrOptions({"avg", "max", "gem"}), None],
        "crop": [StrOptions(set(CROPS))],
        "pretrained": ["boolean"],
        "weights": [str, os.PathLike, None],
        "image_size": [Interval(Integral, 1, MAX_SIDE, closed="both"), tuple, list, None],
        "tile_size": [Interval(Integral, 1, MAX_SIDE, closed="both"), tuple, list, None],
        "reducing_gap": [Interval(Real, 1, None, closed="left"), None],
        "engine": [StrOptions(set(ENGINES))],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        backbone: str | nn.Module = "resnet18.tv_in1k",
        *,
        layers: str | Sequence[str] | None = None,
        pooling: Literal["avg", "max", "gem"] | None = "avg",
        crop: Literal["squash", "center", "border"] = "squash",
        pretrained: bool = True,
        weights: str | os.PathLike[str] | None = None,
        image_size: int | tuple[int, int] | None = None,
        tile_size: int | tuple[int, int] | None = None,
        reducing_gap: float | None = None,
        white_level: int = FULL_RANGE,
        engine: Literal["torch", "onnxruntime", "openvino"] = "torch",
        batch_size: int = 32,
        cache: bool | str | os.PathLike[str] | None = None,
        cache_dtype: Literal["float32", "float16"] = "float32",
        device: str | torch.device | None = None,
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        self.backbone = backbone
        self.layers = layers
        self.pooling = pooling
        self.crop = crop
        self.pretrained = pretrained
        self.weights = weights
        self.image_size = image_size
        self.tile_size = tile_size
        self.reducing_gap = reducing_gap
        self.white_level = white_level
        self.engine = engine
        self.batch_size = batch_size
        self.cache = cache
        self.cache_dtype = cache_dtype
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return names such as "layer1_0", "embedding_0" for the pooled embedding, and "layer1_0_at_3_5" at a position.

        Parameters
        ----------
        input_features : None
            Ignored: images have no names of features.

        Returns
        -------
        ndarray of str objects of shape (`n_features_out_`,)
            Names of the columns that ``transform`` returns.
        """
        check_is_fitted(self, "n_features_out_")
        layers = zip(self.layers_ or ["embedding"], self.layer_widths_, strict=True)
        return self._at_positions([f"{name}_{i}" for name, width in layers for i in range(width)])

    def as_module(self) -> NetworkModule:
        """Return the fitted extractor as a torch module, with a copy of the network.

        Returns
        -------
        torch.nn.Module
            Transformed images (n, 3, H, W) to feature rows.
        """
        return NetworkModule(self)

    def summary(self) -> str:
        """Return the names of the backbone and of the layers.

        Returns
        -------
        str
            Such as "resnet18.tv_in1k, layer2, layer3".
        """
        return ", ".join([self.backbone_name_, *self.layers_])

    def image_transform(self) -> Callable[[Image.Image], Tensor]:
        """Return the function from a picture to what the network takes.

        Returns
        -------
        callable
            A PIL image to a float32 tensor (3, H, W).
        """
        return image_transform(self)

    def _reduction(self) -> Reduction | None:
        if self.reducing_gap is None:
            return None
        height, width = (self.reducing_gap * side / self.crop_pct_ for side in self.input_size_)
        return lambda picture_width, picture_height: min(picture_width / width, picture_height / height)

    def check_weights(self, *, download: bool) -> None:
        """Load the backbone, and check that it has the layers and the weights of ``fit``.

        Parameters
        ----------
        download : bool
            Whether weights may be downloaded.

        Raises
        ------
        ValueError
            If the weights are not those of ``fit``, or a layer is missing.
        OSError
            If they are not available.
        """
        self._checked_engine()
        with self._lent_backbone(download=download) as backbone:
            current_hash = backbone.weights_hash
            if self.layers_:
                check_layers(self.layers_, backbone.network, self.backbone_name_)
        if current_hash != self.weights_hash_:
            raise ValueError(
                f"The weights of backbone {self.backbone_name_!r} are not those that the detector was fitted with: "
                f"SHA-256 {current_hash:.12}..., at the fit {self.weights_hash_:.12}.... Give those with weights=PATH, "
                "or fit again."
            )

    @classmethod
    def _network_parameters(
        cls, document: Mapping[str, Any], backbone: nn.Module | None, weights: str | os.PathLike[str] | None
    ) -> dict[str, Any]:
        name = document["parameters"]["backbone"]
        if (name is None) != isinstance(backbone, nn.Module):
            raise ValueError(
                f"The backbone is a module, {document['fitted']['backbone_name_']!r}: load(path, backbone=MODULE)."
                if name is None
                else f"The backbone is {name!r}, by name: load it without backbone=."
            )
        replaced: dict[str, Any] = {}
        if backbone is not None:
            replaced["backbone"] = backbone
        if weights is not None:
            replaced["weights"] = weights
        return replaced

    def _check_fitted(self) -> None:
        n_layers = len(self.layers_) or 1
        lists = (self.layer_formats_, self.layer_prefix_tokens_, self.layer_widths_, self.layer_grids_)
        n_positions = 1 if self.grid_shape_ is None else prod(self.grid_shape_)
        if (
            any(len(values) != n_layers for values in lists)
            or n_positions * sum(self.layer_widths_) != self.n_features_out_
            or (self.pooling is None) != (self.grid_shape_ is not None)
            or any(len(grid) not in ((2,) if self.pooling is None else (0, 2)) for grid in self.layer_grids_)
            or (self.tile_size_ is not None and self.pooling is not None)
        ):
            raise ValueError("what TimmFeatures says of its layers is contradictory")
        tiles = self._tiles()
        if tiles is not None and tiles.grid != self.grid_shape_:
            raise ValueError(f"TimmFeatures has a grid of {self.grid_shape_}, and its tiles one of {tiles.grid}")
        image_transform(self)

    def _set_fitted(self) -> str:
        self.engine_version_ = self._checked_engine()
        layers = [self.layers] if isinstance(self.layers, str) else list(self.layers or [])
        size = self._size_of_a_pass()
        if self.weights is not None and not isinstance(self.backbone, str):
            raise ValueError(
                f"weights={self.weights!r} needs a backbone by name. Load them into the module instead:"
                " backbone.load_state_dict(...)."
            )
        if isinstance(self.backbone, str):
            self.backbone_name_ = full_name(self.backbone)
        else:
            self.backbone_name_ = module_name(self.backbone)
        random = isinstance(self.backbone, str) and not self.pretrained and self.weights is None
        self.seed_ = int(check_random_state(self.random_state).randint(2**31 - 1)) if random else None
        with self._lent_backbone() as backbone:
            self.weights_hash_, fingerprint = backbone.weights_hash, backbone.fingerprint
            config = _data_config(backbone.network, size, self.crop)
            self.input_size_ = seen = config["input_size"][1:]
            self.tile_size_ = None
            if self.tile_size is not None:
                self.input_size_, self.tile_size_ = _height_and_width(self.image_size, "image_size"), seen
            self.mean_, self.std_ = config["mean"], config["std"]
            self.interpolation_, self.crop_mode_ = config["interpolation"], config["crop_mode"]
            self.crop_pct_ = config["crop_pct"]
            if self.layers is not None:
                check_layers(layers, backbone.network, self.backbone_name_)
            elif self.pooling is None:
                layers = layers_for_positions(backbone.network, self.backbone_name_)
            found, self.activation_bytes_ = layer_formats(
                backbone.network, fingerprint, layers, seen, self.backbone_name_
            )
        if not layers and found[0].axes == "NC" and self.pooling != "avg":
            raise ValueError(
                f"pooling={self.pooling!r} has nothing to pool: with layers=None the backbone's own pooling is"
                " used. Name layers, or use pooling='avg'."
            )
        self.layers_ = layers
        self.layer_formats_ = [layer.axes for layer in found]
        self.layer_prefix_tokens_ = [layer.prefix_tokens for layer in found]
        self.layer_widths_ = [layer.width for layer in found]
        self.layer_grids_ = [list(layer.grid or ()) for layer in found]
        self.grid_shape_ = None
        if self.pooling is None:
            tiles = self._tiles()
            self.grid_shape_ = self._coarsest_grid() if tiles is None else tiles.grid
        self.n_features_out_ = sum(self.layer_widths_) * prod(self.grid_shape_ or (1,))
        return fingerprint

    def _checked_engine(self) -> str | None:
        """Return the version of the engine, None for torch; raise an error where it cannot run the backbone."""
        if self.engine != "torch" and not isinstance(self.backbone, str):
            raise ValueError(
                f"engine={self.engine!r} needs a backbone by name, and it is a module, which may change at any time. "
                "Use engine='torch', or a name with weights=FILE."
            )
        device = as_device(self.device)
        if self.engine != "torch" and device.type != "cpu":
            raise ValueError(
                f"engine={self.engine!r} runs on the CPU, and device is {str(device)!r}. Use device='cpu', or "
                "engine='torch'."
            )
        return engine_version(self.engine)

    def _coarsest_grid(self) -> tuple[int, int]:
        """Return the smallest grid of the layers; raise a ValueError where one has no positions."""
        grids: list[tuple[int, int]] = []
        for layer, grid in zip(self.layers_, self.layer_grids_, strict=True):
            if not grid:
                raise ValueError(
                    f"layers={[layer]} of backbone {self.backbone_name_!r} has no positions on a grid, which "
                    "pooling=None needs. Name layers before the network's own pooling, or use pooling='avg'."
                )
            grids.append((grid[0], grid[1]))
        return min(grids, key=prod)

    def _tiles(self) -> Tiling | None:
        """Return the tiles that images are cut into; None where the network sees an image as a whole."""
        return None if self.tile_size_ is None else tiling(self.input_size_, self.tile_size_, self._coarsest_grid())

    def _size_of_a_pass(self) -> tuple[int, int] | None:
        """Return the size of what goes through the network at once; None is the network's own."""
        if self.tile_size is None:
            return _height_and_width(self.image_size, "image_size")
        if self.pooling is not None or self.image_size is None:
            raise ValueError(
                f"tile_size={self.tile_size!r} with pooling={self.pooling!r} and image_size={self.image_size!r}. Tiles "
                "need pooling=None, since their positions become one grid, and image_size, which images are resized to."
            )
        return _height_and_width(self.tile_size, "tile_size")

    @property
    def sees_whole_images(self) -> bool:
        """Whether the features describe all of an image, resized without keeping its proportions."""
        return self.crop_mode_ == "squash"

    def _block_widths(self) -> list[int]:
        # Positions are a single block: their grid depends on all layers.
        return self.layer_widths_ if self.grid_shape_ is None else [self.n_features_out_]

    @contextmanager
    def _lent_backbone(self, *, download: bool = True) -> Iterator[Backbone]:
        """Yield the backbone in evaluation mode on its device."""
        device = as_device(self.device)
        if isinstance(self.backbone, nn.Module):
            with borrowed(self.backbone, device) as backbone:
                yield backbone
        else:
            size = self._size_of_a_pass()
            yield named_backbone(self.backbone_name_, self.pretrained, self.weights, self.seed_, size, device, download)

    @contextmanager
    def _fitted_backbone(self) -> Iterator[Backbone]:
        """Yield the backbone; raise a ValueError if a named one has other weights than in fit."""
        with self._lent_backbone() as backbone:
            if isinstance(self.backbone, str) and backbone.weights_hash != self.weights_hash_:
                raise ValueError(
                    f"The weights of backbone {self.backbone_name_!r} are not those of fit: SHA-256"
                    f" {backbone.weights_hash:.12}..., at fit {self.weights_hash_:.12}.... Restore the weights, or fit"
                    " again."
                )
            yield backbone

    def _computed(self, images: Images, blocks: list[int]) -> Generator[NDArray[np.float32], None, None]:
        start = 0
        batches = self.batches(images, self.batch_size, self.backbone_name_)
        with self._fitted_backbone() as backbone:
            network = self._network(backbone, self.layers_)
            for batch in batches:
                rows = self._rows(network, batch, blocks).flatten(1).cpu().numpy()
                bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
                if len(bad):
                    raise ValueError(
                        f"{images.name(start + int(bad[0]))}: backbone {self.backbone_name_!r} returned NaN or"
                        " infinite features. Its weights are not finite, or too large for its dtype."
                    )
                yield rows
                start += len(rows)

    def _network(self, backbone: Backbone, layers: list[str]) -> nn.Module:
        """Return what computes these layers of the backbone."""
        size = self.tile_size_ or self.input_size_
        if self.engine == "torch":
            return backbone.for_layers(layers, size, self.backbone_name_)
        return backbone.by_engine(self.engine, layers, size, self.backbone_name_)

    def _block_recipes(self, fingerprint: str | None) -> list[dict[str, Any]]:
        import timm

        if fingerprint is None:
            with self._fitted_backbone() as backbone:
                fingerprint = backbone.fingerprint
        of_all = {
            "network": fingerprint,
            "timm": timm.__version__,
            "pooling": self.pooling,
            "size": self.input_size_,
            "tile_size": self.tile_size_,
            "mean": self.mean_,
            "std": self.std_,
            "resize": [self.interpolation_, self.crop_mode_, self.crop_pct_, self.reducing_gap],
            "engine": [self.engine, engine_version(self.engine)],
        }
        layers = zip(self.layers_ or [""], self.layer_formats_, self.layer_prefix_tokens_, strict=True)
        recipes = [of_all | {"layer": name, "format": axes, "prefix_tokens": n} for name, axes, n in layers]
        return recipes if self.grid_shape_ is None else [{"grid": self.grid_shape_, "layers": recipes}]

    def _rows(self, network: nn.Module, batch: Tensor, blocks: list[int] | None = None) -> Tensor:
        """Return the features of transformed images (n, 3, H, W): all layers, or those of the blocks.

        Of shape (n, n_features), or (n, h, w, C) at positions.
        """
        layers = self.layers_ or [""]
        if blocks is not None and self.grid_shape_ is None:
            layers = [layers[block] for block in blocks]
        tiles = self._tiles()
        if tiles is None:
            return self._rows_of_passes(network, batch, [(self, layers)])[0]
        # One image at a time, as its tiles take several times the memory.
        cut = map(tiles.cut, batch.split(1))
        return torch.cat([tiles.joined(self._rows_of_passes(network, some, [(self, layers)])[0]) for some in cut])

    def _rows_of_passes(self, network: nn.Module, batch: Tensor, wanted: Wanted) -> list[Tensor]:
        """Return the features of images or tiles, in as many forward passes as is fast.

        The extractors in `wanted`, each with the layers that it describes, differ from this one in their layers only.
        """
        n_at_once = micro_batch_size(network, batch, max(extractor.activation_bytes_ for extractor, _ in wanted))

        def of_pass(part: Tensor) -> list[Tensor]:
            return _rows_at_once(network, part, wanted)

        # Side by side, each on one core: threads that share a pass wait for one another after each operation, beside
        # another busy process for hundreds of times as long as they compute. A user's module may not be ready for it.
        is_alone = len(batch) == 1 or not isinstance(self.backbone, str) or not batch.is_cpu or batch.requires_grad
        if is_alone or as_device(self.device).type != "cpu" or torch.compiler.is_compiling():
            parts = list(map(of_pass, batch.split(n_at_once)))
        else:
            n_at_once = min(n_at_once, ceil(len(batch) / n_single_cores()))
            parts = mapped_on_single_cores(of_pass, batch.split(n_at_once))
        return [torch.cat(rows) for rows in zip(*parts, strict=True)]

    def of_layer(self, layer: str, output: Tensor) -> Tensor:
        """Return the features of one layer.

        Parameters
        ----------
        layer : str
            Its name; "" is the embedding.
        output : Tensor
            What it returned for n images.

        Returns
        -------
        Tensor of shape (n, C) or, at positions, (n, C, h, w)
            In float32.
        """
        i = self.layers_.index(layer) if self.layers_ else 0
        axes, prefix_tokens = self.layer_formats_[i], self.layer_prefix_tokens_[i]
        if self.pooling is not None or self.grid_shape_ is None:
            return pooled(output, axes, prefix_tokens, str(self.pooling))
        height, width = self.layer_grids_[i]
        return on_grid(output, axes, prefix_tokens, (height, width), self._coarsest_grid())

    def joined(self, parts: list[Tensor]) -> Tensor:
        """Return the features of several layers side by side.

        Parameters
        ----------
        parts : list of Tensor
            From `of_layer`.

        Returns
        -------
        Tensor of shape (n, n_features) or, at positions, (n, h, w, C)
            In float32.
        """
        rows = torch.cat(parts, dim=1)
        return rows if self.grid_shape_ is None else rows.permute(0, 2, 3, 1)

    def __sklearn_clone__(self) -> Self:
        if not isinstance(self.backbone, nn.Module):
            return super().__sklearn_clone__()
        # scikit-learn would copy the network for every candidate and fold of a search.
        nameless = copy.copy(self)
        nameless.backbone = ""
        twin = super(TimmFeatures, nameless).__sklearn_clone__()
        twin.backbone = self.backbone
        return twin


# Feature extractors, each with the layers that it describes.
Wanted = Sequence[tuple[TimmFeatures, list[str]]]


def _layers(wanted: Wanted) -> list[str]:
    return list(dict.fromkeys(layer for _, layers in wanted for layer in layers))


def _rows_at_once(network: nn.Module, batch: Tensor, wanted: Wanted) -> list[Tensor]:
    """Return the features of a batch by each extractor, from one forward pass."""
    n_layers = len(_layers(wanted))
    parts: dict[tuple[int, str], Tensor] = {}
    seen: set[str] = set()

    def describe(layer: str, output: Tensor) -> None:
        for i, (extractor, layers) in enumerate(wanted):
            if layer in layers:
                # Now, as a later in-place operation may overwrite the output.
                parts[i, layer] = extractor.of_layer(layer, output.clone() if output.requires_grad else output)
        seen.add(layer)
        if len(seen) == n_layers:
            raise LayersRead

    visit_layers(network, batch, _layers(wanted), describe)
    return [extractor.joined([parts[i, layer] for layer in layers]) for i, (extractor, layers) in enumerate(wanted)]


def described_together(extractors: Sequence[TimmFeatures], X: Any) -> list[NDArray[np.float32]]:
    """Return what each of several extractors returns for images, which pass through their common network once.

    Parameters
    ----------
    extractors : sequence of TimmFeatures
        Fitted, without tiles and without a cache. They differ in `layers` only.
    X : images
        As in ``transform``.

    Returns
    -------
    list of ndarray
        From each extractor, as from its ``transform``.
    """
    first = extractors[0]
    images = as_images(X, first.white_level)
    shapes = [
        (extractor.n_features_out_,) if extractor.grid_shape_ is None else (*extractor.grid_shape_, -1)
        for extractor in extractors
    ]
    tables = [np.empty((len(images), extractor.n_features_out_), np.float32) for extractor in extractors]
    wanted = [(extractor, extractor.layers_ or [""]) for extractor in extractors]
    start = 0
    with first._fitted_backbone() as backbone:
        network = first._network(backbone, _layers(wanted))
        for batch in first.batches(images, first.batch_size, first.backbone_name_):
            stop = start + len(batch)
            for table, rows in zip(tables, first._rows_of_passes(network, batch, wanted), strict=True):
                table[start:stop] = rows.flatten(1).cpu().numpy()
            start = stop
    return [table.reshape(len(images), *shape) for table, shape in zip(tables, shapes, strict=True)]


# An image is not resized as a whole if its longer side would become more than this many times the longer side of the
# crop: an image of 60 000 x 1 pixels, 87 bytes in a file, would take 3.3 GB.
_ELONGATED = 16


def image_transform(extractor: TimmFeatures) -> Callable[[Image.Image], Tensor]:
    """Return timm's transform of a fitted extractor, in bounded memory: a PIL image to a tensor (3, H, W)."""
    transform = timm_transform(extractor)
    resize, *others = transform.transforms
    height, width = extractor.input_size_
    # Not by `interpolation_`: older versions of timm resize bilinearly for crops that are no squares.
    resample = Image.Resampling[resize.interpolation.value.upper()]
    gap = extractor.reducing_gap

    def transformed(picture: Image.Image) -> Tensor:
        new_height, new_width = _resized(picture, resize)
        if min(new_height, new_width) > 0 and max(new_height, new_width) <= _ELONGATED * max(height, width):
            if gap is None:
                return transform(picture)
            return after_resize(picture.resize((new_width, new_height), resample, reducing_gap=gap))
        left, right, x, columns = _source(picture.width, max(1, new_width), width)
        top, bottom, y, rows = _source(picture.height, max(1, new_height), height)
        box = (x[0] - left, y[0] - top, x[1] - left, y[1] - top)
        return after_resize(picture.crop((left, top, right, bottom)).resize((columns, rows), resample, box=box))

    def after_resize(part: Any) -> Tensor:
        for other in others:
            part = other(part)
        return part

    return transformed


def _resized(picture: Image.Image, resize: Any) -> tuple[int, int]:
    """Return the height and width of a picture after a resize of timm or torchvision."""
    if hasattr(resize, "get_params"):
        height, width = resize.get_params(picture, resize.size, resize.longest)
        return int(height), int(width)
    if not isinstance(resize.size, int):
        return tuple(resize.size)
    short, long = sorted(picture.size)
    longer = int(resize.size * long / short)
    return (resize.size, longer) if picture.height == short else (longer, resize.size)


def _source(length: int, new_length: int, kept: int) -> tuple[int, int, tuple[float, float], int]:
    """Return the source of the centre crop of a resized line of pixels, and the length of the crop.

    The source is stated twice: as whole pixels, including the margin that the filter needs on both sides so that Pillow
    computes the same as from all pixels; and as exact positions without that margin.
    """
    start = max(0, round((new_length - kept) / 2))
    stop = min(new_length, start + kept)
    step = length / new_length
    edges = start * step, stop * step
    # The widest filter, Lanczos, extends over three pixels.
    margin = 3 * max(1, step) + 1
    return max(0, floor(edges[0] - margin)), min(length, ceil(edges[1] + margin)), edges, stop - start


def timm_transform(extractor: TimmFeatures) -> Any:
    """Return timm's transform of a fitted extractor: a PIL image to a tensor (3, H, W)."""
    from timm.data import create_transform

    return create_transform(
        input_size=(3, *extractor.input_size_),
        mean=extractor.mean_,
        std=extractor.std_,
        interpolation=extractor.interpolation_,
        crop_mode=extractor.crop_mode_,
        crop_pct=extractor.crop_pct_,
        is_training=False,
    )


def _data_config(network: nn.Module, size: tuple[int, int] | None, crop: str) -> dict[str, Any]:
    """Return the preprocessing of a network: its configuration in timm, with this crop."""
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(network, args={"input_size": (3, *size)} if size else None)
    if config["input_size"][0] != 3:
        raise ValueError(
            f"backbone: its configuration says images of {config['input_size'][0]} channels, and images are"
            " read as RGB. Use a backbone with in_chans=3."
        )
    return config | {
        "mean": tuple(map(float, config["mean"])),
        "std": tuple(map(float, config["std"])),
        "crop_mode": crop,
        # The other crops show the whole image.
        "crop_pct": config["crop_pct"] if crop == "center" else 1.0,
    }


def _height_and_width(size: Any, name: str) -> tuple[int, int] | None:
    if size is None:
        return None
    sides = [size] * 2 if isinstance(size, Integral) else list(size)
    if len(sides) != 2 or not all(isinstance(side, Integral) and 1 <= int(side) <= MAX_SIDE for side in sides):
        raise ValueError(
            f"{name}={size!r}. Allowed: (height, width), one int for both, or None; sides up to {MAX_SIDE}."
        )
    return int(sides[0]), int(sides[1])
