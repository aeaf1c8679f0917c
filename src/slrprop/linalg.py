"""Truncated singular value decomposition by several solvers behind one front."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor

from slrprop.errors import SlrpropError

FULL_BELOW = 512  # "auto": up to this smaller side the full decomposition is fast enough
OVERSAMPLING = 16
POWER_ITERATIONS = 12
SUBSPACE_ITERATIONS = 8
WARM_ITERATIONS = 2  # from a start that is near the solution
DENSE_BELOW = 256  # symmetric matrices up to this size are decomposed whole
MIRRORED = 256  # rows of a triangle at a time
TOGETHER = 1 << 18  # numbers of a wide matrix that are worked on at a time, where all of them would take much memory


class SVD(NamedTuple):
    """``W ~ u @ diag(s) @ vt`` with ``u`` (m x k), ``s`` (k,) descending, ``vt`` (k x n)."""

    u: Tensor
    s: Tensor
    vt: Tensor

    @property
    def left(self) -> Tensor:
        """``u`` with the singular values folded in (m x k)."""
        return self.u * self.s


Solver = str | Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]


def _full(w: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    return u[:, :k], s[:k], vt[:k]


def _iterative(package: str) -> Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]:
    def solve(w: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        if k >= min(w.shape):
            return _full(w, k)  # the iterative solvers need k below the smaller side
        matrix = w.cpu().numpy()
        length = len(matrix) if package == "propack" else min(matrix.shape)
        start = np.random.default_rng(0).standard_normal(length).astype(matrix.dtype)
        try:
            # PROPACK counts basis vectors, and its own default of 10 k is too few for k = 1
            vectors = min(*matrix.shape, 10 * k + 50) if package == "propack" else None
            parts = scipy.sparse.linalg.svds(
                matrix, k, v0=start, solver=package, maxiter=vectors, rng=np.random.default_rng(0)
            )
        except (np.linalg.LinAlgError, scipy.sparse.linalg.ArpackError) as error:  # a rank below k, or no convergence
            raise SlrpropError(
                f"the {package} solver failed on a {len(matrix)} x {matrix.shape[1]} weight at rank {k} ({error}); use solver='full'"
            ) from error
        u, s, vt = (torch.from_numpy(part.copy("C")).to(w) for part in parts)
        order = s.argsort(descending=True)
        return u[:, order], s[order], vt[order]

    return solve


def _randomized(w: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[w.device] if w.is_cuda else []):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(w, min(k + OVERSAMPLING, *w.shape), niter=POWER_ITERATIONS)
    return u[:, :k], s[:k], v[:, :k].T


def _auto(w: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    small = min(w.shape)
    return SOLVERS["full" if small <= FULL_BELOW or k > small // 8 else "arpack"](w, k)


SOLVERS: dict[str, Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]] = {
    "auto": _auto,
    "full": _full,
    "arpack": _iterative("arpack"),
    "lanczos": _iterative("propack"),
    "randomized": _randomized,
}


def truncated_svd(w: Tensor, rank: int, solver: Solver = "auto") -> SVD:
    """The ``rank`` largest singular triplets of ``w`` (m x n), in the dtype of ``w`` (half precision: in float32).

    Signs are fixed: the entry of largest magnitude in every column of ``u`` is positive.

    Args:
        solver: ``full`` (LAPACK), ``arpack`` (implicitly restarted Lanczos on the Gram matrix), ``lanczos``
            (PROPACK, Lanczos bidiagonalisation), ``randomized`` (Halko, Martinsson, Tropp 2011, with power
            iterations), ``auto`` (``full`` for small matrices or high ranks, else ``arpack``), or a function
            ``(w, rank) -> (u, s, vt)``.

    Raises:
        SlrpropError: rank outside 1..min(m, n), unknown solver, or a weight that is not finite.
    """
    if w.ndim != 2:
        raise SlrpropError(f"a truncated SVD takes a matrix; this weight has shape {tuple(w.shape)}")
    if not 1 <= rank <= min(w.shape):
        raise SlrpropError(f"rank {rank} was asked of a {w.shape[0]} x {w.shape[1]} weight; choose 1 to {min(w.shape)}")
    if not torch.isfinite(w).all():
        raise SlrpropError(
            f"the {w.shape[0]} x {w.shape[1]} weight holds NaN or infinite values; repair the model first"
        )
    if isinstance(solver, str) and solver not in SOLVERS:
        raise SlrpropError(f"no solver is called '{solver}'; choose one of {', '.join(SOLVERS)}, or pass a function")
    w = w if w.dtype in (torch.float32, torch.float64) else w.float()
    u, s, vt = (SOLVERS[solver] if isinstance(solver, str) else solver)(w, rank)
    if u.shape != (w.shape[0], rank) or s.shape != (rank,) or vt.shape != (rank, w.shape[1]):
        raise SlrpropError(
            f"the solver gave factors of shapes {tuple(u.shape)}, {tuple(s.shape)}, {tuple(vt.shape)} for rank {rank} of a {w.shape[0]} x {w.shape[1]} weight"
        )
    peak = u.gather(0, u.abs().argmax(0, keepdim=True))[0]
    sign = torch.where(peak < 0, -1, 1).to(u)
    return SVD((u * sign).contiguous(), s, (vt * sign[:, None]).contiguous())


def top_eigenvectors(
    apply: Callable[[Tensor], Tensor], size: int, rank: int, dtype: torch.dtype, near: Tensor | None = None
) -> Tensor:
    """Eigenvectors (size x rank) of the largest eigenvalues of a symmetric positive semi-definite operator.

    Below ``DENSE_BELOW`` or for high ranks the whole matrix is decomposed; else block subspace iteration with
    Rayleigh-Ritz (Halko, Martinsson, Tropp 2011), from a fixed start.

    Args:
        apply: multiplies a (size x j) matrix by the operator.
        near: vectors (size x rank) near the solution; the result's Ritz values are no smaller than theirs.
    """
    if size <= DENSE_BELOW or rank + OVERSAMPLING > size // (4 if near is None else 2):
        vectors = torch.linalg.eigh(apply(torch.eye(size, dtype=dtype)))[1]
        return vectors[:, size - rank :].flip(1)
    start = torch.Generator().manual_seed(0)
    basis = torch.randn(size, OVERSAMPLING + (rank if near is None else 0), dtype=dtype, generator=start)
    if near is not None:
        basis = torch.linalg.qr(torch.cat([basis / math.sqrt(size), near], 1))[0]
    for _ in range(SUBSPACE_ITERATIONS if near is None else WARM_ITERATIONS):
        basis = torch.linalg.qr(apply(basis))[0]
    vectors = torch.linalg.eigh(basis.T @ apply(basis))[1]
    return (basis @ vectors[:, OVERSAMPLING:]).flip(1)


def in_parts(*matrices: Tensor, together: int = 0) -> Iterator[tuple[Tensor, ...]]:
    """Matrices of as many rows, the same few rows of each at a time: ``together`` numbers (0: ``TOGETHER``), or one row."""
    rows = max(1, (together or TOGETHER) // max(1, *(matrix[:1].numel() for matrix in matrices)))
    return zip(*(matrix.split(rows) for matrix in matrices), strict=True)


def between(left: Tensor, covariance: Tensor, right: Tensor) -> Tensor:
    """``left.T @ C @ right`` (j x l) of left (m x j), right (m x l) and C (m x m, or its diagonal alone); float64 where C is."""
    if covariance.ndim == 2:
        return left.T @ (covariance @ right)
    found = covariance.new_zeros(left.shape[1], right.shape[1])
    for a, c, b in in_parts(left, covariance[:, None], right):
        found.addmm_((a * c).T, b.to(c))
    return found


def principal(target: Tensor, covariance: Tensor, root: Tensor | None, rank: int) -> Tensor:
    """The top principal directions (n x k) of the weighed output ``C^.5 T L``, see :func:`reduced_rank`."""
    m, n = target.shape
    factors = [target] if root is None else [target, root]
    if covariance.ndim == 1:
        factors, covariance = factors[1:], between(target, covariance, target)
    elif root is not None and (n <= DENSE_BELOW or m < 4 * SUBSPACE_ITERATIONS * rank):  # else the product costs more
        factors = [target @ root]

    def apply(v: Tensor) -> Tensor:
        for factor in reversed(factors):
            v = factor @ v
        v = covariance @ v
        for factor in factors:
            v = factor.T @ v
        return v

    return top_eigenvectors(apply, n, rank, covariance.dtype)


def projected(target: Tensor, root: Tensor | None, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """T projected onto directions (n x k) of its weighed output, as factors (m x k) and (k x n) of its dtype."""
    right = vectors.T if root is None else torch.linalg.solve_triangular(root, vectors.T, upper=False, left=False)
    return target @ (vectors if root is None else root @ vectors).to(target), right.to(target)


def reduced_rank(target: Tensor, covariance: Tensor, root: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """Factors A (m x k), B (k x n) that minimise ``||C^.5 (T - A B) L||_F``: reduced-rank regression in two metrics.

    The projection of T onto the top principal directions of the weighed output (methods: DRONE 2021, SVD-LLM 2024 for
    L = I). Nothing is inverted but L, so C may be singular.

    Args:
        target: T (m x n).
        covariance: C (m x m).
        root: lower Cholesky factor L (n x n) of the outputs' metric; None for the identity.
        rank: k, at most min(m, n).
    """
    return projected(target, root, principal(target, covariance, root, rank))


def mirrored(upper: Tensor) -> Tensor:
    """The symmetric matrix with this upper triangle; what is below its diagonal means nothing, and is overwritten."""
    for start in range(0, len(upper), MIRRORED):  # no second matrix beside it: they can be wide
        here, after = slice(start, start + MIRRORED), slice(start + MIRRORED, None)
        upper[here, here] = upper[here, here].triu() + upper[here, here].triu(1).T
        upper[after, here] = upper[here, after].T
    return upper


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    rest: Tensor,
    start: Tensor,
    steps: int,
    near: Callable[[Tensor], Tensor] = lambda rest: rest,
    enough: Callable[[Tensor, float], bool] = lambda rest, gain: False,
) -> Tensor:
    """Some steps from ``start`` towards the solution x of ``apply(x) = right``; ``apply`` is symmetric and positive semidefinite.

    Args:
        rest: ``right - apply(start)``.
        near: the preconditioner, nearly the inverse of ``apply``.
        enough: whether to end, given what is left of ``rest`` and twice what the last step took off ``x . apply(x) / 2 - x . right``.
    """
    found, along, before = start, torch.zeros_like(start), 0.0
    for _ in range(steps):
        close = near(rest)
        product = float((close * rest).sum())
        along = close + (product / before if before else 0.0) * along
        image = apply(along)
        curvature = float((along * image).sum())
        if not (product > 0 and curvature > 0):
            break
        length = product / curvature
        found, rest, before = found + length * along, rest - length * image, product
        if enough(rest, length * product):
            break
    return found


def passed_on(
    rows: np.ndarray, upper: np.ndarray, keep: Callable[[int, np.ndarray], np.ndarray | float], block: int
) -> None:
    """Make every row i (m x n) in place what ``keep(i, row)`` gives, one after the other; the rows to come take up its error.

    Frantar et al., GPTQ, ICLR 2023, after optimal brain surgery.

    Args:
        upper: the upper Cholesky factor (m x m) of the inverse of what the rows are multiplied with.
        block: rows whose errors are passed on together to those behind them.
    """
    for start in range(0, len(rows), block):
        stop = min(start + block, len(rows))
        errors = np.empty_like(rows[start:stop])
        for i in range(start, stop):
            kept = keep(i, rows[i])
            errors[i - start] = (rows[i] - kept) / upper[i, i]
            rows[i] = kept
            rows[i + 1 : stop] -= upper[i, i + 1 : stop, None] * errors[i - start]
        rows[stop:] -= upper[start:stop, stop:].T @ errors


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with orthogonal components whose two sides have the same length."""
    qa, ra = torch.linalg.qr(left)
    qb, rb = torch.linalg.qr(right.T)
    u, s, vt = torch.linalg.svd(ra @ rb.T, full_matrices=False)
    root = s.sqrt()
    return (qa @ u).mul_(root), root[:, None] * (vt @ qb.T)
