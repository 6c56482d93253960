"""Outputs of layers: read in a forward pass, their format determined by blank images, pooled to one vector."""

from __future__ import annotations

import difflib
import itertools
import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate
from torch.utils._python_dispatch import TorchDispatchMode

from dfkde_sklearn._threads import Lock

# Maximum size of a tensor in a forward pass on a CPU. The C library maps large blocks of memory again in each call, at
# the latest from 32 MiB on, and the page faults cost more than the arithmetic: benchmarks/micro_batches.py.
MAX_ACTIVATION_BYTES = 20 * 2**20
# Of the layers that describe positions by default.
_STRIDES = (8, 16)
# Number of networks whose formats are kept: a search needs them again in every fold.
MAX_FORMATS = 64
_formats: OrderedDict[tuple[Any, ...], tuple[list[LayerFormat], int]] = OrderedDict()
_FORMATS_LOCK = Lock()


class LayersRead(Exception):  # noqa: N818 (a signal, not an error)
    """Ends a forward pass when all needed layers have returned."""


class LayerFormat(NamedTuple):
    """What a layer returns.

    Parameters
    ----------
    axes : str
        "NC", "NCHW", "NHWC", "NLC" or "NCL"; L are tokens.
    prefix_tokens : int
        Number of class and register tokens, which come first: those whose number does not grow with the image.
    width : int
        Length of the axis C.
    grid : tuple (h, w) or None
        The positions; None for "NC", and for tokens that form no grid with the proportions of the image.
    """

    axes: str
    prefix_tokens: int
    width: int
    grid: tuple[int, int] | None


class OtherRuntime(nn.Module):
    """A network that another runtime than torch computes."""

    def outputs(self, batch: Tensor, layers: list[str]) -> dict[str, Tensor]:
        """Return what these layers return for images."""
        raise NotImplementedError


