"""``dfkde export``: a detector as one file for other runtimes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from dfkde_sklearn._cli.arguments import (
    add_force_argument,
    add_quiet_argument,
    add_reading_arguments,
    file_path,
    positive,
)
from dfkde_sklearn._cli.exit_codes import DONE, LABELS_DIFFER
from dfkde_sklearn._cli.files import check_distinct, check_new
from dfkde_sklearn._cli.images import paths_at
from dfkde_sklearn._cli.models import add_model_argument, add_weights_argument, loaded_detector
from dfkde_sklearn._cli.output import print_facts, say

if TYPE_CHECKING:
    from dfkde_sklearn._deploy.export import Agreement

# The runtime that reads each kind of file.
RUNTIMES = {".onnx": "ONNX Runtime", ".pt2": "torch.export"}


def add_parser(commands: Any) -> None:
    """Add the command and its arguments."""
    command = commands.add_parser(
        "export",
        help="write a detector as ONNX, or as a program of PyTorch",
        description="Write a detector as one file for other runtimes: ONNX, which ONNX Runtime and OpenVINO read, or "
        "pt2, which torch.export.load reads. It takes images and answers log density, P(anomalous) and label, and maps "
        "on the grid from a detector of positions. With --check, the file is run and compared with the detector.",
        epilog="Example: dfkde export dfkde-model.safetensors -o parts.onnx --check parts/good. Exit code: 0 on "
        "success; 1 if labels of --check differ, of scores that lie at the threshold; 2 on an error, also if a score "
        "differs by more than the tolerance, and then nothing is written.",
    )
    add_model_argument(command)
    command.add_argument(
        "-o",
        "--output",
        type=file_path,
        required=True,
        metavar="FILE",
        help="the file to write: a name that ends in .onnx or in .pt2",
    )
    command.add_argument(
        "--image-shape",
        type=positive,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="put resizing and normalisation into the file, for images of this many pixels: its input is then uint8 of "
        "shape (n, HEIGHT, WIDTH, 3), RGB (default: float32 of shape (n, 3, h, w), resized and normalised before)",
    )
    command.add_argument(
        "--check",
        nargs="+",
        metavar="IMAGES",
        help="run the file on these images, folders of images or quoted patterns, and compare scores and labels with "
        "those of the detector",
    )
    command.add_argument(
        "--tolerance",
        type=float,
        metavar="T",
        help="with --check, the largest difference of a log density: relative, or in nats where it is below 1 "
        "(default: 0.001)",
    )
    group = command.add_argument_group("the feature extractor")
    add_weights_argument(group)
    add_reading_arguments(group)
    add_force_argument(command)
    add_quiet_argument(command)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from dfkde_sklearn._deploy.export import write_onnx, write_program

    output = options.output
    kind = output.suffix.lower()
    if kind not in RUNTIMES:
        raise ValueError(f"{output}: the name says what to write. Give one that ends in .onnx or in .pt2.")
    if options.tolerance is not None and not (options.check and options.tolerance > 0):
        raise ValueError(f"--tolerance {options.tolerance:g} is that of --check, and a number above 0.")
    check_distinct([("MODEL", options.model), ("-o", output)])
    paths = list(dict.fromkeys(path for source in options.check or [] for path in paths_at(source)))
    check_new(output, options.force)
    detector = loaded_detector(options)
    shape = None if options.image_shape is None else (options.image_shape[0], options.image_shape[1])
    expected = None
    if paths:
        say(options, f"Scoring {len(paths)} images")
        expected = detector._exported_answers(paths)
    say(options, f"Writing {output}{', and running it' if paths else ''}")
    write = write_onnx if kind == ".onnx" else write_program
    model: Any = detector.to_torch()
    agreement = write(model, output, shape, expected, options.tolerance)

    h, w = shape or detector.features_.input_size_
    print_facts(
        {
            "Model": str(options.model),
            "File": f"{output}, {output.stat().st_size / 2**20:.1f} MiB",
            "Input": f"images, {f'uint8 (n, {h}, {w}, 3), RGB' if shape else f'float32 (n, 3, {h}, {w}), normalised'}",
            **({} if agreement is None else _agreement_facts(agreement, RUNTIMES[kind])),
        }
    )
    return LABELS_DIFFER if agreement is not None and agreement.n_labels else DONE


def _agreement_facts(agreement: Agreement, runtime: str) -> dict[str, str]:
    n, n_labels = agreement.n_images, agreement.n_labels
    labels = f"{n_labels} of {n} differ, of scores at the threshold" if n_labels else f"all {n} the same"
    return {
        "Checked": f"{n} images in {runtime}",
        "Largest difference": f"{agreement.difference:.2g} of a log density, of {agreement.tolerance:g} allowed",
        "Labels": labels,
    }
