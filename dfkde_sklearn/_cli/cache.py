"""``dfkde cache``: the size of a feature cache, and how to empty it."""

from __future__ import annotations

import argparse
from typing import Any

from dfkde_sklearn._cli.arguments import file_path
from dfkde_sklearn._cli.exit_codes import DONE
from dfkde_sklearn._cli.output import print_facts


def add_parser(commands: Any) -> None:
    """Add the command and its arguments."""
    command = commands.add_parser(
        "cache",
        help="print the size of a feature cache, or empty it",
        description="Print the size of a feature cache, or empty it: the folder that dfkde fit and dfkde score use as "
        "--cache FOLDER, and feature extractors as cache=FOLDER in Python. Features that are removed are computed "
        "again when they are needed.",
        epilog="Example: dfkde cache size features, after dfkde fit parts/good --cache features",
    )
    command.add_argument("action", choices=("size", "clear"), help="size: print the size; clear: empty the cache first")
    command.add_argument("folder", type=file_path, metavar="FOLDER", help="the folder of the cache")


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    from dfkde_sklearn import cache_size, clear_cache

    if options.action == "clear":
        clear_cache(options.folder)
    size = cache_size(options.folder)
    print_facts(
        {
            "Cache": str(options.folder),
            "Entries": f"{size.n_rows}, one for each image and layer",
            "Size": f"{size.n_bytes / 1e6:.1f} MB",
        }
    )
    return DONE
