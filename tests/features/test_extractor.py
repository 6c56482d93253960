"""What all feature extractors share: a module, a document, a summary, and the same treatment of images."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dfkde_sklearn import ScatteringFeatures, TimmFeatures
from dfkde_sklearn._document import from_json
from dfkde_sklearn._features.extractor import FeatureExtractor

EXTRACTORS = {
    "network": lambda **parameters: TimmFeatures(
        "test_resnet", layers=["layer1", "layer3"], pretrained=False, random_state=0, device="cpu", **parameters
    ),
    "scattering": lambda **parameters: ScatteringFeatures(
        scales=2, orientations=2, image_size=16, device="cpu", **parameters
    ),
}
SUMMARIES = {"network": "test_resnet.r160_in1k, layer1, layer3", "scattering": "scattering"}


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 40, 56, 3), dtype=np.uint8)


@pytest.fixture(params=EXTRACTORS)
def fitted(request, images):
    return EXTRACTORS[request.param]().fit(images)


def test_a_module_of_an_extractor_has_its_features(fitted, images):
    module = fitted.as_module()
    batch = module.read_images(images)
    assert batch.ndim == module.n_image_axes
    with torch.no_grad():
        np.testing.assert_allclose(module(batch).numpy(), fitted.transform(images), rtol=1e-5, atol=1e-6)
    again = module.as_extractor()
    assert type(again) is type(fitted)
    np.testing.assert_array_equal(again.transform(images), fitted.transform(images))


def test_pooling_set_after_the_fit_is_refused_until_the_next(fitted, images):
    pooling, expected = fitted.pooling, fitted.transform(images)
    fitted.set_params(pooling=None)
    for transform in (fitted.transform, lambda X: list(fitted.transform_parts(X))):
        with pytest.raises(ValueError, match="pooling=None was set after the fit, which pooled the positions"):
            transform(images)
    at_positions = fitted.fit_transform(images)
    assert at_positions.ndim == 4
    with pytest.raises(ValueError, match="was set after the fit, which kept the positions"):
        fitted.set_params(pooling=pooling).transform(images)
    np.testing.assert_array_equal(fitted.fit_transform(images), expected)


def test_a_module_reads_images_by_the_white_level_of_its_extractor(images):
    deep = np.round(images / 255 * 4095).astype(np.uint16)
    for build in EXTRACTORS.values():
        extractor = build(white_level=4095).fit(deep)
        expected = torch.stack([extractor.image_transform()(picture) for picture in as_pictures(images)])
        torch.testing.assert_close(extractor.as_module().read_images(deep), expected)


def as_pictures(images):
    return [Image.fromarray(image) for image in images]


def test_an_extractor_survives_its_document(fitted, images):
    document = from_json(json.dumps(fitted.document()))
    again = type(fitted).from_document(document, device="cpu")
    assert vars(again) == vars(fitted)
    again.check_weights(download=False)
    np.testing.assert_array_equal(again.transform(images), fitted.transform(images))


def test_every_fitted_attribute_is_in_the_document_and_checked(fitted):
    attributes = {name for name in vars(fitted) if name.endswith("_")}
    assert fitted.document()["fitted"].keys() == attributes == fitted._fitted_attributes.keys()
    document = from_json(json.dumps(fitted.document()))
    for name in attributes - {"seed_", "grid_shape_", "tile_size_", "engine_version_"}:  # which may be None
        without = {key: value for key, value in document["fitted"].items() if key != name}
        with pytest.raises(ValueError, match=f"lacks {name}"):
            type(fitted).from_document(document | {"fitted": without})
        with pytest.raises(ValueError, match=f"the {name} of .* cannot be"):
            type(fitted).from_document(document | {"fitted": without | {name: None}})


def test_a_document_sets_nothing_that_belongs_to_the_machine(images, tmp_path):
    for build in EXTRACTORS.values():
        document = build(cache=tmp_path).fit(images).document()
        assert document["parameters"].keys().isdisjoint({"cache", "device"})


@pytest.mark.parametrize("name", EXTRACTORS)
def test_a_summary_names_the_network_and_its_layers(name, images):
    assert EXTRACTORS[name]().fit(images).summary() == SUMMARIES[name]


def test_only_extractors_that_other_runtimes_can_compute_are_exportable(images):
    EXTRACTORS["network"]().fit(images).check_exportable()
    with pytest.raises(ValueError, match=r"ScatteringFeatures\(\.\.\.\) cannot be exported: .*features=None"):
        EXTRACTORS["scattering"]().fit(images).check_exportable()


def test_an_extractor_must_say_what_its_features_are():
    class Incomplete(FeatureExtractor):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Incomplete()
