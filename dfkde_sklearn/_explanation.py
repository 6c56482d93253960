"""What detectors say of the reasons for a score."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Explanation(NamedTuple):
    """What the log densities of rows are made of; see :ref:`explanation`.

    ``log_density = axis_terms.sum(1) + residual_term + rest``, in natural logs: the lower a term, the more it makes a
    row anomalous.

    Parameters
    ----------
    log_density : ndarray of shape (n_samples,)
        As from `score_samples`.
    kernels : ndarray of shape (n_samples, n_kernels), int64
        The rows of `kernel_centers_` that carry the density at each row, the largest share first. They are the training
        rows, in their order, unless `max_samples` or `contamination` left some out.
    shares : ndarray of shape (n_samples, n_kernels)
        Their shares of the density. Those of all kernels sum to 1.
    deviations : ndarray of shape (n_samples, n_components)
        Where each row lies on the principal axes, in standard deviations of the training rows from their mean.
    axis_terms : ndarray of shape (n_samples, n_components)
        Of each axis, 0 or below: the distance from the kernels nearby.
    residual_term : ndarray of shape (n_samples,)
        Of the distance from all axes, 0 or below; 0 without a residual.
    rest : ndarray of shape (n_samples,)
        Constants, and how many kernels share the density.
    feature_gains : ndarray of shape (n_samples, n_features)
        By how much the log density would rise with another value of this feature alone, 0 or more: reconstruction-based
        contributions [1]_. If one feature is at fault, its gain is the largest, even where features are correlated.
    layer_terms : dict of str to ndarray of shape (n_samples,)
        The sum of axis and residual terms, split among the layers of :class:`TimmFeatures`; empty where the detector
        knows of no layers. Where layers are correlated one term can be above 0, and others the lower for it.

    See Also
    --------
    DFKDEDetector.explain : Returns it.
    ExplanationDisplay : Draws it.

    References
    ----------
    .. [1] Alcala and Qin (2009), Reconstruction-based contribution for process monitoring,
       doi:10.1016/j.automatica.2009.02.027

    Examples
    --------
    >>> import numpy as np
    >>> from dfkde_sklearn import DFKDEDetector
    >>> good = np.random.default_rng(0).normal(size=(200, 8))
    >>> explanation = DFKDEDetector(n_components=8, residual=None).fit(good).explain([[0, 0, 6.0, 0, 0, 0, 0, 0]])
    >>> int(explanation.feature_gains[0].argmax())
    2
    """

    log_density: NDArray[np.float64]
    kernels: NDArray[np.int64]
    shares: NDArray[np.float64]
    deviations: NDArray[np.float64]
    axis_terms: NDArray[np.float64]
    residual_term: NDArray[np.float64]
    rest: NDArray[np.float64]
    feature_gains: NDArray[np.float64]
    layer_terms: dict[str, NDArray[np.float64]]


class Region(NamedTuple):
    """A connected region of a map below its threshold.

    ``pandas.DataFrame(regions)`` makes a table of a list of them.

    Parameters
    ----------
    image : int
        The number of the image, from 0.
    area : int
        Pixels, or positions of the grid.
    top, left, bottom, right : int
        The bounding box; `bottom` and `right` are the first row and column after it.
    row, column : float
        The centre of mass.
    log_density : float
        The lowest in the region.
    p_value : float
        That of the whole *image*, whose score is the mean of its lowest log densities: regions are not tested one by
        one.

    See Also
    --------
    PatchDFKDEDetector.regions : Returns them.

    Examples
    --------
    >>> from dfkde_sklearn import Region
    >>> Region(0, 12, 3, 4, 6, 8, 4.0, 5.5, -80.0, 0.01).area
    12
    """

    image: int
    area: int
    top: int
    left: int
    bottom: int
    right: int
    row: float
    column: float
    log_density: float
    p_value: float


Explanation.__module__ = Region.__module__ = "dfkde_sklearn"  # the public path, which pickles name