def visit_layers(network: nn.Module, batch: Tensor, layers: list[str], visit: Callable[[str, Any], None]) -> None:
    """Run a forward pass and call ``visit(name, output)`` when a layer returns.

    "" among the layers, or no layer at all, is the embedding.
    """
    if isinstance(network, OtherRuntime):
        with suppress(LayersRead):
            for layer, output in network.outputs(batch, layers or [""]).items():
                visit(layer, output)
        return
    like = _weight(network, batch)
    thread = threading.get_ident()

    def hook_for(layer: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:  # noqa: ARG001
            # Named backbones are shared: ignore the forward passes of other threads.
            if threading.get_ident() == thread:
                visit(layer, output)

        return hook

    modules = dict(network.named_modules())
    hooks = [modules[layer].register_forward_hook(hook_for(layer)) for layer in layers if layer]
    try:
        with torch.inference_mode(not (batch.requires_grad and torch.is_grad_enabled())):
            batch = batch.to(like)
            if layers and "" not in layers:
                network(batch)
            else:
                visit("", embedding(network, batch))
    except LayersRead:
        pass
    finally:
        for hook in hooks:
            hook.remove()


def micro_batch_size(network: nn.Module, batch: Tensor, activation_bytes: int) -> int:
    """Return the number of images that a forward pass should take at once.

    Parameters
    ----------
    network : nn.Module
        On the device where the pass runs.
    batch : Tensor of shape (n, ...)
        The images.
    activation_bytes : int
        Bytes per image of the largest tensor in the pass.
    """
    if _weight(network, batch).device.type != "cpu":
        return max(1, len(batch))
    return max(1, min(len(batch), MAX_ACTIVATION_BYTES // max(1, activation_bytes)))


def _weight(network: nn.Module, default: Tensor) -> Tensor:
    """Return a tensor of the network, for the dtype and the device that it computes in."""
    tensors = itertools.chain(network.parameters(), network.buffers())
    return next((tensor for tensor in tensors if tensor.is_floating_point()), default)


class _LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that an operation of this thread returns."""

    def __init__(self) -> None:
        super().__init__()
        self.n_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        # A view, such as a transposed weight, takes no memory.
        given = {value.untyped_storage().data_ptr() for value in args if isinstance(value, Tensor)}
        for value in output if isinstance(output, tuple | list) else [output]:
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in given:
                self.n_bytes = max(self.n_bytes, value.numel() * value.element_size())
        return output


def embedding(network: nn.Module, batch: Tensor) -> Any:
    """Return the output of a network, for timm's models without the classifier."""
    timm_model: Any = network
    if hasattr(timm_model, "forward_head") and getattr(timm_model, "num_classes", None):
        return timm_model.forward_head(timm_model.forward_features(batch), pre_logits=True)
    return network(batch)


def pooled(output: Tensor, axes: str, prefix_tokens: int, pooling: str) -> Tensor:
    """Return one vector for each image, (n, C) in float32."""
    # float16 overflows in the sum over positions and in the third power.
    output = output.float()
    if axes == "NC":
        return output.flatten(1)
    positions = output.movedim(axes.index("C"), 1).flatten(2)[..., prefix_tokens:]
    # Axes are kept and then flattened: if a graph drops an axis in a reduction and then subtracts a constant,
    # OpenVINO 2026.4 gives wrong results.
    if pooling == "avg":
        vectors = positions.mean(-1, keepdim=True)
    elif pooling == "max":
        vectors = positions.amax(-1, keepdim=True)
    else:
        vectors = positions.clamp(min=1e-6).pow(3).mean(-1, keepdim=True).pow(1 / 3)
    return vectors.flatten(1)


def on_grid(
    output: Tensor, axes: str, prefix_tokens: int, layer_grid: tuple[int, int], grid: tuple[int, int]
) -> Tensor:
    """Return the vectors of all positions of a grid, (n, C, h, w) in float32: local means, interpolated.

    The mean over 3 x 3 positions, without what lies outside the image, and then bilinear interpolation to the grid.
    """
    output = output.float().movedim(axes.index("C"), 1)
    if "L" in axes:
        output = output[..., prefix_tokens:].unflatten(2, layer_grid)
    means = avg_pool2d(output, 3, stride=1, padding=1, count_include_pad=False)
    if layer_grid == grid:
        return means
    return interpolate(means, size=grid, mode="bilinear", align_corners=False)


def feature_stages(network: nn.Module) -> dict[str, int]:
    """Return the outputs of the stages of a network, or of its blocks, and their strides in pixels.

    As timm's `feature_info` states them; empty for a network without it.
    """
    found = getattr(network, "feature_info", None)
    # A list of dictionaries, or an object that holds one.
    stages = [dict(stage) for stage in getattr(found, "info", found) or []]
    stride = {stage["module"]: stage["reduction"] for stage in stages if "module" in stage and "reduction" in stage}
    available = {layer for layer, _ in network.named_modules()}
    return {layer: reduction for layer, reduction in stride.items() if layer in available}


def layers_for_positions(network: nn.Module, name: str) -> list[str]:
    """Return the layers that describe positions: of strides 8 and 16, or two blocks in the middle of a transformer.

    As timm's `feature_info` states them. Measured on photographs: earlier layers add little, later ones hurt.
    """
    stride = feature_stages(network)
    names = list(stride)
    if len({stride[layer] for layer in names}) == 1 and len(names) > 3:
        return [names[len(names) // 2 - 1], names[3 * len(names) // 4 - 1]]
    chosen = [layer for layer in names if stride[layer] in _STRIDES]
    if not chosen:
        raise ValueError(
            f"layers=None with pooling=None takes the layers of stride 8 and 16, and backbone {name!r} does not state "
            "any (timm's feature_info). Name layers in the middle of the network, such as the outputs of its stages."
        )
    return chosen


def check_layers(layers: list[str], network: nn.Module, name: str) -> None:
    """Raise a ValueError unless these are submodules of the network."""
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


def layer_formats(
    network: nn.Module, fingerprint: str, layers: list[str], size: tuple[int, int], name: str
) -> tuple[list[LayerFormat], int]:
    """Return the format of each layer's output, [] being the embedding, and the bytes of the largest activation.

    Both come from forward passes of blank images; the bytes are per image. The result is kept under the fingerprint of
    the network.
    """
    key = (fingerprint, *layers, *size)
    with _FORMATS_LOCK:
        if key not in _formats:
            _formats[key] = _found_formats(network, layers, size, name)
            if len(_formats) > MAX_FORMATS:
                _formats.popitem(last=False)
        _formats.move_to_end(key)
        return _formats[key]


def _found_formats(
    network: nn.Module, layers: list[str], size: tuple[int, int], name: str
) -> tuple[list[LayerFormat], int]:
    height, width = size
    largest = _LargestTensor()
    try:
        with largest:
            shapes = _output_shapes(network, layers, (height, width))
    except Exception as error:
        raise _wrong_size(name, size, error) from error
    taller = _shapes_of_taller(network, layers, shapes, (height, width))
    formats = [_format_of(network, layer, shapes[layer], taller, (height, width), name) for layer in shapes]
    return formats, largest.n_bytes // 2


def usable_layers(network: nn.Module, layers: list[str], size: tuple[int, int], name: str) -> dict[str, LayerFormat]:
    """Return the format of each submodule that can be a layer, in their order.

    Parameters
    ----------
    network : nn.Module
        In evaluation mode; its weights do not matter.
    layers : list of str
        Names of submodules.
    size : tuple (height, width)
        Of the images.
    name : str
        Of the network, in errors.

    Raises
    ------
    ValueError
        If the network does not take images of this size.
    """
    try:
        shapes = _output_shapes(network, layers, size)
    except Exception as error:
        raise _wrong_size(name, size, error) from error
    taller = _shapes_of_taller(network, layers, shapes, size)
    # Equal shapes have equal formats, and to find one may take a forward pass.
    formats, known = dict[str, LayerFormat](), dict[Any, LayerFormat | None]()
    for layer in layers:
        key = repr((shapes[layer], taller and taller[layer]))
        if key not in known:
            known[key] = None
            with suppress(ValueError):
                known[key] = _format_of(network, layer, shapes[layer], taller, size, name)
        found = known[key]
        if found is not None:
            formats[layer] = found
    return formats


def _wrong_size(name: str, size: tuple[int, int], error: Exception) -> ValueError:
    return ValueError(
        f"backbone {name!r} does not take colour images of {size[0]} x {size[1]} pixels: {error!r}."
        " If another size is right, pass image_size."
    )


def _shapes_of_taller(
    network: nn.Module, layers: list[str], shapes: dict[str, list[Any]], size: tuple[int, int]
) -> dict[str, list[Any]] | None:
    """Return the shapes for images twice as tall; None where no layer needs them, or the network refuses these."""
    if not any(isinstance(shape, tuple) and _n_wide_axes(shape) > 1 for found in shapes.values() for shape in found):
        return None
    # Networks for one size only refuse this, each with an error of its own.
    with suppress(Exception):
        return _output_shapes(network, layers, (2 * size[0], size[1]))
    return None


def _format_of(
    network: nn.Module,
    layer: str,
    found: list[Any],
    taller: dict[str, list[Any]] | None,
    size: tuple[int, int],
    name: str,
) -> LayerFormat:
    """Return the format of a layer that returned `found`; raise a ValueError where it cannot be a layer."""
    height, width = size
    owner = f"backbone {name!r}"
    called = f"layers={[layer]} of {owner}" if layer else owner
    if len(found) != 1:
        how_often = f"runs {len(found)} times" if found else "never runs"
        raise ValueError(f"{called} {how_often} in a forward pass. Name a layer that runs once.")
    (shape,) = found
    if isinstance(shape, str):
        raise ValueError(f"{called} returns a {shape}, not a tensor. Name a layer that does.")
    if shape[:1] != (2,):
        raise ValueError(f"{called} returns shape {shape} for 2 images: not an entry for each.")
    if _n_wide_axes(shape) <= 1:
        return LayerFormat("NC", 0, math.prod(shape[1:]), None)
    if taller is None or taller[layer][0] == shape:
        axes, prefix_tokens = _axes_by_size(network, shape, height, width)
    else:
        axes, prefix_tokens = _axes_by_growth(network, shape, taller[layer][0], height, width)
    returned = f"{called} returns shape {shape} for 2 images of {height} x {width} pixels"
    if axes is None:
        raise ValueError(f"{returned}: which axis holds the channels is not certain. Name another layer.")
    if prefix_tokens is None:
        raise ValueError(
            f"{returned}, {axes}: how many of the {shape[axes.index('L')]} tokens are class and register tokens,"
            " which must not be pooled, is not certain. Name another layer, or set backbone.num_prefix_tokens to"
            " their number."
        )
    if "L" in axes:
        grid = _grid(shape[axes.index("L")] - prefix_tokens, height, width)
    else:
        grid = shape[axes.index("H")], shape[axes.index("W")]
    return LayerFormat(axes, prefix_tokens, shape[axes.index("C")], grid)


def _output_shapes(network: nn.Module, layers: list[str], size: tuple[int, int]) -> dict[str, list[Any]]:
    """Return for each layer what each of its calls returns for two blank images: a shape, or the name of a type."""
    shapes: dict[str, list[Any]] = {layer: [] for layer in layers or [""]}

    def note(layer: str, output: Any) -> None:
        shapes[layer].append(tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__)

    visit_layers(network, torch.zeros(2, 3, *size), layers, note)
    return shapes


def _n_wide_axes(shape: tuple[int, ...]) -> int:
    """Return the number of axes after the first that are longer than 1; 0 or 1 means one vector for each image."""
    return sum(length > 1 for length in shape[1:])


def _axes_by_growth(
    network: nn.Module, shape: tuple[int, ...], taller: tuple[int, ...], height: int, width: int
) -> tuple[str | None, int | None]:
    """Return axes and prefix tokens of an output, from its shapes for an image and for one twice as tall.

    The numbers of channels and of prefix tokens do not depend on the size of the image.
    """
    grown = tuple(axis for axis in range(len(shape)) if shape[axis] != taller[axis])
    named = {"NCHW": (4, 2), "NHWC": (4, 1), "NLC": (3, 1), "NCL": (3, 2)}
    axes = next((axes for axes, key in named.items() if key == (len(shape), *grown)), None)
    if axes is None or "L" not in axes:
        return axes, 0
    length = shape[grown[0]]
    constant = 2 * length - taller[grown[0]]
    stated = getattr(network, "num_prefix_tokens", None)
    if constant == stated:
        return axes, stated
    # A grid that does not double exactly, such as that of overlapping patches, leaves a constant too.
    return axes, _prefix_tokens(length, {0, constant if stated is None else stated}, height, width)


def _axes_by_size(network: nn.Module, shape: tuple[int, ...], height: int, width: int) -> tuple[str | None, int | None]:
    """Return axes and prefix tokens of an output, for a network that takes images of one size only."""
    if len(shape) == 4:
        maps = {"NCHW": shape[2:], "NHWC": shape[1:3]}
        proportional = [axes for axes, (h, w) in maps.items() if h * width == w * height]
        return (proportional[0] if len(proportional) == 1 else None), 0
    if len(shape) != 3:
        return None, 0
    stated = getattr(network, "num_prefix_tokens", None)
    n_patches = {n for module in network.modules() if isinstance(n := getattr(module, "num_patches", None), int)}
    if stated is None:
        n_patches |= _convolved_positions(network, height, width)
    lengths = {n + prefix for n in n_patches for prefix in (0, stated or 0)}
    fitting = [axis for axis in (1, 2) if shape[axis] in lengths]
    if len(fitting) != 1:
        widths = _token_widths(network)
        fitting = [axis for axis in (1, 2) if shape[3 - axis] in widths]
    if len(fitting) != 1:
        return None, 0
    axes, length = ("NLC", "NCL")[fitting[0] - 1], shape[fitting[0]]
    if length in n_patches:
        return axes, 0
    if stated is None:
        # Of several numbers of patches, the largest that fits.
        stated = length - max((n for n in n_patches if n < length <= 2 * n), default=length)
    elif length - stated in n_patches:
        return axes, stated
    # Merging leaves fewer patches.
    return axes, _prefix_tokens(length, {0, stated}, height, width)


def _prefix_tokens(length: int, candidates: set[int], height: int, width: int) -> int | None:
    """Return the number of prefix tokens, among `candidates`, that leaves a grid of patches; None if uncertain."""
    fitting = [n for n in candidates if 0 <= n < length and _grid(length - n, height, width)]
    return fitting[0] if len(fitting) == 1 else None


def _grid(n_positions: int, height: int, width: int) -> tuple[int, int] | None:
    """Return the grid (h, w) of positions with the proportions of the image, up to rounding; None if there is none."""
    rows = [
        rows
        for rows in range(1, n_positions + 1)
        if n_positions % rows == 0 and abs(n_positions // rows - rows * width / height) < 1
    ]
    if not rows:
        return None
    best = min(rows, key=lambda rows: abs(n_positions // rows - rows * width / height))
    return best, n_positions // best


def _convolved_positions(network: nn.Module, height: int, width: int) -> set[int]:
    """Return the numbers of positions in the outputs of the network's convolutions, including patch embeddings."""
    convolutions = [name for name, module in network.named_modules() if name and isinstance(module, nn.Conv2d)]
    if not convolutions:
        return set()
    shapes = _output_shapes(network, convolutions, (height, width))
    return {math.prod(shape[2:]) for found in shapes.values() for shape in found}


def _token_widths(network: nn.Module) -> list[Any]:
    """Return the possible numbers of channels of a network's tokens."""
    widths = [getattr(network, "embed_dim", None), getattr(network, "num_features", None)]
    widths += [info.get("num_chs") for info in getattr(network, "feature_info", None) or []]
    return widths + [module.normalized_shape[-1] for module in network.modules() if isinstance(module, nn.LayerNorm)]
