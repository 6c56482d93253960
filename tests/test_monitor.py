"""Drift: exact p-values, the law of false alarms, and a state that survives."""

import json
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import kstest
from sklearn.exceptions import NotFittedError

from dfkde_sklearn import DFKDEDetector, DriftMonitor, PatchDFKDEDetector
from dfkde_sklearn._monitor import _HIGHER, _LOWER, _RATES, _SPREADS, _TAIL


def calibrated(n=100, seed=0, groups=None):
    """Return a detector with normal calibration scores."""
    rng = np.random.default_rng(seed)
    detector = DFKDEDetector.original(n_components=2).fit(rng.normal(size=(20, 4)))
    detector.calibration_scores_ = rng.normal(size=n)
    detector.calibration_groups_ = np.arange(n) if groups is None else groups
    return detector


def scores(n, seed=1):
    return np.random.default_rng(seed).normal(size=n)


@pytest.mark.parametrize("n", [1, 30, 300])
def test_p_values_of_exchangeable_scores_are_independent_and_uniform(n):
    p_values = np.concatenate(
        [
            [DriftMonitor(calibrated(n, seed), random_state=seed)._take(score) for score in scores(1, 1000 + seed)]
            for seed in range(300)
        ]
    )
    assert kstest(p_values, "uniform").pvalue > 0.01
    monitor = DriftMonitor(calibrated(n))
    of_many = np.array([monitor._take(score) for score in scores(2000)])
    assert kstest(of_many, "uniform").pvalue > 0.01
    assert abs(np.corrcoef(of_many[1:], of_many[:-1])[0, 1]) < 4 / 2000**0.5


def test_equal_scores_are_decided_at_random():
    detector = calibrated(50)
    detector.calibration_scores_ = np.zeros(50)
    monitor = DriftMonitor(detector)
    assert kstest([monitor._take(0.0) for _ in range(1000)], "uniform").pvalue > 0.01
    assert monitor.alarm_ is None


def test_alarms_without_a_change_are_as_rare_as_promised():
    # With a run length of 200 at most 300 alarms are to be expected in 1000 steps of 60 monitors.
    n_alarms = 0
    for seed in range(60):
        monitor = DriftMonitor(calibrated(40, seed), average_run_length=200, random_state=seed)
        rng = np.random.default_rng(seed + 500)
        while monitor.n_seen_ < 1000:
            monitor.update_scores(rng.normal(size=10))
            if monitor.alarm_ is not None:
                n_alarms += 1
                monitor.reset()
    assert 0 < n_alarms < 300


def slow_evidence(p_values, among_parts):
    """Return the evidence of the groups of bets, in exact fractions, from all starts of each bet."""
    tail = Fraction(_TAIL)
    gains = [[], [], []]
    for p, q in zip(map(Fraction, p_values), map(Fraction, among_parts), strict=True):
        of_p, of_q = (2 * (value - tail) / (1 - tail) - 1 for value in (p, q))
        gains[0].append([1 + (0 if p <= tail else Fraction(tilt) * of_p) for tilt in _LOWER])
        gains[1].append([Fraction(r) / tail if p <= tail else (1 - Fraction(r)) / (1 - tail) for r in _RATES])
        other = [Fraction(tilt) * of_q for tilt in _HIGHER] + [Fraction(s) * (2 * abs(of_q) - 1) for s in _SPREADS]
        gains[2].append([1 + (0 if q <= tail else gain) for gain in other])
    evidence = []
    for of_group in gains:
        statistics = []
        for bet in range(len(of_group[0])):
            total = Fraction(0)
            for start in range(len(of_group)):
                product = Fraction(1)
                for row in of_group[start:]:
                    product *= row[bet]
                total += product
            statistics.append(total)
        evidence.append(float(sum(statistics) / len(statistics)))
    return evidence


