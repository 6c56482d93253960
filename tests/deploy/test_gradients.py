"""Gradients pass through exported modules, and are those of finite differences."""

import numpy as np
import pytest
import torch

from dfkde_sklearn import DFKDEDetector, PatchDFKDEDetector, ScatteringFeatures, TimmFeatures
from dfkde_sklearn.datasets import make_textures

DATA = make_textures(n_train=30, n_test=2, image_size=32, random_state=0)
NETWORK = {"pretrained": False, "image_size": 32, "random_state": 0}


@pytest.mark.parametrize("parameters", [{}, {"residual": None}, {"scaling": "norm"}, {"n_components": 3}])
def test_the_gradient_of_rows_is_that_of_finite_differences(parameters):
    rows = np.random.default_rng(0).normal(size=(40, 6))
    model = DFKDEDetector(**parameters).fit(rows).to_torch()
    new = torch.from_numpy(rows[:3] * 1.1).requires_grad_(True)
    assert torch.autograd.gradcheck(model, (new,))


@pytest.mark.parametrize("density", ["kernel", "gaussian"])
def test_the_gradient_of_vectors_at_positions_is_that_of_finite_differences(density):
    vectors = np.random.default_rng(0).normal(size=(30, 3, 3, 4))
    model = PatchDFKDEDetector(None, density=density, normalization=0.5, n_lowest=3).fit(vectors).to_torch()
    assert torch.autograd.gradcheck(model, (torch.from_numpy(vectors[:2] * 1.1).requires_grad_(True),))


FEATURES = {
    "network": (DFKDEDetector, TimmFeatures("test_resnet", layers=["layer1", "layer2"], **NETWORK)),
    "gem": (DFKDEDetector, TimmFeatures("test_resnet", layers=["layer1", "layer2"], pooling="gem", **NETWORK)),
    "embedding": (DFKDEDetector, TimmFeatures("test_resnet", **NETWORK)),
    "positions": (PatchDFKDEDetector, TimmFeatures("test_resnet", layers="layer2", pooling=None, **NETWORK)),
    "wavelets": (DFKDEDetector, ScatteringFeatures(image_size=32)),
    "wavelets at positions": (PatchDFKDEDetector, ScatteringFeatures(image_size=32, pooling=None)),
}


@pytest.mark.parametrize("name", FEATURES)
def test_gradients_reach_the_pixels(name):
    make, features = FEATURES[name]
    model = make(features).fit(DATA.X_train).to_torch()
    images = model.read_images(DATA.X_test).requires_grad_(True)

    def scores(batch):
        features = model.get_features(batch)
        if make is PatchDFKDEDetector:
            return model.log_densities(features)[0]
        return model.density.log_density(features)

    found = scores(images)
    found.sum().backward()
    assert torch.isfinite(images.grad).all()
    with torch.no_grad():
        np.testing.assert_allclose(found.detach(), scores(images), rtol=1e-3)
        # Along the gradient the score rises by its length, to first order.
        direction = images.grad / images.grad.norm()
        step = 1e-2
        risen = (scores(images + step * direction).sum() - scores(images - step * direction).sum()) / (2 * step)
    assert float(risen) == pytest.approx(float(images.grad.norm()), rel=0.1)


def test_without_a_gradient_no_graph_is_kept():
    model = DFKDEDetector(FEATURES["network"][1]).fit(DATA.X_train).to_torch()
    features = model.get_features(model.read_images(DATA.X_test))
    assert not features.requires_grad


def test_integrated_gradients_of_captum_add_up():
    attr = pytest.importorskip("captum.attr")
    rows = np.random.default_rng(0).normal(size=(40, 6))
    model = DFKDEDetector(residual=None).fit(rows).to_torch()
    new = torch.from_numpy(rows[:4] * 2)
    baseline = torch.from_numpy(np.tile(rows.mean(0), (4, 1)))
    attributions = attr.IntegratedGradients(model).attribute(new, baseline, n_steps=300)
    torch.testing.assert_close(attributions.sum(1), model(new) - model(baseline), atol=1e-3, rtol=1e-3)
