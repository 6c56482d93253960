"""Images to a feature matrix through a pretrained network of timm, or any module."""

from __future__ import annotations

import copy
import difflib
import dis
import hashlib
import itertools
import json
import math
import os
import ssl
import threading
import types
import urllib.error
import urllib.request
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin, _fit_context
from sklearn.utils import Tags, check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from dfkde_sklearn._cache import check_cache, feature_matrix, numerics
from dfkde_sklearn._device import as_device
from dfkde_sklearn._images import Images, as_images, image_batches

# Seconds to wait for the first sign of the server that has the weights.
PROBE_SECONDS = 3.0
# Backbones kept in memory, least recently used first; a search over layers or components needs one.
MAX_LOADED = 4
_loaded: OrderedDict[tuple[Any, ...], tuple[nn.Module, str]] = OrderedDict()
_loading = threading.RLock()
# What was found out of networks with a fingerprint, which a search asks for again in every fold.
MAX_KNOWN = 64
_known: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
# Of the loaded backbones, which nobody changes.
_fingerprints: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
# A user's module has one training flag and one device: threads that use it take turns.
_borrowing = threading.RLock()


class TimmFeatures(TransformerMixin, BaseEstimator):
    """Describe images by a pretrained network: pooled layers, or the pooled embedding.

    Each image is read, resized, cropped and normalised as the backbone's own configuration in timm says,
    and goes through the network once. The forward pass ends after the last layer that was asked for.

    Parameters
    ----------
    backbone : str or torch.nn.Module, default="resnet18.tv_in1k"
        The network. A name is any that ``timm.create_model`` takes. A module is used as it stands and shared,
        not copied, between clones; its training flags and its device are as before when a method returns. If
        it has timm's ``pretrained_cfg`` (every model of ``timm.create_model`` does), size, mean, standard
        deviation and interpolation come from there, else they are timm's defaults: 224 x 224 and ImageNet's.
    layers : str, list of str or None, default=None
        Names of submodules as in ``backbone.named_modules()``, whose outputs are pooled and concatenated in
        this order. None is the pooled embedding: what a timm model returns with ``num_classes=0``, and the
        output of another module.
    pooling : {"avg", "max", "gem"}, default="avg"
        How the positions of a layer become one vector: their mean, their maximum, or the generalised mean
        with exponent 3 of values clamped to at least 1e-6 [1]_. Class and register tokens are left out.
    pretrained : bool, default=True
        Whether a named backbone gets timm's pretrained weights, downloaded at the first use. False gives
        random weights, drawn with `random_state`.
    weights : str, PathLike or None, default=None
        File with the weights of a named backbone, in place of pretrained ones: safetensors, or a state dict
        of ``torch.save``, read with ``weights_only=True``. Weights of a classifier may be there or not; any
        other difference to the network is an error.
    image_size : int, tuple (height, width) or None, default=None
        Size in pixels of what the network sees. None is the backbone's own.
    batch_size : int, default=32
        Images that go through the network at once. Does not change the result.
    cache : bool, str, PathLike or None, default=None
        Whether to keep features, layer by layer, and read those that are there. True: in the memory of this
        process, up to 1 GiB, for all feature stages. A path: in this folder, for any number of processes of
        this machine, until :func:`clear_cache`. See Notes.
    device : str, torch.device or None, default=None
        Where the network runs. None is the first CUDA GPU where there is one, else the CPU.
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
    n_features_out_ : int
        Number of features.
    input_size_ : tuple of int
        Height and width of what the network sees.
    mean_, std_ : tuple of float
        What the channels, scaled to [0, 1], are normalised with.
    interpolation_, crop_mode_ : str
        How an image is resized and cropped, in timm's words.
    crop_pct_ : float
        Share of the resized image that the crop keeps.
    seed_ : int or None
        What the random weights were drawn with, None for weights that are not random.

    See Also
    --------
    ScatteringFeatures : Fixed filters; nothing to download.

    Notes
    -----
    Loaded backbones are shared in memory, and only their name goes into a pickle: they are loaded anew where
    they are needed, and weights that differ from those of ``fit`` are an error. A module goes into the pickle
    whole.

    With `cache`, an image goes through the network only if a layer asked for is not there yet, and then as far
    as the last such layer. Features are found by the content of the image (the bytes of its file, not its path)
    and by all that decides them: weights, structure and code of the network, layer, pooling, preprocessing, device,
    versions of the libraries. Of a module's attributes, plain ones (numbers, text, tensors, functions) count, but not
    those that its ``forward`` assigns; functions that its class calls from elsewhere do not: after changing one,
    clear the cache. What is read is bit for bit what was computed the first time. Computed again without the
    cache, the last bit of a float32 may differ where the images share their batch with others. To fill the cache
    in one pass for a search over layers, describe the images with all of them once:
    ``TimmFeatures(layers=[...], cache=...).fit_transform(images)``.

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

    _parameter_constraints: dict[str, Any] = {  # noqa: RUF012 (scikit-learn's protocol)
        "backbone": [str, nn.Module],
        "layers": [str, list, tuple, None],
        "pooling": [StrOptions({"avg", "max", "gem"})],
        "pretrained": ["boolean"],
        "weights": [str, os.PathLike, None],
        "image_size": [Interval(Integral, 1, None, closed="left"), tuple, list, None],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "cache": ["boolean", str, os.PathLike, None],
        "device": [str, torch.device, None],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        backbone: str | nn.Module = "resnet18.tv_in1k",
        *,
        layers: str | Sequence[str] | None = None,
        pooling: Literal["avg", "max", "gem"] = "avg",
        pretrained: bool = True,
        weights: str | os.PathLike[str] | None = None,
        image_size: int | tuple[int, int] | None = None,
        batch_size: int = 32,
        cache: bool | str | os.PathLike[str] | None = None,
        device: str | torch.device | None = None,
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        self.backbone = backbone
        self.layers = layers
        self.pooling = pooling
        self.pretrained = pretrained
        self.weights = weights
        self.image_size = image_size
        self.batch_size = batch_size
        self.cache = cache
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any = None) -> Self:
        """Load the backbone and find out what its layers return; nothing is learnt from the images.

        Parameters
        ----------
        X : images
            A list of paths, PIL images or arrays; an array or tensor of images; a folder; a column of paths.
        y : None
            Ignored.

        Returns
        -------
        TimmFeatures
            The fitted transformer.

        Raises
        ------
        ValueError
            If the backbone, a layer, the weights or the images are not what is allowed.
        OSError
            If pretrained weights are not on this machine and cannot be downloaded, or the cache cannot be
            written to.
        """
        self._fit(X)
        return self

    @_fit_context(prefer_skip_nested_validation=True)
    def fit_transform(self, X: Any, y: Any = None) -> np.ndarray:
        """Do what `fit` and then `transform` do, and look at the network's weights once.

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
        return self._described(X, self._fit(X))

    def transform(self, X: Any) -> np.ndarray:
        """Return the features of the images.

        Parameters
        ----------
        X : images
            A list of paths, PIL images or arrays; an array or tensor of images; a folder; a column of paths.

        Returns
        -------
        ndarray of shape (n_images, `n_features_out_`), float32
            A row for each image, in their order.

        Raises
        ------
        ValueError
            If an image cannot be read, its features are not finite, or the backbone's weights are not those
            of ``fit``.
        OSError
            If the backbone's weights have to be loaded again and are not to be had.
        """
        check_is_fitted(self, "n_features_out_")
        return self._described(X)

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return names such as "layer1_0", or "embedding_0" for the pooled embedding.

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
        return np.array([f"{name}_{i}" for name, width in layers for i in range(width)], dtype=object)

    def _fit(self, X: Any) -> str:
        """Fit, and return the fingerprint of the backbone."""
        as_images(X)
        check_cache(self.cache)
        layers = [self.layers] if isinstance(self.layers, str) else list(self.layers or [])
        size = _height_and_width(self.image_size)
        if self.weights is not None and not isinstance(self.backbone, str):
            raise ValueError(
                f"weights={self.weights!r} needs a backbone by name. Load them into the module instead:"
                " backbone.load_state_dict(...)."
            )
        if isinstance(self.backbone, str):
            self.backbone_name_ = _full_name(self.backbone)
        else:
            self.backbone_name_ = _module_name(self.backbone)
        random = isinstance(self.backbone, str) and not self.pretrained and self.weights is None
        self.seed_ = int(check_random_state(self.random_state).randint(2**31 - 1)) if random else None
        with self._network() as (network, weights_hash):
            fingerprint = self._fingerprint(network)
            self.weights_hash_ = weights_hash or _remembered((fingerprint,), partial(_weights_hash, network))
            config = _data_config(network, size)
            self.input_size_ = config["input_size"][1:]
            self.mean_, self.std_ = config["mean"], config["std"]
            self.interpolation_, self.crop_mode_ = config["interpolation"], config["crop_mode"]
            self.crop_pct_ = config["crop_pct"]
            if self.layers is not None:
                _check_layers(layers, network, self.backbone_name_)
            found = _remembered(
                (fingerprint, *layers, *self.input_size_),
                partial(_layer_formats, network, layers, self.input_size_, self.backbone_name_),
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
        self.n_features_out_ = sum(self.layer_widths_)
        return fingerprint

    def _described(self, X: Any, fingerprint: str | None = None) -> np.ndarray:
        """Return the features of the images; the fingerprint of the backbone need not be taken where it is given."""
        images = as_images(X)
        from timm.data import create_transform

        preprocess = create_transform(
            input_size=(3, *self.input_size_),
            mean=self.mean_,
            std=self.std_,
            interpolation=self.interpolation_,
            crop_mode=self.crop_mode_,
            crop_pct=self.crop_pct_,
            is_training=False,
        )
        return feature_matrix(
            images,
            self.layer_widths_,
            partial(self._recipes, fingerprint),
            partial(self._computed, preprocess),
            self.cache,
        )

    @contextmanager
    def _network(self) -> Iterator[tuple[nn.Module, str | None]]:
        """Lend the backbone in evaluation mode on its device; with its weights' hash where it has a name."""
        device = as_device(self.device)
        if isinstance(self.backbone, nn.Module):
            with _borrowed(self.backbone, device):
                yield self.backbone, None
        else:
            size = _height_and_width(self.image_size)
            yield _named_backbone(self.backbone_name_, self.pretrained, self.weights, self.seed_, size, device)

    @contextmanager
    def _fitted_network(self) -> Iterator[nn.Module]:
        """Lend the backbone if a named one has the weights of fit."""
        with self._network() as (network, weights_hash):
            if weights_hash not in (None, self.weights_hash_):
                raise ValueError(
                    f"The weights of backbone {self.backbone_name_!r} are not those of fit: SHA-256"
                    f" {weights_hash:.12}..., at fit {self.weights_hash_:.12}.... Restore the weights, or fit"
                    " again."
                )
            yield network

    def _computed(
        self, preprocess: Callable[[Any], Tensor], images: Images, blocks: list[int]
    ) -> Generator[np.ndarray, None, None]:
        """Yield the features of the images, of the layers at these positions, batch by batch."""
        start = 0
        batches = image_batches(
            images, preprocess, self.batch_size, verbose=bool(self.verbose), description=self.backbone_name_
        )
        with self._fitted_network() as network:
            for batch in batches:
                rows = self._rows(network, batch, blocks).cpu().numpy()
                bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
                if len(bad):
                    raise ValueError(
                        f"{images.name(start + int(bad[0]))}: backbone {self.backbone_name_!r} returned NaN or"
                        " infinite features. Its weights are not finite, or too large for its dtype."
                    )
                yield rows
                start += len(rows)

    def _recipes(self, fingerprint: str | None = None) -> list[str]:
        """Return, for each layer, all that decides its features beside the image."""
        import timm

        if fingerprint is None and isinstance(self.backbone, nn.Module):
            fingerprint = self._fingerprint(self.backbone)
        elif fingerprint is None:
            with self._fitted_network() as network:
                fingerprint = self._fingerprint(network)
        of_all = {
            "network": fingerprint,
            "timm": timm.__version__,
            "numerics": numerics(as_device(self.device)),
            "pooling": self.pooling,
            "size": self.input_size_,
            "mean": self.mean_,
            "std": self.std_,
            "resize": [self.interpolation_, self.crop_mode_, self.crop_pct_],
        }
        layers = zip(self.layers_ or [""], self.layer_formats_, self.layer_prefix_tokens_, strict=True)
        return [json.dumps(of_all | {"layer": layer}, default=str) for layer in layers]

    def _fingerprint(self, network: nn.Module) -> str:
        if isinstance(self.backbone, nn.Module):
            return _fingerprint(network)
        if network not in _fingerprints:
            _fingerprints[network] = _fingerprint(network)
        return _fingerprints[network]

    def _rows(self, network: nn.Module, batch: Tensor, blocks: list[int] | None = None) -> Tensor:
        """Return the features (n, n_features) of transformed images (n, 3, H, W): of all layers, or of these."""
        plan = list(zip(self.layers_ or [""], self.layer_formats_, self.layer_prefix_tokens_, strict=True))
        if blocks is not None:
            plan = [plan[block] for block in blocks]
        formats = {name: (axes, prefix_tokens) for name, axes, prefix_tokens in plan}
        pooled: dict[str, Tensor] = {}

        def pool(layer: str, output: Tensor) -> None:
            # At once: a later operation in place may overwrite the output.
            pooled[layer] = _pooled(output, *formats[layer], self.pooling)
            if len(pooled) == len(formats):
                raise _LayersRead

        _visit_layers(network, batch, [layer for layer in formats if layer], pool)
        return torch.cat([pooled[layer] for layer in formats], dim=1)

    def __sklearn_clone__(self) -> Self:
        if not isinstance(self.backbone, nn.Module):
            return super().__sklearn_clone__()
        # scikit-learn would copy the network for every candidate and fold of a search.
        nameless = copy.copy(self)
        nameless.backbone = ""
        twin = super(TimmFeatures, nameless).__sklearn_clone__()
        twin.backbone = self.backbone
        return twin

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.no_validation = True
        return tags


class _LayersRead(Exception):  # noqa: N818 (a signal, not an error)
    """Ends a forward pass once every layer asked for has returned."""


class _LayerFormat(NamedTuple):
    axes: str
    prefix_tokens: int
    width: int


# Layers


def _visit_layers(network: nn.Module, batch: Tensor, layers: list[str], visit: Callable[[str, Any], None]) -> None:
    """Run a forward pass and call ``visit(name, output)`` when a layer returns, or with the embedding."""
    tensors = itertools.chain(network.parameters(), network.buffers())
    like = next((tensor for tensor in tensors if tensor.is_floating_point()), batch)
    thread = threading.get_ident()

    def hook_for(layer: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:  # noqa: ARG001
            # Named backbones are shared: another thread's pass through this one is none of ours.
            if threading.get_ident() == thread:
                visit(layer, output)

        return hook

    modules = dict(network.named_modules())
    hooks = [modules[layer].register_forward_hook(hook_for(layer)) for layer in layers]
    try:
        with torch.inference_mode():
            batch = batch.to(like)
            if layers:
                network(batch)
            else:
                visit("", _embedding(network, batch))
    except _LayersRead:
        pass
    finally:
        for hook in hooks:
            hook.remove()


def _embedding(network: nn.Module, batch: Tensor) -> Any:
    """Return what timm's models return with ``num_classes=0``, also for one that has its classifier."""
    timm_model: Any = network
    if hasattr(timm_model, "forward_head") and getattr(timm_model, "num_classes", None):
        return timm_model.forward_head(timm_model.forward_features(batch), pre_logits=True)
    return network(batch)


def _pooled(output: Tensor, axes: str, prefix_tokens: int, pooling: str) -> Tensor:
    """Return one vector for each image, (n, C) in float32."""
    # float16 overflows in the sum over positions and in the third power.
    output = output.float()
    if axes == "NC":
        return output.flatten(1)
    positions = output.movedim(axes.index("C"), 1).flatten(2)[..., prefix_tokens:]
    if pooling == "avg":
        return positions.mean(-1)
    if pooling == "max":
        return positions.amax(-1)
    return positions.clamp(min=1e-6).pow(3).mean(-1).pow(1 / 3)


def _check_layers(layers: list[str], network: nn.Module, name: str) -> None:
    if not layers or not all(isinstance(layer, str) for layer in layers):
        raise ValueError(f"layers={layers}. Allowed: one or several names of submodules, or None.")
    repeated = [layer for layer, count in Counter(layers).items() if count > 1]
    if repeated:
        raise ValueError(f"layers={layers}: {repeated} more than once. Name each layer once.")
    available = [layer for layer, _ in network.named_modules() if layer]
    unknown = [layer for layer in layers if layer not in available]
    if not unknown:
        return
    close = [match for layer in unknown for match in difflib.get_close_matches(layer, available)]
    outer = [layer for layer in available if "." not in layer]
    raise ValueError(
        f"layers={unknown} not found in backbone {name!r}."
        + (f" Did you mean {' or '.join(map(repr, close))}?" if close else "")
        + f" Available: {', '.join(map(repr, outer))}, and the submodules that named_modules() lists."
    )


def _layer_formats(network: nn.Module, layers: list[str], size: tuple[int, int], name: str) -> list[_LayerFormat]:
    """Return the format of each layer's output, found out by forward passes of blank images."""
    height, width = size
    try:
        shapes = _output_shapes(network, layers, (height, width))
    except Exception as error:
        raise ValueError(
            f"backbone {name!r} does not take colour images of {height} x {width} pixels: {error!r}."
            " If another size is right, pass image_size."
        ) from error
    owner = f"backbone {name!r}"
    called = {layer: f"layers={[layer]} of {owner}" if layer else owner for layer in shapes}
    for layer, found in shapes.items():
        if len(found) != 1:
            how_often = f"runs {len(found)} times" if found else "never runs"
            raise ValueError(f"{called[layer]} {how_often} in a forward pass. Name a layer that runs once.")
        if isinstance(found[0], str):
            raise ValueError(f"{called[layer]} returns a {found[0]}, not a tensor. Name a layer that does.")
        if found[0][:1] != (2,):
            raise ValueError(f"{called[layer]} returns shape {found[0]} for 2 images: not an entry for each.")
    taller = None
    if any(_n_wide_axes(shape) > 1 for (shape,) in shapes.values()):
        # Networks for one size only refuse this, each with an error of its own.
        with suppress(Exception):
            taller = _output_shapes(network, layers, (2 * height, width))
    formats = []
    for layer, (shape,) in shapes.items():
        if _n_wide_axes(shape) <= 1:
            formats.append(_LayerFormat("NC", 0, math.prod(shape[1:])))
            continue
        if taller is None or taller[layer][0] == shape:
            axes, prefix_tokens = _axes_by_size(network, shape, height, width)
        else:
            axes, prefix_tokens = _axes_by_growth(network, shape, taller[layer][0])
        if axes is None:
            raise ValueError(
                f"{called[layer]} returns shape {shape} for 2 images of {height} x {width} pixels: which axis"
                " holds the channels is not certain. Name another layer."
            )
        formats.append(_LayerFormat(axes, prefix_tokens, shape[axes.index("C")]))
    return formats


def _output_shapes(network: nn.Module, layers: list[str], size: tuple[int, int]) -> dict[str, list[Any]]:
    """Return what each layer returns for two blank images, time by time: a shape, or the name of a type."""
    shapes: dict[str, list[Any]] = {layer: [] for layer in layers or [""]}

    def note(layer: str, output: Any) -> None:
        shapes[layer].append(tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__)

    _visit_layers(network, torch.zeros(2, 3, *size), layers, note)
    return shapes


def _n_wide_axes(shape: tuple[int, ...]) -> int:
    """Count the axes beside the first that are longer than 1: no more than one is a vector for each image."""
    return sum(length > 1 for length in shape[1:])


def _axes_by_growth(network: nn.Module, shape: tuple[int, ...], taller: tuple[int, ...]) -> tuple[str | None, int]:
    """Return axes and prefix tokens of an output from its shape for an image and for one twice as tall.

    There are as many channels, and as many prefix tokens, for every size of image.
    """
    grown = tuple(axis for axis in range(len(shape)) if shape[axis] != taller[axis])
    named = {"NCHW": (4, 2), "NHWC": (4, 1), "NLC": (3, 1), "NCL": (3, 2)}
    axes = next((axes for axes, key in named.items() if key == (len(shape), *grown)), None)
    if axes is None or "L" not in axes:
        return axes, 0
    n_prefix = getattr(network, "num_prefix_tokens", 0)
    constant = 2 * shape[grown[0]] - taller[grown[0]]
    if n_prefix == 0 or constant == 0:
        return axes, 0
    return (axes, n_prefix) if constant == n_prefix else (None, 0)


def _axes_by_size(network: nn.Module, shape: tuple[int, ...], height: int, width: int) -> tuple[str | None, int]:
    """Return axes and prefix tokens of an output of a network that takes images of one size only."""
    if len(shape) == 4:
        maps = {"NCHW": shape[2:], "NHWC": shape[1:3]}
        proportional = [axes for axes, (h, w) in maps.items() if h * width == w * height]
        return (proportional[0] if len(proportional) == 1 else None), 0
    if len(shape) != 3:
        return None, 0
    n_prefix = getattr(network, "num_prefix_tokens", 0)
    n_patches = [getattr(module, "num_patches", None) for module in network.modules()]
    lengths = [n + prefix for n in n_patches if isinstance(n, int) for prefix in (0, n_prefix)]
    widths = [getattr(network, "embed_dim", None), getattr(network, "num_features", None)]
    widths += [info.get("num_chs") for info in getattr(network, "feature_info", None) or []]
    fitting = [axis for axis in (1, 2) if shape[axis] in lengths]
    if len(fitting) != 1:
        fitting = [axis for axis in (1, 2) if shape[3 - axis] in widths]
    if len(fitting) != 1:
        return None, 0
    axes, length = ("NLC", "NCL")[fitting[0] - 1], shape[fitting[0]]
    if n_prefix == 0 or length in n_patches:
        return axes, 0
    return (axes, n_prefix) if length - n_prefix in n_patches else (None, 0)


# Backbones


@contextmanager
def _borrowed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Lend a user's module in evaluation mode on `device`, and give it back as it was."""
    with _borrowing:
        devices = {tensor.device for tensor in itertools.chain(module.parameters(), module.buffers())}
        if len(devices) > 1:
            raise ValueError(
                f"backbone: a module on several devices ({', '.join(sorted(map(str, devices)))}). Move it to one."
            )
        moved = bool(devices) and devices != {device}
        training = [(part, part.training) for part in module.modules()]
        try:
            module.eval()
            if moved:
                module.to(device)
            yield
        finally:
            # Some modules keep what they computed in evaluation mode until train() is called.
            module.train(training[0][1])
            for part, flag in training:
                part.training = flag
            if moved:
                module.to(next(iter(devices)))


def _named_backbone(
    name: str,
    pretrained: bool,
    weights: str | os.PathLike[str] | None,
    seed: int | None,
    size: tuple[int, int] | None,
    device: torch.device,
) -> tuple[nn.Module, str]:
    """Return a backbone and the hash of its weights, loaded once for all that ask for the same."""
    file = None if weights is None else _weights_file(weights)
    # A file that was written anew is another file.
    state = file and (str(file), file.stat().st_mtime_ns, file.stat().st_size)
    key = (name, pretrained, state, seed, size, str(device))
    with _loading:
        if key not in _loaded:
            network = _created(name, pretrained, file, seed, size).eval().requires_grad_(False)
            _loaded[key] = network.to(device), _weights_hash(network)
            if len(_loaded) > MAX_LOADED:
                _loaded.popitem(last=False)
        _loaded.move_to_end(key)
        return _loaded[key]


def _created(
    name: str, pretrained: bool, file: Path | None, seed: int | None, size: tuple[int, int] | None
) -> nn.Module:
    import timm

    options: dict[str, Any] = {"num_classes": 0}
    if size and _takes_one_size(name):
        options["img_size"] = size
    # On the CPU, so that a seed draws the same weights everywhere; the user's generator is left as it was.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        try:
            found = name
            source: dict[str, Any] = {}
            if ":" in name or (pretrained and file is None):
                found, source = _pretrained_source(name)
            if file is None:
                return timm.create_model(found, pretrained=pretrained, pretrained_cfg_overlay=source, **options)
            network = timm.create_model(found, num_classes=0)
            _load_weights(network, file, name)
            if "img_size" not in options:
                return network
            # timm resamples what depends on the size, such as position embeddings.
            source = {"file": str(file), "custom_load": False}
            return timm.create_model(found, pretrained=True, pretrained_cfg_overlay=source, **options)
        except OSError as error:
            from huggingface_hub.constants import HF_HUB_CACHE

            raise OSError(
                f"The pretrained weights of backbone {name!r} are neither in the cache ({HF_HUB_CACHE}) nor to be"
                f" downloaded ({error}). Ways out: weights=PATH to a file of them; copy the cache of a machine"
                " that has them, and set HF_HUB_OFFLINE=1; ScatteringFeatures(), which needs no download; or"
                " pretrained=False for random weights."
            ) from error
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            raise ValueError(
                f"image_size={size}: backbone {name!r} takes images of one size only, its own. Use None."
            ) from error


def _takes_one_size(name: str) -> bool:
    from timm.models import get_pretrained_cfg

    config = None if ":" in name else get_pretrained_cfg(name)
    return config is not None and config.fixed_input_size


def _full_name(name: str) -> str:
    """Return the name with its tag, so that a later default of timm's changes nothing."""
    import timm
    from timm.models import get_pretrained_cfg

    if ":" in name:  # "hf-hub:..." and "local-dir:..." name one model
        return name
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models())
        raise ValueError(
            f"backbone={name!r} is not a model of timm."
            + (f" Did you mean {' or '.join(map(repr, close))}?" if close else "")
            + " timm.list_models() lists all; models of the Hugging Face hub are named 'hf-hub:OWNER/MODEL'."
        )
    try:
        config = get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = [architecture, *timm.list_models(f"{architecture}.*", pretrained=True)]
        raise ValueError(
            f"backbone={name!r}: timm has no such weights. Allowed: {', '.join(map(repr, tags))}."
        ) from error
    return f"{architecture}.{config.tag}" if config and config.tag else architecture


def _module_name(module: nn.Module) -> str:
    config = getattr(module, "pretrained_cfg", None)
    names = [config.get(key) for key in ("architecture", "tag")] if isinstance(config, dict) else []
    return ".".join(filter(None, names)) or type(module).__name__


def _data_config(network: nn.Module, size: tuple[int, int] | None) -> dict[str, Any]:
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(network, args={"input_size": (3, *size)} if size else None)
    if config["input_size"][0] != 3:
        raise ValueError(
            f"backbone: its configuration says images of {config['input_size'][0]} channels, and images are"
            " read as RGB. Use a backbone with in_chans=3."
        )
    return config | {key: tuple(map(float, config[key])) for key in ("mean", "std")}


def _height_and_width(image_size: Any) -> tuple[int, int] | None:
    if image_size is None:
        return None
    sides = [image_size] * 2 if isinstance(image_size, Integral) else list(image_size)
    if len(sides) != 2 or not all(isinstance(side, Integral) and int(side) >= 1 for side in sides):
        raise ValueError(f"image_size={image_size!r}. Allowed: (height, width), one int for both, or None.")
    return int(sides[0]), int(sides[1])


# Weights


def _weights_hash(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, values in sorted(network.state_dict().items()):
        if isinstance(values, Tensor):
            digest.update(f"{name} {values.dtype} {tuple(values.shape)};".encode())
            digest.update(_bytes(values))
    return digest.hexdigest()


def _remembered(key: tuple[Any, ...], find: Callable[[], Any]) -> Any:
    """Return what is known under a key, found out at the first time."""
    with _loading:
        if key not in _known:
            _known[key] = find()
            if len(_known) > MAX_KNOWN:
                _known.popitem(last=False)
        _known.move_to_end(key)
        return _known[key]


def _fingerprint(network: nn.Module) -> str:
    """Return a hash of what decides the outputs of a network: weights, modules, settings and code.

    A search takes it for every candidate and fold: it has to cost little.
    """
    digest, texts = hashlib.sha256(), []
    kinds = {kind: _code_and_records(kind) for kind in {type(part) for part in network.modules()}}
    for name, part in network.named_modules():
        code, records = kinds[type(part)]
        texts.append(f"{name}: {code}")
        contents = vars(part)
        texts += [f"{key}={_described(value)}" for key, value in contents.items() if key not in records]
        # This file's own hooks stand there while another thread reads layers.
        for hook in (*contents["_forward_hooks"].values(), *contents["_forward_pre_hooks"].values()):
            if hook.__module__ != __name__:
                texts.append(f"hook {_described(hook)}")
        for key, values in (*contents["_parameters"].items(), *contents["_buffers"].items()):
            if values is not None:
                texts.append(f"{key} {values.dtype} {tuple(values.shape)}")
                digest.update(_bytes(values))
    if isinstance(network, torch.jit.ScriptModule):
        texts.append(str(network.inlined_graph))
    digest.update("\n".join(texts).encode())
    return digest.hexdigest()


def _bytes(values: Tensor) -> memoryview:
    flat = values.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _code_and_records(kind: type) -> tuple[str, set[str]]:
    """Return text that tells a class of modules, and the attributes that its forward pass writes to."""
    own = kind.__mro__[: kind.__mro__.index(nn.Module)]
    methods = [method for part in own for method in vars(part).values() if isinstance(method, types.FunctionType)]
    forward = [_records(method.__code__) for method in methods if method.__name__.startswith("forward")]
    codes = "".join(_code(method.__code__) for method in methods)
    # What every module has, weights among it, is looked at by itself.
    return f"{kind.__module__}.{kind.__qualname__} {codes}", set(vars(nn.Module())).union(*forward)


def _described(value: Any) -> str:
    """Return text that tells apart settings of a module; nothing for what is no plain value."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"({','.join(map(_described, value))})"
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(_bytes(value)).hexdigest()}"
    if isinstance(value, partial):
        return _described([value.func, value.args, *value.keywords.items()])
    if not isinstance(value, types.FunctionType):
        return getattr(value, "__qualname__", "")
    cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
    enclosed = {name: cell.cell_contents for name, cell in cells if name not in _records(value.__code__)}
    plain = [item for item in enclosed.items() if isinstance(item[1], bool | int | float | str | Tensor)]
    return _code(value.__code__) + _described([value.__defaults__, plain])


@lru_cache(maxsize=4096)
def _code(code: types.CodeType) -> str:
    """Return a hash of what a function does, wherever it was defined."""
    constants = [_code(part) if isinstance(part, types.CodeType) else repr(part) for part in code.co_consts]
    # The text of a set depends on the process.
    constants = ["".join(sorted(text)) if text.startswith("frozenset") else text for text in constants]
    return hashlib.sha256(f"{code.co_name} {code.co_code.hex()} {code.co_names} {constants}".encode()).hexdigest()


@lru_cache(maxsize=4096)
def _records(code: types.CodeType) -> frozenset[str]:
    """Return the names of what code writes to: what it counts or keeps, not what it was set to."""
    steps = list(dis.get_instructions(code))
    assigned = {step.argval for step in steps if step.opname in ("STORE_ATTR", "STORE_DEREF")}
    grown = {owner.argval for owner, step in itertools.pairwise(steps) if step.argval in ("append", "extend", "add")}
    return frozenset(name for name in assigned | grown if isinstance(name, str))


def _weights_file(weights: str | os.PathLike[str]) -> Path:
    file = Path(weights).resolve()
    if not file.is_file():
        raise FileNotFoundError(f"weights={str(weights)!r}: there is no such file.")
    return file


def _load_weights(network: nn.Module, file: Path, name: str) -> None:
    """Load a file into `network`, whose weights it must have all, and no others but a classifier's."""
    from timm.models import load_state_dict

    try:
        given = load_state_dict(str(file), weights_only=True)
        shapes = {key: tuple(values.shape) for key, values in given.items()}
    except Exception as error:
        raise ValueError(
            f"weights={str(file)!r} cannot be read as safetensors (a name that ends so) or as a state dict of"
            f" torch.save: {error}"
        ) from error
    config: Any = network.pretrained_cfg
    classifier = config.get("classifier") or ()
    heads = tuple(f"{head}." for head in ([classifier] if isinstance(classifier, str) else classifier))
    own = {key: tuple(values.shape) for key, values in network.state_dict().items()}
    # Batch norms count batches in training only, and older files lack the count.
    missing = [key for key in own.keys() - shapes.keys() if not key.endswith("num_batches_tracked")]
    differences = {
        "missing": [key for key in missing if not key.startswith(heads)],
        "unexpected": [key for key in shapes.keys() - own.keys() if not key.startswith(heads)],
        "of another shape": [
            f"{key} {shapes[key]} for {own[key]}" for key in own.keys() & shapes.keys() if own[key] != shapes[key]
        ],
    }
    if any(differences.values()):
        listed = "; ".join(
            f"{len(keys)} {kind}: {', '.join(sorted(keys)[:5])}{', ...' if len(keys) > 5 else ''}"
            for kind, keys in differences.items()
            if keys
        )
        raise ValueError(
            f"weights={str(file)!r} do not fit backbone {name!r}: {listed}. For a network with other arguments,"
            " or a file that timm has to convert, pass the module: backbone=timm.create_model(...,"
            " pretrained=True, pretrained_cfg_overlay=dict(file=PATH))."
        )
    network.load_state_dict(given, strict=False)


def _pretrained_source(name: str) -> tuple[str, dict[str, Any]]:
    """Return a name and an overlay of its configuration with which timm finds pretrained weights.

    Left alone, timm asks the hub even for files in the cache, and tries for most of a minute without network.
    """
    from huggingface_hub import hf_hub_url, try_to_load_from_cache
    from timm.models import get_pretrained_cfg

    source, _, hub_id = name.partition(":")
    config: Any = None
    if source == "local-dir":
        return name, {}
    if hub_id:
        filenames = ["config.json"]
    else:
        config = get_pretrained_cfg(name)
        if config is None or not config.has_weights:
            raise ValueError(
                f"timm has no pretrained weights for backbone {name!r}. Use weights=PATH, or pretrained=False"
                " for random ones."
            )
        if not config.hf_hub_id:
            if not Path(torch.hub.get_dir(), "checkpoints", Path(config.url).name).exists():
                _check_reachable(config.url)
            return name, {}
        hub_id, filename = config.hf_hub_id, config.hf_hub_filename or "pytorch_model.bin"
        safe = filename.replace("pytorch_model.bin", "model.safetensors")
        filenames = list(dict.fromkeys([safe, str(Path(filename).with_suffix(".safetensors")), filename]))
    repository, _, revision = hub_id.partition("@")
    for filename in filenames:
        cached = try_to_load_from_cache(repository, filename, revision=revision or None)
        if not isinstance(cached, str):
            continue
        if config is not None:
            # timm's own format of most files on the hub, whatever the one at config.url has.
            return name, {"file": cached, "custom_load": bool(config.hf_hub_filename and config.custom_load)}
        folder = Path(cached).parent
        if any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir()):
            return f"local-dir:{folder}", {}
    _check_reachable(hf_hub_url(repository, filenames[0], revision=revision or None))
    return name, {}


def _check_reachable(url: str) -> None:
    """Raise an OSError with the reason unless something answers at `url` soon."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    failure = ["no answer"]

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS):
                failure.clear()
        except urllib.error.HTTPError:
            failure.clear()  # an answer; what it means is for the download to say
        except Exception as error:
            failure[:] = [str(error)]
            if isinstance(getattr(error, "reason", None), ssl.SSLError):
                failure.clear()  # an answer too; the hub's client may know certificates that Python does not

    # In a thread, as no timeout covers the look-up of a name.
    probe = threading.Thread(target=ask, daemon=True)
    probe.start()
    probe.join(PROBE_SECONDS + 0.5)
    if failure:
        raise OSError(f"{url}: {failure[0]}")
