"""Reduced-rank regression in two metrics, against square roots and the SVD."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from slrprop import linalg
from slrprop.linalg import balanced, principal, reduced_rank, top_eigenvectors, truncated_svd


def positive(size, seed, rank=None):
    """A random positive (semi-)definite matrix whose eigenvalues differ."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(size, rank or size + 5, dtype=torch.float64, generator=generator)
    scale = 0.8 ** torch.arange(size, dtype=torch.float64)
    return scale[:, None] * (wide @ wide.T) * scale


def half(matrix):
    """The symmetric square root."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def weighted_error(rest, covariance, metric=None):
    """``tr(G R^T C R)``."""
    wide = rest if metric is None else rest @ metric
    return float((rest * (covariance @ wide)).sum())


def random_matrix(m, n, seed=0):
    return torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class TestReducedRank:
    @pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9), (5, 1), (1, 5)])
    def test_without_metrics_it_is_the_truncated_svd(self, shape):
        target, rank = random_matrix(*shape), min(3, *shape)
        left, right = reduced_rank(target, torch.eye(shape[0], dtype=torch.float64), None, rank)
        svd = truncated_svd(target, rank)
        torch.testing.assert_close(left @ right, svd.left @ svd.vt)

    def test_whitened_inputs_make_it_the_svd(self):
        """Inputs with orthonormal columns have the identity as their second moments."""
        target = random_matrix(8, 6)
        x = torch.linalg.qr(random_matrix(40, 8, 1))[0]
        left, right = reduced_rank(target, x.T @ x, None, 2)
        svd = truncated_svd(target, 2)
        torch.testing.assert_close(left @ right, svd.left @ svd.vt)

    @given(st.integers(1, 9), st.integers(1, 9), st.data())
    @hypothesis_settings(deadline=None, max_examples=40)
    def test_brute_force_by_square_roots(self, m, n, data):
        """The SVD of ``C^.5 T G^.5``, and the roots taken off again."""
        rank, seed = data.draw(st.integers(1, min(m, n))), data.draw(st.integers(0, 99))
        target, c, g = random_matrix(m, n, seed), positive(m, seed + 1), positive(n, seed + 2)
        left, right = reduced_rank(target, c, torch.linalg.cholesky(g), rank)
        svd = truncated_svd(half(c) @ target @ half(g), rank)
        want = torch.linalg.solve(half(c), svd.left @ svd.vt) @ torch.linalg.inv(half(g))
        assert left.shape == (m, rank) and right.shape == (rank, n)
        rest = target - left @ right
        best = weighted_error(target - want, c, g)
        total = weighted_error(target, c, g)
        assert abs(weighted_error(rest, c, g) - best) < 1e-9 * total

    @pytest.mark.parametrize("case", ["dead", "few", "none"])
    def test_singular_covariances_are_fine(self, case):
        """The error is the rest of the spectrum of the weighed output, which no matrix of that rank goes below."""
        m, n, rank = 10, 8, 3
        x = random_matrix(40 if case == "dead" else 4, m, 3)
        if case == "dead":
            x[:, [1, 4, 5]] = 0
        c = (x.T @ x / len(x)) * (case != "none")
        target, g = random_matrix(m, n, 1), positive(n, 2)
        root = torch.linalg.cholesky(g)
        left, right = reduced_rank(target, c, root, rank)
        assert torch.isfinite(left).all() and torch.isfinite(right).all()
        rest = torch.linalg.svdvals(half(c) @ target @ root)[rank:].square().sum()
        torch.testing.assert_close(weighted_error(target - left @ right, c, g), float(rest), rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("weighted", [False, True])
    def test_the_iterative_path_is_the_dense_one(self, weighted, monkeypatch):
        m, n, rank = 150, 120, 4
        target = random_matrix(m, n) * 0.9 ** torch.arange(n)
        c, root = positive(m, 1), torch.linalg.cholesky(positive(n, 2) + torch.eye(n)) if weighted else None
        dense = principal(target, c, root, rank)
        monkeypatch.setattr(linalg, "DENSE_BELOW", 10)
        applied = []
        apply = linalg.top_eigenvectors
        monkeypatch.setattr(linalg, "top_eigenvectors", lambda *given: applied.append(given) or apply(*given))
        iterative = principal(target, c, root, rank)
        assert applied and iterative.shape == (n, rank)
        torch.testing.assert_close(iterative @ iterative.T, dense @ dense.T, rtol=1e-6, atol=1e-6)

    def test_high_ranks_of_large_operators_are_decomposed_whole(self, monkeypatch):
        monkeypatch.setattr(linalg, "DENSE_BELOW", 10)
        matrix, calls = positive(40, 0), []
        found = top_eigenvectors(lambda v: calls.append(v.shape) or matrix @ v, 40, 12, torch.float64)
        assert calls == [(40, 40)]
        values = torch.linalg.eigvalsh(matrix).flip(0)[:12]
        torch.testing.assert_close((found * (matrix @ found)).sum(0), values)

    def test_no_direction_is_none(self):
        """Rank 0 gives no vectors, not all of them."""
        assert top_eigenvectors(lambda v: v, 5, 0, torch.float64).shape == (5, 0)

    @given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8), st.integers(0, 99))
    @hypothesis_settings(deadline=None, max_examples=30)
    def test_balanced_factors_have_the_same_product(self, m, n, k, seed):
        left, right = random_matrix(m, k, seed), 100 * random_matrix(k, n, seed + 1)
        a, b = balanced(left, right)
        torch.testing.assert_close(a @ b, left @ right)
        torch.testing.assert_close(a.norm(dim=0), b.norm(dim=1))
        for gram in (a.T @ a, b @ b.T):
            torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=1e-9, atol=1e-9 * float(gram.max()))
