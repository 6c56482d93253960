"""Training: the fit of the density, and what rows that a fit has not seen tell of it.

Functions of tensors. The training rows are cut into folds, and each fold is looked at by a fit to the other folds:
that gives the scores that thresholds are set from, the spread of what the principal axes leave out, and the number of
axes that hold for new rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from torch import Tensor

from dfkde_sklearn._density.axes import (
    CentredRows,
    EigenPairs,
    leading_eigenpairs,
    more_than_rounding,
    principal_axes,
    span,
)
from dfkde_sklearn._density.scoring import (
    FeatureDensity,
    RowDensity,
    Settings,
    TrimmedDensity,
    Units,
    beyond_rounding,
    n_leaving,
    residual_term,
    row_density,
)
from dfkde_sklearn._threads import run_in_turn, run_on_single_cores

# Measured on features of photographs, 10 folds, 20, and one a row hold the false-alarm rate equally well.
N_FOLDS = 20
# Folds are refitted on this many first axes of the whole, which holds every set of up to 1024 rows or features exactly.
# Of more, the first quarter at most can be kept: a fold hardly bends those towards the axes that are left out, but the
# last axes have bent towards the very rows that are held out.
FOLD_WIDTH = 1024
_KEPT_SHARE = 4
# Centring a scatter matrix by its mean costs the digits by which it shrinks: past this, it is summed anew.
_CENTRING_LIMIT = 1e-4
# Axes along which the variance of new rows is more than so many times that of the training rows are fitted to these.
# Measured on features of photographs, anything from 1.5 to 2.5 finds defects about as well.
_MAX_RATIO = 2.0
# Axes along which the variance of new rows is less than so many times that of an average direction off all axes tell
# training rows from others and nothing else. It matters where noise is alike in all directions; features of
# photographs are not like that.
_MIN_SIGNAL = 1.25
# Multiplications for a fold's scatter matrix and pairs of its rows, under which threads of Python would only wait for
# one another.
_SMALL_FOLD = 2**19
_HASHED_AT_ONCE = 1024
# So many rows that a fit has not seen tell their variances to one or two per cent.
_ENOUGH = 8192

_Found = TypeVar("_Found")


class Training(NamedTuple):
    """The result of `fit`.

    fitted : FeatureDensity.
    calibration_scores : Tensor (n,), the log density of each training row from a fit without it.
    n_unrefitted : int, rows for which only their own kernel could be left out.
    n_torn : int, rows that would not be in the fold of the first row of their group if folds were consecutive rows.
    """

    fitted: FeatureDensity
    calibration_scores: Tensor
    n_unrefitted: int
    n_torn: int


class NarrowRows(NamedTuple):
    """Centred rows on so many columns that a refit costs little.

    rows : CentredRows (n, width).
    beyond : Tensor (n,), squared distances of the rows from what they are in all columns.
    units : Units, of the rows.
    groups : Tensor (n,), as `folds` takes them, or None.
    pairs : dict, by the number of a fold all eigenpairs of the others' scatter matrix, of folds where they were needed.
    """

    rows: CentredRows
    beyond: Tensor
    units: Units
    groups: Tensor | None
    pairs: dict[int, EigenPairs]

    def take(self, kept: Tensor) -> NarrowRows:
        """Return the rows where the mask `kept` (n,) is true."""
        rows, _ = self.rows.take(kept)
        groups = None if self.groups is None else self.groups[kept]
        return NarrowRows(rows, self.beyond[kept], self.units, groups, {})


class Fold(NamedTuple):
    """Rows that are left out, and the others.

    number : int, of the fold.
    where : slice or Tensor, where the rows are.
    held_out : Tensor (n, width), the rows, about the mean of the others.
    others : CentredRows.
    scatter : Tensor (width, width), of the others.
    """

    number: int
    where: slice | Tensor
    held_out: Tensor
    others: CentredRows
    scatter: Tensor


class CrossFitted(NamedTuple):
    """What fits without a row say of it; NaN where there is none.

    log_densities : Tensor (n,), without a residual term.
    squared_distances : Tensor (n,), from the principal axes.
    """

    log_densities: Tensor
    squared_distances: Tensor


class UnseenSpectrum(NamedTuple):
    """How rows that a fit has not seen spread along its principal axes.

    variances : Tensor (width,), mean squares along each axis.
    ratios : Tensor (width,), the same in units of the variances of the rows that the axes come from.
    beyond : float, mean squared distance from all these axes.
    """

    variances: Tensor
    ratios: Tensor
    beyond: float

    def n_predicted(self, n_features: int) -> int:
        """Return the number of first axes that hold for new rows, at least 1.

        Along these, new rows vary much as the training rows do, and more than along directions that no axis spans.
        """
        n_beyond = n_features - len(self.ratios)
        noise = self.beyond / n_beyond if n_beyond else 0.0
        # Single axes are noisy: ratios as the nearest increasing curve, variances as the nearest decreasing one.
        ratios = isotonic_regression(self.ratios.cpu().numpy()).x
        variances = isotonic_regression(self.variances.cpu().numpy(), increasing=False).x
        return max(1, int(((ratios <= _MAX_RATIO) & (variances >= _MIN_SIGNAL * noise)).sum()))

    def left_out(self, d: int, n_features: int) -> tuple[float, float]:
        """Return sum and sum of squares of the variances along the directions after the first `d`."""
        rest = self.variances[d:]
        n_beyond = n_features - max(d, len(self.variances))
        # Of the directions beyond all axes only the total is known.
        squares = self.beyond**2 / n_beyond if n_beyond else 0.0
        return float(rest.sum()) + self.beyond, float(rest.square().sum()) + squares


def fit(X: Tensor, n_components: int | float | Literal["auto"], settings: Settings, of_rows: Tensor) -> Training:
    """Fit the density to the training rows `X` (n, n_features), float32 or float64.

    `n_components` is the largest number of principal axes, the share of variance that they hold, or "auto": as many as
    hold for rows that a fit has not seen. Rows for which `of_rows` (n,), int64, holds the same number share a fold.

    Raises
    ------
    ValueError
        If the rows do not differ.
    """
    n, n_features = X.shape
    n_moved = n_torn(of_rows)
    groups = of_rows.to(X.device) if n_moved else None
    whole = span(X, settings.working_memory)
    scatter = whole.rows.scatter()
    offset = float((whole.mean * whole.scale).square().sum())
    units = Units(n_features, whole.scale, whole.noise, scatter.new_zeros(2), offset, X.dtype)
    narrow = None
    if isinstance(n_components, str):
        narrow = narrowed(whole.rows, scatter, FOLD_WIDTH, units, groups)
        n_sought: int | float = unseen_spectrum(narrow, units.noise, settings).n_predicted(n_features)
        if narrow.rows.width < whole.rows.width:
            n_sought = min(n_sought, FOLD_WIDTH // _KEPT_SHARE)
    else:
        n_sought = n_components
    found = row_density(whole.rows, scatter, n_sought, settings, units)
    most = max(1, n_spanned(n, groups, settings.contamination))
    if found is not None and found.density.axes.shape[1] > most:
        found = row_density(whole.rows, scatter, most, settings, units)
    if found is None:
        raise ValueError(
            f"The {n} training rows do not differ beyond rounding, so that they have no density. Give at least two "
            "distinct rows; a constant offset far larger than the variation hides it."
        )
    width = max(FOLD_WIDTH, _KEPT_SHARE * found.density.axes.shape[1])
    if narrow is None or narrow.rows.width < min(width, whole.rows.width):
        narrow = narrowed(whole.rows, scatter, width, units, groups)
    scores = cross_fitted(narrow, found, settings)
    density = with_unseen_residuals(found, scores, narrow, settings, units)
    log_densities = density.with_residual(scores.log_densities, scores.squared_distances)
    if len(unscored := scores.squared_distances.isnan().nonzero()[:, 0]):
        log_densities[unscored] = density.leave_one_out(whole.rows.rows(), units, settings.working_memory)[unscored]
    fitted = FeatureDensity(whole.mean, whole.scale, density.in_features(whole))
    return Training(fitted, log_densities, len(unscored), n_moved)


def copies(table: NDArray[np.number]) -> Tensor:
    """Return for each row of a table (n, n_features) the place of the first row that equals it, (n,), int64."""
    first: dict[int, int] = {}

    def hashes() -> Iterator[int]:
        for start in range(0, len(table), _HASHED_AT_ONCE):
            # Adding zero makes one number of 0 and -0.
            yield from (hash(row.tobytes()) for row in table[start : start + _HASHED_AT_ONCE] + 0.0)

    # Rows that differ and have one hash, of 64 bits, do no harm: they share a fold.
    return torch.tensor([first.setdefault(of_row, i) for i, of_row in enumerate(hashes())])


def runs(n: int) -> list[slice]:
    """Return `N_FOLDS` runs of `n` consecutive places; `n` of them where that is fewer."""
    n_runs = min(N_FOLDS, n)
    return [slice(*ends) for ends in pairwise(round(i * n / n_runs) for i in range(n_runs + 1))]


def folds(n: int, groups: Tensor | None = None) -> Sequence[slice | Tensor]:
    """Return where the rows of each fold are: runs of consecutive rows.

    Where `groups` (n,) holds a number for each row, folds are runs of groups, in order of their numbers: rows of one
    group share a fold.
    """
    if groups is None:
        return runs(n)
    numbers, group = groups.unique(return_inverse=True)
    return [((run.start <= group) & (group < run.stop)).nonzero()[:, 0] for run in runs(len(numbers))]


def n_torn(groups: Tensor) -> int:
    """Return how many rows lie in another run of consecutive rows than the first row of their group (n,)."""
    places = torch.arange(len(groups))
    _, group = groups.unique(return_inverse=True)
    first = places.new_full((int(group.max()) + 1,), len(groups)).scatter_reduce(0, group, places, "amin")
    run_of = torch.cat([torch.full((run.stop - run.start,), i) for i, run in enumerate(runs(len(groups)))])
    return int((run_of != run_of[first[group]]).sum())


def n_spanned(n: int, groups: Tensor | None, contamination: float) -> int:
    """Return the number of axes that training rows in general position have without any one fold.

    Rows of a group count as one, and a contamination takes its share off them.
    """
    numbers = torch.arange(n) if groups is None else groups
    n_groups = len(numbers.unique())

    def n_left(where: slice | Tensor) -> int:
        held_out = numbers[where]
        return n_groups - len(held_out.unique()) - n_leaving(contamination, n - len(held_out))

    return min(map(n_left, folds(n, groups))) - 1


def narrowed(rows: CentredRows, scatter: Tensor, width: int, units: Units, groups: Tensor | None) -> NarrowRows:
    """Return the rows on at most `width` of their first axes."""
    if rows.width <= width:
        return NarrowRows(rows, scatter.new_zeros(len(rows)), units, groups, {})
    leading = principal_axes(rows, width, units.noise, scatter)
    beyond = torch.cat([(block - (block @ leading.axes) @ leading.axes.T).square().sum(1) for block in rows.blocks()])
    on_axes = CentredRows(leading.coordinates, scatter.new_zeros(leading.axes.shape[1]), 1.0, rows.block_rows)
    return NarrowRows(on_axes, beyond, units._replace(beyond=leading.left_out), groups, {})


def of_folds(
    rows: CentredRows, look: Callable[[Fold], _Found], working_memory: int, groups: Tensor | None = None
) -> list[_Found]:
    """Return what `look` makes of each of the `folds` of the rows.

    On the CPU several folds at a time, each on one core, where `working_memory` allows as many as keep half the cores
    busy.
    """
    n, width = len(rows), rows.width
    places = folds(n, groups)
    n_folds = len(places)
    # Summed over the other folds, not subtracted from the whole: a far outlier's square would swallow the rest.
    scatters = _sums_of_others([rows.part(where).scatter() for where in places])
    found: dict[int, _Found] = {}

    def look_at(i: int) -> None:
        found[i] = look(_fold(rows, i, places[i], scatters[i]))

    # The rows, the scatter matrix, its eigenvectors, and what their computation takes.
    n_at_once = working_memory // (8 * width * (n + 5 * width))
    if rows.X.is_cpu and 2 * n_at_once >= min(torch.get_num_threads(), n_folds):
        is_small = n * (width**2 + n) < _SMALL_FOLD
        run_on_single_cores(1 if is_small else n_at_once)(look_at, range(n_folds))
    else:
        run_in_turn(look_at, range(n_folds))
    return [found[i] for i in range(n_folds)]


def _fold(rows: CentredRows, number: int, where: slice | Tensor, others_scatter: Tensor) -> Fold:
    in_others = torch.ones(len(rows), dtype=torch.bool, device=others_scatter.device)
    in_others[where] = False
    others, mean = rows.take(in_others)
    others_centred = others_scatter - len(others) * torch.outer(mean, mean)
    if others_centred.trace() < _CENTRING_LIMIT * others_scatter.trace():
        others_centred = others.scatter()
    return Fold(number, where, rows.part(where).rows() - mean, others, others_centred)


def unseen_spectrum(narrow: NarrowRows, noise: float, settings: Settings) -> UnseenSpectrum:
    """Return the spread of rows along principal axes of the other rows; of many rows, by some `_ENOUGH` of them."""
    are_kept = 8 * N_FOLDS * narrow.rows.width**2 <= settings.working_memory
    step = -(-len(narrow.rows) // _ENOUGH)

    def spread(fold: Fold) -> tuple[Tensor, Tensor, Tensor]:
        pairs = narrow.pairs.get(fold.number) or leading_eigenpairs(fold.scatter, narrow.rows.width)
        if are_kept:
            narrow.pairs[fold.number] = pairs
        eigenvalues, axes = more_than_rounding(pairs, noise)
        held_out = fold.held_out[::step]
        on_axes = held_out @ axes
        beyond = (held_out - on_axes @ axes.T).square().sum(1) + narrow.beyond[fold.where][::step]
        return on_axes.square(), eigenvalues / (len(fold.others) - 1), beyond

    spreads = of_folds(narrow.rows, spread, settings.working_memory, narrow.groups)
    squares, variances, beyond = zip(*spreads, strict=True)
    # Folds may have an axis or two more than others: what lies along these goes to what lies beyond the axes.
    width = min(map(len, variances))
    along = torch.cat([of_fold[:, :width] for of_fold in squares])
    ratios = torch.cat(
        [of_fold[:, :width] / of_axes[:width] for of_fold, of_axes in zip(squares, variances, strict=True)]
    )
    rest = torch.cat([of_fold[:, width:].sum(1) for of_fold in squares]) + torch.cat(beyond)
    return UnseenSpectrum(_bounded_mean(along), _bounded_mean(ratios), float(_bounded_mean(rest)))


def cross_fitted(narrow: NarrowRows, whole: TrimmedDensity, settings: Settings) -> CrossFitted:
    """Return the log density and the residual of each training row by a fit without it.

    The rows are cut into folds, and each fold is scored by a fit to the other folds: their principal axes,
    scale, whitening, contamination and kernels. In-sample scores are useless for a threshold: in many dimensions a
    row's own kernel dominates its density. Leaving out that kernel alone is not enough: the axes still bend towards
    the row.

    Parameters
    ----------
    narrow : NarrowRows
        The training rows.
    whole : TrimmedDensity
        The fit to all of them.
    settings : Settings
        What it was asked for.

    Returns
    -------
    CrossFitted
        NaN where a fold's rows are the only ones on some axis, so that there is no fit without them.
    """
    d = whole.density.axes.shape[1]
    # A searched bandwidth is one number learnt from all rows: searching it again in each fold hardly changes it.
    if settings.bandwidth == "loo":
        settings = settings._replace(bandwidth=whole.density.bandwidth)
    log_densities = whole.density.kernel_centers.new_full((len(narrow.rows),), torch.nan)
    squared_distances = narrow.beyond.new_full((len(narrow.rows),), torch.nan)

    def score(fold: Fold) -> None:
        pairs = narrow.pairs.get(fold.number)
        found = row_density(fold.others, fold.scatter, d, settings, narrow.units, pairs)
        if found is not None and found.density.axes.shape[1] == d:
            coordinates, distances = found.density.split(fold.held_out)
            whitened = found.density.whiten(coordinates)
            log_densities[fold.where] = found.density.kernel_log_density(whitened, settings.working_memory)
            distances = distances + narrow.beyond[fold.where]
            offset, dtype = narrow.units.offset, narrow.units.dtype
            squared_distances[fold.where] = beyond_rounding(distances, coordinates, offset, dtype)

    of_folds(narrow.rows, score, settings.working_memory, narrow.groups)
    return CrossFitted(log_densities, squared_distances)


def with_unseen_residuals(
    whole: TrimmedDensity, scores: CrossFitted, narrow: NarrowRows, settings: Settings, units: Units
) -> RowDensity:
    """Return the density with residual terms learnt from the rows that a fit has not seen.

    Training rows lie nearer to axes that bend towards them than new rows do, the more so the fewer they are.
    """
    density, kept = whole
    unseen = scores.squared_distances[kept & scores.squared_distances.isfinite()]
    if density.gaussian_residual is None or not len(unseen):
        return density
    n, d = len(kept), density.axes.shape[1]
    gaussian = residual_term("gaussian", float(_bounded_mean(unseen)), torch.nan, n, d, units)
    if settings.residual != "box":
        return replace(density, gaussian_residual=gaussian, residual=gaussian if settings.residual else None)
    if not kept.all():
        narrow = narrow.take(kept)
    total, squares = unseen_spectrum(narrow, units.noise, settings).left_out(d, units.n_features)
    box = residual_term("box", total, squares, n, d, units)
    return replace(density, gaussian_residual=gaussian, residual=box)


def _sums_of_others(terms: list[Tensor]) -> list[Tensor]:
    """Return, for each term, the sum of all the others."""
    before, after = [torch.zeros_like(terms[0])], [torch.zeros_like(terms[0])]
    for term, last in zip(terms[:-1], terms[:0:-1], strict=True):
        before.append(before[-1] + term)
        after.append(after[-1] + last)
    return [left + right for left, right in zip(before, after[::-1], strict=True)]


def _bounded_mean(squares: Tensor) -> Tensor:
    """Return the mean over the first axis of squares of which none counts for more than 50 times their median.

    Normal rows stay below: the mean has its usual value. A row from elsewhere cannot carry it away.
    """
    medians = squares.median(0).values if squares.ndim > 1 else squares.median()
    return squares.minimum(50 * medians).mean(0)
