"""Images to features: against timm by hand, and what a user may rely on."""

import copy
import io
import json
import pickle
import socket
import threading
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.file_download
import joblib
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image, ImageOps
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KernelDensity
from sklearn.pipeline import make_pipeline
from sklearn.utils import estimator_checks
from timm.data import create_transform, resolve_model_data_config
from timm.models.mlp_mixer import MlpMixer
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from dfkde_sklearn._features import backbones
from dfkde_sklearn._features.network import TimmFeatures
from dfkde_sklearn._images import as_images

REAL_WEIGHTS = Path(__file__).parents[3] / "shared" / "weights" / "mobilenetv2_100_same.safetensors"


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 40, 56, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _nothing_loaded_before():
    backbones._loaded.clear()


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tiny networks spend their time on waking threads."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def tiny(backbone="test_resnet", **parameters):
    """Return features of a tiny network with random weights on the CPU."""
    parameters = {"pretrained": False, "random_state": 0, "device": "cpu"} | parameters
    return TimmFeatures(backbone, **parameters)


def seeded(build, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().eval()


def timm_inputs(network, images, crop="squash", **config):
    """Return what timm's own transform makes of the images."""
    config["crop_mode"] = crop
    if crop != "center":
        config["crop_pct"] = 1.0
    transform = create_transform(**resolve_model_data_config(network, args=config), is_training=False)
    return torch.stack([transform(Image.fromarray(image)) for image in images])


def hooked(network, layer, batch):
    """Return the output of a layer in a forward pass to the end."""
    outputs = []
    hook = network.get_submodule(layer).register_forward_hook(lambda *call: outputs.append(call[2].clone()))
    with torch.no_grad():
        network(batch)
    hook.remove()
    return outputs[0]


# Preprocessing


class Input(nn.Module):
    """A backbone whose features are the pixels that it sees."""

    def __init__(self, **pretrained_cfg):
        super().__init__()
        if pretrained_cfg:
            self.pretrained_cfg = pretrained_cfg

    def forward(self, batch):
        return batch.flatten(1)


@pytest.mark.parametrize("crop", ["squash", "center", "border"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {
            "input_size": (3, 24, 24),
            "mean": (0.5, 0.4, 0.3),
            "std": (0.2, 0.3, 0.4),
            "interpolation": "bilinear",
        },
        {"input_size": (3, 32, 32), "crop_pct": 0.8, "crop_mode": "squash", "interpolation": "nearest"},
        {
            "input_size": (3, 30, 30),
            "crop_pct": 0.9,
            "crop_mode": "border",
            "mean": (0,) * 3,
            "std": (1,) * 3,
        },
    ],
)
def test_network_sees_exactly_what_timm_s_transform_makes_of_the_image(config, crop, images):
    network = Input(**config)
    expected = timm_inputs(network, images, crop).flatten(1)
    np.testing.assert_array_equal(tiny(network, crop=crop).fit_transform(images), expected)
    of_pictures = tiny(network, crop=crop).fit_transform([Image.fromarray(i) for i in images])
    np.testing.assert_array_equal(of_pictures, expected)


def test_images_are_squashed_by_default():
    # Left half black, right half white, twice as wide as high: each half fills one half of what the network sees.
    image = np.zeros((1, 40, 80), np.uint8)
    image[..., 40:] = 255
    network = Input(input_size=(3, 8, 8), crop_pct=0.5, mean=(0,) * 3, std=(1,) * 3, interpolation="nearest")
    features = tiny(network)
    seen = features.fit_transform(image).reshape(3, 8, 8)
    assert (seen[..., :4] == 0).all()
    assert (seen[..., 4:] == 1).all()
    assert (features.crop_mode_, features.crop_pct_) == ("squash", 1.0)


def test_center_loses_the_edges_and_border_fills_what_is_missing():
    image = np.full((1, 40, 80), 255, np.uint8)
    image[..., :10] = 0
    network = Input(input_size=(3, 8, 8), crop_pct=1.0, mean=(0.2,) * 3, std=(1,) * 3, interpolation="nearest")
    center = tiny(network, crop="center").fit(image)
    np.testing.assert_allclose(center.transform(image), 0.8, atol=1e-6)
    assert (center.crop_mode_, center.crop_pct_) == ("center", 1.0)
    bordered = tiny(network, crop="border").fit_transform(image).reshape(3, 8, 8)
    np.testing.assert_allclose(bordered[:, [0, 1, 6, 7]], 0, atol=1e-6)  # filled with the mean
    np.testing.assert_allclose(bordered[:, 2:6, 0], -0.2, atol=1e-6)
    np.testing.assert_allclose(bordered[:, 2:6, 2:], 0.8, atol=1e-6)


@pytest.mark.parametrize("image_size", [20, (20, 20), (16, 24), [16, 24]])
def test_image_size_overrides_the_backbone_s_own(image_size, images):
    size = (20, 20) if image_size in (20, (20, 20)) else (16, 24)
    network = Input(input_size=(3, 40, 40))
    features = tiny(network, image_size=image_size).fit(images)
    assert features.input_size_ == size
    expected = timm_inputs(network, images, input_size=(3, *size)).flatten(1)
    np.testing.assert_array_equal(features.transform(images), expected)


@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("input_size", [(3, 24, 24), (3, 20, 28)])
def test_elongated_images_are_seen_as_timm_sees_them(input_size, interpolation, crop_pct):
    network = Input(input_size=input_size, interpolation=interpolation, crop_pct=crop_pct)
    rng = np.random.default_rng(0)
    for shape in [(7, 900), (1200, 5), (1, 700), (2000, 1), (31, 999)]:
        images = rng.integers(0, 256, (1, *shape, 3), dtype=np.uint8)
        expected = timm_inputs(network, images, "center").flatten(1)
        grey_level = float(1 / (255 * min(network.pretrained_cfg.get("std", (0.224,)))))
        seen = tiny(network, crop="center").fit_transform([Image.fromarray(images[0])])
        assert np.abs(seen - expected.numpy()).max() <= 1.01 * grey_level


@pytest.mark.parametrize("crop", ["center", "border", "squash"])
@pytest.mark.parametrize("shape", [(1, 60_000), (5000, 1)])
def test_an_image_of_few_bytes_takes_little_memory(crop, shape):
    features = tiny(Input(input_size=(3, 224, 224)), crop=crop).fit(np.zeros((1, 9, 9), np.uint8))
    read = features.image_transform()
    sizes = []
    resize = Image.Image.resize

    def noted(picture, size, *args, **kwargs):
        sizes.append(size[0] * size[1])
        return resize(picture, size, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", noted)
        assert read(Image.new("RGB", shape[::-1], "white")).shape == (3, 224, 224)
    assert max(sizes) <= 16 * 256**2


# Large images


@pytest.fixture
def photograph():
    """Smooth, of 900 x 700 pixels."""
    y, x = np.mgrid[:700, :900]
    levels = 128 + 60 * np.sin(x / 40) + 50 * np.cos(y / 25 + x / 90)
    return Image.fromarray(np.stack([levels, levels[::-1], levels[:, ::-1]], -1).astype(np.uint8))


def encoded(picture, form, **settings):
    file = io.BytesIO()
    picture.save(file, form, **settings)
    return file.getvalue()


def input_of(picture, **parameters):
    """Return what a network of 100 x 80 pixels gets of a picture."""
    features = tiny(Input(input_size=(3, 80, 100)), **parameters).fit(np.zeros((1, 9, 9), np.uint8))
    (rows,) = features.transform([picture])
    return rows


@pytest.mark.parametrize("size", [(800, 640), (907, 641)])
@pytest.mark.parametrize("gap", [1, 2, 4])
def test_large_images_are_resized_by_way_of_an_integer_fraction(photograph, gap, size):
    picture = photograph.resize(size)
    expected = picture.resize((100, 80), Image.Resampling.BICUBIC, reducing_gap=gap)
    for image in (picture, encoded(picture, "PNG"), np.asarray(picture).astype(np.uint16) * 257):
        np.testing.assert_array_equal(input_of(image, reducing_gap=gap), input_of(expected))


@pytest.mark.parametrize(("gap", "divisor"), [(1, 8), (1.1, 4), (2, 4), (3, 2), (4.1, 1)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_the_decoder_of_jpeg_divides_by_itself(photograph, gap, divisor, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = photograph.resize((800, 640))
    data = encoded(upright if orientation == 1 else upright.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif)
    with Image.open(io.BytesIO(data)) as picture:
        picture.draft(None, (picture.width // divisor, picture.height // divisor))
        decoded = np.asarray(ImageOps.exif_transpose(picture))
    assert decoded.shape[:2] == (640 // divisor, 800 // divisor)
    np.testing.assert_array_equal(input_of(data, reducing_gap=gap), input_of(decoded, reducing_gap=gap))


def test_jpeg_is_divided_only_where_no_rest_is_left(photograph):
    for size, divisor in {(800, 640): 8, (804, 640): 4, (800, 642): 2, (801, 640): 1}.items():
        data = encoded(photograph.resize(size), "JPEG")
        read = as_images([data]).picture(0, lambda *_: 8.0)
        assert read.size == (size[0] // divisor, size[1] // divisor)
        assert as_images([data])[0].size == size


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("crop", ["squash", "center", "border"])
@pytest.mark.parametrize("size", [(800, 640), (907, 641)])
def test_what_a_reduced_image_shows_is_the_same_to_a_few_grey_levels(photograph, form, crop, size):
    data = encoded(photograph.resize(size), form)
    grey_level = 1 / 255 / 0.224
    expected = input_of(data, crop=crop)
    differences = [np.abs(input_of(data, crop=crop, reducing_gap=gap) - expected).max() / grey_level for gap in (1, 2)]
    assert 0 < differences[0] < 6
    assert differences[1] < 3


def test_a_module_reads_reduced_images_as_its_extractor_does(photograph):
    features = tiny(image_size=80, reducing_gap=2).fit(np.zeros((1, 9, 9), np.uint8))
    data = [encoded(photograph.resize((800, 640)), "JPEG")]
    module = features.as_module()
    rows = module(module.read_images(data)).numpy()
    np.testing.assert_allclose(rows, features.transform(data), rtol=1e-5, atol=1e-6)
    assert np.abs(rows - tiny(image_size=80).fit_transform(data)).max() > 1e-5


@pytest.mark.parametrize("crop", ["squash", "center", "border"])
@pytest.mark.parametrize("size", [(30, 30), (199, 159)])
def test_images_that_are_not_large_are_as_before(size, crop):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
    for image in (picture, encoded(picture, "JPEG")):
        expected = input_of(image, crop=crop)
        np.testing.assert_array_equal(input_of(image, crop=crop, reducing_gap=1), expected)


@pytest.mark.parametrize("crop", ["squash", "center", "border"])
@pytest.mark.parametrize("size", [(8, 4000), (4000, 8), (60_000, 1)])
def test_thin_images_are_seen_as_without_a_gap(size, crop):
    data = encoded(Image.new("RGB", size, "orange"), "JPEG")
    expected = input_of(data, crop=crop)
    np.testing.assert_allclose(input_of(data, crop=crop, reducing_gap=1), expected, atol=1.01 / 255 / 0.224)


def test_a_reducing_gap_below_one_is_refused(photograph):
    with pytest.raises(ValueError, match="'reducing_gap' parameter"):
        input_of(photograph, reducing_gap=0.5)


def test_16_bit_images_have_the_features_of_8_bit_ones_given_the_white_level(images):
    expected = tiny(Input()).fit_transform(images)
    deep = np.round(images / 255 * 1023).astype(np.uint16)
    told = tiny(Input(), white_level=1023)
    np.testing.assert_array_equal(told.fit_transform(deep), expected)
    np.testing.assert_array_equal(told.transform(list(deep)), expected)
    with pytest.warns(UserWarning, match="5 of 256 .*white_level=1023"):
        tiny(Input()).fit_transform(deep)


def test_paths_arrays_and_tensors_have_the_same_features(images, tmp_path):
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    expected = tiny().fit_transform(images)
    for X in (
        tmp_path,
        sorted(tmp_path.iterdir()),
        torch.from_numpy(images).permute(0, 3, 1, 2),
        list(images),
    ):
        np.testing.assert_array_equal(tiny().fit_transform(X), expected)


# Layers against timm by hand


@pytest.mark.parametrize(
    "name",
    ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_nfnet", "test_byobnet"],
)
def test_pooled_embedding_is_the_output_of_timm_s_model_without_classifier(name, images):
    features = tiny(name).fit(images)
    network = seeded(lambda: timm.create_model(name, num_classes=0), features.seed_)
    with torch.no_grad():
        expected = network(timm_inputs(network, images))
    np.testing.assert_allclose(features.transform(images), expected, rtol=1e-4, atol=1e-5)
    assert features.layers_ == []
    assert features.n_features_out_ == network.num_features


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
def test_classifier_of_a_module_is_left_out(name, images):
    network = seeded(lambda: timm.create_model(name, num_classes=7))
    with torch.no_grad():
        batch = timm_inputs(network, images)
        expected = network.forward_head(network.forward_features(batch), pre_logits=True)
        assert network(batch).shape == (5, 7)
    np.testing.assert_allclose(tiny(network).fit_transform(images), expected, rtol=1e-4, atol=1e-5)


def tokens_without_class(output):
    return output[:, 1:].transpose(1, 2)


def tokens(output):
    return output.transpose(1, 2)


def channels_first(output):
    return output.flatten(2)


def channels_last(output):
    return output.flatten(1, 2).transpose(1, 2)


def vit():
    return VisionTransformer(img_size=64, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=0)


def swin():
    return SwinTransformer(
        img_size=64, patch_size=4, embed_dim=24, depths=(1, 1), num_heads=(2, 2), window_size=4, num_classes=0
    )


def mixer(embed_dim=24):
    return MlpMixer(img_size=32, patch_size=8, num_blocks=2, embed_dim=embed_dim, num_classes=0)


@pytest.mark.parametrize(
    ("build", "layer", "positions"),
    [
        ("test_resnet", "layer1", channels_first),
        ("test_resnet", "layer3.0.conv1", channels_first),
        ("test_efficientnet", "blocks.2", channels_first),
        ("test_nfnet", "stages.1", channels_first),
        ("test_byobnet", "stages.1", channels_first),
        ("test_convnext", "stages.1", channels_first),
        ("test_convnext", "stages.1.blocks.0.mlp", channels_last),
        ("test_mambaout", "stages.1", channels_last),
        ("test_vit", "blocks.1", tokens_without_class),
        ("test_vit", "norm", tokens_without_class),
        ("test_vit", "blocks.0.attn.qkv", tokens_without_class),
        (vit, "blocks.1", tokens_without_class),
        (vit, "patch_embed", tokens),
        (swin, "layers.0", channels_last),
        (swin, "layers.1.blocks.0.mlp", tokens),
        (swin, "patch_embed.proj", channels_first),
        (mixer, "blocks.1", tokens),
        (mixer, "blocks.0.mlp_tokens", channels_first),
    ],
)
@pytest.mark.parametrize("pooling", ["avg", "max", "gem"])
def test_layer_is_pooled_over_its_positions(build, layer, positions, pooling, images):
    if isinstance(build, str):
        features = tiny(build, layers=layer, pooling=pooling, image_size=64).fit(images)
        kwargs = {"img_size": 64} if "vit" in build else {}
        network = seeded(lambda: timm.create_model(build, num_classes=0, **kwargs), features.seed_)
    else:
        network = seeded(build)
        size = 32 if build is mixer else 64
        features = tiny(network, layers=layer, pooling=pooling, image_size=size).fit(images)
    output = hooked(network, layer, timm_inputs(network, images, input_size=(3, *features.input_size_)))
    values = positions(output).double().numpy()  # (n, C, positions)
    expected = {
        "avg": values.mean(-1),
        "max": values.max(-1),
        "gem": np.cbrt((np.maximum(values, 1e-6) ** 3).mean(-1)),
    }[pooling]
    np.testing.assert_allclose(features.transform(images), expected, rtol=1e-4, atol=1e-5)


def test_resnet_layers_by_hand(images):
    features = tiny(layers=["layer1", "layer2"]).fit(images)
    network = seeded(lambda: timm.create_model("test_resnet", num_classes=0), features.seed_)
    with torch.no_grad():
        x = network.maxpool(network.act1(network.bn1(network.conv1(timm_inputs(network, images)))))
        first = network.layer1(x)
        expected = torch.cat([first.mean((2, 3)), network.layer2(first).mean((2, 3))], dim=1)
    np.testing.assert_allclose(features.transform(images), expected, rtol=1e-4, atol=1e-5)


def test_layers_are_concatenated_in_the_order_asked_for(images):
    layers = ["layer3", "layer1", "layer2.0.conv1"]
    features = tiny(layers=layers).fit(images)
    single = [tiny(layers=layer).fit_transform(images) for layer in layers]
    np.testing.assert_allclose(features.transform(images), np.hstack(single), rtol=1e-5, atol=1e-6)
    assert features.layer_widths_ == [len(part[0]) for part in single]
    names = features.get_feature_names_out()
    assert len(names) == features.n_features_out_ == sum(features.layer_widths_)
    assert (names[0], names[features.layer_widths_[0]], names[-1]) == (
        "layer3_0",
        "layer1_0",
        f"layer2.0.conv1_{features.layer_widths_[2] - 1}",
    )
    assert tiny().fit(images).get_feature_names_out()[1] == "embedding_1"


class Transformer(nn.Module):
    """A vision transformer of one's own: `n_prefix` tokens, patches, blocks; of any size, or of one."""

    def __init__(self, n_prefix=1, kernel=8, stride=8, fixed=None, convolved=True, width=24):
        super().__init__()
        self.patches = nn.Conv2d(3, width, kernel, stride) if convolved else nn.Unfold(kernel, stride=stride)
        self.embedding = nn.Identity() if convolved else nn.Linear(3 * kernel**2, width)
        self.tokens = nn.Parameter(torch.randn(1, n_prefix, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 32, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.turned = nn.Identity()
        self.fixed = fixed

    def forward(self, batch):
        if self.fixed is not None and tuple(batch.shape[2:]) != self.fixed:
            raise ValueError(f"Input image size {tuple(batch.shape[2:])} doesn't match model {self.fixed}.")
        tokens = self.embedding(self.patches(batch).flatten(2).transpose(1, 2))
        tokens = torch.cat([self.tokens.expand(len(batch), -1, -1), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        self.turned(tokens.mT)
        return tokens[:, 0]


class Wrapped(nn.Module):
    """Knows nothing of the tokens of what it wraps."""

    def __init__(self, network):
        super().__init__()
        self.inner = network

    def forward(self, batch):
        return self.inner(batch)


def torchvision_vit():
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=64, patch_size=8, num_layers=2, num_heads=2, hidden_dim=24, mlp_dim=32, num_classes=3
    )


@pytest.mark.parametrize(
    ("build", "layer", "size", "n_prefix"),
    [
        (lambda: Transformer(5), "blocks.1", (64, 64), 5),  # as torch.hub's DINOv2 with registers
        (lambda: Transformer(1), "blocks.1", (64, 96), 1),
        (lambda: Transformer(1), "norm", (40, 56), 1),  # 36 in all, which is a square too
        (lambda: Transformer(5), "turned", (64, 64), 5),
        (lambda: Transformer(2, fixed=(64, 64)), "blocks.0", (64, 64), 2),  # as a distilled one of Hugging Face
        (lambda: Transformer(1, fixed=(64, 64)), "norm", (64, 64), 1),
        (lambda: Transformer(1, fixed=(64, 64)), "turned", (64, 64), 1),
        (lambda: Transformer(0, fixed=(64, 64)), "norm", (64, 64), 0),
        (lambda: Transformer(0), "norm", (64, 64), 0),
        (lambda: Transformer(4, convolved=False), "norm", (64, 64), 4),
        (lambda: Transformer(0, kernel=8, stride=7), "norm", (64, 64), 0),  # 9 rows, and 18 of twice the height
        (lambda: Transformer(0, kernel=16, stride=6), "norm", (64, 64), 0),  # 9 rows, and 19
        (lambda: Transformer(0, kernel=3, stride=5), "norm", (64, 64), 0),  # 13 rows, and 26
        (lambda: Transformer(0, kernel=3, stride=6), "norm", (63, 63), 0),  # 11 rows, and 21
        (lambda: Wrapped(vit()), "inner.blocks.1", (64, 64), 1),
        (torchvision_vit, "encoder.layers.encoder_layer_1", (64, 64), 1),
    ],
)
@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_class_and_register_tokens_are_found_and_left_out(build, layer, size, n_prefix, pooling, images):
    network = seeded(build)
    features = tiny(network, layers=layer, pooling=pooling, image_size=size).fit(images)
    assert features.layer_prefix_tokens_ == [n_prefix]
    output = hooked(network, layer, timm_inputs(network, images, input_size=(3, *size)))
    patches = (output if layer == "turned" else output.mT)[..., n_prefix:]
    expected = patches.mean(-1) if pooling == "avg" else patches.amax(-1)
    np.testing.assert_allclose(features.transform(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Transformer(1, kernel=16, stride=6),  # a class token, and a grid that does not double
        lambda: Transformer(1, convolved=False, fixed=(64, 64)),  # nothing says how many patches there are
    ],
)
def test_class_tokens_that_are_not_certain_are_an_error_unless_their_number_is_stated(build, images):
    network = seeded(build)
    features = tiny(network, layers="norm", image_size=64)
    with pytest.raises(ValueError, match=r"NLC: how many of the \d+ tokens .* set backbone\.num_prefix_tokens"):
        features.fit(images)
    network.num_prefix_tokens = 1
    output = hooked(network, "norm", timm_inputs(network, images, input_size=(3, 64, 64)))
    np.testing.assert_allclose(features.fit_transform(images), output[:, 1:].mean(1), rtol=1e-4, atol=1e-5)


class Permuted(nn.Module):
    """As many channels, rows and columns; channels first, or last."""

    def __init__(self, last):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.layer = nn.Identity()
        self.last = last

    def forward(self, batch):
        maps = self.conv(batch)
        return self.layer(maps.permute(0, 2, 3, 1) if self.last else maps).flatten(1)


@pytest.mark.parametrize("last", [False, True])
def test_axes_are_right_when_there_are_as_many_channels_as_rows(last, images):
    network = seeded(lambda: Permuted(last))
    features = tiny(network, layers=["conv", "layer"], image_size=8).fit(images)
    assert features.layer_formats_ == ["NCHW", "NHWC" if last else "NCHW"]
    conv, layer = np.hsplit(features.transform(images), 2)
    np.testing.assert_allclose(layer, conv, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batch_size_does_not_change_the_features(batch_size, images):
    expected = tiny(layers=["layer1", "layer3"]).fit_transform(images)
    features = tiny(layers=["layer1", "layer3"], batch_size=batch_size).fit_transform(images)
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)
    assert features.dtype == np.float32


class Wide(nn.Module):
    """Notes how many images come at once; its largest activation takes `mib` MiB for an image of 32 x 32."""

    def __init__(self, mib):
        super().__init__()
        self.conv = nn.Conv2d(3, 256 * mib, 1)
        self.head = nn.Linear(256 * mib, 2000, bias=False)  # more bytes, but no activation
        self.seen = {"sizes": []}

    def forward(self, batch):
        self.seen["sizes"].append(len(batch))
        return self.head(self.conv(batch).mean((2, 3)))[:, :5]


@pytest.mark.parametrize(
    ("mib", "batch_size", "sizes"),
    [(1, 32, [5]), (1, 2, [2, 2, 1]), (8, 32, [2, 2, 1]), (8, 3, [2, 1, 2]), (8, 1, [1] * 5), (12, 32, [1] * 5)],
)
def test_on_a_cpu_no_activation_of_several_images_takes_over_20_mib(mib, batch_size, sizes, images):
    network = seeded(lambda: Wide(mib))
    features = tiny(network, batch_size=batch_size, image_size=32).fit(images)
    assert features.activation_bytes_ == mib * 2**20
    network.seen["sizes"].clear()
    found = features.transform(images)
    assert network.seen["sizes"] == sizes
    with torch.no_grad():
        expected = network(timm_inputs(network, images, input_size=(3, 32, 32)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.second = nn.Conv2d(4, 5, 3)
        self.n_passes = 0

    def forward(self, batch):
        maps = self.second(self.first(batch))
        self.n_passes += 1
        return maps.mean((2, 3))


def test_forward_pass_ends_after_the_last_layer_asked_for(images):
    network = Counting()
    features = tiny(network, layers=["second", "first"], image_size=16).fit(images)
    before = network.n_passes
    features.transform(images)
    assert network.n_passes == before


# A user's module


def test_module_is_given_back_as_it_was(images):
    network = timm.create_model("test_resnet", num_classes=0)
    network.train()
    network.layer1.eval()  # frozen in part, as in fine-tuning
    flags = {name: part.training for name, part in network.named_modules()}
    state = copy.deepcopy(network.state_dict())
    tiny(network, layers="layer2").fit_transform(images)
    assert {name: part.training for name, part in network.named_modules()} == flags
    assert all(torch.equal(state[key], values) for key, values in network.state_dict().items())
    assert not any(part._forward_hooks for part in network.modules())
    network(torch.zeros(2, 3, 32, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_module_is_given_back_as_it_was_after_an_error(images):
    network = timm.create_model("test_resnet", num_classes=0).train()
    features = tiny(network, layers="layer2").fit(images)
    with pytest.raises(ValueError, match="the file is not an image"):
        features.transform([Image.fromarray(images[0]), __file__])
    assert network.training
    assert not any(part._forward_hooks for part in network.modules())


def test_module_is_shared_between_clones_and_copied_into_a_pickle(images):
    network = seeded(lambda: timm.create_model("test_resnet", num_classes=0))
    features = tiny(network, layers=["layer1"]).set_output(transform="pandas").fit(images)
    twin = clone(features)
    assert twin.backbone is network
    assert not hasattr(twin, "n_features_out_")
    assert twin.get_params() == features.get_params()
    assert isinstance(twin.fit_transform(images), pd.DataFrame)
    copied = pickle.loads(pickle.dumps(features))
    assert copied.backbone is not network
    pd.testing.assert_frame_equal(copied.transform(images), features.transform(images))


class Caching(nn.Module):
    """Keeps what it computes of its weight in evaluation mode, as timm's LeViT does."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.kept = None

    def train(self, mode=True):
        self.kept = None if mode else self.kept
        return super().train(mode)

    def forward(self, batch):
        if self.training:
            return batch.flatten(1)[:, :2] * self.weight
        self.kept = self.weight * 1 if self.kept is None else self.kept
        return batch.flatten(1)[:, :2] * self.kept


def test_module_in_training_keeps_nothing_that_was_computed_in_evaluation(images):
    network = Caching().train()
    before = tiny(network).fit_transform(images)
    with torch.no_grad():
        network.weight *= 2
    np.testing.assert_array_equal(tiny(network).fit_transform(images), 2 * before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_module_computes_in_its_own_dtype(dtype, images):
    network = seeded(lambda: timm.create_model("test_resnet", num_classes=0))
    expected = tiny(network).fit_transform(images)
    found = tiny(copy.deepcopy(network).to(dtype)).fit_transform(images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0.1, atol=0.05 if dtype == torch.bfloat16 else 1e-5)


def test_non_finite_features_are_an_error_that_names_the_image(images):
    network = Input(mean=(0,) * 3, std=(1,) * 3)
    network.forward = lambda batch: 1 / (batch.flatten(1).amax(1, keepdim=True) - 1) * torch.ones(2)
    X = images // 2
    X[3] = 255
    with pytest.raises(ValueError, match=r"images\[3\]: backbone 'Input' returned NaN or infinite"):
        tiny(network, batch_size=2).fit_transform(X)


@pytest.mark.skipif(not REAL_WEIGHTS.exists(), reason="needs the MobileNetV2 weights, which are no part of the package")
def test_module_of_timm_with_local_weights_needs_no_further_argument(images):
    overlay = {"file": str(REAL_WEIGHTS), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    network = timm.create_model(
        "mobilenetv2_100", pretrained=True, num_classes=0, pad_type="same", pretrained_cfg_overlay=overlay
    ).eval()
    features = TimmFeatures(network).fit(images)
    assert features.mean_ == (0.5, 0.5, 0.5)
    assert features.n_features_out_ == 1280
    with torch.no_grad():
        expected = network(timm_inputs(network, images))
    np.testing.assert_allclose(features.transform(images), expected, rtol=1e-3, atol=1e-4)


# Random weights


def test_random_weights_follow_from_random_state_and_leave_global_generators_alone(images):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = tiny(random_state=3).fit(images)
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)
    backbones._loaded.clear()
    torch.manual_seed(99)
    again, other = tiny(random_state=3).fit(images), tiny(random_state=4).fit(images)
    np.testing.assert_array_equal(first.transform(images), again.transform(images))
    assert first.weights_hash_ == again.weights_hash_ != other.weights_hash_
    assert not np.allclose(first.transform(images), other.transform(images))


def test_loading_leaves_the_global_generator_alone(images, tmp_path):
    file = saved(tmp_path / "weights.safetensors")
    state = torch.get_rng_state()
    tiny(weights=file).fit(images)
    assert torch.equal(torch.get_rng_state(), state)


# Local weights


def saved(file, state=None, *, network="test_resnet", wrap=lambda state: state, **kwargs):
    state = seeded(lambda: timm.create_model(network, **kwargs), 5).state_dict() if state is None else state
    if file.suffix == ".safetensors":
        safetensors.torch.save_file(state, file)
    else:
        torch.save(wrap(state), file)
    return file


def prefixed(prefix, state):
    return {f"{prefix}{key}": values for key, values in state.items()}


@pytest.mark.parametrize(
    ("name", "wrap", "num_classes"),
    [
        ("a.safetensors", None, 0),
        ("a.safetensors", None, 1000),
        ("a.pth", lambda state: state, 3),
        ("a.pt", lambda state: {"state_dict": state, "epoch": 3}, 0),
        ("a.bin", lambda state: {"model": {f"module.{key}": v for key, v in state.items()}}, 0),
        ("a.pt", lambda state: {"model_state_dict": state, "optimizer": {"lr": 0.1}}, 5),
        ("a.pt", lambda state: {"model": {"state_dict": prefixed("encoder.", state)}}, 0),
        ("a.pt", lambda state: prefixed("model.", state), 1000),
        ("a.pt", lambda state: prefixed("backbone.", state) | {"decoder.weight": torch.ones(2)}, 0),
        ("a.pt", lambda state: {"state_dict": prefixed("model._orig_mod.module.backbone.", state)}, 4),
    ],
)
@pytest.mark.parametrize("pretrained", [True, False])
def test_weights_come_from_the_file(name, wrap, num_classes, pretrained, images, tmp_path):
    file = saved(tmp_path / name, wrap=wrap, num_classes=num_classes)
    features = TimmFeatures("test_resnet", weights=file, pretrained=pretrained, device="cpu").fit(images)
    network = seeded(lambda: timm.create_model("test_resnet", num_classes=num_classes), 5)
    network.reset_classifier(0)
    with torch.no_grad():
        expected = network(timm_inputs(network, images))
    np.testing.assert_allclose(features.transform(images), expected, rtol=1e-4, atol=1e-5)
    assert features.seed_ is None


def test_float16_weights_are_computed_with_in_float32(images, tmp_path):
    state = seeded(lambda: timm.create_model("test_resnet", num_classes=0), 5).state_dict()
    state = {key: v.half() if v.is_floating_point() else v for key, v in state.items()}
    state = {key: v for key, v in state.items() if not key.endswith("num_batches_tracked")}
    half = tiny(weights=saved(tmp_path / "half.safetensors", state)).fit(images)
    whole = tiny(weights=saved(tmp_path / "whole.pth", {key: v.float() for key, v in state.items()}))
    np.testing.assert_array_equal(half.transform(images), whole.fit_transform(images))
    assert half.weights_hash_ == whole.weights_hash_


def test_image_size_resamples_position_embeddings_as_timm_does(images, tmp_path):
    file = saved(tmp_path / "vit.safetensors", network="vit_tiny_patch16_224")
    features = tiny("vit_tiny_patch16_224", weights=file, image_size=(64, 96)).fit(images)
    network = timm.create_model(
        "vit_tiny_patch16_224",
        pretrained=True,
        num_classes=0,
        img_size=(64, 96),
        pretrained_cfg_overlay={"file": str(file), "custom_load": False},
    ).eval()
    with torch.no_grad():
        expected = network(timm_inputs(network, images, input_size=(3, 64, 96)))
    np.testing.assert_allclose(features.transform(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("layer1.0.conv1.weight"), "1 missing: layer1.0.conv1.weight"),
        (lambda state: state.update(extra=torch.ones(2)), "1 unexpected: extra"),
        (
            lambda state: state.update({"conv1.0.weight": torch.ones(2, 2)}),
            r"1 of another shape: conv1.0.weight \(2, 2\) for \(\d+, 3, 3, 3\)",
        ),
        (lambda state: state.clear(), r"\d+ missing: bn1.bias, .*, \.\.\."),
        (
            lambda state: prefix_in_place("model.", state).pop("model.layer4.0.conv1.weight"),
            r"without the prefix 'model\.': 1 missing: layer4.0.conv1.weight",
        ),
        (
            lambda state: prefix_in_place("backbone.", state).update({"backbone.extra": torch.ones(2)}),
            r"without the prefix 'backbone\.': 1 unexpected: extra",
        ),
        (lambda state: prefix_in_place("trunk.", state), r"\d+ missing: bn1.bias, "),
    ],
)
def test_weights_that_do_not_fit_are_an_error_that_lists_the_keys(change, message, images, tmp_path):
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    change(state)
    file = saved(tmp_path / "other.pth", dict(state))
    with pytest.raises(ValueError, match=rf"other\.pth' do not fit backbone 'test_resnet\.r160_in1k':? {message}"):
        tiny(weights=file).fit(images)


def prefix_in_place(prefix, state):
    for key in list(state):
        state[prefix + key] = state.pop(key)
    return state


def test_file_that_holds_the_network_twice_is_refused(images, tmp_path):
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    file = saved(tmp_path / "twice.pth", prefixed("encoder.", state) | prefixed("model.encoder.", state))
    with pytest.raises(ValueError, match=r"2 times, under the prefixes 'encoder\.', 'model\.encoder\.'"):
        tiny(weights=file).fit(images)


def without(part):
    return lambda state: {key: values for key, values in state.items() if part not in key}


def model_folder(folder, state, **config):
    """Lay weights and a configuration into a folder as timm does for the hub."""
    folder.mkdir(parents=True, exist_ok=True)
    saved(folder / "model.safetensors", state)
    config = {"architecture": "test_resnet", "pretrained_cfg": {"num_classes": 1000, "classifier": "fc"} | config}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def weights_by(route, state, tmp_path, monkeypatch):
    """Return the name of a backbone whose weights come in by one of the routes."""
    if route == "local-dir":
        return f"local-dir:{model_folder(tmp_path / 'model', state)}"
    name = "someone--something" if route == "hf-hub" else "timm--test_resnet.r160_in1k"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / f"models--{name}"
    model_folder(repository / "snapshots" / "abc", state)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    return "hf-hub:someone/something" if route == "hf-hub" else "test_resnet.r160_in1k"


ROUTES = ["local-dir", "hf-hub", "hub's cache"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("change", [lambda state: state, without("fc."), without("num_batches_tracked")])
def test_weights_are_those_of_the_file_by_every_route(route, change, images, tmp_path, monkeypatch):
    state = seeded(lambda: timm.create_model("test_resnet"), 5).state_dict()
    backbone = weights_by(route, change(state), tmp_path, monkeypatch)
    expected = tiny(weights=saved(tmp_path / "all.pth", state)).fit(images)
    assert TimmFeatures(backbone, device="cpu").fit(images).weights_hash_ == expected.weights_hash_


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: prefixed("model.", state), r"'conv1\.0\.weight' and 74 more are not"),
        (lambda _: timm.create_model("test_vit").state_dict(), r"'conv1\.0\.weight' and 74 more are not"),
        (without("layer4."), r"'layer4\.0\.conv1\.weight' and \d+ more are not"),
        (without("layer2.0.bn1.running_var"), r"'layer2\.0\.bn1\.running_var' is not"),
        (lambda state: state | {"conv1.0.weight": torch.ones(2, 2)}, r"cannot be loaded [\s\S]*conv1\.0\.weight"),
    ],
)
def test_weights_that_the_file_lacks_are_an_error_by_every_route(route, change, message, images, tmp_path, monkeypatch):
    backbone = weights_by(route, change(timm.create_model("test_resnet").state_dict()), tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=rf"^The weights of backbone '{backbone}' .*{message}"):
        TimmFeatures(backbone, device="cpu").fit(images)


def test_names_in_a_model_s_folder_may_have_prefixes_where_the_file_is_named(images, tmp_path):
    state = seeded(lambda: timm.create_model("test_resnet"), 5).state_dict()
    folder = model_folder(tmp_path / "model", prefixed("model.", state))
    found = TimmFeatures(f"local-dir:{folder}", weights=folder / "model.safetensors", device="cpu").fit(images)
    assert found.weights_hash_ == tiny(weights=saved(tmp_path / "all.pth", state)).fit(images).weights_hash_


def test_folder_without_a_model_is_an_error_that_names_it(images, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"'local-dir:{tmp_path}': there is no file 'config\.json'"):
        TimmFeatures(f"local-dir:{tmp_path}", device="cpu").fit(images)


@pytest.mark.parametrize("num_classes", [0, 7])
def test_recipe_for_a_module_in_the_error_of_weights_checks_the_weights(num_classes, tmp_path):
    state = timm.create_model("test_resnet", num_classes=num_classes).state_dict()

    def by_recipe(file):
        overlay = {"file": str(file), "num_classes": num_classes}
        return timm.create_model(
            "test_resnet", pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=overlay
        )

    module = by_recipe(saved(tmp_path / "whole.pth", state))
    assert all(torch.equal(values, state[key]) for key, values in module.state_dict().items())
    with pytest.raises(RuntimeError, match=r"Missing key.*layer4\.0"):
        by_recipe(saved(tmp_path / "part.pth", without("layer4.")(state)))


def test_weights_leave_no_second_copy_in_the_network(images, tmp_path):
    file = saved(tmp_path / "vit.safetensors", network="test_vit", num_classes=0)
    tiny("test_vit", weights=file, image_size=96).fit(images)
    (loaded,) = backbones._loaded.values()
    assert "state_dict" not in loaded.network.pretrained_cfg


class Harmful:
    def __reduce__(self):
        return print, ("code has run",)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda: pickled(Harmful()), id="code"),
        pytest.param(lambda: pickled([1, 2]), id="no state dict"),
        pytest.param(lambda: pickled({"a": 1}), id="no tensors"),
        pytest.param(lambda: b"garbage", id="garbage"),
        pytest.param(lambda: b"", id="empty"),
    ],
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_file_that_holds_no_weights_is_an_error_and_runs_no_code(content, suffix, images, tmp_path, capsys):
    file = tmp_path / f"bad.{suffix}"
    file.write_bytes(content())
    with pytest.raises(ValueError, match=rf"bad\.{suffix}' cannot be read"):
        tiny(weights=file).fit(images)
    assert "code has run" not in capsys.readouterr().out


def pickled(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def test_file_written_anew_is_read_anew_and_refused_by_what_was_fitted(images, tmp_path):
    file = saved(tmp_path / "weights.pth")
    features = tiny(weights=str(file)).fit(images)
    features.transform(images)
    saved(file, seeded(lambda: timm.create_model("test_resnet", num_classes=0), 6).state_dict())
    with pytest.raises(ValueError, match=r"weights of backbone .* are not those of fit: SHA-256"):
        features.transform(images)
    assert clone(features).fit(images).weights_hash_ != features.weights_hash_


# Pretrained weights, with and without a network


def cached_weights(folder, monkeypatch, name="test_resnet.r160_in1k"):
    """Lay a file into a cache of the hub, as a download does."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    repository = folder / f"models--timm--{name}"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    return saved(repository / "snapshots" / "abc" / "model.safetensors", network=name.partition(".")[0])


# The second has another format at its first address than on the hub.
@pytest.mark.parametrize("name", ["test_resnet.r160_in1k", "vit_tiny_patch16_224.augreg_in21k"])
def test_cached_weights_are_used_without_asking_the_network(name, images, tmp_path, monkeypatch):
    file = cached_weights(tmp_path, monkeypatch, name)
    monkeypatch.setattr(socket, "socket", None)  # any connection fails
    architecture = name.partition(".")[0]
    features = TimmFeatures(name, device="cpu").fit(images)
    expected = tiny(architecture, weights=file).fit(images)
    assert features.backbone_name_ == name
    assert features.weights_hash_ == expected.weights_hash_
    np.testing.assert_array_equal(features.transform(images), expected.transform(images))


@pytest.mark.parametrize("backbone", ["test_resnet", "hf-hub:someone/something"])
@pytest.mark.parametrize("network", ["offline", "refused", "silent"])
def test_weights_that_are_not_to_be_had_are_an_error_with_the_ways_out(
    backbone, network, images, tmp_path, monkeypatch
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if network == "silent":  # accepts, and never answers
            server.listen()
            monkeypatch.setattr(backbones, "PROBE_SECONDS", 0.2)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for module in (huggingface_hub.constants, huggingface_hub.file_download):  # older versions have a copy
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", url, raising=False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", network == "offline")
        reason = "HF_HUB_OFFLINE is set" if network == "offline" else r"http://127\.0\.0\.1:"
        with pytest.raises(OSError, match=rf"'{backbone}.* neither in the cache .*{reason}") as error:
            TimmFeatures(backbone).fit(images)
    for way_out in ("weights=PATH", "HF_HUB_OFFLINE=1", "ScatteringFeatures()", "pretrained=False"):
        assert way_out in str(error.value)


# What is kept


def test_fitted_state_is_small_and_plain(images):
    features = tiny(layers=["layer1", "layer3"]).fit(images)
    before = copy.deepcopy(features.__dict__)
    features.transform(images)
    assert features.__dict__ == before
    plain = (str, int, float, list, type(None))
    for name, value in features.__dict__.items():
        if name.endswith("_"):
            values = value if isinstance(value, list | tuple) else [value]
            assert all(isinstance(entry, plain) for entry in values), name
    assert len(pickle.dumps(features)) < 3000


@pytest.mark.parametrize("store", ["pickle", "joblib"])
def test_unpickled_features_load_their_backbone_again(store, images, tmp_path):
    features = tiny(layers=["layer1", "layer3"]).fit(images)
    expected = features.transform(images)
    if store == "pickle":
        again = pickle.loads(pickle.dumps(features))
    else:
        joblib.dump(features, tmp_path / "features.joblib")
        again = joblib.load(tmp_path / "features.joblib")
    backbones._loaded.clear()
    np.testing.assert_array_equal(again.transform(images), expected)


def test_unpickled_features_refuse_other_weights(images):
    features = tiny().fit(images)
    features.seed_ += 1
    with pytest.raises(ValueError, match=r"'test_resnet.r160_in1k' are not those of fit: SHA-256 \w{12}\.\.\."):
        features.transform(images)


def test_backbones_are_shared_and_no_more_are_kept_than_the_bound(images):
    for layers in (None, "layer1", ["layer2", "layer3"]):
        clone(tiny(layers=layers)).fit_transform(images)
        tiny("test_resnet.r160_in1k", layers=layers).fit_transform(images)
    assert len(backbones._loaded) == 1
    for seed in range(backbones.MAX_LOADED + 2):
        tiny(random_state=seed).fit(images)
    assert len(backbones._loaded) == backbones.MAX_LOADED


def test_weights_hash_depends_on_names_shapes_dtypes_and_values():
    def hash_of(**tensors):
        module = nn.Module()
        for name, values in tensors.items():
            module.register_buffer(name, values)
        return backbones.weights_hash(module)

    zeros = torch.zeros(2, 3)
    different = [
        hash_of(a=zeros),
        hash_of(b=zeros),
        hash_of(a=zeros.T),
        hash_of(a=zeros.int()),
        hash_of(a=zeros + 1),
        hash_of(a=zeros.bfloat16()),
        hash_of(a=zeros, b=zeros),
        hash_of(),
    ]
    assert len(set(different)) == len(different)
    assert hash_of(a=torch.ones(3, 2).T, b=zeros) == hash_of(b=zeros, a=torch.ones(2, 3))


def test_threads_that_share_a_backbone_do_not_read_each_other_s_layers(images):
    layers = ["layer1", "layer2", "layer3", "layer4"]
    fitted = [tiny(layers=layer, batch_size=1).fit(images) for layer in layers]
    expected = [features.transform(images) for features in fitted]
    found = [None] * len(fitted)

    def transform(i):
        for _ in range(3):
            found[i] = fitted[i].transform(images)

    threads = [threading.Thread(target=transform, args=(i,)) for i in range(len(fitted))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


# scikit-learn


@pytest.mark.parametrize(
    "check",
    [
        estimator_checks.check_no_attributes_set_in_init,
        estimator_checks.check_parameters_default_constructible,
        estimator_checks.check_get_params_invariance,
        estimator_checks.check_set_params,
        estimator_checks.check_param_validation,
        estimator_checks.check_get_feature_names_out_error,
        estimator_checks.check_estimator_cloneable,
        estimator_checks.check_estimator_repr,
        estimator_checks.check_estimator_tags_renamed,
        estimator_checks.check_valid_tag_types,
        estimator_checks.check_mixin_order,
        estimator_checks.check_estimators_unfitted,
    ],
)
def test_scikit_learn_s_check_passes(check):
    check("TimmFeatures", tiny())


def test_grid_search_over_layers_in_a_pipeline(images):
    X = list(images) * 2
    pipeline = make_pipeline(tiny(), PCA(2), KernelDensity(bandwidth=5.0))
    grid = {
        "timmfeatures__layers": [None, "layer1", ["layer1", "layer2"]],
        "timmfeatures__image_size": [32, 48],
    }
    search = GridSearchCV(pipeline, grid, cv=2, error_score="raise").fit(X)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert len(set(search.cv_results_["mean_test_score"].round(6))) == 6
    best = search.best_estimator_[0]
    assert {"layers": best.layers, "image_size": best.image_size} == {
        key.removeprefix("timmfeatures__"): value for key, value in search.best_params_.items()
    }


def test_output_may_be_a_data_frame(images):
    frame = tiny(layers="layer1").set_output(transform="pandas").fit_transform(images)
    assert list(frame.columns[:2]) == ["layer1_0", "layer1_1"]


def test_module_in_a_grid_search_is_never_copied(images):
    network = timm.create_model("test_resnet", num_classes=0)
    pipeline = make_pipeline(tiny(network, image_size=32), PCA(2), KernelDensity())
    search = GridSearchCV(pipeline, {"timmfeatures__layers": ["layer1", "layer2"]}, cv=2, error_score="raise")
    assert search.fit(list(images)).best_estimator_[0].backbone is network


def test_verbose_shows_progress(images, capsys):
    tiny().fit_transform(images)
    assert capsys.readouterr().err == ""
    tiny(verbose=True).fit_transform(images)
    assert "test_resnet.r160_in1k: 100%" in capsys.readouterr().err


# Errors


class Odd(nn.Module):
    """Layers that cannot be read."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.twice = nn.ReLU()
        self.never = nn.ReLU()
        self.pair = nn.MaxPool2d(2, return_indices=True)
        self.windows = nn.Identity()
        self.volume = nn.Identity()

    def forward(self, batch):
        maps = self.twice(self.twice(self.conv(batch)))
        maps, _ = self.pair(maps)
        self.volume(maps[:, :, None].expand(-1, -1, 3, -1, -1))
        return self.windows(torch.cat([maps, maps])).mean((1, 2, 3))[: len(batch), None]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("layer9", r"layers=\['layer9'\] not found in backbone 'Odd'\. Available: 'conv', 'twice', "),
        (["conv", "twise"], r"layers=\['twise'\] not found in backbone 'Odd'\. Did you mean 'twice'\?"),
        ([], r"layers=\[\]\. Allowed"),
        ([3], r"layers=\[3\]\. Allowed"),
        (["conv", "conv"], r"\['conv'\] more than once"),
        ("twice", r"layers=\['twice'\] of backbone 'Odd' runs 2 times"),
        ("never", r"layers=\['never'\] of backbone 'Odd' never runs"),
        ("pair", r"layers=\['pair'\] of backbone 'Odd' returns a tuple, not a tensor"),
        ("windows", r"layers=\['windows'\] of backbone 'Odd' returns shape \(4, .* for 2 images"),
        ("volume", r"layers=\['volume'\] of backbone 'Odd' returns shape .* not certain"),
    ],
)
def test_layer_that_cannot_be_read_is_an_error_that_says_why(layers, message, images):
    with pytest.raises(ValueError, match=message):
        tiny(Odd(), layers=layers, image_size=16).fit(images)


def on_meta(module, buffer=None):
    if buffer is None:
        return module.to("meta")
    module.register_buffer(buffer, torch.empty(2, device="meta"), persistent=False)
    return module


def test_axes_that_are_not_certain_are_an_error(images):
    # 16 patches and 16 channels, in a network that takes one size only
    with pytest.raises(ValueError, match="which axis holds the channels is not certain"):
        tiny(mixer(embed_dim=16), layers="blocks.0", image_size=32).fit(images)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"backbone": "resnet81"}, "backbone='resnet81' is not a model of timm. Did you mean 'resnet18'"),
        (
            {"backbone": "resnet18.nobody_in1k"},
            r"timm has no such weights\. Allowed: 'resnet18', .*'resnet18\.tv_in1k'",
        ),
        ({"backbone": "timm/resnet18"}, "'hf-hub:OWNER/MODEL'"),
        ({"backbone": "cspresnet50d", "pretrained": True}, "timm has no pretrained weights for backbone"),
        ({"pooling": "max"}, "pooling='max' has nothing to pool"),
        ({"pooling": "mean"}, "The 'pooling' parameter of TimmFeatures must be"),
        ({"crop": "border-box"}, "The 'crop' parameter of TimmFeatures must be"),
        ({"backbone": 3}, "The 'backbone' parameter of TimmFeatures must be"),
        ({"image_size": (32, 32, 3)}, r"image_size=\(32, 32, 3\)\. Allowed: \(height, width\)"),
        ({"image_size": (0, 32)}, r"image_size=\(0, 32\)\. Allowed: \(height, width\)"),
        ({"image_size": 0}, "The 'image_size' parameter of TimmFeatures must be"),
        ({"backbone": Input(), "weights": "a.pth"}, "weights='a.pth' needs a backbone by name"),
        ({"backbone": Input(input_size=(1, 8, 8))}, "images of 1 channels"),
        ({"backbone": nn.Conv2d(1, 2, 3)}, "backbone 'Conv2d' does not take colour images of 224 x 224"),
        ({"backbone": swin()}, "backbone 'SwinTransformer' does not take .* 224 x 224 .* pass image_size"),
        ({"backbone": on_meta(nn.Conv2d(3, 2, 3))}, "backbone: 'weight' is on the meta device"),
        ({"backbone": on_meta(Input(), "pixels")}, "backbone: 'pixels' is on the meta device"),
        ({"backbone": nn.LazyConv2d(2, 3)}, "backbone: 'weight' gets its shape, and its values, in the first forward"),
        ({"device": "warp"}, "device='warp' is not a torch device"),
    ],
)
def test_bad_parameter_is_an_error_that_says_what_is_allowed(parameters, message, images):
    with pytest.raises(ValueError, match=message):
        tiny(**parameters).fit(images)


def test_missing_weights_file_is_an_error_that_names_it(images):
    with pytest.raises(FileNotFoundError, match=r"weights='no-such\.pth': there is no such file"):
        tiny(weights="no-such.pth").fit(images)


def test_transform_before_fit_is_an_error(images):
    with pytest.raises(NotFittedError):
        tiny().transform(images)
    broken = tiny(layers="layer9")
    with pytest.raises(ValueError, match="not found"):
        broken.fit(images)
    with pytest.raises(NotFittedError):
        broken.transform(images)


def test_what_is_no_image_is_refused_by_fit_and_by_transform(images):
    matrix = np.zeros((5, 7))
    with pytest.raises(ValueError, match="feature matrix or one grey image"):
        tiny().fit(matrix)
    with pytest.raises(ValueError, match="feature matrix or one grey image"):
        tiny().fit(images).transform(matrix)
