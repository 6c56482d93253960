"""DriftMonitor: whether new parts still look like the training parts, over months of parts."""

from __future__ import annotations

import hashlib
import json
import math
import os
from bisect import bisect_left, bisect_right, insort
from collections import deque
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kstest
from sklearn.utils import assert_all_finite, column_or_1d
from sklearn.utils._param_validation import Interval, validate_parameter_constraints
from sklearn.utils.validation import check_is_fitted

from dfkde_sklearn._calibration import CalibratedOutlierMixin, lowest_of_groups
from dfkde_sklearn._document import is_integer_from
from dfkde_sklearn._files import write_file
from dfkde_sklearn._groups import group_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMAT, _VERSION = "dfkde-sklearn drift monitor", 1
# P-values up to this one are the tail, whose rate says how many parts are bad; the others are the bulk.
_TAIL = 0.05
# Bets on the bulk, as tilts of the density of its p-values: parts that score lower or higher than before, and parts
# that vary more or less. And bets on the rate of p-values in the tail.
_LOWER, _HIGHER = np.array([-0.9, -0.5, -0.25]), np.array([0.25, 0.5, 0.9])
_SPREADS = np.array([-0.5, 0.5])
_RATES = np.array([0.075, 0.1, 0.2, 0.4])
# The bets by what they are on: a lower bulk, the tail, and another bulk. Each group has its share of the false alarms.
_GROUPS = np.cumsum([len(_LOWER), len(_RATES)])
_N_GROUPS = len(_GROUPS) + 1
# Parts that the description is about.
_RECENT = 400


