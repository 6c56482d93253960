"""Networks that compute the same faster, against the networks themselves."""

import copy
import warnings

import numpy as np
import pytest
import timm
import torch
from torch import nn

from dfkde_sklearn import TimmFeatures
from dfkde_sklearn._features.backbones import MAX_DIFFERENCE, Backbone, named_backbone
from dfkde_sklearn._features.layers import visit_layers
from dfkde_sklearn._features.optimized import FoldedBatchNorm, LaidOutConv2d, difference, optimize

SIZE = (64, 64)
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 48, 56, 3), np.uint8)


def network(name, seed=0):
    torch.manual_seed(seed)
    return with_statistics(timm.create_model(name, num_classes=0).eval().requires_grad_(False))


def with_statistics(found):
    """Give each batch norm statistics and parameters that are not those of a new one."""
    generator = torch.Generator().manual_seed(1)
    for module in found.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            if module.affine:
                module.weight.data.uniform_(0.5, 1.5, generator=generator)
                module.bias.data.normal_(0, 0.1, generator=generator)
    return found


def outputs(of, images, layers):
    found = {}
    visit_layers(of, images, layers, lambda layer, output: found.__setitem__(layer, output.clone()))
    return found


@pytest.mark.parametrize(
    "name",
    # Plain batch norms; with activations in them; with convolutions of TensorFlow's padding; before the convolutions.
    ["resnet18", "mobilenetv2_100", "tf_efficientnet_b0", "densenet121", "test_resnet", "regnety_002"],
)
def test_an_optimised_network_computes_the_same(name):
    plain = network(name)
    fast = copy.deepcopy(plain)
    changed = optimize(fast, SIZE)
    assert changed
    assert any(isinstance(module, LaidOutConv2d) for module in fast.modules())
    assert [name for name, _ in plain.named_modules() if name not in dict(fast.named_modules())] == []
    for size, n in [(SIZE, 3), ((96, 64), 1)]:  # also of a size that weights are not laid out for
        images = torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(2))
        expected, found = outputs(plain, images, [])[""], outputs(fast, images, [])[""]
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_every_layer_is_the_same_but_the_convolutions_that_are_named():
    plain = network("test_efficientnet")
    fast = copy.deepcopy(plain)
    changed = optimize(fast, SIZE)
    images = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(2))
    calls = [name for name, module in plain.named_modules() if name and not isinstance(module, nn.Identity)]
    expected, found = outputs(plain, images, calls), outputs(fast, images, calls)
    differing = {
        name
        for name in expected
        if not torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-5 * float(expected[name].abs().max()))
    }
    assert differing == changed
    assert {type(plain.get_submodule(name)) for name in changed} == {nn.Conv2d}


def test_batch_norms_without_parameters_and_convolutions_with_bias_are_folded():
    torch.manual_seed(0)
    plain = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU()).eval())
    fast = copy.deepcopy(plain)
    assert optimize(fast, SIZE) == {"0"}
    assert isinstance(fast[1], FoldedBatchNorm)
    assert difference(plain, fast, SIZE, []) < 1e-6


class Reused(nn.Module):
    """A convolution that is called twice, one whose output is changed in place, and one that is used before and after
    its batch norm."""

    def __init__(self, which):
        super().__init__()
        self.which = which
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        if self.which == "twice":
            return self.bn(self.conv(y))
        if self.which == "in place":
            return self.bn(y.relu_())
        return y + self.bn(y)


@pytest.mark.parametrize("which", ["twice", "in place"])
def test_what_looks_like_a_pair_but_is_none_is_left_alone(which):
    plain = with_statistics(Reused(which).eval())
    before = copy.deepcopy(plain.state_dict())
    assert optimize(plain, SIZE) == frozenset()
    assert all(torch.equal(before[name], value) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("change", ["hook", "parametrized", "standardized"])
def test_convolutions_whose_weight_is_not_a_plain_parameter_are_left_alone(change):
    found = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval())
    if change == "hook":
        found[0].register_forward_pre_hook(lambda *_: None)
    elif change == "parametrized":
        nn.utils.parametrizations.weight_norm(found[0])
    else:
        found[0] = timm.layers.StdConv2d(3, 4, 3)
    assert optimize(found.requires_grad_(False), SIZE) == frozenset()


def test_networks_without_batch_norm_are_not_changed():
    found = network("test_vit", 0)
    images = torch.zeros(1, 3, 160, 160)
    expected = outputs(found, images, [])[""]
    assert optimize(found, (160, 160)) == frozenset()
    assert torch.equal(outputs(found, images, [])[""], expected)


def backbone_of(found):
    backbone = Backbone(found)
    backbone.may_optimize()
    return backbone


def test_a_copy_that_computes_something_else_is_not_used_and_named():
    backbone = backbone_of(with_statistics(Reused("before and after").eval()))
    with pytest.warns(UserWarning, match=r"backbone 'odd' runs as it is: a faster copy.*differs by"):
        found = backbone.for_layers([], SIZE, "odd")
    assert found is backbone.network
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backbone.for_layers([], SIZE, "odd") is backbone.network  # said once


def test_a_copy_that_fails_is_not_used_and_named():
    class Particular(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(self.conv(x)) * self.bn.eps

    backbone = backbone_of(Particular().eval())
    with pytest.warns(UserWarning, match=r"fails: AttributeError.*eps"):
        assert backbone.for_layers([], SIZE, "particular") is backbone.network


def test_the_network_itself_is_used_where_a_folded_convolution_is_a_layer():
    backbone = backbone_of(network("test_resnet"))
    assert backbone.for_layers(["layer1"], SIZE, "r") is not backbone.network
    assert backbone.for_layers(["layer1", "conv1.0"], SIZE, "r") is backbone.network


def test_other_dtypes_and_autocast_use_the_network_itself():
    double = backbone_of(network("test_resnet").double())
    assert double.for_layers([], SIZE, "r") is double.network
    single = backbone_of(network("test_resnet"))
    with torch.autocast("cpu", torch.bfloat16):
        assert single.for_layers([], SIZE, "r") is single.network


@pytest.mark.parametrize(
    "parameters", [{}, {"layers": ["layer2", "layer3"]}, {"pooling": None}, {"layers": ["conv1.0"]}]
)
def test_features_of_a_named_network_are_those_of_its_module(parameters):
    by_name = TimmFeatures("test_resnet", pretrained=False, random_state=0, image_size=64, **parameters)
    found = by_name.fit_transform(IMAGES)
    lent = named_backbone(by_name.backbone_name_, False, None, by_name.seed_, (64, 64), torch.device("cpu"), False)
    assert lent.for_layers([], (64, 64), "r") is not lent.network
    expected = TimmFeatures(copy.deepcopy(lent.network), image_size=64, **parameters).fit_transform(IMAGES)
    np.testing.assert_allclose(found, expected, rtol=0, atol=MAX_DIFFERENCE / 10 * np.abs(expected).max())