def test_the_evidence_is_that_of_a_slow_sum_over_all_starts():
    monitor, new = DriftMonitor(calibrated(20)), scores(12) - 0.7
    p_values = [monitor._take(score) for score in new]
    assert min(p_values) <= _TAIL
    shares = [np.random.default_rng((0, i)).random() for i in range(12)]
    among_parts = [(np.sum(new[:i] < new[i]) + shares[i]) / (i + 1) for i in range(12)]
    np.testing.assert_allclose(monitor._bets.evidence(), slow_evidence(p_values, among_parts), rtol=1e-10)


def test_calibration_scores_that_are_a_little_too_low_raise_no_alarm():
    detector = calibrated(300)
    detector.calibration_scores_ = detector.calibration_scores_ - 0.3
    for seed in range(5):
        assert DriftMonitor(detector, random_state=seed).update_scores(scores(3000, seed)).alarm_ is None


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda z: z - 1, "bulk"),
        (lambda z: z + 1, "bulk"),
        (lambda z: 0.4 * z, "bulk"),
        (lambda z: z - 9, "bulk"),
        (lambda z: np.where(np.arange(len(z)) % 8, z, z - 9), "tail"),
    ],
    ids=["lower", "higher", "narrower", "all are far", "an eighth is bad"],
)
def test_a_change_is_found_soon_and_for_what_it_is(change, kind):
    monitor = DriftMonitor(calibrated(300)).update_scores(scores(800))
    assert monitor.alarm_ is None
    assert monitor.since_ is None
    assert "No drift in 800 parts" in monitor.describe()
    monitor.update_scores(change(scores(500, seed=2)))
    assert monitor.alarm_ == kind
    assert 550 < monitor.since_ < 860
    assert f"since about part {monitor.since_} of 1300" in monitor.describe()
    # The reference is that of the alarm: more of the same is no less of an alarm.
    before = len(monitor._reference)
    monitor.update_scores(change(scores(500, seed=3)))
    assert len(monitor._reference) == before
    assert monitor.alarm_ == kind
    monitor.reset()
    assert monitor.alarm_ is None
    assert monitor.n_seen_ == 1800
    assert monitor.describe() == "No parts so far since the reset."


@pytest.mark.parametrize("sizes", [[300], [1] * 300, [7, 200, 93]])
def test_the_division_into_updates_makes_no_difference(sizes):
    monitor, of_all = DriftMonitor(calibrated()), scores(300) - 0.3
    for part in np.split(of_all, np.cumsum(sizes)[:-1]):
        monitor.update_scores(part)
    expected = DriftMonitor(calibrated()).update_scores(of_all)
    assert monitor._bets.evidence() == expected._bets.evidence()
    assert (monitor.alarm_, monitor.since_, monitor._recent) == (expected.alarm_, expected.since_, expected._recent)
    assert monitor.history_[-1][:3] == expected.history_[-1][:3]


@pytest.mark.parametrize("make", [DFKDEDetector, PatchDFKDEDetector])
def test_rows_are_scored_by_the_detector(make):
    rng = np.random.default_rng(0)
    detector, new = make().fit(rng.normal(size=(60, 5))), rng.normal(size=(30, 5))
    expected = DriftMonitor(detector).update_scores(detector.score_samples(new))
    assert DriftMonitor(detector).update(new).history_ == expected.history_