class DriftMonitor:
    """Watch whether new parts still come from where the training parts came from.

    Thresholds and p-values of a detector hold for parts like the training parts. The monitor is given the scores of all
    new parts, in order, and raises an alarm when they stop being like them: if the bulk of the parts scores differently
    than before (another lamp, focus or supplier), or if more of them than usual score very low (a run of bad parts).

    Parameters
    ----------
    detector : DFKDEDetector or PatchDFKDEDetector
        Fitted. The monitor keeps a reference to it, and its calibration scores.
    average_run_length : int, default=100000
        While nothing changes, the first alarm comes after at least this number of parts, on average.
    random_state : int, default=0
        Seed of the numbers that decide between equal scores.

    Attributes
    ----------
    alarm_ : {"bulk", "tail"} or None
        What the alarm is about; None as long as there is none.
    since_ : int or None
        The part since which things are different, as far as can be told: its number, from 0.
    n_seen_ : int
        Number of parts so far, of groups where groups were given.
    history_ : list of tuple (n_seen, bulk, tail, low_share, median)
        After each update: the number of parts, the evidence in the bulk and in the tail as shares of what raises an
        alarm, and of the parts of the update the share of p-values up to 0.05, and the median p-value.

    See Also
    --------
    DFKDEDetector.recalibrate : Moves the threshold to what good parts look like now.

    Notes
    -----
    Each part gets a p-value: its rank among the calibration scores *and* the parts before it, ties decided at random.
    As long as all come from one source these are independent and uniform, exactly [1]_, however few calibration scores
    there are. A bet multiplies its stake by the ratio of two densities of the p-value: what it is if things have
    changed in a certain way, and 1. The evidence is the mean over several bets of their Shiryaev-Roberts statistics,
    which take up a new stake with each part, so that a change is found whenever it comes. It exceeds a limit in t parts
    with a probability of at most t over that limit [2]_. This is proved for the first alarm; after a `reset`, it was
    measured.

    There are three groups of bets, each with a limit of six times `average_run_length`: that the bulk, the p-values
    above 0.05, is lower than before; that the rate of those up to 0.05 is higher; and that the bulk is higher, or
    varies more or less. Calibration scores are out-of-fold scores, which may be a little lower than those of new parts:
    the first two bet on the opposite. The third would find it, and therefore goes by p-values among the parts alone:
    parts that are higher, or vary differently, from the very first on are not found.

    The rate of low p-values rises where all parts score lower too: an alarm is about the bulk if, of the last parts
    since the change, up to 400, more than half are in the tail, or the others are not uniform by a Kolmogorov-Smirnov
    test. The more parts have come since, the surer that is.

    References
    ----------
    .. [1] Vovk, Nouretdinov and Gammerman (2003), Testing exchangeability on-line, International Conference on Machine
       Learning
    .. [2] Shin, Ramdas and Rinaldo (2024), E-detectors: a nonparametric framework for sequential change detection,
       doi:10.51387/23-NEJSDS51

    Examples
    --------
    >>> import numpy as np
    >>> from dfkde_sklearn import DFKDEDetector, DriftMonitor
    >>> rng = np.random.default_rng(0)
    >>> detector = DFKDEDetector(n_components=4).fit(rng.normal(size=(300, 16)))
    >>> monitor = DriftMonitor(detector)
    >>> monitor.update(rng.normal(size=(500, 16))).alarm_ is None
    True
    >>> monitor.update(0.6 + rng.normal(size=(300, 16))).alarm_
    'bulk'
    """

    __module__ = "dfkde_sklearn"

    def __init__(
        self, detector: CalibratedOutlierMixin, *, average_run_length: int = 100_000, random_state: int = 0
    ) -> None:
        check_is_fitted(detector)
        validate_parameter_constraints(
            {
                "average_run_length": [Interval(Integral, 1, 2**53, closed="both")],
                "random_state": [Interval(Integral, 0, 2**32 - 1, closed="both")],
            },
            {"average_run_length": average_run_length, "random_state": random_state},
            type(self).__name__,
        )
        self.detector = detector
        self.average_run_length = int(average_run_length)
        self.random_state = int(random_state)
        self.n_seen_ = 0
        self.history_: list[tuple[int, float, float, float, float]] = []
        self._calibration = _fingerprint(detector)
        self.reset()

    def reset(self) -> Self:
        """Begin anew with the calibration scores, after an alarm has been dealt with; the history stays.

        Returns
        -------
        DriftMonitor
            The monitor itself.
        """
        lowest = lowest_of_groups(self.detector.calibration_scores_, self.detector.calibration_groups_)
        self._reference: list[float] = np.sort(lowest.astype(np.float64)).tolist()
        self._parts: list[float] = []
        self._bets = _Bets()
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._first_alarm: Literal["bulk", "tail"] | None = None
        self.since_: int | None = None
        return self

    @property
    def alarm_(self) -> Literal["bulk", "tail"] | None:
        """What the alarm is about, as far as can be told by now; None as long as there is none."""
        # The rate of low p-values rises where all parts score lower too.
        return "bulk" if self._first_alarm == "tail" and self._bulk_has_moved() else self._first_alarm

    def update(self, X: Any, *, groups: Any = None) -> Self:
        """Take in new parts, in the order in which they were made.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features) or images
            As the detector's `score_samples`; good and bad ones alike.
        groups : array-like of shape (n_samples,) or None, default=None
            What each row or image shows, where several show one part; all of one part are in one update. The lowest
            score of each counts.

        Returns
        -------
        DriftMonitor
            The monitor itself.

        Raises
        ------
        ValueError
            As `score_samples`; or if `groups` has another length or a missing label. The monitor is then as it was.
        """
        return self.update_scores(self.detector.score_samples(X), groups=groups)

    def update_scores(self, scores: Any, *, groups: Any = None) -> Self:
        """Take in new parts by their scores, which the detector has computed before.

        Parameters
        ----------
        scores : array-like of shape (n_samples,)
            Of the detector's `score_samples`, or the `log_density` of its `assess`.
        groups : array-like of shape (n_samples,) or None, default=None
            As in `update`.

        Returns
        -------
        DriftMonitor
            The monitor itself.

        Raises
        ------
        ValueError
            If `scores` is empty, not one-dimensional or holds NaN or infinities; or as `update`.
        """
        values = column_or_1d(np.asarray(scores))
        if not len(values):
            raise ValueError("scores is empty: give those of at least one part.")
        values = values.astype(np.float64)
        assert_all_finite(values, input_name="scores")
        if groups is not None:
            values = lowest_of_groups(values, group_numbers(groups, len(values)))
        p_values = [self._take(score) for score in values.tolist()]
        lower, tail, other = (evidence / self._limit for evidence in self._bets.evidence())
        low = float(np.mean(np.array(p_values) <= _TAIL))
        self.history_.append((self.n_seen_, max(lower, other), tail, low, float(np.median(p_values))))
        return self

    def describe(self) -> str:
        """Return in a sentence or two how things stand.

        Returns
        -------
        str
            With the rate of low p-values among the last 400 parts, and their median.
        """
        if not self._recent:
            return f"No parts so far{' since the reset' if self.n_seen_ else ''}."
        recent = np.array(self._recent)
        facts = (
            f"Of the last {len(recent)} parts, {np.mean(recent <= _TAIL):.1%} have a p-value of at most {_TAIL}, where "
            f"{_TAIL:.0%} are usual, and the median p-value is {np.median(recent):.2f}, where 0.5 is."
        )
        alarm = self.alarm_
        if alarm is None:
            return f"No drift in {self.n_seen_} parts. {facts}"
        what = {
            "bulk": "new parts as a whole are not like the training parts any more",
            "tail": "more parts than usual score very low, and the others are as before, as far as can be told",
        }[alarm]
        return f"Alarm: since about part {self.since_} of {self.n_seen_}, {what}. {facts}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file, whole or not at all: JSON, without the detector.

        Parameters
        ----------
        path : str or PathLike
            The file.

        Raises
        ------
        OSError
            If the file cannot be written.
        """
        state = {
            "format": _FORMAT,
            "version": _VERSION,
            "calibration": self._calibration,
            "average_run_length": self.average_run_length,
            "random_state": self.random_state,
            "n_seen": self.n_seen_,
            "alarm": self._first_alarm,
            "since": self.since_,
            "history": self.history_,
            "reference": self._reference,
            "parts": self._parts,
            "recent": list(self._recent),
            "bets": self._bets.state(),
        }
        write_file(path, json.dumps(state).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str], detector: CalibratedOutlierMixin) -> Self:
        """Return the monitor in a file.

        Parameters
        ----------
        path : str or PathLike
            What `save` wrote.
        detector : DFKDEDetector or PatchDFKDEDetector
            The detector that it watches.

        Returns
        -------
        DriftMonitor
            As it was when it was saved.

        Raises
        ------
        ValueError
            If the file is not that of a monitor, is damaged, or belongs to another detector.
        OSError
            If it cannot be read.
        """
        name = os.fspath(path)
        try:
            state = json.loads(Path(path).read_bytes())
            if state["format"] != _FORMAT or state["version"] != _VERSION:
                raise ValueError(f"format {state['format']!r}, version {state['version']!r}")
            monitor = cls(detector, average_run_length=state["average_run_length"], random_state=state["random_state"])
            monitor._restore(state)
            is_of_detector = state["calibration"] == monitor._calibration
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            raise ValueError(
                f"{name!r} is not a file of DriftMonitor.save, or it is damaged: {type(error).__name__}: {error}"
            ) from error
        if not is_of_detector:
            raise ValueError(
                f"{name!r} is the monitor of another detector, or the detector was recalibrated since: its calibration "
                "scores are others. Begin a new file."
            )
        return monitor

    def plot(self, figure: Figure | None = None) -> Figure:
        """Draw the evidence, and the rate of low p-values, update by update.

        Parameters
        ----------
        figure : matplotlib.figure.Figure, default=None
            Empty, to draw into, such as one of ``matplotlib.pyplot.figure()``. None: a new one, which pyplot does not
            keep open.

        Returns
        -------
        matplotlib.figure.Figure
            Two axes, one above the other.

        Raises
        ------
        ImportError
            If matplotlib is not installed: the extra "plot".
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("DriftMonitor.plot needs matplotlib: pip install 'dfkde-sklearn[plot]'.") from error
        figure = figure or Figure(figsize=(7, 4.5), layout="constrained")
        above, below = figure.subplots(2, sharex=True)
        n, bulk, tail, low, median = np.array(self.history_ or [(0, 0.0, 0.0, np.nan, np.nan)]).T
        above.semilogy(n, np.maximum(bulk, 1e-6), label="bulk")
        above.semilogy(n, np.maximum(tail, 1e-6), label="tail")
        above.axhline(1, color="black", linestyle="--", linewidth=1, label="alarm")
        above.set(ylabel="evidence, of an alarm's")
        above.legend(frameon=False)
        below.plot(n, low, marker=".", label=f"p-values of at most {_TAIL}")
        below.plot(n, median, marker=".", label="median p-value")
        for usual in (_TAIL, 0.5):
            below.axhline(usual, color="grey", linestyle=":", linewidth=1)
        below.set(xlabel="parts", ylabel="in each update", ylim=(0, 1))
        below.legend(frameon=False)
        return figure

    # Private.

    def _take(self, score: float) -> float:
        """Take in one part, and return its p-value."""
        # The same for any division of the parts into updates.
        share = float(np.random.default_rng((self.random_state, self.n_seen_)).random())
        p_value = _smoothed_rank(score, self._reference, share)
        self.n_seen_ += 1
        self._recent.append(p_value)
        # From an alarm on, the reference stays what it was.
        if self._first_alarm is None:
            self._bets.place(p_value, _smoothed_rank(score, self._parts, share), self.n_seen_ - 1)
            insort(self._reference, score)
            insort(self._parts, score)
            evidence = self._bets.evidence()
            strongest = int(np.argmax(evidence))
            if evidence[strongest] >= self._limit:
                self._first_alarm = ("bulk", "tail", "bulk")[strongest]
                self.since_ = self._bets.since(strongest)
        return p_value

    @property
    def _limit(self) -> float:
        # An alarm in t parts has a probability of at most t times the number of groups over this: on average, the first
        # then comes after at least this over twice that number.
        return float(2 * _N_GROUPS * self.average_run_length)

    def _bulk_has_moved(self) -> bool:
        """Return whether the last parts since the change are mostly in the tail, or the others are not uniform."""
        p_values = np.array(self._recent)[(self.since_ or 0) - self.n_seen_ :]
        within = (p_values[p_values > _TAIL] - _TAIL) / (1 - _TAIL)
        return len(within) < len(p_values) / 2 or float(kstest(within, "uniform").pvalue) < 0.001

    def _restore(self, state: dict[str, Any]) -> None:
        """Set what `save` wrote; raise an error where it cannot be."""
        reference, parts, recent = (
            np.asarray(state[name], dtype=np.float64) for name in ("reference", "parts", "recent")
        )
        history = [tuple(map(float, of_update)) for of_update in state["history"]]
        if (
            any(of.ndim != 1 or not np.isfinite(of).all() or (np.diff(of) < 0).any() for of in (reference, parts))
            or len(reference) <= len(parts)
            or recent.ndim != 1
            or not ((recent >= 0) & (recent <= 1)).all()
            or state["alarm"] not in ("bulk", "tail", None)
            or not is_integer_from(0)(state["n_seen"])
            or state["n_seen"] < max(len(parts), len(recent))
            or (state["since"] is None) != (state["alarm"] is None)
            or not (state["since"] is None or is_integer_from(0)(state["since"]))
            or (state["since"] or 0) > state["n_seen"]
            or any(len(of_update) != 5 or not _is_update(of_update) for of_update in history)
        ):
            raise ValueError("its values contradict one another")
        self._reference, self._parts = reference.tolist(), parts.tolist()
        self._recent.extend(recent.tolist())
        self._bets = _Bets.of_state(state["bets"])
        if (self._bets.starts < 0).any() or (self._bets.starts > state["n_seen"]).any():
            raise ValueError("its bets begin after its last part")
        self.n_seen_, self._first_alarm, self.since_ = state["n_seen"], state["alarm"], state["since"]
        self.history_ = [(int(of_update[0]), *of_update[1:]) for of_update in history]  # type: ignore[misc]


