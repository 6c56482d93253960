"""Of how many detectors the false-alarm rate on new rows is above the one asked for, on average and with confidence.

    python benchmarks/promises.py --mvtec FOLDER
    python benchmarks/promises.py --tiles FOLDER --weights FILE
    python benchmarks/promises.py --quick

Folders and file are those of `real_data.py`, which see. Prints tables in markdown, and then the claims, asserted.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from false_alarms import DETECTORS
from numpy.typing import NDArray
from real_data import (
    ImageSet,
    NormalAndAnomalous,
    check_claims,
    group_splits,
    load_categories,
    load_images,
    mobilenet,
    option_parser,
    parse,
    print_heading,
    print_table,
    print_versions,
)
from scipy.stats import betabinom, binom
from threadpoolctl import threadpool_limits

from dfkde_sklearn import DFKDEDetector, TimmFeatures
from dfkde_sklearn._calibration import conditional_p_values, threshold_at_rate

TARGET_FPR, CONFIDENCE = 0.05, 0.9
SIZES = (60, 100, 209, 391, 1000)
# Fewer held-out rows than these tell little about a rate.
MIN_HELD_OUT = 100
# Generated rows on which the rate of a detector is measured: its standard error is 0.0015.
N_NEW = 20000
N_GENERATED_FEATURES = 64
# Of the tiles: 40 are too few for 0.05 with a confidence of 0.9. Generated ones are fewer still.
OF_TILES, OF_GENERATED_TILES = 0.1, 0.2
# (training rows, held-out normal rows, anomalous rows), by a seed.
Draw = Callable[[int, int], tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]


def main() -> None:
    parser = option_parser(__doc__, "mvtec", "tiles", "weights")
    parser.add_argument("--detectors", type=int, default=300, help="of each row (%(default)s; with --quick 3)")
    options = parse(parser)
    n_detectors = 3 if options.quick else options.detectors
    start = time.perf_counter()
    warnings.filterwarnings("ignore", message=".*near-duplicate")
    print_versions()
    claims: dict[str, bool] = {}
    # Matrices as small as these are done sooner by one thread, and much sooner where other work runs beside.
    torch.set_num_threads(1)
    with threadpool_limits(1):
        if options.mvtec:
            claims |= kept_by_rows(load_categories(options.mvtec), n_detectors)
        if options.tiles:
            images = load_images(options.tiles)
            network = TimmFeatures(mobilenet(options.weights), pooling=None)
            rate = OF_GENERATED_TILES if options.quick else OF_TILES
            # Fits at positions take longer.
            claims |= kept_by_parts(images, network.fit_transform(images.paths.tolist()), n_detectors // 6 + 1, rate)
    check_claims(claims, time.perf_counter() - start, quick=options.quick)


def kept_by_rows(categories: Mapping[str, NormalAndAnomalous], n_detectors: int) -> dict[str, bool]:
    """Print the shares of detectors whose rate is above the one asked for; return the claims on them."""
    mixed = [np.concatenate(parts) for parts in zip(*categories.values(), strict=True)]
    n_each = max(1, n_detectors // len(categories))
    data: dict[str, list[tuple[Draw, int, int]]] = {
        "generated": [(generated, N_NEW + max(SIZES), n_detectors)],
        "each category": [(drawn_from(*rows), len(rows[0]), n_each) for rows in categories.values()],
        "all categories": [(drawn_from(*mixed), len(mixed[0]), max(1, n_detectors // 2))],
    }
    rows: dict[str, dict[str, float | str]] = {}
    claims = {}
    for name, parts in data.items():
        for n in SIZES:
            if any(n_normal < n + MIN_HELD_OUT for _, n_normal, _ in parts):
                continue
            runs = [run for draw, _, n_runs in parts for run in answers(draw, n, n_runs)]
            mean = {column: float(np.mean([run[column] for run in runs])) for column in runs[0]}
            rows[f"{name}, N = {n}"] = dict(mean)
            claim = f"{name}, N = {n}: above: {mean['above']:.3f}, more than {mean['above, 0.9']:.3f} with confidence"
            claims[claim] = mean["above"] > mean["above, 0.9"]
            for column, expected in (("above, 0.9", mean["law"]), ("p-values, 0.9", mean["law of p-values"])):
                # Few held-out rows tell a rate only roughly, and more seem above than are.
                expected = max(1 - CONFIDENCE, expected)
                limit = expected + 3 * math.sqrt(expected * (1 - expected) / len(runs))
                claims[f"{name}, N = {n}: {column}: {mean[column]:.3f}, at most {limit:.3f}"] = mean[column] <= limit
    print_heading(
        "Generated rows and ResNet-18 features of MVTec AD: detectors above target_fpr=0.05",
        "--mvtec FOLDER",
        f"N normal rows drawn at random for training, rates measured on {N_NEW} generated ones, or on all other normal "
        f"ones; {n_detectors} detectors, of all categories as one {n_detectors // 2}. Alarms: the mean rate; above: "
        "the share of detectors whose rate is above 0.05; found: the share of the anomalous rows; for confidence=None, "
        "and for 0.9. P-values, 0.9: the share of detectors with p-values of at most p for more than the share p of "
        "the rows, for any p. Law: what is above where scores are independent, and rates measured on as many rows.",
    )
    print_table("data", rows, "promises_rows")
    return claims


def answers(draw: Draw, n: int, n_detectors: int) -> list[dict[str, float]]:
    """Return rates, whether they are above the ones promised, and found shares, of each detector."""
    runs = []
    for seed in range(n_detectors):
        train, held_out, anomalous = draw(n, seed)
        detector = DFKDEDetector(features=None, target_fpr=TARGET_FPR, confidence=CONFIDENCE).fit(train)
        good, bad = detector.score_samples(held_out), detector.score_samples(anomalous)
        average = threshold_at_rate(detector.calibration_scores_, TARGET_FPR)
        alarms, confident_alarms = float((good < average).mean()), float((good < detector.offset_).mean())
        runs.append(
            {
                "alarms": alarms,
                "above": float(alarms > TARGET_FPR),
                "found": float((bad < average).mean()),
                "alarms, 0.9": confident_alarms,
                "above, 0.9": float(confident_alarms > TARGET_FPR),
                "law": share_above(TARGET_FPR, n, len(good)),
                "found, 0.9": float((bad < detector.offset_).mean()),
                "p-values, 0.9": float(any_share_above(good, detector.calibration_scores_)),
                "law of p-values": p_values_above(n, len(good)),
            }
        )
    return runs


def any_share_above(scores: NDArray[Any], calibration_scores: NDArray[Any]) -> bool:
    """Return whether for any p more than the share p of the scores has a conditional p-value of at most p."""
    p_values = np.sort(conditional_p_values(scores, calibration_scores, CONFIDENCE))
    return bool((np.arange(1, len(p_values) + 1) > p_values * len(p_values)).any())


@cache
def p_values_above(n: int, n_held_out: int) -> float:
    """Return the probability of that for independent scores, by simulation."""
    rng = np.random.default_rng(0)
    return float(np.mean([any_share_above(rng.uniform(size=n_held_out), rng.uniform(size=n)) for _ in range(400)]))


@cache
def share_above(rate: float, n: int, n_held_out: int) -> float:
    """Return the probability that more than the share `rate` of held-out scores lies below the rank of `n` scores."""
    rank = binom.ppf(1 - CONFIDENCE, n, rate)
    return float(betabinom.sf(math.floor(rate * n_held_out), n_held_out, rank, n + 1 - rank))


def generated(n: int, seed: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return rows that vary in many directions, and anomalous ones that vary a little in all besides."""
    rng = np.random.default_rng((n, seed))
    scales = 1 / np.arange(1, N_GENERATED_FEATURES + 1) ** 0.5
    rows = rng.normal(size=(n + N_NEW + 1000, N_GENERATED_FEATURES)) * scales
    anomalous = rows[-1000:] + rng.normal(0, 0.17, (1000, N_GENERATED_FEATURES))
    return rows[:n], rows[n : n + N_NEW], anomalous


