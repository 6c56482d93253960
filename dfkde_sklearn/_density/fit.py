"""The fit of a density to the rows of training features, as a recipe of seven steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

from torch import Tensor

from dfkde_sklearn._density.axes import span
from dfkde_sklearn._density.eigen import Scatter
from dfkde_sklearn._density.estimate import Settings, feature_density, row_density
from dfkde_sklearn._density.folds import Folds, fold_places, n_moved
from dfkde_sklearn._density.held_out import calibration_scores, cross_fitted, held_out_spectrum, with_held_out_residuals
from dfkde_sklearn._density.scoring import FeatureDensity
from dfkde_sklearn._kernels.bandwidth import leave_one_out_bandwidth

# Folds are refitted on this many first principal axes of all rows, which is exact for up to 1024 rows or features.
# Of more, "auto" keeps the first quarter at most: a fold hardly bends those towards the axes that are dropped, but the
# last axes have bent towards the very rows that are held out.
FOLD_WIDTH = 1024
_WIDTH_PER_AXIS = 4

_NO_DIFFERENCE = (
    "The {} training rows do not differ beyond rounding, so that they have no density. Give at least two distinct "
    "rows; a constant offset far larger than the variation hides it."
)


class Training(NamedTuple):
    """The result of `fit`.

    fitted : FeatureDensity.
    calibration_scores : Tensor (n,), the log density of each training row by a fit without it.
    n_unrefitted : int, rows for which only their own kernel could be left out.
    """

    fitted: FeatureDensity
    calibration_scores: Tensor
    n_unrefitted: int


def fit(
    X: Tensor,
    n_components: int | float | Literal["auto"],
    settings: Settings,
    groups: Tensor,
    *,
    leave_out_groups: bool = False,
) -> Training:
    """Fit the density to training rows.

    Parameters
    ----------
    X : Tensor of shape (n, n_features), float32 or float64
    n_components : int, float or "auto"
        The largest number of principal axes, the fraction of the variance that they hold, or "auto": as many as hold
        for held-out rows.
    settings : Settings
    groups : Tensor of shape (n,), int64
        Rows of one group share a fold, such as exact copies.
    leave_out_groups : bool, default=False
        Whether the bandwidth "loo" leaves out whole folds of groups, not single rows.

    Returns
    -------
    Training

    Raises
    ------
    ValueError
        If the rows do not differ.
    """
    if bool((groups == groups[0]).all()):
        raise ValueError(_NO_DIFFERENCE.format(len(X)))  # all are copies of one row, which leaves nothing to any fold
    is_moved = n_moved(groups) > 0
    # 1. Centre and scale the rows; few rows are rotated onto the space that they span.
    features = span(X, settings.working_memory)
    scatter = Scatter(features.rows.scatter())
    # 2. Assign the rows to folds.
    folds = Folds(features.rows, groups.to(X.device) if is_moved else None, settings.working_memory)
    # 3. Choose the number of components.
    n_sought: int | float
    if isinstance(n_components, str):
        projected = folds.projected(FOLD_WIDTH, scatter, features.noise)
        n_sought = held_out_spectrum(projected, features.noise).n_reliable(features.n_features)
        if projected is not folds:
            n_sought = min(n_sought, FOLD_WIDTH // _WIDTH_PER_AXIS)
    else:
        n_sought = n_components
    # 4. Estimate the density of all rows.
    max_components = folds.max_components(settings.contamination)
    result = row_density(features.rows, scatter, n_sought, features, settings, max_components)
    if result is None:
        raise ValueError(_NO_DIFFERENCE.format(len(X)))
    density, is_kept = result
    if leave_out_groups and settings.bandwidth == "loo":
        places = fold_places(int(is_kept.sum()), groups.to(X.device)[is_kept])
        h = leave_one_out_bandwidth(density.kernel_centers, left_out=places, working_memory=settings.working_memory)
        density = replace(density, bandwidth=h)
    # 5. Score each row by a fit without it.
    width = max(FOLD_WIDTH, _WIDTH_PER_AXIS * density.axes.shape[1])
    folds = folds.projected(width, scatter, features.noise)
    log_densities, squared_distances = cross_fitted(folds, density, features, settings)
    # 6. Estimate the residual terms from held-out rows.
    density = with_held_out_residuals(density, is_kept, squared_distances, folds, features, settings)
    # 7. Add them to the scores, and return the density as one of the features.
    scores, n_unrefitted = calibration_scores(log_densities, squared_distances, density, features, settings)
    return Training(feature_density(density, features), scores, n_unrefitted)
