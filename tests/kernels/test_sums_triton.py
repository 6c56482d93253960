"""The kernel for GPUs, without one: in Triton's interpreter against long double, and compiled to machine code.

What no test here can tell is its speed, and the rounding of a real GPU's own exp2.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dfkde_sklearn._kernels.density import log_density
from dfkde_sklearn._kernels.sums import backend

triton = pytest.importorskip("triton", reason="Triton comes with torch for CUDA only")


def normal_rows(n, d, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, d)))


# Triton decides at import whether to interpret, and its interpreter divides by zero aloud: a process of its own.
INTERPRETED = """
import sys
import torch
sys.path.insert(0, {tests!r})
from test_density import (
    assert_float32_close, leave_one_out, log_density, normal_rows, rows_of_every_kind, slow_leave_one_out,
    slow_log_density,
)
from dfkde_sklearn._kernels.density import _is_cheaper_directly
from dfkde_sklearn._kernels.sums import backend
from dfkde_sklearn._kernels.sums_triton import exp2_sums

torch.set_num_threads(1)
q, rows = normal_rows(5, 4), normal_rows(9, 4)
q[:, 0] = rows[:, -1] = 1
powers = (q @ rows.T).exp2()
of_rows = torch.full((9,), 3.0, dtype=torch.float64)
torch.testing.assert_close(exp2_sums(q, rows, of_rows), powers.sum(1), rtol=1e-14, atol=0)
torch.testing.assert_close(of_rows, powers.sum(0) + 3, rtol=1e-14, atol=0)
assert exp2_sums(q, rows[:0], of_rows[:0]).tolist() == [0] * 5
for n, d, bandwidth in ((970, 2, 0.3), (600, 37, 0.8)):
    support = normal_rows(n, d)
    support[-3:] *= 40
    queries = torch.cat([normal_rows(2**24 // (n * (d + 16)), d, seed=2), rows_of_every_kind(support)])
    assert not _is_cheaper_directly(len(queries), support)
    assert not _is_cheaper_directly(n, support)
    for dtype in (torch.float64, torch.float32):
        queries, support = queries.to(dtype), support.to(dtype)
        assert backend(support.device, dtype) is exp2_sums
        of_queries, left_out = log_density(queries, support, bandwidth), leave_one_out(support, bandwidth)
        expected = slow_log_density(queries, support, bandwidth)
        expected_left_out = slow_leave_one_out(support, bandwidth)
        if dtype == torch.float64:
            torch.testing.assert_close(of_queries, expected, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(left_out, expected_left_out, rtol=1e-11, atol=1e-11)
        else:
            assert_float32_close(of_queries, expected)
            assert_float32_close(left_out, expected_left_out)
"""


def test_kernel_in_the_interpreter_agrees_with_long_double():
    script = INTERPRETED.format(tests=str(Path(__file__).parent))
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_where_the_kernel_cannot_be_built_torch_computes_the_same_after_a_warning(monkeypatch):
    import dfkde_sklearn._kernels.sums_triton  # noqa: F401  # not interpreted, so that it wants a GPU

    support, queries = normal_rows(3000, 5), normal_rows(900, 5, seed=1)
    expected = log_density(queries, support, 0.5)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    backend.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"in torch.float64 on cpu: .*PyTorch computes the same more slowly"):
            torch.testing.assert_close(log_density(queries, support, 0.5), expected, rtol=1e-13, atol=1e-13)
    finally:
        backend.cache_clear()


@pytest.mark.parametrize("is_one_step", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore")  # Triton's own, of its future versions
def test_kernel_compiles_to_machine_code_of_a_gpu_without_tf32(dtype, is_one_step, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dfkde_sklearn._kernels.sums_triton import _DIMENSIONS, _TILES, _exp2_sums

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    queries, rows, warps = _TILES[dtype]
    of_kernel = {
        "IS_ONE_STEP": is_one_step, "DIMENSIONS": _DIMENSIONS, "QUERIES": queries, "ROWS": rows
    }  # fmt: skip
    factor = {torch.float32: "*fp32", torch.float64: "*fp64"}[dtype]
    signature = {"q": factor, "rows": factor, "sums": "*fp64", **dict.fromkeys(["m", "n", "width"], "i32")}
    source = ASTSource(_exp2_sums, {**signature, **dict.fromkeys(of_kernel, "constexpr")}, of_kernel)
    options = {"num_warps": warps, "num_stages": 2, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.asm["cubin"]
    assert "tf32" not in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 48 * 2**10, "more than any GPU gives without being asked"
