"""Damage files at random: saved models, caches, monitors and images. Each works as before, or is refused in words.

    python tests/fuzz.py --minutes 20 --seed 0
    python tests/fuzz.py --seed 0 --case 1234

Here and not among the benchmarks, since it prints no figures of the pages; `test_hard_use.py` runs a few of its cases.

A case is a number: with the seed it decides the file and what is done to it. It passes if the file can be used and all
results are finite, or if there is an error that the documentation names (ValueError, OSError, TypeError), within
SECONDS and with at most MEMORY more memory. What fails is printed with its number, each kind of failure once. After a
crash, the last line of FOLDER/running has the number.
"""

import argparse
import contextlib
import faulthandler
import hashlib
import io
import json
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image

from dfkde_sklearn import DFKDEDetector, DriftMonitor, PatchDFKDEDetector, ScatteringFeatures

DOCUMENTED = (ValueError, OSError, TypeError)
SECONDS, MEMORY = 20, 512 * 2**20
MAX_PIXELS = 2_000_000
DIGITS = b"0" * 64
# Numbers that sizes, counts and offsets are not, and that readers forget.
SIZES = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, 46341, 65536, 10**6]
STRANGE = [None, True, False, 0, -1, 1, 3, 10**400, 2**31, 2**63, 2**64, 0.5, 1e308, -1e308, 1e-320]
STRANGE += [float("nan"), float("inf"), float("-inf"), "", "tuple", "nan", "\ud800", "\0", [], [[]], {}, [0.0]]
STRANGE += [{"tuple": 5}, {"tuple": []}, {"a": {"b": []}}, ["x"] * 3, [1e308] * 3, [None] * 9, "a" * 10_000]


class Hang(BaseException):
    """A case that takes too long: of a class that no one catches."""


class WrongError(Exception):
    """A result that is not finite, or is not the right one."""


def random_images(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 32, 32), dtype=np.uint8)


def small_features(**settings):
    return ScatteringFeatures(scales=2, orientations=4, image_size=32, device="cpu", **settings)


# What is done to bytes