def test_the_lowest_score_of_a_group_counts_once():
    detector = calibrated(120, groups=np.arange(120) // 3)
    monitor = DriftMonitor(detector)
    np.testing.assert_array_equal(monitor._reference, np.sort(detector.calibration_scores_.reshape(40, 3).min(1)))
    new = scores(60)
    monitor.update_scores(new, groups=[f"part {i // 3}" for i in range(60)])
    assert monitor.n_seen_ == 20
    single = DriftMonitor(detector).update_scores(new.reshape(20, 3).min(1))
    assert monitor.history_ == single.history_


@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_a_saved_monitor_goes_on_where_it_was(shift, tmp_path):
    detector = calibrated()
    monitor = DriftMonitor(detector, average_run_length=5000, random_state=3).update_scores(scores(50))
    monitor.update_scores(scores(100) - shift)
    monitor.save(tmp_path / "monitor.json")
    again = DriftMonitor.load(tmp_path / "monitor.json", detector)
    for one in (monitor, again):
        one.update_scores(scores(200, seed=5))
    assert again.history_ == monitor.history_
    assert again.describe() == monitor.describe()
    assert (again.alarm_, again.since_, again.average_run_length) == (monitor.alarm_, monitor.since_, 5000)
    assert (monitor.alarm_ is not None) == (shift > 0)


def test_files_that_are_not_those_of_the_monitor_are_refused(tmp_path):
    file = tmp_path / "monitor.json"
    DriftMonitor(calibrated()).update_scores(scores(30)).save(file)
    with pytest.raises(ValueError, match="is the monitor of another detector"):
        DriftMonitor.load(file, calibrated(seed=1))
    whole = json.loads(file.read_text())
    changes = [
        {"format": "other"},
        {"version": 2},
        {"reference": whole["reference"][::-1]},
        {"reference": []},
        {"parts": [1.0, 0.0]},
        {"recent": [2.0]},
        {"n_seen": -1},
        {"alarm": "all"},
        {"since": "never"},
        {"history": [[1, 2]]},
        {"bets": {}},
        {"bets": whole["bets"] | {"sums": [1.0]}},
        {"average_run_length": 0},
        # Found by tests/fuzz.py: these raised other errors, or when the monitor was used.
        {"reference": [10**400]},
        {"history": [[10**400] * 5]},
        {"history": [[1, 0.0, float("nan"), 0.5, 0.5]]},
        {"bets": whole["bets"] | {"starts": [2**70] * len(whole["bets"]["starts"])}},
        {"bets": whole["bets"] | {"sums": [1e999] * len(whole["bets"]["sums"])}},
        {"bets": []},
        {"n_seen": 2**64},
        {"n_seen": True},
        {"since": 31},
        {"average_run_length": 10**400},
    ]
    for change in changes:
        file.write_text(json.dumps(whole | change))
        with pytest.raises(ValueError, match=r"not a file of DriftMonitor\.save, or it is damaged"):
            DriftMonitor.load(file, calibrated())
    without = {name: value for name, value in whole.items() if name != "calibration"}
    for content in ("", "{", "[]", json.dumps(whole)[:200], json.dumps(without)):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"not a file of DriftMonitor\.save, or it is damaged"):
            DriftMonitor.load(file, calibrated())
    with pytest.raises(FileNotFoundError):
        DriftMonitor.load(tmp_path / "none", calibrated())


def test_wrong_input_leaves_the_monitor_as_it_was():
    monitor = DriftMonitor(calibrated())
    for bad, message in {
        (): "scores is empty",
        (1.0, np.nan): "scores contains NaN",
        (np.inf,): "scores contains infinity",
        ((1.0, 2.0), (3.0, 4.0)): "1d array",
    }.items():
        with pytest.raises(ValueError, match=message):
            monitor.update_scores(bad)
    with pytest.raises(ValueError, match="groups has 1 labels"):
        monitor.update_scores([1.0, 2.0], groups=["a"])
    assert (monitor.n_seen_, monitor.history_) == (0, [])
    assert monitor.describe() == "No parts so far."
    with pytest.raises(NotFittedError):
        DriftMonitor(DFKDEDetector())
    for parameters in ({"average_run_length": 0}, {"average_run_length": 1.5}, {"random_state": -1}):
        with pytest.raises(ValueError, match="parameter of DriftMonitor must be"):
            DriftMonitor(calibrated(), **parameters)


def test_the_picture_shows_the_evidence_and_the_rates():
    pytest.importorskip("matplotlib")
    monitor = DriftMonitor(calibrated())
    assert len(monitor.plot().axes) == 2
    for _ in range(5):
        monitor.update_scores(scores(40) - 0.5)
    above, below = monitor.plot().axes
    np.testing.assert_allclose(above.lines[0].get_xdata(), [40, 80, 120, 160, 200])
    np.testing.assert_allclose(below.lines[0].get_ydata(), [of_update[3] for of_update in monitor.history_])
    from matplotlib.figure import Figure

    given = Figure()
    assert monitor.plot(given) is given
    assert len(given.axes) == 2
