"""The contract of the backends, for those that a CPU runs, and how the sums are divided into blocks."""

import numpy as np
import pytest
import torch

from dfkde_sklearn._kernels import sums_llvm, sums_torch
from dfkde_sklearn._kernels.sums import backend

BACKENDS = {"LLVM": sums_llvm.exp2_sums, "PyTorch": sums_torch.exp2_sums}
DTYPES = {torch.float64: 1e-14, torch.float32: 1e-5}


@pytest.mark.parametrize("exp2_sums", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "d"), [(1, 1, 1), (5, 0, 2), (7, 241, 3), (40, 1000, 16), (600, 480, 5)])
def test_sums_of_queries_and_of_rows_are_those_of_long_double(exp2_sums, dtype, m, n, d):
    rng = np.random.default_rng(0)
    q, rows = (torch.from_numpy(rng.normal(size=(k, d + 2))).to(dtype) for k in (m, n))
    q[:, 0] = rows[:, -1] = 1
    powers = np.exp2(q.double().numpy().astype(np.longdouble) @ rows.double().numpy().astype(np.longdouble).T)
    of_rows = torch.full((n,), 3.0, dtype=torch.float64)
    of_queries = exp2_sums(q, rows, of_rows)
    assert torch.equal(exp2_sums(q, rows), of_queries)
    assert of_queries.dtype == torch.float64
    np.testing.assert_allclose(of_queries.numpy(), powers.sum(1).astype(float), rtol=DTYPES[dtype])
    np.testing.assert_allclose(of_rows.numpy(), powers.sum(0).astype(float) + 3, rtol=DTYPES[dtype])


def test_a_device_without_code_of_its_own_takes_pytorch():
    assert backend(torch.device("meta"), torch.float64) is sums_torch.exp2_sums
