"""How often `DriftMonitor` raises an alarm without a reason, and how soon with one.

    python benchmarks/drift.py --tiles FOLDER --weights FILE
    python benchmarks/drift.py --quick

The folder and the file are those of `real_data.py`, which see. Without a reason: 100 000 rows from the distribution of
the training rows, for detectors that were fitted to few or many of them. With one: generated photographs of cloth, and
the photographs of magnetic tiles by tile, of which those from some number on are darker, or blurred, or of another
cloth, or one in ten has a defect. Prints the tables, and the claims, asserted.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from real_data import check_claims, load_images, mobilenet, parsed_options, print_heading, print_table, print_versions
from scipy.ndimage import gaussian_filter

from dfkde_sklearn import DFKDEDetector, DriftMonitor, ScatteringFeatures, TimmFeatures
from dfkde_sklearn.datasets import make_textures

Pictures = NDArray[np.uint8]
# What happens to pictures (n, height, width, ...).
CHANGES: dict[str, Callable[[Pictures], Pictures]] = {
    "darker by a tenth": lambda pictures: (0.9 * pictures).astype(np.uint8),
    "blurred by 0.7 pixels": lambda pictures: blurred(pictures, 0.7),
    "blurred by 1.5 pixels": lambda pictures: blurred(pictures, 1.5),
}
SIZE = 64


def blurred(pictures: Pictures, sigma: float) -> Pictures:
    return gaussian_filter(pictures, (0, sigma, sigma, *[0] * (pictures.ndim - 3)))


def main() -> None:
    options = parsed_options(__doc__, "tiles", "weights")
    start = time.perf_counter()
    warnings.filterwarnings("ignore", message=".*near-duplicate")
    print_versions()
    claims = false_alarms(2000 if options.quick else 100_000, options.seeds)
    delays: dict[str, dict[str, str]] = {}
    delays |= delays_of_cloth(60 if options.quick else 300, options.seeds)
    delays |= delays_of_tiles(options.tiles, TimmFeatures(mobilenet(options.weights), layers="blocks.4"), options.seeds)
    print_heading(
        "Parts until the alarm",
        "--tiles FOLDER --weights FILE",
        f"Median, least and most of {options.seeds} seeds; a dash where there was none in what was left.",
    )
    print_table("parts, change", delays, "drift_delays")
    check_claims(claims, time.perf_counter() - start, quick=options.quick)


def false_alarms(n_parts: int, n_seeds: int) -> dict[str, bool]:
    """Print the number of alarms without a change; return the claims on it."""
    rows: dict[str, dict[str, str]] = {}
    claims: dict[str, bool] = {}
    for n_train in (100, 1000):
        for length in (10_000, 100_000):
            n_alarms = []
            for seed in range(n_seeds):
                rng = np.random.default_rng(seed)
                scales = 1 / np.sqrt(np.arange(1, 33))
                detector = DFKDEDetector(features=None).fit(rng.normal(size=(n_train, 32)) * scales)
                monitor = DriftMonitor(detector, average_run_length=length, random_state=seed)
                count = 0
                for _ in range(n_parts // 1000):
                    monitor.update(rng.normal(size=(1000, 32)) * scales)
                    if monitor.alarm_ is not None:
                        count += 1
                        monitor.reset()
                n_alarms.append(count)
            rows[f"{n_train} training rows, `average_run_length={length}`"] = {
                "promised": f"{n_parts / length:g}",
                "alarms": f"{np.mean(n_alarms):.1f}",
                "most": str(max(n_alarms)),
            }
            name = f"{n_train} training rows: {np.mean(n_alarms):.1f} alarms, at most {n_parts / length:g}"
            # Counts of alarms are about a Poisson law's.
            claims[name] = sum(n_alarms) <= n_seeds * n_parts / length + 3 * (n_seeds * n_parts / length) ** 0.5
    print_heading(
        f"Alarms without a change, in {n_parts} parts", "--tiles FOLDER --weights FILE", f"Mean of {n_seeds} seeds."
    )
    print_table("detector", rows, "drift_alarms")
    return claims


def delays_of_cloth(n: int, n_seeds: int) -> dict[str, dict[str, str]]:
    """Return the parts until the alarm, after `n` unchanged ones, of generated photographs."""
    found: dict[str, list[tuple[int | None, str | None]]] = {}
    for seed in range(n_seeds):
        data = make_textures(n, 3 * n, image_size=SIZE, anomaly_fraction=0, random_state=seed)
        bad = make_textures(1, 3 * n, image_size=SIZE, anomaly_fraction=0.1, random_state=seed).X_test
        other = make_textures(1, 2 * n, image_size=SIZE, material="twill", anomaly_fraction=0, random_state=seed).X_test
        detector = DFKDEDetector(ScatteringFeatures(image_size=SIZE)).fit(data.X_train)
        before, after = data.X_test[:n], data.X_test[n:]
        streams = {name: change(after) for name, change in CHANGES.items()}
        streams |= {"another cloth": other, "one in ten is bad": bad[n:], "unchanged": after}
        first = detector.score_samples(before)
        for name, pictures in streams.items():
            scores = detector.score_samples(pictures)
            found.setdefault(f"cloth, {name}", []).append(delay(detector, first, scores, None, None, 10_000))
    return {name: shown(runs) for name, runs in found.items()}


def delays_of_tiles(folder: object, extractor: TimmFeatures, n_seeds: int) -> dict[str, dict[str, str]]:
    """Return the tiles until the alarm, after a fifth of them unchanged."""
    images = load_images(folder)  # type: ignore[arg-type]
    good = np.flatnonzero(~images.is_defect)
    pictures = [np.asarray(Image.open(path).convert("RGB")) for path in images.paths[good]]
    groups = images.groups[good]
    features = {"unchanged": extractor.fit_transform(pictures)}
    for name, change in CHANGES.items():
        features[name] = extractor.transform([change(picture[None])[0] for picture in pictures])
    found: dict[str, list[tuple[int | None, str | None]]] = {}
    for seed in range(n_seeds):
        names = np.random.default_rng(seed).permutation(np.unique(groups))
        n_train, n_before = len(names) // 2, len(names) // 5
        train, before, after = (
            np.flatnonzero(np.isin(groups, some))
            for some in (names[:n_train], names[n_train : n_train + n_before], names[n_train + n_before :])
        )
        detector = DFKDEDetector(features=None).fit(features["unchanged"][train], groups=groups[train])
        first = detector.score_samples(features["unchanged"][before])
        for name, rows in features.items():
            scores = detector.score_samples(rows[after])
            found.setdefault(f"tiles, {name}", []).append(
                delay(detector, first, scores, groups[before], groups[after], 1000)
            )
    return {name: shown(runs) for name, runs in found.items()}


def delay(
    detector: DFKDEDetector,
    first: NDArray[np.floating],
    scores: NDArray[np.floating],
    first_groups: NDArray[np.str_] | None,
    groups: NDArray[np.str_] | None,
    length: int,
) -> tuple[int | None, str | None]:
    """Return the parts from the change to the alarm, negative if it came before, and what it is about."""
    monitor = DriftMonitor(detector, average_run_length=length).update_scores(first, groups=first_groups)
    n_before = monitor.n_seen_
    if monitor.alarm_ is not None:
        return -1, monitor.alarm_
    parts = [np.array([i]) for i in range(len(scores))]
    if groups is not None:
        parts = [np.flatnonzero(groups == group) for group in dict.fromkeys(groups.tolist())]
    n_parts: int | None = None
    for part in parts:
        monitor.update_scores(scores[part], groups=None if groups is None else groups[part])
        if n_parts is None and monitor.alarm_ is not None:
            n_parts = monitor.n_seen_ - n_before
    return n_parts, monitor.alarm_


def shown(runs: list[tuple[int | None, str | None]]) -> dict[str, str]:
    """Return the cells of a row."""
    n_parts = [n for n, _ in runs if n is not None]
    kinds = [kind for _, kind in runs if kind is not None]
    return {
        "alarms": f"{len(n_parts)} of {len(runs)}",
        "after": f"{np.median(n_parts):.0f} ({min(n_parts)} to {max(n_parts)})" if n_parts else "-",
        "about": ", ".join(f"{kind} {kinds.count(kind)}" for kind in ("bulk", "tail") if kind in kinds) or "-",
    }


if __name__ == "__main__":
    main()
