"""Shards of ``dfkde score``: one of N jobs, with a file of its own, that may be stopped at any moment.

Nothing is shared but the folder: the images of a shard follow from the list, its file from the shard, and what a file
holds is in its metadata. Until a shard is complete, what it has scored is in hidden files beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dfkde_sklearn._cli.exit_codes import DONE, NOT_ALL_NORMAL
from dfkde_sklearn._cli.output import one_line, print_message, shows_progress, summarize
from dfkde_sklearn._cli.tables import Row, arrow_table, check_utf_8
from dfkde_sklearn._files import write_file
from dfkde_sklearn._report.text import decimal

# Images that are scored before their results are on the disk: a minute or so of one core behind a small network.
_IMAGES = 1024
_KEY = "dfkde_sklearn."
# What the files of one folder have in common, in the words of the errors.
_MODEL, _LIST, _THRESHOLD, _SHARDS = "model_sha256", "images_sha256", "threshold", "n_shards"
_WORDS = {
    _MODEL: "another model: the SHA-256 of its model is",
    _LIST: "other images: the SHA-256 of their list is",
    _THRESHOLD: "another threshold:",
    _SHARDS: "another number of shards:",
}


def score_shard(options: argparse.Namespace, detector: Any, paths: Sequence[str]) -> int:
    """Score the shard of the images that was asked for, write its file, and return the exit code of the command."""
    try:
        importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ImportError("--shard needs pyarrow: pip install 'dfkde-sklearn[parquet]'.") from error
    from tqdm import tqdm

    from dfkde_sklearn._batch.models import sha256_of

    k, n = options.shard
    folder = options.parquet
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--parquet {folder}: with --shard it is a folder, and this is a file. Name another.")
    paths = sorted(paths)
    check_utf_8(paths, "Rename the image.")
    facts = {
        _MODEL: sha256_of(options.model),
        _LIST: hashlib.sha256(b"\0".join(map(os.fsencode, paths))).hexdigest(),
        _THRESHOLD: repr(float(detector.offset_)),
        _SHARDS: str(n),
    }
    of_shard = paths[k - 1 :: n]
    file = folder / f"scores-{k:05}-of-{n:05}.parquet"
    for other in sorted(folder.glob("scores-*-of-*.parquet")):
        if re.fullmatch(r"scores-\d{5,}-of-\d{5,}\.parquet", other.name) and (other != file or not options.force):
            _check(other, facts)
    if file.exists() and not (options.resume or options.force):
        raise FileExistsError(f"{file} exists. Keep it and go on with --resume, or overwrite it with --force.")
    folder.mkdir(parents=True, exist_ok=True)
    if file.exists() and not options.force:
        summarize(options, f"Shard {k} of {n} is complete: {file}")
        return _told(options, _checked(file, options))
    detector.features_.set_params(verbose=False)
    parts: list[Any] = []
    some_readable = False
    with tqdm(total=len(of_shard), desc=file.stem, unit="image", disable=not shows_progress(options)) as progress:
        for start in range(0, len(of_shard), _IMAGES):
            images = of_shard[start : start + _IMAGES]
            part = _part(file, start)
            if options.resume and part.exists():
                _check(part, facts)
                parts.append(_checked(part, options))
                some_readable = True
            else:
                parts.append(arrow_table(_rows(detector, images, options.skip_broken)))
                some_readable |= any(verdict != "broken" for verdict in parts[-1]["verdict"].to_pylist())
                # Where nothing can be read, storage is missing rather than an image: nothing of it is kept.
                if some_readable:
                    write_file(part, _parquet(parts[-1], facts))
            progress.update(len(images))
    if of_shard and not some_readable:
        raise ValueError(f"None of the {len(of_shard)} images of shard {k}/{n} can be read. {parts[0]['reason'][0]}")
    table = importlib.import_module("pyarrow").concat_tables(parts) if parts else arrow_table([])
    write_file(file, _parquet(table, facts))
    for start in range(0, len(of_shard), _IMAGES):
        _part(file, start).unlink(missing_ok=True)
    return _told(options, table)


def _part(file: Path, start: int) -> Path:
    """Return the hidden file of the images from the position `start` of a shard, which readers of the folder skip."""
    return file.with_name(f".{file.name}.{start:09}")


def _rows(detector: Any, images: Sequence[str], skip_broken: bool) -> list[Row]:
    from dfkde_sklearn._batch.columns import assessed

    columns = assessed(detector, images, skip_broken=skip_broken, widened=False)
    rows = []
    for path, score, p_anomalous, p_value, verdict, reason in zip(images, *columns.values(), strict=True):
        if verdict == "broken":
            print_message(f"dfkde score: skipped: {one_line(reason)}")
            rows.append(Row(path, None, None, None, "broken", str(reason)))
        else:
            rows.append(Row(path, decimal(score), decimal(p_anomalous), decimal(p_value), str(verdict), ""))
    return rows


def _told(options: argparse.Namespace, table: Any) -> int:
    """Print what a shard holds, and return the exit code."""
    k, n = options.shard
    verdicts = table["verdict"].to_pylist()
    anomalous, broken = verdicts.count("anomalous"), verdicts.count("broken")
    summary = f"Shard {k} of {n}: {anomalous} of {len(verdicts) - broken} images are anomalous."
    summarize(options, summary + (f" {broken} could not be read." if broken else ""))
    return NOT_ALL_NORMAL if options.exit_code and (anomalous or broken) else DONE


def _parquet(table: Any, facts: Mapping[str, str]) -> bytes:
    """Return the content of a Parquet file, with the facts as its metadata."""
    file = io.BytesIO()
    named = table.replace_schema_metadata({f"{_KEY}{name}": value for name, value in facts.items()})
    importlib.import_module("pyarrow.parquet").write_table(named, file)
    return file.getvalue()


def _read(file: Path) -> Any:
    try:
        return importlib.import_module("pyarrow.parquet").ParquetFile(file).read()
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}. If it is damaged, remove it and start again.") from error


def _checked(file: Path, options: argparse.Namespace) -> Any:
    """Return what a file holds; without --skip-broken, an image in it that could not be read is an error."""
    table = _read(file)
    reasons = [reason for reason in table["reason"].to_pylist() if reason]
    if reasons and not options.skip_broken:
        raise ValueError(
            f"{file} has {len(reasons)} images that could not be read, the first for this: {reasons[0]} Give "
            "--skip-broken, as the earlier job did; or mend them, and score the whole shard anew with --force."
        )
    return table


def _check(file: Path, facts: Mapping[str, str]) -> None:
    """Raise a ValueError if a file is not what a shard of this job would write."""
    way_out = "Name another folder, or remove the files of the other job from this one, hidden ones too."
    try:
        found = importlib.import_module("pyarrow.parquet").ParquetFile(file).schema_arrow.metadata or {}
        of_file = {name: found[f"{_KEY}{name}".encode()].decode() for name in facts}
    except (ValueError, LookupError) as error:
        raise ValueError(f"{file} is no shard of dfkde score, or it is damaged: {error!r}. {way_out}") from error
    for name, wanted in facts.items():
        if of_file[name] != wanted:
            raise ValueError(
                f"{file} holds scores of {_WORDS[name]} {of_file[name]}, and of this job {wanted}. {way_out}"
            )
