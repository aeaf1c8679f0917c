"""One ADMM for Net-Trim and DDLR: the simplest matrix whose response to the samples stays near a layer's.

Net-Trim (Aghasi, Abdi, Nguyen, Romberg, NIPS 2017) asks for the smallest sum of magnitudes, DDLR (Papadimitriou, Jain,
arXiv 2107.05787) for the smallest sum of singular values, under the same convex constraints.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from slrprop.errors import SlrpropError

Proximal = Callable[[Tensor, float], Tensor]  # (matrix, step) -> argmin_B R(B) step + ||B - matrix||^2 / 2

TINY = 1e-300
TOLERANCE = 1e-4  # of both relative residuals
CHECK_EVERY = 10  # iterations between looks at the residuals
RELAXATION = 1.6  # over-relaxation, Boyd et al. 2011, section 3.4.3
BALANCE_FIRST, BALANCE_GROWTH = 10, 1.5  # rho follows the residuals after 10, 15, 23, ... iterations


def soft_threshold(matrix: Tensor, step: float) -> Tensor:
    """Proximal step of the sum of magnitudes; exact zeros."""
    return matrix.sign() * (matrix.abs() - step).clamp_min(0)


def singular_value_threshold(matrix: Tensor, step: float) -> Tensor:
    """Proximal step of the nuclear norm; the lost singular values are zero to rounding.

    Through the Gram matrix of the smaller side: what it loses in precision are singular values far below ``step``.
    """
    if matrix.shape[0] < matrix.shape[1]:
        return singular_value_threshold(matrix.T, step).T
    squares, v = torch.linalg.eigh(matrix.T @ matrix)
    s = squares.clamp_min(0).sqrt()
    kept = s > step
    v = v[:, kept]
    return (matrix @ (v * (1 - step / s[kept]))) @ v.T


class Violation(NamedTuple):
    """How far a solution is outside the constraints, relative to ``||Y||_F``; zero if inside.

    ``error``: ``||(X W + b - Y)_active||_F`` above eps. ``ceiling``: Frobenius norm of what exceeds V elsewhere.
    """

    error: float
    ceiling: float


@dataclass(frozen=True, eq=False)
class Programme:
    """The constraints ``||(X W + b - Y)_active||_F <= eps`` and ``X W + b <= V`` elsewhere, all float64.

    Args:
        x: X, the layer's inputs (p x m), one sample a row.
        y: Y, its outputs (p x n).
        eps: the radius.
        active: bool (p x n), where the outputs are to be met; None: everywhere (a linear layer).
        ceiling: V (p x n), or one number.
    """

    x: Tensor
    y: Tensor
    eps: float
    active: Tensor | None = None
    ceiling: Tensor | float = 0.0

    def __post_init__(self) -> None:
        if self.x.ndim != 2 or self.y.ndim != 2 or len(self.x) != len(self.y):
            raise SlrpropError(
                f"samples must be two matrices of as many rows, got {tuple(self.x.shape)} and {tuple(self.y.shape)}"
            )
        if not (torch.isfinite(self.x).all() and torch.isfinite(self.y).all()):
            raise SlrpropError("the samples hold NaN or infinite values; repair the model or the data first")
        if not self.eps >= 0:
            raise SlrpropError(f"the radius eps must be at least 0, got {self.eps}")

    @classmethod
    def parallel(cls, x: Tensor, z: Tensor, relu: bool, gain: float) -> "Programme":
        """Every layer by itself: ``eps = gain ||Y||_F``, V = 0; ``z`` are the original pre-activations."""
        y = z.relu() if relu else z
        return cls(x, y, gain * float(y.norm()), y > 0 if relu else None)

    @classmethod
    def cascade(cls, x: Tensor, z: Tensor, relu: bool, gain: float, response: Tensor) -> "Programme":
        """A layer behind compressed ones: the original weight's ``response`` (p x n) to x is always allowed.

        ``V = response`` and ``eps = sqrt(1.1) ||(response - Y)_active||_F`` (Net-Trim, section 2.2); where x is not
        changed, so that this error is nothing, the parallel constraints.
        """
        first = cls.parallel(x, z, relu, gain)
        error = first.distance(response)
        if error <= 1e-4 * float(first.y.norm()):
            return first
        return cls(x, first.y, 1.1**0.5 * error, first.active, response)

    def distance(self, response: Tensor) -> float:
        """``||(response - Y)_active||_F``."""
        difference = response - self.y
        return float((difference if self.active is None else difference * self.active).norm())

    def violation(self, weight: Tensor, bias: Tensor) -> Violation:
        """Of a weight (m x n) and a bias (n,)."""
        response = self.x @ weight + bias
        scale = max(float(self.y.norm()), TINY)
        above = 0.0
        if self.active is not None:
            above = float(((response - self.ceiling).clamp_min(0) * ~self.active).norm())
        return Violation(max(0.0, self.distance(response) - self.eps) / scale, above / scale)


class Solution(NamedTuple):
    """A weight (m x n) and bias (n,) with the state in which the iteration ended.

    ``primal`` and ``dual`` are relative residuals; ``converged`` says that both came below the tolerance.
    """

    weight: Tensor
    bias: Tensor
    violation: Violation
    iterations: int
    primal: float
    dual: float
    converged: bool


def solve(
    programme: Programme,
    proximal: Proximal,
    rho: float = 1.0,
    iterations: int = 1000,
    tolerance: float = TOLERANCE,
) -> Solution:
    """``min R(W)`` under the programme's constraints, R given by its proximal step.

    The bias is a weight of one more input that is always 1. It is not penalised: every stored form keeps all n biases
    anyway, so a zero there saves nothing, and a rank would have to be spent on it.

    The splitting is Net-Trim's: responses (in the constraints) and weight (in R) are copies tied to one variable, whose
    step is a linear system with ``C = X^T X + I``, factored once; dead inputs and few samples make X^T X singular, C never.
    X, Y, V and eps are divided by ``0.3 sqrt(max |X^T X|)``, which balances the two copies. ``rho`` is where the
    penalty starts: at ever longer intervals it is multiplied by the root of the two residuals' quotient (residual
    balancing, Boyd et al. 2011, section 3.4.1; without the growing intervals it can circle for thousands of iterations).
    C does not depend on it.

    Args:
        proximal: :func:`soft_threshold` (Net-Trim), :func:`singular_value_threshold` (DDLR), or another.
        iterations: the limit.
        tolerance: both relative residuals below this end the iteration.

    Returns:
        The penalised copy: exactly sparse or exactly of low rank; feasible up to ``violation``.
    """
    x = torch.cat((programme.x, programme.x.new_ones(len(programme.x), 1)), 1)
    scale = 0.3 * max(float((x.T @ x).abs().max()), TINY) ** 0.5
    x, y, eps, ceiling = x / scale, programme.y / scale, programme.eps / scale, programme.ceiling / scale
    active = programme.active
    factor = torch.linalg.cholesky(x.T @ x + torch.eye(x.shape[1], dtype=x.dtype))
    tied = x.new_zeros(x.shape[1], y.shape[1])
    reached = x @ tied
    dual_response, dual_weight = torch.zeros_like(reached), torch.zeros_like(tied)
    above = ceiling - y if active is not None else None
    primal = dual = float("inf")
    done, balance_at = 0, float(BALANCE_FIRST)
    for done in range(1, iterations + 1):
        # all passes over p x n arrays in place: they cost as much as the two products
        step = (reached - dual_response).sub_(y)
        length = float(step.norm() if active is None else torch.where(active, step, 0).norm())
        shrink = min(1.0, eps / max(length, TINY))
        response = (
            step * shrink if active is None else torch.where(active, step * shrink, step.clamp_max(above))
        ).add_(y)
        weight = tied - dual_weight
        weight = torch.cat((proximal(weight[:-1], 1 / rho), weight[-1:]))
        dual_response.add_(torch.lerp(reached, response, RELAXATION))
        dual_weight.add_(torch.lerp(tied, weight, RELAXATION))
        old = (reached, tied)
        tied = torch.cholesky_solve(torch.addmm(dual_weight, x.T, dual_response), factor)
        reached = x @ tied
        dual_response.sub_(reached)
        dual_weight.sub_(tied)
        if done % CHECK_EVERY and done < iterations:
            continue
        size = max(_norm(response, weight), _norm(reached, tied), TINY)
        primal = _norm(response - reached, weight - tied) / size
        dual = _norm(reached - old[0], tied - old[1]) / max(_norm(dual_response, dual_weight), 1e-3 * size)
        if max(primal, dual) <= tolerance:
            break
        if done >= balance_at:
            balance_at = BALANCE_GROWTH * done
            change = min(max((primal / max(dual, TINY)) ** 0.5, 0.1), 10.0)
            rho *= change
            dual_response /= change
            dual_weight /= change
    found, bias = weight[:-1], weight[-1]
    return Solution(found, bias, programme.violation(found, bias), done, primal, dual, max(primal, dual) <= tolerance)


def _norm(response: Tensor, weight: Tensor) -> float:
    return math.hypot(float(response.norm()), float(weight.norm()))