class _Bets:
    """The Shiryaev-Roberts statistics of the bets, and since when each has been winning, by Page's rule.

    In logarithms, since a statistic may exceed the largest number before an alarm is looked at.
    """

    def __init__(self) -> None:
        n = len(_LOWER) + len(_RATES) + len(_HIGHER) + len(_SPREADS)
        self.log_statistics = np.full(n, -np.inf)
        self.sums, self.starts = np.zeros(n), np.zeros(n, dtype=np.int64)

    def place(self, p_value: float, among_parts: float, part: int) -> None:
        """Bet on the p-values of a part among calibration scores and parts, and among the parts."""
        is_low = p_value <= _TAIL
        lower = 0 * _LOWER if is_low else _LOWER * _within_bulk(p_value)
        tail = (_RATES - _TAIL) / _TAIL if is_low else (_TAIL - _RATES) / (1 - _TAIL)
        within = _within_bulk(among_parts)
        other = np.concatenate([_HIGHER * within, _SPREADS * (2 * abs(within) - 1)]) * (among_parts > _TAIL)
        gains = np.log1p(np.concatenate([lower, tail, other]))
        self.log_statistics = np.logaddexp(self.log_statistics, 0.0) + gains
        ended = self.sums <= 0
        self.starts[ended] = part
        self.sums = np.maximum(self.sums, 0.0) + gains

    def evidence(self) -> list[float]:
        """Return the mean statistic of the bets of each group."""
        return [_mean_of_logs(of_group) for of_group in np.split(self.log_statistics, _GROUPS)]

    def since(self, group: int) -> int:
        """Return the part at which the most successful bet of a group began to win."""
        logs, starts = (np.split(values, _GROUPS)[group] for values in (self.log_statistics, self.starts))
        return int(starts[logs.argmax()])

    def state(self) -> dict[str, list[float]]:
        """Return values of JSON."""
        logs = [None if math.isinf(value) else value for value in self.log_statistics.tolist()]
        return {"log_statistics": logs, "sums": self.sums.tolist(), "starts": self.starts.tolist()}  # type: ignore[dict-item]

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Self:
        """Return the bets of `state`; raise an error where it is not one."""
        bets = cls()
        logs = [-np.inf if value is None else value for value in state["log_statistics"]]
        for name, values, dtype in (
            ("log_statistics", logs, np.float64),
            ("sums", state["sums"], np.float64),
            ("starts", state["starts"], np.int64),
        ):
            array = np.asarray(values, dtype=dtype)
            if array.shape != getattr(bets, name).shape or not (array < np.inf).all():
                raise ValueError(f"{name} of its bets are {array}")
            setattr(bets, name, array)
        return bets


