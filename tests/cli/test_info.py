"""``dfkde info``."""

import json

from command_line import fact, run


def test_info_tells_what_a_model_holds_without_its_network(textures, weights, tmp_path, capsys):
    model = tmp_path / "model"
    arguments = ("--features", "test_resnet", "--weights", weights, "--layers", "layer2,layer3", "--target-fpr", "0.1")
    assert run("fit", textures / "train" / "good", *arguments, "--model", model) == 0
    weights.unlink()
    capsys.readouterr()
    assert run("info", model) == 0
    printed = capsys.readouterr().out
    assert fact(printed, "Detector") == "PatchDFKDEDetector"
    assert fact(printed, "Calibration scores") == "60"
    assert fact(printed, "Layers") == "layer2, layer3"
    assert "target_fpr=0.1" in fact(printed, "Settings")
    assert fact(printed, "Backbone").startswith("test_resnet")
    assert run("info", model, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["extractor"]["fitted"]["layers_"] == ["layer2", "layer3"]
    assert f"score {document['offset']:.2f}" in fact(printed, "Threshold")


def test_info_tells_of_a_detector_of_feature_matrices(odd, capsys):
    assert run("info", odd / "matrix") == 0
    assert fact(capsys.readouterr().out, "Feature extractor") == "none: feature matrices"
