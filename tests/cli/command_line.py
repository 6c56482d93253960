"""Helpers of the tests of the command line, which run it in this process."""

import csv
from pathlib import Path

from PIL import Image

from dfkde_sklearn._cli.main import main

SCATTERING = ("--features", "scattering", "--image-size", "64", "--detector", "pooled", "--residual", "box")


def run(*arguments):
    """Run a command line, and return its exit code."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stopped:  # of wrong arguments
        return stopped.code


def rows_of(file):
    """Return the rows of a CSV file."""
    with Path(file).open(newline="") as lines:
        return list(csv.DictReader(lines))


def fact(printed, name):
    """Return the value that was printed beside a name."""
    (line,) = (line for line in printed.splitlines() if line.startswith(f"{name}  "))
    return line.removeprefix(name).strip()


def is_png(path):
    """Return whether a file is a PNG."""
    with Image.open(path) as picture:
        return picture.format == "PNG"