def _smoothed_rank(score: float, in_order: list[float], share: float) -> float:
    """Return the rank of a score among others and itself, over their number; of equal ones this share lies below."""
    below, upto = bisect_left(in_order, score), bisect_right(in_order, score)
    return (below + share * (upto - below + 1)) / (len(in_order) + 1)


def _is_update(of_update: tuple[float, ...]) -> bool:
    """Return whether an entry of the history is possible: a number of parts, two evidences, two shares."""
    n_seen, bulk, tail, low, median = of_update
    return 0 <= n_seen < 2**53 and bulk >= 0 and tail >= 0 and 0 <= low <= 1 and 0 <= median <= 1


def _within_bulk(p_value: float) -> float:
    """Return the place of a p-value in the bulk, from -1 to 1."""
    return 2 * (p_value - _TAIL) / (1 - _TAIL) - 1


def _mean_of_logs(logs: NDArray[np.float64]) -> float:
    """Return the mean of numbers from their logarithms, infinite where it is larger than numbers are."""
    with np.errstate(over="ignore"):
        return float(np.exp(logs).mean())


def _fingerprint(detector: CalibratedOutlierMixin) -> str:
    """Return the SHA-256 of the calibration scores and of their groups."""
    scores = np.ascontiguousarray(detector.calibration_scores_, dtype=np.float64)
    groups = np.ascontiguousarray(detector.calibration_groups_, dtype=np.int64)
    return hashlib.sha256(scores.tobytes() + groups.tobytes()).hexdigest()
