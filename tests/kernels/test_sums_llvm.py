"""The loop of machine code for CPUs against long double, for vectors of any width, and what happens without it."""

import sys

import numpy as np
import pytest
import torch

from dfkde_sklearn._kernels import sums_llvm, sums_torch
from dfkde_sklearn._kernels.density import leave_one_out, log_density
from dfkde_sklearn._kernels.sums import backend
from dfkde_sklearn._kernels.sums_llvm import exp2_sums

DTYPES = {torch.float64: 1e-15, torch.float32: 4e-7}


@pytest.fixture(params=[16, 32, 64])
def width(request, monkeypatch):
    """Bytes of a vector: LLVM makes code for wider ones than the processor has, too."""
    monkeypatch.setattr(sums_llvm, "_vectors", lambda dtype: (request.param // dtype.itemsize, 4))


def factors(m, n, d, dtype, seed=0):
    rng = np.random.default_rng(seed)
    q, rows = (torch.from_numpy(rng.normal(size=(k, d + 2))).to(dtype) for k in (m, n))
    q[:, 0] = rows[:, -1] = 1
    return q, rows


def exact_powers(q, rows):
    q, rows = (x.double().numpy().astype(np.longdouble) for x in (q, rows))
    return np.exp2(q @ rows.T)


def largest_error(actual, exact):
    return float(np.abs(actual.numpy() / exact - 1).max(initial=0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "d"),
    [(1, 1, 1), (1, 3, 0), (5, 4, 2), (40, 63, 16), (33, 64, 1), (129, 65, 5), (7, 130, 40), (1, 999, 3)],
)
def test_sums_are_those_of_long_double(m, n, d, dtype, width):
    q, rows = factors(m, n, d, dtype)
    exact = exact_powers(q, rows)
    # The exponents, of some units, are rounded in the type of the factors.
    tolerance = DTYPES[dtype] * (4 + d)
    assert largest_error(exp2_sums(q, rows), exact.sum(1)) < tolerance
    of_rows = torch.full((n,), 3.0, dtype=torch.float64)
    assert torch.equal(exp2_sums(q, rows, of_rows), exp2_sums(q, rows))
    assert largest_error(of_rows, exact.sum(0) + 3) < tolerance


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_power_is_right_to_its_last_digits_over_the_whole_range(dtype):
    info = torch.finfo(dtype)
    low, high = np.log2(info.tiny), np.log2(info.max)
    rng = np.random.default_rng(0)
    exponents = np.concatenate([rng.uniform(low, high, 3000), np.arange(low, high, 0.5), rng.uniform(-1, 1, 1000)])
    q, rows = factors(len(exponents), 1, 0, dtype)
    q[:, -1] = torch.from_numpy(exponents)
    rows[:, 0] = 0
    powers = exp2_sums(q, rows)
    assert largest_error(powers, np.exp2(q[:, -1].double().numpy().astype(np.longdouble))) < 2.5 * info.eps
    whole = q[:, -1].frac() == 0
    assert torch.equal(powers[whole], q[whole, -1].double().exp2())


@pytest.mark.parametrize("dtype", DTYPES)
def test_powers_out_of_range_are_the_smallest_normal_number_and_infinity(dtype):
    info = torch.finfo(dtype)
    exponents = torch.tensor([-torch.inf, info.min, 1.01 * np.log2(info.tiny), 1.001 * np.log2(info.max), info.max])
    q, rows = factors(len(exponents), 1, 0, dtype)
    q[:, -1], rows[:, 0] = exponents.to(dtype), 0
    assert exp2_sums(q, rows).tolist() == [info.tiny] * 3 + [np.inf] * 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_depends_on_no_other_query(dtype):
    q, rows = factors(100, 700, 6, dtype)
    sums = exp2_sums(q, rows)
    for start, stop in ((0, 1), (13, 60), (99, 100)):
        assert torch.equal(exp2_sums(q[start:stop], rows), sums[start:stop])


def normal_rows(n, d, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, d)))


@pytest.fixture
def decided_anew():
    backend.cache_clear()
    yield
    backend.cache_clear()


def refuses(*arguments):
    raise RuntimeError("no memory may be run here")


def test_where_no_code_can_be_made_torch_computes_the_same_after_a_warning(monkeypatch, decided_anew):
    support, queries = normal_rows(3000, 5), normal_rows(900, 5, seed=1)
    expected, expected_left_out = log_density(queries, support, 0.5), leave_one_out(support, 0.5)
    backend.cache_clear()
    monkeypatch.setattr(sums_llvm, "_loop", refuses)
    message = r"LLVM cannot build the code for densities in torch.float64 on cpu: no memory may be run here. PyTorch"
    with pytest.warns(RuntimeWarning, match=message):
        torch.testing.assert_close(log_density(queries, support, 0.5), expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(leave_one_out(support, 0.5), expected_left_out, rtol=1e-13, atol=1e-13)


def test_without_llvmlite_torch_computes_the_same(monkeypatch, decided_anew):
    support, queries = normal_rows(3000, 5), normal_rows(900, 5, seed=1)
    expected = log_density(queries, support, 0.5)
    backend.cache_clear()
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    monkeypatch.delitem(sys.modules, "dfkde_sklearn._kernels.sums_llvm")
    torch.testing.assert_close(log_density(queries, support, 0.5), expected, rtol=1e-13, atol=1e-13)
    assert backend(support.device, support.dtype) is sums_torch.exp2_sums
