"""Features at every position: against slow loops over positions, for every format that layers have."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from dfkde_sklearn import ScatteringFeatures, TimmFeatures, cache_size, clear_cache
from dfkde_sklearn._document import from_json
from dfkde_sklearn._features.scattering import ROUNDING
from dfkde_sklearn._features.wavelets import morlet_filters


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)


def tiny(**parameters):
    return TimmFeatures(
        **{"backbone": "test_resnet", "pretrained": False, "random_state": 0, "image_size": 64, "pooling": None}
        | parameters
    )


def slow_means(of_layer):
    """Return the mean over 3 x 3 positions, of maps (C, h, w), by a loop."""
    _, height, width = of_layer.shape
    means = np.empty_like(of_layer)
    for i in range(height):
        for j in range(width):
            window = of_layer[:, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]
            means[:, i, j] = window.mean((1, 2))
    return means


def slow_bilinear(of_layer, grid):
    """Return maps (C, h, w) at the centres of the cells of another grid, by a loop."""
    _, height, width = of_layer.shape
    result = np.empty((len(of_layer), *grid))
    for i in range(grid[0]):
        for j in range(grid[1]):
            y = np.clip((i + 0.5) * height / grid[0] - 0.5, 0, height - 1)
            x = np.clip((j + 0.5) * width / grid[1] - 0.5, 0, width - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            above = of_layer[:, top, left] * (1 - (x - left)) + of_layer[:, top, right] * (x - left)
            below = of_layer[:, bottom, left] * (1 - (x - left)) + of_layer[:, bottom, right] * (x - left)
            result[:, i, j] = above * (1 - (y - top)) + below * (y - top)
    return result


def outputs_of(network, layers, batch):
    """Return what the layers of a network give for a batch."""
    outputs = {}
    modules = dict(network.named_modules())
    hooks = [
        modules[layer].register_forward_hook(lambda _, __, output, layer=layer: outputs.update({layer: output.clone()}))
        for layer in layers
    ]
    with torch.inference_mode():
        network.eval()(batch)
    for hook in hooks:
        hook.remove()
    return [outputs[layer].double().numpy() for layer in layers]


@pytest.mark.parametrize("layers", [["layer2", "layer3"], ["layer3", "layer1"], ["layer2"]])
def test_they_are_local_means_on_the_coarsest_grid(layers, images):
    network = timm.create_model("test_resnet", num_classes=0)
    features = tiny(backbone=network, layers=layers).fit(images)
    actual = features.transform(images)
    outputs = outputs_of(network, layers, torch.stack([features.image_transform()(Image.fromarray(x)) for x in images]))
    grid = min((of_layer.shape[2:] for of_layer in outputs), key=np.prod)
    assert features.grid_shape_ == grid
    assert actual.dtype == np.float32
    for i in range(len(images)):
        expected = np.concatenate([slow_bilinear(slow_means(of_layer[i]), grid) for of_layer in outputs])
        np.testing.assert_allclose(actual[i], expected.transpose(1, 2, 0), rtol=1e-4, atol=1e-5)


class _Outputs(nn.Module):
    """A network whose one layer returns a given format: its maps (n, 6, 4, 4) are 16 x 16 blocks of the image."""

    num_prefix_tokens = 2

    def __init__(self, axes):
        super().__init__()
        self.axes = axes
        self.blocks = nn.Conv2d(3, 6, 16, stride=16)
        self.layer = nn.Identity()
        self.head = nn.Linear(6, 5)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, x):
        maps = self.blocks(x)
        tokens = maps.flatten(2).transpose(1, 2)
        prefix = torch.full_like(tokens[:, :2], 1e6)
        output = {
            "NCHW": maps,
            "NHWC": maps.permute(0, 2, 3, 1),
            "NLC": torch.cat([prefix, tokens], 1),
            "NCL": torch.cat([prefix, tokens], 1).transpose(1, 2),
        }[self.axes]
        output = self.layer(output)
        return self.head(output.movedim(1 if self.axes in ("NCHW", "NCL") else -1, -1).flatten(1, -2).mean(1))


@pytest.mark.parametrize("axes", ["NHWC", "NLC", "NCL"])
def test_every_format_gives_the_same_positions(axes, images):
    tall = np.concatenate([images, images[:, :32]], axis=1)  # 96 x 64: a grid of 6 x 4
    expected = TimmFeatures(_Outputs("NCHW"), layers=["layer"], pooling=None, image_size=(96, 64)).fit_transform(tall)
    features = TimmFeatures(_Outputs(axes), layers=["layer"], pooling=None, image_size=(96, 64))
    actual = features.fit_transform(tall)
    assert features.layer_formats_ == [axes]
    assert features.layer_prefix_tokens_ == [0 if "H" in axes else 2]
    assert actual.shape == (5, 6, 4, 6)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "size", "layers", "shape"),
    [
        ("test_resnet", 64, ["layer2", "layer3"], (4, 4, 48 + 192)),
        ("mobilenetv2_050", 64, ["blocks.2", "blocks.4"], (4, 4, 16 + 48)),
        ("vit_tiny_patch16_224", 224, ["blocks.5", "blocks.8"], (14, 14, 2 * 192)),
    ],
)
def test_the_default_layers_are_in_the_middle(name, size, layers, shape, images):
    features = tiny(backbone=name, image_size=size).fit(images[:1])
    assert features.layers_ == layers
    assert features.transform(images[:1]).shape[1:] == shape
    assert features.n_features_out_ == np.prod(shape)


def test_the_embedding_of_a_network_that_names_no_stages_is_no_default(images):
    with pytest.raises(ValueError, match=r"does not state any.*Name layers"):
        TimmFeatures(_Outputs("NCHW"), pooling=None, image_size=64).fit(images)


def test_a_layer_without_positions_is_named(images):
    with pytest.raises(ValueError, match=r"layers=\['global_pool'\].*has no positions on a grid"):
        tiny(layers=["layer2", "global_pool"]).fit(images)


def test_a_module_refuses_images_of_another_size(images):
    module = tiny().fit(images).as_module()
    with pytest.raises(ValueError, match=r"96 x 64 pixels; features at positions were fitted on 64 x 64"):
        module(torch.zeros(2, 3, 96, 64))


def test_the_module_and_its_trace_give_the_same(images):
    features = tiny().fit(images)
    module = features.as_module()
    batch = module.read_images(images)
    expected = features.transform(images)
    np.testing.assert_allclose(module(batch), expected, rtol=1e-5, atol=1e-6)
    program = torch.export.export(module, (batch,), dynamic_shapes=({0: torch.export.Dim("n", min=1)},))
    np.testing.assert_allclose(program.module()(batch[:3]), expected[:3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("build", [tiny, lambda: ScatteringFeatures(pooling=None, image_size=64)])
def test_flipped_images_are_described_as_they_are(build, axes, images):
    features = build().fit(images)
    flipped = np.flip(images, [axis + 1 for axis in axes])
    np.testing.assert_allclose(
        features.transform_flipped(images, axes), features.transform(flipped), rtol=1e-4, atol=1e-4
    )


def test_flipped_images_have_their_own_place_in_the_cache(images, tmp_path):
    features = ScatteringFeatures(pooling=None, image_size=64, cache=tmp_path).fit(images)
    features.transform(images)
    flipped = features.transform_flipped(images, (1,))
    assert cache_size(tmp_path).n_rows == 10
    np.testing.assert_array_equal(features.transform_flipped(images, (1,)), flipped)
    assert cache_size(tmp_path).n_rows == 10


def test_the_cache_holds_positions_in_float32_or_float16(images, monkeypatch):
    clear_cache()
    plain = tiny().fit_transform(images)
    full = tiny(cache=True).fit_transform(images)
    size = cache_size().n_bytes
    clear_cache()
    half = tiny(cache=True, cache_dtype="float16").fit(images)
    first = half.transform(images)
    assert cache_size().n_bytes < 0.55 * size
    monkeypatch.setattr(TimmFeatures, "_computed", lambda *_: pytest.fail("not read from the cache"))
    second = half.transform(images)
    clear_cache()
    np.testing.assert_array_equal(full, plain)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, plain.astype(np.float16).astype(np.float32))


def test_an_odd_number_of_features_fits_into_float16(images, tmp_path):
    rows = ScatteringFeatures(scales=1, orientations=1, image_size=32, cache=tmp_path, cache_dtype="float16")
    first = rows.fit_transform(images)
    assert first.shape == (5, 3)
    np.testing.assert_array_equal(rows.transform(images), first)


def test_features_too_large_for_float16_are_refused(images):
    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 2, 16, stride=16)
            self.layer.bias.data[:] = 1e5

        def forward(self, x):
            return self.layer(x).mean((2, 3))

    features = TimmFeatures(Large(), layers="layer", pooling=None, image_size=64, cache=True, cache_dtype="float16")
    with pytest.raises(ValueError, match=r"images\[0\]: a feature of magnitude .* is too large for cache_dtype"):
        features.fit_transform(images)


def test_names_of_features_name_their_position(images):
    features = tiny().fit(images)
    names = features.get_feature_names_out()
    assert len(names) == features.n_features_out_
    flat = features.transform(images).reshape(5, -1)
    assert flat.shape[1] == len(names)
    assert names[np.ravel_multi_index((1, 3, 48), (4, 4, 240))] == "layer3_0_at_1_3"
    waves = ScatteringFeatures(pooling=None, scales=2, orientations=2, image_size=32).fit(images)
    assert waves.get_feature_names_out()[-1] == "order1_scale1_orientation1_at_15_15"


def test_wavelets_at_positions_are_means_of_filtered_images(images):
    features = ScatteringFeatures(pooling=None, scales=2, orientations=3, image_size=32).fit(images)
    actual = features.transform(images)
    assert actual.shape == (5, 16, 16, 6)
    grey = features.image_transform()(Image.fromarray(images[0])).double().numpy()
    framed = np.pad(grey, 4, mode="reflect")
    filters = morlet_filters(40, 2, 3)
    for j in range(2):
        for k in range(3):
            modulus = np.abs(np.fft.ifft2(np.fft.fft2(framed) * filters[j, k]))[4:-4, 4:-4]
            cells = modulus.reshape(16, 2, 16, 2).mean((1, 3))
            gain = np.sqrt((filters[j, k] ** 2).mean())
            expected = np.log1p(cells / (ROUNDING * gain))
            # The maps are sampled more coarsely than the image.
            assert np.abs(actual[0, :, :, 3 * j + k] - expected).mean() < 0.03 * expected.mean()
            assert np.corrcoef(actual[0, :, :, 3 * j + k].ravel(), expected.ravel())[0, 1] > 0.9


def test_a_saved_document_keeps_the_positions(images):
    for fitted in (tiny().fit(images), ScatteringFeatures(pooling=None, image_size=64).fit(images)):
        again = type(fitted).from_document(from_json(json.dumps(fitted.document())))
        assert again.grid_shape_ == fitted.grid_shape_
        np.testing.assert_array_equal(again.transform(images), fitted.transform(images))
