"""``--groups``: which images show the same part."""

from __future__ import annotations

import argparse
import csv
import os
import re
from collections.abc import Sequence
from pathlib import Path

from dfkde_sklearn._cli.arguments import filled
from dfkde_sklearn._cli.images import root_of

FOLDER = "folder"
_COLUMNS = ("path", "group")


def add_groups_argument(command: argparse.ArgumentParser, purpose: str) -> None:
    """Add --groups; `purpose` says what for."""
    command.add_argument(
        "--groups",
        type=filled,
        metavar="RULE",
        help=f"which images show the same part, {purpose}: 'folder', those in one folder; FILE.csv, a table with the "
        "columns path and group; or a regular expression for the path of an image below the folder that holds all, "
        "whose parentheses enclose the name of the part, such as '(part[0-9]+)_'",
    )


def image_groups(options: argparse.Namespace, paths: Sequence[str]) -> list[str] | None:
    """Return the group of each image by the rule --groups, None without one.

    Raises
    ------
    ValueError
        If the rule gives an image no group, or is no regular expression.
    OSError
        If there is no such table.
    """
    rule = options.groups
    if rule is None:
        return None
    folder = root_of(options, paths)
    if rule == FOLDER:
        return [str(Path(path).parent) for path in paths]
    if rule.lower().endswith(".csv"):
        return _groups_in_table(Path(rule), paths, folder)
    try:
        pattern = re.compile(rule)
    except re.error as error:
        raise ValueError(
            f"--groups {rule!r} is not a regular expression ({error}). Allowed: a regular expression, 'folder', or the "
            "name of a CSV file."
        ) from error
    names = [Path(os.path.relpath(path, folder)).as_posix() for path in paths]
    matches = [pattern.search(name) for name in names]
    without = [name for name, match in zip(names, matches, strict=True) if match is None]
    if without:
        raise ValueError(
            f"--groups {rule!r} does not match {without[0]} ({len(without)} of {len(paths)} images). It has to match "
            f"the path of every image below {folder}; what is in its parentheses, or the whole match, is the group."
        )
    found = [match for match in matches if match is not None]
    return ["\n".join(part or "" for part in match.groups()) or match.group() for match in found]


def _groups_in_table(table: Path, paths: Sequence[str], folder: Path) -> list[str]:
    with table.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if not {*_COLUMNS} <= {*(reader.fieldnames or ())}:
            raise ValueError(f"--groups {table}: it has the columns {reader.fieldnames}; needed are path and group.")
        rows = [(row["path"] or "", row["group"] or "") for row in reader]
    # Relative to the table or to the images.
    group_of = {os.path.realpath(base / path): group for base in (folder, table.parent) for path, group in rows}
    groups = [group_of.get(os.path.realpath(path), "") for path in paths]
    without = [path for path, group in zip(paths, groups, strict=True) if not group]
    if without:
        raise ValueError(
            f"--groups {table} names no group for {without[0]} ({len(without)} of {len(paths)} images). Every image "
            f"needs a row; paths are relative to the table or to {folder}."
        )
    return groups
