"""Networks that compute the same on a CPU in less time.

Each batch norm is folded into the convolution before it, images and weights are stored with the channels last, and
oneDNN gets the weights of each convolution as it wants to read them. On one AVX-512 core that is 1.3 to 2.3 times as
fast: benchmarks/engines.py.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from dfkde_sklearn._features.layers import visit_layers

# Images for which weights are laid out, and results are compared.
_N_IMAGES = 2


def optimize(network: nn.Module, size: tuple[int, int]) -> frozenset[str]:
    """Change a network, in place, so that it computes the same embedding in less time.

    Parameters
    ----------
    network : nn.Module
        In evaluation mode, in float32 on the CPU. Its class may do anything: which convolutions precede a batch norm is
        seen in a pass.
    size : tuple (height, width)
        Of the images for which weights are laid out; others take a little longer.

    Returns
    -------
    frozenset of str
        The names of the submodules that now return something else: convolutions, whose outputs are normalised. It is
        empty where the network has nothing to fold, and was not changed. All names are as before.
    """
    images = torch.randn(_N_IMAGES, 3, *size, generator=torch.Generator().manual_seed(0))
    changed = _fold_batch_norms(network, images[:1])
    if changed:
        _lay_out_weights(network, images)
        # Tensors of four axes; the others have no channels to come last.
        network.to(memory_format=torch.channels_last)
    return changed


def difference(network: nn.Module, other: nn.Module, size: tuple[int, int], layers: list[str]) -> float:
    """Return the largest difference between outputs of two networks for noise, relative to the largest of its layer.

    It is NaN where one of them is. No layers are the embedding.
    """
    images = torch.randn(_N_IMAGES, 3, *size, generator=torch.Generator().manual_seed(0))

    def outputs(of: nn.Module) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        visit_layers(of, images, layers, lambda layer, output: found.__setitem__(layer, output.clone()))
        return found

    expected, values = outputs(network), outputs(other)
    ratios = []
    for layer, output in expected.items():
        largest = output.abs().max().clamp_min(torch.finfo(output.dtype).tiny)
        ratios.append((values[layer] - output).abs().max() / largest)
    return float(torch.stack(ratios).max())


class FoldedBatchNorm(nn.Module):
    """What is left of a batch norm: the dropout and activation of timm's, under the same names.

    Parameters
    ----------
    batch_norm : nn.Module
        The batch norm that was folded.
    """

    def __init__(self, batch_norm: nn.Module) -> None:
        super().__init__()
        self.drop = getattr(batch_norm, "drop", nn.Identity())
        self.act = getattr(batch_norm, "act", nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        """Return what the batch norm returns for the output of its convolution before folding."""
        return self.act(self.drop(x))


class LaidOutConv2d(nn.Module):
    """A convolution whose weights are stored as oneDNN reads them, by the operators of torch's own compiler.

    Parameters
    ----------
    convolution : nn.Conv2d
        A plain one.
    shape : list of int
        Of the input for which the layout is chosen; others take longer.
    """

    def __init__(self, convolution: nn.Conv2d, shape: list[int]) -> None:
        super().__init__()
        self.bias = convolution.bias
        self._settings: tuple[Any, ...] = (
            list(convolution.padding),
            list(convolution.stride),
            list(convolution.dilation),
            convolution.groups,
        )
        reorder = torch.ops.mkldnn._reorder_convolution_weight
        self._weight = reorder(convolution.weight.detach(), *self._settings, shape)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of `x`."""
        convolve = torch.ops.mkldnn._convolution_pointwise
        x = x.contiguous(memory_format=torch.channels_last)
        return convolve(x, self._weight, self.bias, *self._settings, "none", [], "")


