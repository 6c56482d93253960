"""``dfkde search``: which layers, components and bandwidth suit the parts."""

from __future__ import annotations

import argparse
import shlex
import time
import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dfkde_sklearn._cli.arguments import (
    POOLED,
    POSITIONS,
    add_batch_size_argument,
    add_detector_argument,
    add_force_argument,
    add_quiet_argument,
    add_reading_arguments,
    bandwidth,
    detector_class,
    file_path,
    layers,
    n_components,
    positive,
    weights_advice,
)
from dfkde_sklearn._cli.exit_codes import DONE
from dfkde_sklearn._cli.files import check_new
from dfkde_sklearn._cli.groups import add_groups_argument, image_groups
from dfkde_sklearn._cli.images import add_images_argument, described
from dfkde_sklearn._cli.models import save_detector
from dfkde_sklearn._cli.output import print_facts, print_heading, print_line, print_table, say, shows_progress
from dfkde_sklearn._cli.training import (
    DEFAULT_FEATURES,
    SCATTERING,
    WEIGHTS_ADVICE,
    add_features_arguments,
    feature_extractor,
    training_images,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# What is tried where the command line says nothing; the defaults of the detectors come first.
N_COMPONENTS: tuple[int | float | str, ...] = ("auto", 16, 64)
BANDWIDTHS: dict[str, tuple[float | str, ...]] = {POSITIONS: ("scott", 0.5), POOLED: ("scott", "loo")}
# Strides of the layers that are tried, alone and after a neighbour. At positions, late layers find few defects.
STRIDES = {POSITIONS: (8, 16), POOLED: (8, 16, 32)}
N_FOLDS = 3
# A fit takes three images that differ, and a fold some to be measured on.
_MIN_IMAGES = 4 * N_FOLDS
# Bytes of features that are held at once.
_MAX_BYTES = 2**31


class Candidate(NamedTuple):
    """A setting, and how well it did.

    Parameters
    ----------
    layers : list of str or None
        None are the default ones.
    name : str
        Of the layers.
    parameters : dict
        Of the detector.
    aurocs : list of float
        One for each fold.
    seconds : float
        What fits and scores took.
    """

    layers: list[str] | None
    name: str
    parameters: dict[str, Any]
    aurocs: list[float]
    seconds: float

    @property
    def mean(self) -> float:
        """The mean AUROC of the folds."""
        return sum(self.aurocs) / len(self.aurocs)

    @property
    def error(self) -> float:
        """The standard error of that mean; 0 of a single fold."""
        n = len(self.aurocs)
        variance = sum((auroc - self.mean) ** 2 for auroc in self.aurocs) / max(1, n - 1)
        return float((variance / n) ** 0.5)


def add_parser(commands: Any) -> None:
    """Add the command and its arguments."""
    command = commands.add_parser(
        "search",
        help="find the layers, components and bandwidth that suit your parts",
        description="Try layers of the backbone, numbers of components and bandwidths on good images, and say which "
        "dfkde fit should use. Each setting learns from two thirds of the images, and has to tell the others from "
        "copies of them with a pasted piece: stand-ins for defects, since good images alone cannot say which layers "
        "find any. Where the images are a folder in the MVTec layout with a folder test, the defects there are used "
        "instead. Each image passes through the network once.",
        epilog="Example: dfkde search parts/good -o best.safetensors. The best of many settings looks a little better "
        "than it is: measure it with dfkde evaluate on images that were not used here.",
    )
    add_images_argument(command, "good images, or one folder in the MVTec layout, as dfkde fit takes them")
    command.add_argument(
        "-o",
        "--model",
        type=file_path,
        metavar="FILE",
        help="also fit the best setting to all good images, and save it",
    )
    group = command.add_argument_group("what is tried; each may be given several times")
    group.add_argument(
        "--layers",
        type=layers,
        action="append",
        metavar="A,B,...",
        help="layers of the backbone, see dfkde layers (default: the default ones, stages of stride 8 and 16, with "
        "--detector pooled also 32, and pairs of neighbours)",
    )
    group.add_argument(
        "--n-components",
        type=n_components,
        action="append",
        metavar="N",
        help=f"of the pooled detector, as in dfkde fit (default: {', '.join(map(str, N_COMPONENTS))})",
    )
    group.add_argument(
        "--bandwidth",
        type=bandwidth,
        action="append",
        metavar="H",
        help="as in dfkde fit (default: "
        + "; ".join(f"{', '.join(map(str, values))} for {name}" for name, values in BANDWIDTHS.items())
        + ")",
    )
    command.add_argument(
        "--max-images",
        type=positive,
        default=100,
        metavar="N",
        help="good images that are used for the search, evenly drawn (default: %(default)s)",
    )
    command.add_argument(
        "--seed", type=int, default=0, help="determines which pieces are pasted where (default: %(default)s)"
    )
    add_groups_argument(command, "so that they are on one side of each split")
    add_detector_argument(command)
    group = command.add_argument_group("the feature extractor")
    add_features_arguments(group)
    add_batch_size_argument(group)
    add_reading_arguments(group)
    add_force_argument(command)
    add_quiet_argument(command)


def run(options: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    import numpy as np

    from dfkde_sklearn._cli.pasting import WithPastedPieces
    from dfkde_sklearn._groups import warn_of_near_duplicates
    from dfkde_sklearn._images import as_images

    if options.n_components is not None and options.detector != POOLED:
        raise ValueError("--n-components is for --detector pooled. Leave it out, or choose that one.")
    good, test = training_images(options)
    groups = image_groups(options, good)
    if options.model is not None:
        check_new(options.model, options.force)
    if len(good) < _MIN_IMAGES:
        raise ValueError(f"{len(good)} good images are too few for a search: at least {_MIN_IMAGES} are needed.")
    if test is not None and len(np.unique(test.y_test)) < 2:
        test = None
    drawn = np.unique(np.linspace(0, len(good) - 1, min(len(good), options.max_images)).round().astype(int))
    used, n = [good[i] for i in drawn], len(drawn)
    used_groups = None if groups is None else [groups[i] for i in drawn]
    if test is None:
        images: Any = WithPastedPieces(as_images(used, options.white_level), options.seed)
        is_bad = np.repeat([0, 1], n)
        splits = [(train, np.concatenate([held_out, n + held_out])) for train, held_out in _folds(n, used_groups)]
        measure = f"AUROC of good images, and of their copies with a pasted piece; {N_FOLDS} folds"
    else:
        images = [*used, *test.X_test]
        is_bad = np.concatenate([np.zeros(n, dtype=int), test.y_test])
        splits = [(np.arange(n), n + np.arange(len(test.y_test)))]
        measure = f"AUROC of the images in {Path(options.images[0], 'test')}"
    with weights_advice(WEIGHTS_ADVICE):
        extractors = _extractors(options)
        features = _features(options, list(extractors.values()), images)
    if groups is None:
        warn_of_near_duplicates(features[0][:n].reshape(n, -1), "images")
    candidates = _candidates(options, extractors, features, is_bad, splits, used_groups)
    best, is_default = _recommended(options, candidates)

    print_facts({"Good images": described(used, used_groups), "Measured by": measure})
    _print_candidates(candidates)
    print_heading("Use:")
    print_line(_fit_command(options, best))
    if is_default:
        print_line()
        print_line("No other setting is better than the default one by more than the standard error.")
    if options.model is not None:
        say(options, f"Fitting the detector to {len(good)} images")
        extractor = feature_extractor(options, best.layers)
        detector = detector_class(options)(extractor, **best.parameters, device=options.device, random_state=0)
        save_detector(detector.fit(good, groups=groups), options.model, options.force)
        print_line()
        print_facts({"Model": f"{options.model}, for dfkde score"})
    return DONE


def _folds(n: int, groups: Sequence[str] | None) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield the images (n,) to learn from and those held out, in consecutive folds or by whole groups."""
    import numpy as np
    from sklearn.model_selection import GroupKFold, KFold

    folds = KFold(N_FOLDS) if groups is None else GroupKFold(N_FOLDS)
    yield from folds.split(np.zeros(n), groups=groups)


def _extractors(options: argparse.Namespace) -> dict[str, Any]:
    """Return fitted feature extractors, which differ in their layers, by the names of these."""
    from dfkde_sklearn._features.layers import feature_stages

    if options.features == SCATTERING:
        # It has no layers, and says so where some are given.
        return {SCATTERING: _fitted(options, options.layers[0] if options.layers else None)}
    try:
        default = _fitted(options, None)
    except ValueError:
        # A network that states no default layers.
        if options.layers is None:
            raise
        default = None
    if options.layers is not None:
        sets = options.layers
    else:
        with default._lent_backbone() as backbone:
            stages = feature_stages(backbone.network)
        sets = [default.layers_, *_layer_sets(stages, STRIDES[options.detector])]
    extractors = [
        default if default is not None and layers_ == default.layers_ else _fitted(options, layers_) for layers_ in sets
    ]
    return {_name(extractor): extractor for extractor in extractors}


def _fitted(options: argparse.Namespace, layers_: list[str] | None) -> Any:
    extractor: Any = feature_extractor(options, layers_)
    extractor._validate_params()
    extractor._fit()
    return extractor


def _name(extractor: Any) -> str:
    return ",".join(extractor.layers_) or "pooled embedding"


def _layer_sets(stages: dict[str, int], strides: Sequence[int]) -> list[list[str]]:
    """Return the layers that are tried, from the strides of the stages of a network and those of interest."""
    names = list(stages)
    if len(set(stages.values())) == 1:
        # Of a transformer, whose blocks have one stride, three depths.
        depths = [names[round(len(names) * depth) - 1] for depth in (0.5, 0.75, 1)]
        return [[name] for name in dict.fromkeys(depths)]
    single = [[name] for name in names if stages[name] in strides]
    pairs = [list(pair) for pair in pairwise(names) if stages[pair[1]] in strides]
    return [*single, *pairs]


def _features(options: argparse.Namespace, extractors: list[Any], images: Any) -> list[NDArray[np.float32]]:
    """Return the features of the images by each extractor, from one pass of each image."""
    from dfkde_sklearn._features.network import described_together

    n_bytes = 4 * len(images) * sum(extractor.n_features_out_ for extractor in extractors)
    if n_bytes > _MAX_BYTES:
        raise ValueError(
            f"{len(extractors)} sets of layers describe {len(images)} images by {n_bytes / 2**30:.1f} GiB of features, "
            f"over {_MAX_BYTES / 2**30:.0f} GiB. Try fewer of them by --layers, or use fewer images: --max-images "
            f"{max(_MIN_IMAGES, options.max_images * _MAX_BYTES // n_bytes)}."
        )
    say(options, f"Describing {len(images)} images by {len(extractors)} sets of layers, in one pass of each")
    if options.features == SCATTERING:
        return [extractors[0].transform(images)]
    return described_together(extractors, images)


def _candidates(
    options: argparse.Namespace,
    extractors: dict[str, Any],
    features: list[NDArray[np.float32]],
    is_bad: NDArray[np.int64],
    splits: list[tuple[NDArray[np.int64], NDArray[np.int64]]],
    groups: list[str] | None,
) -> list[Candidate]:
    """Return all settings, each fitted and measured on all splits."""
    import numpy as np
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import ParameterGrid
    from tqdm import tqdm

    from dfkde_sklearn._patch_detector import normalization_for

    kind = detector_class(options)
    grid: dict[str, Any] = {"bandwidth": options.bandwidth or BANDWIDTHS[options.detector]}
    if options.detector == POOLED:
        grid["n_components"] = options.n_components or N_COMPONENTS
    settings = list(ParameterGrid(grid))
    candidates = []
    with tqdm(
        total=len(extractors) * len(settings) * len(splits), unit="fit", disable=not shows_progress(options)
    ) as progress:
        for (name, extractor), rows in zip(extractors.items(), features, strict=True):
            # What a detector that is given the extractor does.
            fixed = {} if options.detector == POOLED else {"normalization": normalization_for(extractor)}
            for parameters in settings:
                detector = kind(features=None, **parameters, **fixed, device=options.device, random_state=0)
                if options.detector == POSITIONS:
                    # Of no interest here is the threshold, for which a fit would refit ten times.
                    detector._n_folds = 2
                start, aurocs = time.perf_counter(), []
                for train, held_out in splits:
                    of_train = None if groups is None else np.array(groups)[train]
                    with warnings.catch_warnings():
                        # Of this search, not of the user's images: they are the same for all settings.
                        warnings.simplefilter("ignore", UserWarning)
                        scores = detector.fit(rows[train], groups=of_train).score_samples(rows[held_out])
                    aurocs.append(float(roc_auc_score(is_bad[held_out], -scores)))
                    progress.update()
                layers_ = None if getattr(extractor, "layers", None) is None else extractor.layers_
                candidates.append(Candidate(layers_, name, parameters, aurocs, time.perf_counter() - start))
    return candidates


def _recommended(options: argparse.Namespace, candidates: list[Candidate]) -> tuple[Candidate, bool]:
    """Return the setting to use, and whether that is the default one, which another has to beat clearly."""
    best = max(candidates, key=lambda candidate: candidate.mean)
    defaults = detector_class(options)().get_params(deep=False)
    for candidate in candidates:
        is_default = candidate.layers is None and candidate.parameters.items() <= defaults.items()
        if is_default and candidate.mean >= best.mean - best.error:
            return candidate, True
    return best, False


def _print_candidates(candidates: list[Candidate]) -> None:
    names = sorted(candidates[0].parameters, reverse=True)
    print_table(
        "The settings, the best first:",
        ("layers", *(name.replace("_", " ") for name in names), "AUROC", "standard error", "seconds"),
        [
            (
                candidate.name,
                *(str(candidate.parameters[name]) for name in names),
                f"{candidate.mean:.3f}",
                f"{candidate.error:.3f}" if len(candidate.aurocs) > 1 else "-",
                f"{candidate.seconds:.1f}",
            )
            for candidate in sorted(candidates, key=lambda candidate: -candidate.mean)
        ],
    )


def _fit_command(options: argparse.Namespace, best: Candidate) -> str:
    """Return the command that fits a detector with a setting."""
    words = ["dfkde", "fit", *(options.images or [])]
    for name, default in (
        ("files_from", None),
        ("detector", POSITIONS),
        ("features", DEFAULT_FEATURES),
        ("weights", None),
        ("image_size", None),
        ("crop", None),
        ("reducing_gap", None),
        ("engine", None),
        ("white_level", None),
        ("groups", None),
    ):
        value = getattr(options, name)
        if value not in (None, default):
            words += [f"--{name.replace('_', '-')}", str(value)]
    if options.null:
        words.append("-0")
    if best.layers is not None:
        words += ["--layers", ",".join(best.layers)]
    defaults = detector_class(options)().get_params(deep=False)
    for name, value in best.parameters.items():
        if value != defaults[name]:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)