def damaged(data, rng, others):
    """Return bytes with up to four things wrong."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        if not data:
            return bytes(data)
        at, length = int(rng.integers(len(data))), int(rng.integers(1, 33))
        kind = rng.integers(8)
        if kind == 0:
            for place in rng.integers(len(data), size=length):
                data[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[at : at + length] = rng.bytes(length)
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            data[at:at] = data[at : at + length] * int(rng.integers(1, 50))
        elif kind == 5:  # a size, near the beginning more often
            place = int(rng.integers(min(len(data), 64))) if rng.random() < 0.7 else at
            size, layout = SIZES[rng.integers(len(SIZES))], ["<I", ">I", "<H", ">H", "<Q"][rng.integers(5)]
            packed = struct.pack(layout, size & (2 ** (8 * struct.calcsize(layout)) - 1))
            data[place : place + len(packed)] = packed
        else:  # the beginning of one file and the end of another
            other = others[rng.integers(len(others))]
            there = int(rng.integers(len(other) + 1)) if kind == 6 else min(at, len(other))
            data[at:] = other[there:]
    return bytes(data)


def altered(document, rng):
    """Return a JSON document with another value, or none, at up to three places."""
    document = json.loads(json.dumps(document))
    for _ in range(rng.integers(1, 4)):
        owner, key = document, None
        while True:
            keys = list(owner) if isinstance(owner, dict) else range(len(owner))
            if not keys:
                break
            key = keys[rng.integers(len(keys))]
            if not isinstance(owner[key], dict | list) or rng.random() < 0.2:
                break
            owner, key = owner[key], None
        if key is None:
            continue
        if rng.random() < 0.2:
            del owner[key]
        elif isinstance(owner[key], int | float) and abs(owner[key]) < 1e300 and rng.random() < 0.5:
            owner[key] *= [-1, 0, 2, 10**6, 0.5][rng.integers(5)]
        else:
            owner[key] = STRANGE[rng.integers(len(STRANGE))]
    return document


# Images


def whole_images():
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    colour = Image.fromarray(rng.integers(0, 256, (24, 30, 3), dtype=np.uint8))
    pictures = [(colour, {}), (colour, {"exif": exif})]
    pictures += [(colour.convert(mode), {}) for mode in ("L", "P", "RGBA", "1", "CMYK")]
    pictures.append((colour.convert("L").convert("I;16"), {}))
    pictures.append((Image.fromarray(rng.random((9, 8)).astype(np.float32)), {}))
    ways = [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("BMP", {}), ("GIF", {}), ("WEBP", {})]
    ways += [("WEBP", {"lossless": True}), ("JPEG2000", {}), ("AVIF", {}), ("ICO", {}), ("TGA", {}), ("PPM", {})]
    ways += [("TIFF", {"compression": c}) for c in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits")]
    ways += [("PCX", {}), ("SGI", {}), ("DDS", {}), ("QOI", {}), ("IM", {}), ("MSP", {}), ("XBM", {})]
    ways += [
        (kind, {"save_all": True, "append_images": [colour.rotate(90)]}) for kind in ("GIF", "PNG", "WEBP", "TIFF")
    ]
    files = []
    for picture, options in pictures:
        for kind, way in ways:
            data = io.BytesIO()
            with contextlib.suppress(Exception):
                picture.save(data, kind, **options, **way)
                files.append(data.getvalue())
    return files


def with_right_checksums(data):
    """Return a PNG whose chunks have the checksums of what is in them, so that readers go on."""
    result, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        content = data[at + 4 : at + 8 + length]
        result += data[at : at + 4] + content + struct.pack(">I", zlib.crc32(content))
        at += 12 + length
    return bytes(result)


class Images:
    def __init__(self):
        self.files = whole_images()
        self.detector = DFKDEDetector(small_features(), n_components=4).fit(random_images(20))

    def check(self, rng, folder):
        data = damaged(self.files[rng.integers(len(self.files))], rng, self.files)
        if data.startswith(b"\x89PNG") and rng.random() < 0.7:
            data = with_right_checksums(data)
        path = folder / "image.png"
        path.write_bytes(data)
        source = path if rng.random() < 0.5 else data
        try:
            scores = self.detector.score_samples([source])
        except DOCUMENTED as error:
            if (str(path) if source is path else "images[0]") not in str(error):
                raise WrongError(f"an error that does not name the image: {error}") from error
            raise
        if not np.isfinite(scores).all():
            raise WrongError(f"scores {scores}")


# Models


class Models:
    def __init__(self, folder):
        rows = np.random.default_rng(0).normal(size=(30, 6))
        images, grids = random_images(20), np.random.default_rng(1).normal(size=(20, 3, 3, 4))
        positions = small_features(pooling=None)
        self.cases = [
            (DFKDEDetector(n_components=3).fit(rows), rows),
            (DFKDEDetector(n_components=3, residual="gaussian", scaling="norm").fit(rows.astype(np.float32)), rows),
            (DFKDEDetector(small_features(), n_components=4).fit(images), images[:2]),
            (PatchDFKDEDetector(features=None).fit(grids), grids),
            (PatchDFKDEDetector(positions).fit(images), images[:2]),
        ]
        self.files = []
        for i, (detector, _) in enumerate(self.cases):
            detector.save(folder / str(i), training_rows=True)
            self.files.append((folder / str(i)).read_bytes())

    def check(self, rng, folder):
        number = int(rng.integers(len(self.cases)))
        (detector, X), data = self.cases[number], self.files[number]
        path = folder / "model.safetensors"
        path.write_bytes(self.changed(data, rng))
        loaded = type(detector).load(path, device="cpu")
        with np.errstate(all="ignore"):
            assessment = loaded.assess(X)
            loaded.calibration_scores_.sum()
        # A file with a right checksum may hold any density, one of which rows are infinitely far too.
        if any(np.isnan(values).any() for values in assessment) or not np.isin(assessment.label, (-1, 1)).all():
            raise WrongError(f"{assessment}")
        loaded.save(folder / "again")

    def changed(self, data, rng):
        kind = rng.integers(4)
        if kind == 0:
            return damaged(data, rng, self.files)
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])["__metadata__"]["dfkde-sklearn"]
        tensors = safetensors.torch.load(data)
        if kind == 1:
            header = json.dumps(altered(json.loads(header), rng))
        elif kind == 2:
            name = sorted(tensors)[rng.integers(len(tensors))]  # safetensors has no order
            tensors[name] = self.strange(tensors[name], rng)
        else:  # any byte, with a right checksum
            digits = json.loads(header)["sha256"].encode()
            data = damaged(data.replace(digits, DIGITS, 1), rng, self.files)
            return data.replace(DIGITS, hashlib.sha256(data).hexdigest().encode(), 1)
        header = json.dumps(json.loads(header) | {"sha256": DIGITS.decode()}) if "{" in header[:1] else header
        data = safetensors.torch.save(tensors, {"dfkde-sklearn": header})
        return data.replace(DIGITS, hashlib.sha256(data).hexdigest().encode(), 1)

    def strange(self, tensor, rng):
        value = [np.nan, np.inf, -np.inf, 1e308, -1e308, 0.0, -1.0, 1e-320, 1e-200, 1e200, 2.0**62][rng.integers(11)]
        changed = tensor.clone().contiguous()
        if changed.numel() and changed.is_floating_point():
            limits = torch.finfo(changed.dtype)
            value = float(np.clip(value, limits.min, limits.max)) if abs(value) < np.inf else value
            changed.view(-1)[rng.integers(changed.numel())] = value
        elif changed.numel() and changed.dtype == torch.int64:
            changed.view(-1)[rng.integers(changed.numel())] = int(rng.integers(-(2**62), 2**62))
        kinds = [
            changed,
            changed,
            changed * 0,
            tensor.double(),
            tensor.half(),
            tensor.long(),
            tensor.bool(),
            tensor[None],
        ]
        kinds += [tensor.reshape(-1)[:0], tensor.reshape(-1)[:-1], torch.cat([tensor.reshape(-1)] * 2)]
        return kinds[rng.integers(len(kinds))].contiguous()


# Caches


class Caches:
    def __init__(self, folder):
        self.images = random_images(6)
        small_features(cache=folder).fit_transform(self.images)
        self.expected = small_features().fit_transform(self.images)
        (file,) = folder.glob("*.sqlite3")
        self.name, self.whole = file.name, file.read_bytes()

    def check(self, rng, folder):
        (folder / self.name).write_bytes(damaged(self.whole, rng, [self.whole]))
        for suffix in ("-wal", "-shm"):
            if rng.random() < 0.2:
                (folder / (self.name + suffix)).write_bytes(damaged(self.whole, rng, [self.whole]))
        for _ in range(2):
            rows = small_features(cache=folder).fit_transform(self.images)
            if not np.allclose(rows, self.expected, rtol=1e-5, atol=1e-6):
                raise WrongError("other features than without a cache")


# Monitors


class Monitors:
    def __init__(self, folder):
        rng = np.random.default_rng(0)
        self.detector = DFKDEDetector(n_components=3).fit(rng.normal(size=(40, 5)))
        self.files = []
        for i, shift in enumerate((0.0, 5.0)):
            monitor = DriftMonitor(self.detector, average_run_length=500)
            for _ in range(3):
                monitor.update(shift + rng.normal(size=(30, 5)))
            monitor.save(folder / str(i))
            self.files.append((folder / str(i)).read_bytes())
        self.new = self.detector.score_samples(rng.normal(size=(8, 5)))

    def check(self, rng, folder):
        data = self.files[rng.integers(len(self.files))]
        if rng.random() < 0.8:
            data = json.dumps(altered(json.loads(data), rng)).encode()
        else:
            data = damaged(data, rng, self.files)
        path = folder / "monitor.json"
        path.write_bytes(data)
        monitor = DriftMonitor.load(path, self.detector)
        try:
            monitor.describe()
            monitor.update_scores(self.new)
            monitor.describe()
            monitor.save(path)
            DriftMonitor.load(path, self.detector).reset().update_scores(self.new)
        except DOCUMENTED as error:
            raise WrongError(f"loaded, and then {type(error).__name__}: {error}") from error
        if not np.isfinite(np.array(monitor.history_)[:, [0, 3, 4]].astype(float)).all():
            raise WrongError(f"history {monitor.history_[-1]}")


# Cases


def peak_memory():
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def kinds_of_files(folder):
    """Return what is damaged, by name."""
    places = {name: folder / f"whole-{name}" for name in ("models", "caches", "monitors")}
    for place in places.values():
        place.mkdir(parents=True)
    return {
        "images": Images(),
        "models": Models(places["models"]),
        "caches": Caches(places["caches"]),
        "monitors": Monitors(places["monitors"]),
    }


def run_case(kinds, seed, case, folder):
    """Run a case, and return its kind and outcome: "used" or "refused"; raise what is a failure."""
    rng = np.random.default_rng((seed, case))
    name = list(kinds)[case % len(kinds)]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    before = peak_memory()
    outcome = "used"
    try:
        kinds[name].check(rng, folder)
    except DOCUMENTED:
        outcome = "refused"
    if peak_memory() > before + MEMORY:
        raise WrongError(f"{(peak_memory() - before) / 2**20:.0f} MiB of memory")
    return name, outcome


@contextlib.contextmanager
def limited_time():
    """Raise `Hang` after SECONDS; where no Python code runs any more, end the process and show where."""

    def stop(*_):
        raise Hang(f"over {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(3 * SECONDS, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def quiet():
    """Let no warning through, and no image that is large for a test."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, MAX_PIXELS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this case alone, whose error is raised")
    parser.add_argument("--folder", type=Path, help="where the damaged files lie (default: a temporary folder)")
    options = parser.parse_args()
    faulthandler.enable()
    torch.set_num_threads(1)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="fuzz-"))
    folder.mkdir(exist_ok=True)
    counts, failures = Counter(), {}
    with quiet():
        kinds = kinds_of_files(Path(tempfile.mkdtemp(prefix="fuzz-whole-")))
        if options.case is not None:
            print(run_case(kinds, options.seed, options.case, folder / "case"))
            return
        end, case = time.monotonic() + 60 * options.minutes, 0
        while time.monotonic() < end:
            (folder / "running").write_text(f"--seed {options.seed} --case {case}\n")
            try:
                with limited_time():
                    name, outcome = run_case(kinds, options.seed, case, folder / "case")
                counts[name, outcome] += 1
            except (Exception, Hang) as error:
                name = list(kinds)[case % len(kinds)]
                counts[name, "failed"] += 1
                line = traceback.extract_tb(error.__traceback__)[-1]
                what = (name, type(error).__name__, line.filename, line.lineno)
                if what not in failures:
                    failures[what] = case
                    print(f"--seed {options.seed} --case {case}: {name}: {traceback.format_exc()}", flush=True)
            case += 1
    print(f"{case} cases in {options.minutes:g} minutes, seed {options.seed}")
    for (name, outcome), count in sorted(counts.items()):
        print(f"{name:10} {outcome:8} {count}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
