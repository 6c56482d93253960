"""``dfkde layers``: the layers of a backbone."""

from __future__ import annotations

import argparse
from typing import Any

from dfkde_sklearn._cli.exit_codes import DONE
from dfkde_sklearn._cli.output import print_facts, print_table


def add_parser(commands: Any) -> None:
    """Add the command and its arguments."""
    command = commands.add_parser(
        "layers",
        help="list the layers of a backbone",
        description="List the layers of a backbone that dfkde fit --layers takes, with the number of channels and the "
        "grid of positions of each. Needs no weights, and downloads nothing.",
        epilog="Example: dfkde layers resnet18, then dfkde fit parts/good --features resnet18 --layers layer2,layer3",
    )
    command.add_argument("backbone", metavar="BACKBONE", help="the name of a model of timm")
    command.add_argument("--image-size", type=int, metavar="PIXELS", help="height and width of the images")
    command.add_argument(
        "--all",
        action="store_true",
        help="list the parts of blocks too (default: stages, and the blocks in them)",
    )


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from dfkde_sklearn import TimmFeatures
    from dfkde_sklearn._features.layers import feature_stages, layers_for_positions, usable_layers

    # Random weights: shapes do not depend on them.
    extractor: Any = TimmFeatures(
        options.backbone, pretrained=False, random_state=0, image_size=options.image_size, device="cpu"
    )
    extractor._validate_params()
    extractor._fit()
    with extractor._lent_backbone(download=False) as backbone:
        network = backbone.network
        stages = feature_stages(network)
        layers = [
            layer
            for layer, _ in network.named_modules()
            if layer and (options.all or layer.count(".") <= 1 or layer in stages)
        ]
        formats = usable_layers(network, layers, extractor.input_size_, extractor.backbone_name_)
        try:
            default = ", ".join(layers_for_positions(network, extractor.backbone_name_))
        except ValueError:
            default = "none, name some"
    h, w = extractor.input_size_
    print_facts(
        {
            "Backbone": extractor.backbone_name_,
            "Images": f"{h} x {w} pixels",
            "Default layers": default,
            "of the pooled detector": f"the pooled embedding, {extractor.n_features_out_} channels",
        }
    )
    print_table(
        "The layers, and their positions:",
        ("layer", "channels", "grid"),
        [(layer, str(of.width), f"{of.grid[0]} x {of.grid[1]}" if of.grid else "-") for layer, of in formats.items()],
    )
    return DONE