def drawn_from(normal: NDArray[Any], anomalous: NDArray[Any]) -> Draw:
    def draw(n: int, seed: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        order = np.random.default_rng((n, seed)).permutation(len(normal))
        return normal[order[:n]], normal[order[n:]], anomalous

    return draw


def kept_by_parts(images: ImageSet, maps: NDArray[np.float32], n_splits: int, rate: float) -> dict[str, bool]:
    """Print the shares of photographs and of tiles that are called anomalous; return the claims on them."""
    rows: dict[str, dict[str, float | str]] = {}
    claims = {}
    # Drawn at random, since those as foldered are one split of many.
    splits = group_splits(images, n_splits)[1:]
    n_tiles, n_new = (len(np.unique(images.groups[places])) for places in splits[0])
    expected = share_above(rate, n_tiles, n_new)
    limit = expected + 3 * math.sqrt(expected * (1 - expected) / len(splits))
    for name, (make, pool) in DETECTORS.items():
        runs = [shares_of_split(make, pool(maps), images, *split, seed, rate) for seed, split in enumerate(splits)]
        for setting in runs[0]:
            of_runs = np.array([run[setting] for run in runs])
            photographs, tiles, found = of_runs.mean(0)
            above = float((of_runs[:, 1] > rate).mean())
            row = f"`{name}`, {setting}"
            rows[row] = {"photographs": photographs, "tiles": tiles, "splits above": above, "found": found}
            if setting == "confidence 0.9, groups":
                claims[f"{row}: {above:.3f} of the splits above, at most {limit:.3f}"] = above <= limit
            if setting == "confidence 0.9, no groups":
                claims[f"{row}: {above:.3f} of the splits above, at least 0.8"] = above >= 0.8
            if setting == "p-values, groups":
                claims[f"{row}: {photographs:.3f} of the photographs, at most {rate + 0.03:.2f}"] = bool(
                    photographs <= rate + 0.03
                )
    print_heading(
        f"Magnetic tiles: good photographs of new tiles called anomalous, for target_fpr={rate}",
        "--tiles FOLDER --weights FILE",
        f"Trained on the good photographs of {n_tiles} tiles drawn at random, in random order, tested on those of "
        f"{n_new} others; {len(splits)} splits. Photographs: the share of those of a tile, each tile counting once; "
        f"tiles: those with any photograph called anomalous; splits above: with more than {rate} of the tiles, by the "
        f"law {expected:.3f} with confidence 0.9 and groups; found: the share of all defective photographs. p-values: "
        f"of at most {rate}. MobileNetV2, layers for positions; DFKDEDetector: their mean over positions.",
    )
    print_table("detector", rows, "promises_tiles")
    return claims


def shares_of_split(
    make: Any,
    features: NDArray[np.float32],
    images: ImageSet,
    train: NDArray[np.int64],
    held_out: NDArray[np.int64],
    seed: int,
    rate: float,
) -> dict[str, tuple[float, float, float]]:
    """Return the shares of photographs, tiles and defects called anomalous, by what the answers rest on."""
    train = np.random.default_rng(seed).permutation(train)
    shares = {}
    for groups in ("groups", "no groups"):
        detector = make(features=None, target_fpr=rate, confidence=CONFIDENCE)
        detector.fit(features[train], groups=images.groups[train] if groups == "groups" else None)
        good, bad = (detector.assess(features[places]) for places in (held_out, images.is_defect))
        average = threshold_at_rate(detector.calibration_scores_, rate)
        answers = {
            "average": (good.log_density < average, bad.log_density < average),
            "confidence 0.9": (good.label == -1, bad.label == -1),
            "p-values": (good.p_value <= rate, bad.p_value <= rate),
        }
        for name, (is_alarm, is_found) in answers.items():
            of_tiles = [is_alarm[images.groups[held_out] == tile] for tile in np.unique(images.groups[held_out])]
            shares[f"{name}, {groups}"] = (
                float(np.mean([of_tile.mean() for of_tile in of_tiles])),
                float(np.mean([of_tile.any() for of_tile in of_tiles])),
                float(is_found.mean()),
            )
    return shares


if __name__ == "__main__":
    main()
