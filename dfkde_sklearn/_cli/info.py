"""``dfkde info``: what a model file holds, without its network."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from dfkde_sklearn._cli.exit_codes import DONE
from dfkde_sklearn._cli.models import add_model_argument, file_of_model
from dfkde_sklearn._cli.output import print_facts, print_line


def add_parser(commands: Any) -> None:
    """Add the command and its arguments."""
    command = commands.add_parser(
        "info",
        help="describe a model file",
        description="Describe a model file: the detector and its settings, the feature extractor, and the "
        "versions that wrote it. Checks the file's SHA-256, and needs no weights of the network.",
        epilog="Example: dfkde info dfkde-model.safetensors",
    )
    add_model_argument(command)
    command.add_argument("--json", action="store_true", help="print all that the file says, as JSON")


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from dfkde_sklearn._deploy.saved import described

    document = file_of_model(options.model, described)
    if options.json:
        for line in json.dumps(document, indent=2).splitlines():
            print_line(line)
        return DONE
    extractor = document["extractor"]
    facts = {
        "Model": f"{options.model}, {options.model.stat().st_size / 2**20:.1f} MiB",
        "Detector": document["detector"],
        "Calibration scores": str(document["n_calibration_scores"]),
        "Threshold": f"score {document['offset']:.2f} (a log density)",
    }
    if "map_offset" in document:
        facts["Threshold of maps"] = f"{document['map_offset']:.2f}"
    facts["Settings"] = _listed(document["parameters"])
    facts["Feature extractor"] = "none: feature matrices" if extractor is None else extractor["class"]
    if extractor is not None:
        fitted = extractor["fitted"]
        if "backbone_name_" in fitted:
            facts["Backbone"] = f"{fitted['backbone_name_']}, SHA-256 of the weights {fitted['weights_hash_']:.12}..."
            facts["Layers"] = ", ".join(fitted["layers_"]) or "the pooled embedding"
        facts["Its settings"] = _listed(extractor["parameters"])
    facts["Written by"] = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    print_facts(facts)
    return DONE


def _listed(parameters: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in parameters.items())
