"""The whole way from feature rows to scores, through the public detector, against mpmath with 60 digits."""

import subprocess
import sys
from pathlib import Path

import mpmath
import numpy as np
import pytest
from mpmath import mpf

from dfkde_sklearn import DFKDEDetector


def exact_log_densities(X, queries, bandwidth):
    """SciPy's definition: kernels of the covariance of X times the squared bandwidth, here by its Cholesky factor."""
    with mpmath.workdps(60):
        n, d = X.shape
        rows, queries = ([[mpf(float(x)) for x in row] for row in table] for table in (X, queries))
        mean = [mpmath.fsum(column) / n for column in zip(*rows, strict=True)]
        rows, queries = ([[x - m for x, m in zip(r, mean, strict=True)] for r in table] for table in (rows, queries))
        factor = [[mpf(0)] * d for _ in range(d)]
        for i in range(d):
            for j in range(i + 1):
                covariance = mpmath.fdot((row[i], row[j]) for row in rows) / (n - 1)
                rest = covariance - mpmath.fdot(zip(factor[i][:j], factor[j][:j], strict=True))
                factor[i][j] = mpmath.sqrt(rest) if i == j else rest / factor[j][j]

        def whitened(row):
            z = []
            for i in range(d):
                z.append((row[i] - mpmath.fdot(zip(factor[i][:i], z, strict=True))) / factor[i][i])
            return [x / mpf(bandwidth) for x in z]

        support = [whitened(row) for row in rows]
        log_volume = mpmath.fsum(mpmath.log(factor[i][i] * mpf(bandwidth)) for i in range(d))
        normaliser = mpmath.log(n) + d * mpmath.log(2 * mpmath.pi) / 2 + log_volume
        result = []
        for query in map(whitened, queries):
            exponents = [-mpmath.fsum((a - b) ** 2 for a, b in zip(query, z, strict=True)) / 2 for z in support]
            top = max(exponents)
            result.append(top + mpmath.log(mpmath.fsum(mpmath.exp(x - top) for x in exponents)) - normaliser)
        return result


def training_and_query_rows(n, d, condition, rotated, dtype):
    """Rows of that condition number, and fresh rows, training rows, and outliers to 1e6 standard deviations."""
    rng = np.random.default_rng(0)
    scales = np.logspace(0, -np.log10(condition), d)
    rotation = np.linalg.qr(rng.normal(size=(d, d)))[0] if rotated else np.eye(d)
    far = rng.normal(size=(4, d))
    far *= np.array([[30], [1e3], [1e5], [1e6]]) / np.linalg.norm(far, axis=1, keepdims=True)
    X, fresh, far = (
        ((z * scales) @ rotation).astype(dtype) for z in (rng.normal(size=(n, d)), rng.normal(size=(6, d)), far)
    )
    return X, np.vstack([fresh, X[:4], far])


def scores_in_small_and_large_batches(X, queries):
    """Few rows go another way through the density than many; both must hold."""
    detector = DFKDEDetector.original(features=None, n_components=X.shape[1], scaling=None).fit(X)
    assert detector.n_components_ == X.shape[1]
    n, d = X.shape
    copies = -(-(2**24) // (len(queries) * n * (d + 16)))
    many = detector.score_samples(np.tile(queries, (copies, 1))).reshape(copies, -1)
    return detector.bandwidth_, [detector.score_samples(queries), many[0], many[-1]]


@pytest.mark.parametrize(
    ("n", "d", "condition", "rotated"),
    [(90, 2, 1, True), (80, 8, 1e12, False), (80, 8, 1e6, True), (100, 64, 1e3, True)],
)
def test_float64_scores_have_ten_digits(n, d, condition, rotated):
    X, queries = training_and_query_rows(n, d, condition, rotated, np.float64)
    bandwidth, batches = scores_in_small_and_large_batches(X, queries)
    exact = exact_log_densities(X, queries, bandwidth)
    for scores in batches:
        errors = [abs(mpf(float(s)) - e) / max(abs(e), 1) for s, e in zip(scores, exact, strict=True)]
        assert max(errors) < 1e-10


@pytest.mark.parametrize(("n", "d", "condition"), [(90, 2, 1), (80, 16, 1e3), (100, 64, 1)])
def test_float32_scores_are_right_to_2e_5_nats_or_a_millionth(n, d, condition):
    X, queries = training_and_query_rows(n, d, condition, True, np.float32)
    bandwidth, batches = scores_in_small_and_large_batches(X, queries)
    exact = exact_log_densities(X, queries, bandwidth)
    for scores in batches:
        errors = [abs(mpf(float(s)) - e) for s, e in zip(scores, exact, strict=True)]
        assert max(errors[:10]) < 2e-5
        assert all(error < 1e-6 * abs(e) for error, e in zip(errors[10:], exact[10:], strict=True))


# Of the process itself: what getrusage says of a new process starts at the memory of the one that started it.
ADDED_BY_SCORING = """
import re
from pathlib import Path
import numpy as np
from dfkde_sklearn import DFKDEDetector

def peak():
    return 1024 * int(re.search("VmHWM:[^0-9]*([0-9]+) kB", Path("/proc/self/status").read_text())[1])

queries = np.random.default_rng(0).normal(size=(1_000_000, 16))
detector = DFKDEDetector(features=None, n_components=16).fit(queries[:400])
detector.score_samples(queries[:400])
before = peak()
scores = detector.score_samples(queries)
print(peak() - before - scores.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc")
def test_scoring_a_million_rows_adds_less_than_100_mb_to_input_and_output():
    ran = subprocess.run([sys.executable, "-c", ADDED_BY_SCORING], capture_output=True, text=True, check=True)
    assert 0 < int(ran.stdout) < 100e6
