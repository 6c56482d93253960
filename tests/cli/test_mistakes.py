"""What is typed by mistake, and what the command line answers."""

import re

import pytest
from command_line import run
from PIL import Image

from dfkde_sklearn._cli.main import main

# What is typed, and what the error says.
MISTAKES = {
    "fit {odd}/missing": "missing' is neither a folder nor a file",
    "fit {model} --features scattering": "the file is not an image",
    "fit {odd}/none": "no image file in the folder",
    "fit {odd}/single --features scattering": "minimum of 3 is required",
    "fit {odd}/several": "It holds several categories, load one of them: 'one'",
    "fit {odd}/tested": "has no folder train/good",
    "fit {images} --features resnet1": "is not a model of timm",
    "fit {images} --features test_resnet --weights no.safetensors": "no.safetensors': there is no such file",
    "fit {images} --features scattering --weights {model}": "--weights is for a backbone",
    "fit {images} --features scattering --crop center": "--crop is for a backbone",
    "fit {images} --features scattering --reducing-gap 2": "--reducing-gap is for a backbone",
    "fit {images} --features scattering --engine openvino": "--engine is for a backbone",
    "fit {images} --features scattering --tile-size 32": "--tile-size is for a backbone",
    "fit {images} --features test_resnet --tile-size 32": "Tiles need pooling=None",
    "fit {images} --target-fpr 5": "argument --target-fpr: 5 is not a rate between 0 and 1: 0.05 is 5 %",
    "fit {images} --target-fpr 5%": "5% is not a rate between 0 and 1: 0.05 is 5 %",
    "fit {images} --target-fpr 0": "0 is not a rate between 0 and 1: 0.05 is 5 %",
    "fit {images} --target-fpr nan": "nan is not a rate between 0 and 1: 0.05 is 5 %",
    "fit {images} --confidence 90": "argument --confidence: 90 is not a rate between 0 and 1: 0.9 is 90 %",
    "fit {images} --contamination 2.5": "argument --contamination: 2.5 is not a rate between 0 and 1: 0.025 is 2.5 %",
    "fit {images} --features scattering --contamination 0.6": "'contamination' parameter of PatchDFKDEDetector must be",
    "fit {images} --bandwidth wide": "'wide' is neither a number nor one of scott, silverman, loo",
    "fit {images} --features scattering --bandwidth loo": "'bandwidth' parameter of PatchDFKDEDetector must be",
    "fit {odd}/missing --model {model}": "missing' is neither a folder nor a file",
    "fit {odd}/missing*.png": "neither a folder nor a file, and as a pattern it matches nothing",
    "fit {images} --features scattering --confidence 0.99": r"confidence=0\.99 of .* at least 90 good .* there are 60",
    "fit {images} --features scattering --confidence 0.9 --contamination 0.1": "contamination=0.1 sets the threshold",
    "fit {images} --features scattering --residual box": "--residual is for the other detector",
    "fit {images} --detector pooled --flips all": "--flips is for the other detector",
    "fit {images} --features scattering --groups (": r"--groups '\(' is not a regular expression",
    "fit {images} --features scattering --groups x[0-9]y": "does not match train/good/.*60 of 60 images",
    "fit {images} --features scattering --groups no.csv": "no.csv",
    "fit {images} --features scattering --groups folder": "all 60 rows are one group",
    "score {model} {images} --maps maps": "is a pooled detector, which has no maps",
    "score {model} {images} --fdr 5": "5 is not a rate between 0 and 1: 0.05 is 5 %",
    "score {model} {images} --fdr 0.001": "fdr=0.001 with 60 calibration scores",
    "score {model} {images} --monitor {odd}/text": "is not a file of DriftMonitor.save, or it is damaged",
    "score {model} {images} --monitor no/where": "there is no folder no",
    "score {model} {images} --masks": "Give --maps FOLDER too",
    "fit {images} --features scattering --device tpu9": "device='tpu9'",
    "fit {images} --features scattering --device meta": "device='meta'. Allowed: 'cpu', 'cuda'",
    "score {model} {images} --device xpu": "device='xpu'. Allowed: 'cpu', 'cuda'",
    "score {model} {images} --device vulkan:1": "device='vulkan:1'. Allowed: 'cpu', 'cuda'",
    "score {model} {images} --device cpu:3": "device='cpu:3': torch numbers CUDA GPUs only",
    "score {model} {images} --max-pixels 4095": " pixels.*MAX_IMAGE_PIXELS.*On the command line: --max-pixels N",
    "score {model} {images} --skip-broken --max-pixels 9": "None of the 120 images.*: --max-pixels N",
    "fit {images} --model no/where": "there is no folder no",
    "fit {images} --model {odd} --force": "is a folder. Name a file.",
    "score {odd}/missing {images}": "MODEL .*missing: there is no such file",
    "score {odd}/text {images}": "is not a file of a detector's save",
    "score {odd}/single/000.png {images}": "is not a file of a detector's save",
    "score {odd}/cut {images}": "or it is damaged",
    "score {odd}/weights {images}": "is not a file of a detector's save",
    "score {odd}/older {images}": "is a pickle.*fit it again",
    "score {odd}/matrix {images}": "fitted on a feature matrix",
    "score {model} {odd}/missing.png": "missing.png' is neither a folder nor a file",
    "score {model} {images} --weights {model}": "ScatteringFeatures has no backbone.*weights= is --weights",
    "score {model} {images} --sheet a.png --csv ./a.png": "name the same file",
    "score {model} {images} --sheet sheet.jpg": r"ends in \.png",
    "evaluate {model} {odd}/missing": "missing' is neither a folder nor a file",
    "evaluate {model} {odd}/none": "has no folder 'good', but no folders",
    "evaluate {model} {images}/test/hole/000.png": "The images are in no folder 'good', but 'hole'",
    "evaluate {odd}/matrix {images}": "fitted on a feature matrix",
    "info {odd}/cut": "or it is damaged",
    "info {odd}/older": "is a pickle.*fit it again",
    "info {odd}/missing": "MODEL .*missing: there is no such file",
    "evaluate {model} {images} --files-from no.txt": "No such file or directory: 'no.txt'",
    "score {model} --files-from {odd}/none": "Is a directory",
    "score {model} {images} --target-fpr 5": "5 is not a rate between 0 and 1: 0.05 is 5 %",
    "score {model} {images} --target-fpr 0.1 --fdr 0.1": "not allowed with argument",
    "score {model} {images} --fdr 0.3 --confidence 0.9": "--confidence is that of --target-fpr",
    "score {model} {images} --confidence 0.99": "at least 90 good .* there are 60",
    "score {model} {images} --groups folder": "Give one of them too",
    "score {model} {images} --fdr 0.3 --groups x[0-9]y": "does not match",
    "score {model} {images} --top 0": "'0' is not a whole number of at least 1",
    "score {model} {images} --top 3 --sort input": "not allowed with argument",
    "score {model} {images} --csv - --json -": "--csv and --json both print the table",
    "score {model} {images} --parquet -": "Name a file",
    "score {model} {images} --csv {model} --force": "MODEL and --csv name the same file",
    "score {model} {images} --json a.json --jsonl ./a.json": "--json and --jsonl name the same file",
    "score {model}": "the following arguments are required: IMAGES",
    "export {model} -o model.txt": r"ends in \.onnx or in \.pt2",
    "export {model} -o model.onnx": "cannot be exported: other runtimes lack its complex Fourier transforms",
    "export {model} -o model.onnx --check {odd}/none": "no image file in the folder",
    "export {model} -o model.onnx --tolerance 0.1": "is that of --check",
    "export {odd}/matrix -o model.onnx": "fitted on a feature matrix",
    "recalibrate {model} {odd}/missing": "neither a folder nor a file",
    "recalibrate {odd}/matrix {images}": "fitted on a feature matrix",
    "layers resnet1": "is not a model of timm. Did you mean 'resnet18'",
    "search {odd}/single": "1 good images are too few for a search: at least 12",
    "search {images} --features test_resnet --weights no.safetensors": "no.safetensors': there is no such file",
    "demo --out sheet.jpg": r"ends in \.png",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_on_standard_error(mistake, fitted, textures, odd, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [part.format(odd=odd, model=fitted, images=textures) for part in mistake.split()]
    assert run(*arguments, *([] if arguments[0] in ("info", "layers") else ["--quiet"])) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"dfkde {arguments[0]}: error: ")
    assert re.search(MISTAKES[mistake], line)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [[], ["fit"], ["score", "model"], ["demo", "--material", "jelly"], ["fit", "a", "--n-components", "b"]]
)
def test_wrong_arguments_end_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_the_limit_of_pixels_ends_with_the_command(fitted, textures):
    before = Image.MAX_IMAGE_PIXELS
    assert run("score", fitted, textures / "test" / "good", "--max-pixels", 64 * 64) == 0
    assert before == Image.MAX_IMAGE_PIXELS
