import pytest
import torch

from slrprop import SlrpropError
from slrprop.linalg import SOLVERS, truncated_svd


def spectrum(m, n, dtype):
    """A matrix whose singular values fall by a tenth each."""
    generator = torch.Generator().manual_seed(0)
    k = min(m, n)
    u, _ = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))
    return ((u * 0.9 ** torch.arange(k)) @ v.T).to(dtype)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("rank", [1, 6])
@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (700, 600)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solvers_agree_with_full(solver, shape, dtype, rank):
    w = spectrum(*shape, dtype)
    got, want = truncated_svd(w, rank, solver), truncated_svd(w, rank, "full")
    tolerance = 2e-5 if dtype == torch.float32 else 1e-9
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("solver", SOLVERS)
def test_factors_are_orthonormal_sorted_and_repeatable(solver):
    w = spectrum(50, 30, torch.float64)
    u, s, vt = truncated_svd(w, 5, solver)
    eye = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(u.T @ u, eye)
    torch.testing.assert_close(vt @ vt.T, eye)
    assert (s.diff() <= 0).all()
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()
    for again, first in zip(truncated_svd(w, 5, solver), (u, s, vt), strict=True):
        assert torch.equal(again, first)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (1, 7)])
def test_full_rank_rebuilds_the_matrix(solver, shape):
    w = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    svd = truncated_svd(w, min(shape), solver)
    torch.testing.assert_close(svd.left @ svd.vt, w)


def test_truncation_error_is_the_rest_of_the_spectrum():
    w = spectrum(30, 20, torch.float64)
    svd = truncated_svd(w, 8)
    rest = torch.linalg.svdvals(w)[8:].square().sum().sqrt()
    torch.testing.assert_close((w - svd.left @ svd.vt).norm(), rest)


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "lanczos"])
def test_rank_deficient_weights_are_normal(solver):
    w = torch.zeros(30, 20, dtype=torch.float64)
    w[3, 4] = 2.0
    with pytest.raises(
        SlrpropError, match=r"propack solver failed on a 30 x 20 weight at rank 3 .*; use solver='full'"
    ):
        truncated_svd(w, 3, "lanczos")
    svd = truncated_svd(w, 3, solver)
    torch.testing.assert_close(svd.left @ svd.vt, w)
    assert torch.isfinite(svd.u).all() and torch.isfinite(svd.vt).all()


def test_half_precision_is_solved_in_single():
    assert truncated_svd(torch.randn(9, 8).half(), 2).u.dtype == torch.float32


def test_a_function_can_solve():
    def solver(w, k):
        u, s, vt = torch.linalg.svd(w, full_matrices=False)
        return u[:, :k], s[:k], vt[:k]

    w = spectrum(20, 10, torch.float64)
    assert torch.equal(truncated_svd(w, 3, solver).u, truncated_svd(w, 3, "full").u)
    with pytest.raises(SlrpropError, match=r"gave factors of shapes .* for rank 3 of a 20 x 10"):
        truncated_svd(w, 3, lambda w, k: (w, w, w))


@pytest.mark.parametrize(
    ("rank", "message"), [(0, "choose 1 to 4"), (-1, "choose 1 to 4"), (5, "rank 5 was asked of a 6 x 4")]
)
def test_bad_ranks(rank, message):
    with pytest.raises(SlrpropError, match=message):
        truncated_svd(torch.randn(6, 4), rank)


def test_bad_matrices_and_solvers():
    with pytest.raises(SlrpropError, match="NaN or infinite"):
        truncated_svd(torch.full((3, 3), torch.nan), 1)
    with pytest.raises(SlrpropError, match="takes a matrix"):
        truncated_svd(torch.randn(3), 1)
    with pytest.raises(SlrpropError, match="no solver is called 'magic'"):
        truncated_svd(torch.randn(3, 3), 1, "magic")