def _fold_batch_norms(network: nn.Module, images: Tensor) -> frozenset[str]:
    """Fold each batch norm of a network into its convolution, in place, and return the convolutions' names."""
    names = {module: name for name, module in network.named_modules()}
    pairs = _convolutions_of_batch_norms(network, images)
    for batch_norm, convolution in pairs.items():
        weight, bias = fuse_conv_bn_weights(
            convolution.weight.double(),
            None if convolution.bias is None else convolution.bias.double(),
            batch_norm.running_mean.double(),
            batch_norm.running_var.double(),
            batch_norm.eps,
            None if batch_norm.weight is None else batch_norm.weight.double(),
            None if batch_norm.bias is None else batch_norm.bias.double(),
        )
        convolution.weight, convolution.bias = (
            nn.Parameter(values.detach().float(), requires_grad=False) for values in (weight, bias)
        )
        _replace(network, names[batch_norm], FoldedBatchNorm(batch_norm))
    return frozenset(names[convolution] for convolution in pairs.values())


def _convolutions_of_batch_norms(network: nn.Module, images: Tensor) -> dict[Any, Any]:
    """Return the batch norms that can be folded, each with the convolution whose output it takes.

    Whether another module also takes the convolution's output is not seen; a comparison of the results shows it.
    """
    outputs: dict[int, tuple[nn.Module, Tensor, int]] = {}
    found: dict[nn.Module, nn.Module] = {}
    n_calls: Counter[nn.Module] = Counter()

    def after_convolution(module: nn.Module, arguments: Any, output: Any) -> None:  # noqa: ARG001
        n_calls[module] += 1
        # The tensor is kept, so that no later one has its id.
        outputs[id(output)] = module, output, output._version

    def before_batch_norm(module: nn.Module, arguments: Any) -> None:
        n_calls[module] += 1
        convolution, _, version = outputs.get(id(arguments[0]), (None, None, None))
        # An operation in place, such as an activation, returns the same tensor in a new version.
        if convolution is not None and version == arguments[0]._version:
            found[module] = convolution

    hooks = []
    for module in network.modules():
        if _has_hooks(module):
            continue
        if _is_convolution(module):
            hooks.append(module.register_forward_hook(after_convolution))
        elif _is_batch_norm(module):
            hooks.append(module.register_forward_pre_hook(before_batch_norm))
    try:
        with torch.no_grad():  # in inference mode tensors have no versions
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        batch_norm: convolution
        for batch_norm, convolution in found.items()
        if n_calls[batch_norm] == n_calls[convolution] == 1
    }


def _is_convolution(module: nn.Module) -> bool:
    """Return whether a module convolves with its parameter as it is, not with a function of it."""
    from timm.layers import Conv2dSame

    forwards = (nn.Conv2d.forward, Conv2dSame.forward)
    return isinstance(module, nn.Conv2d) and type(module).forward in forwards and "weight" in module._parameters


def _is_batch_norm(module: nn.Module) -> bool:
    from timm.layers import BatchNormAct2d

    forwards = (nn.BatchNorm2d.forward, BatchNormAct2d.forward)
    return isinstance(module, nn.BatchNorm2d) and type(module).forward in forwards and module.running_var is not None


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _lay_out_weights(network: nn.Module, images: Tensor) -> None:
    """Replace the plain convolutions of a network, in place, where this torch has oneDNN's operators."""
    operators = ("_reorder_convolution_weight", "_convolution_pointwise")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, name) for name in operators):
        return
    shapes: dict[nn.Module, list[int]] = {}

    def note(module: nn.Module, arguments: Any) -> None:
        shapes[module] = list(arguments[0].shape)

    names = {module: name for name, module in network.named_modules() if _is_plain(module)}
    hooks = [module.register_forward_pre_hook(note) for module in names]
    try:
        visit_layers(network, images, [], lambda *_: None)
    finally:
        for hook in hooks:
            hook.remove()
    for module, shape in shapes.items():
        assert isinstance(module, nn.Conv2d)
        _replace(network, names[module], LaidOutConv2d(module, shape))


def _is_plain(module: nn.Module) -> bool:
    return (
        _is_convolution(module)
        and type(module).forward is nn.Conv2d.forward
        and not _has_hooks(module)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, module)
