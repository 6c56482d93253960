"""``dfkde export``."""

import numpy as np
import onnxruntime
import pytest
import torch
from command_line import fact, run

from dfkde_sklearn import PatchDFKDEDetector


@pytest.fixture(scope="module")
def network_model(textures, tmp_path_factory, shared_weights):
    """A model with a tiny network."""
    model = tmp_path_factory.mktemp("network") / "model"
    arguments = ("--features", "test_resnet", "--weights", shared_weights, "--image-size", "64", "-o", model)
    assert run("fit", textures / "train" / "good", *arguments) == 0
    return model


def answers(file, batch):
    """Return log densities and labels of an exported file for a batch."""
    if file.suffix == ".onnx":
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        scores, _, labels, *_ = session.run(None, {"images": batch.numpy()})
    else:
        scores, _, labels, *_ = (values.numpy() for values in torch.export.load(file).module()(batch))
    return scores, labels


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2"])
def test_the_file_answers_as_the_detector_and_the_check_says_so(name, network_model, textures, tmp_path, capsys):
    images = textures / "test" / "hole"
    assert run("export", network_model, "-o", tmp_path / name, "--check", images, images / "*.png") == 0
    printed = capsys.readouterr().out
    detector = PatchDFKDEDetector.load(network_model)
    scores, labels = answers(tmp_path / name, detector.to_torch().read_images(str(images)))
    expected = detector.assess(str(images))
    np.testing.assert_allclose(scores, expected.log_density, rtol=1e-4)
    np.testing.assert_array_equal(labels, expected.label)
    assert fact(printed, "Checked").startswith("20 images in ")
    assert fact(printed, "Labels") == "all 20 the same"
    difference = float(fact(printed, "Largest difference").split()[0])
    maps = np.abs(scores - expected.log_density) / np.maximum(1, np.abs(expected.log_density))
    assert maps.max() * 0.9 <= difference < 1e-3


def test_without_a_check_the_file_is_written_all_the_same(network_model, tmp_path, capsys):
    assert run("export", network_model, "-o", tmp_path / "model.pt2", "--image-shape", "64", "64") == 0
    printed = capsys.readouterr().out
    assert "Checked" not in printed
    assert fact(printed, "Input") == "images, uint8 (n, 64, 64, 3), RGB"
    batch = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    assert torch.export.load(tmp_path / "model.pt2").module()(batch)[0].shape == (2,)


def test_a_file_that_differs_by_more_than_the_tolerance_is_not_written(network_model, textures, tmp_path, capsys):
    arguments = ("--check", textures / "test" / "hole", "--tolerance", "1e-12")
    assert run("export", network_model, "-o", tmp_path / "model.onnx", *arguments) == 2
    assert "is not the detector: check[" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_labels_that_differ_at_the_threshold_are_an_exit_code(network_model, textures, tmp_path, capsys):
    images = textures / "test" / "hole"
    assert run("export", network_model, "-o", tmp_path / "model.onnx") == 0
    detector = PatchDFKDEDetector.load(network_model)
    scores, _ = answers(tmp_path / "model.onnx", detector.to_torch().read_images(str(images)))
    expected = detector.score_samples(str(images)).astype(np.float64)
    i = np.argmax(np.abs(scores - expected))
    assert scores[i] != expected[i]
    # Between what the file and what the detector answers.
    detector.offset_ = float(scores[i] + expected[i]) / 2
    detector.save(tmp_path / "moved")
    capsys.readouterr()
    assert run("export", tmp_path / "moved", "-o", tmp_path / "moved.onnx", "--check", images) == 1
    assert fact(capsys.readouterr().out, "Labels").startswith("1 of 20 differ")
    assert (tmp_path / "moved.onnx").is_file()


def test_an_existing_file_is_kept_unless_forced(network_model, tmp_path, capsys):
    (tmp_path / "model.pt2").write_bytes(b"precious")
    assert run("export", network_model, "-o", tmp_path / "model.pt2") == 2
    assert "model.pt2 exists" in capsys.readouterr().err
    assert (tmp_path / "model.pt2").read_bytes() == b"precious"
