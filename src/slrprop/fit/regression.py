"""The problem every data-aware method solves: a layer's inputs, what its outputs should be, and which outputs matter; in float64."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from slrprop.linalg import DENSE_BELOW, balanced, principal, projected
from slrprop.operators import MatMul, Operator

DAMPING = 1e-4  # pull towards the original weight, times the mean variance of the inputs
SELECTION_DAMPING = 1e-3
ROUNDING_DAMPING = 1e-2  # of the covariance, when errors of rounding are passed on


def level(matrix: Tensor) -> float:
    """The mean of a covariance's diagonal, what damping is measured by; 1 where all is zero."""
    return float(matrix.diagonal().mean()) or 1.0


class Spread(NamedTuple):
    """How errors of one row are passed on to the others: rows by falling variance, and the inverse's Cholesky factor."""

    order: Tensor
    upper: Tensor

    @classmethod
    def of(cls, covariance: Tensor) -> "Spread":
        """From the covariance (r x r) of what the rows are multiplied with."""
        order = covariance.diagonal().argsort(descending=True)
        spread = covariance[order[:, None], order]
        spread.diagonal().add_(ROUNDING_DAMPING * level(spread))
        return cls(order, torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(spread)), upper=True))


class Components(NamedTuple):
    """The product of rank k nearest to a weight in both metrics, its components by falling share of the weighed output."""

    left: Tensor  # (m, k)
    right: Tensor  # (k, n)
    vectors: Tensor  # (n, k), orthonormal: principal directions of the weighed output


@dataclass(frozen=True, eq=False)
class Regression:
    """Find factors F of a layer so that ``x @ F + bias`` is near the original pre-activation z; all float64 but an embedding's weight.

    ``original`` (m x n) is the layer's weight; ``weight`` (m x n) the one to come near to: the original, or where layers
    before are compressed, the least-squares weight from their outputs to z (ridge towards the original). ``bias`` (n,) is the
    original one, ``mean`` (m,) and ``covariance`` (m x m, centred; of an embedding its diagonal, all there is) are of x, ``target_mean`` (n,) of z. ``metric`` (n x n)
    weighs errors of z by what they do to the network's outputs (Gauss-Newton: the mean of ``J H J^T``, J the Jacobian of the
    outputs, H centring over classes), damped; None weighs all alike. ``root`` is its lower Cholesky factor. ``relu``: the layer's activation is ReLU.
    ``operator`` says how it is multiplied. ``samples`` gives up to ``pairs.SAMPLE_ROWS`` of (x, z), (p x m) and (p x n).
    """

    name: str
    original: Tensor
    weight: Tensor
    bias: Tensor
    mean: Tensor
    covariance: Tensor
    target_mean: Tensor
    metric: Tensor | None
    root: Tensor | None
    relu: bool
    samples: Callable[[], tuple[Tensor, Tensor]]
    operator: Operator = field(default_factory=MatMul)
    _components: dict[bool, Components] = field(init=False, default_factory=dict)  # the largest that are known
    _covered: list[Tensor] = field(init=False, default_factory=list)

    def corrected_bias(self, weight: Tensor) -> Tensor:
        """The bias (n,) that makes the mean output right for a dense weight (m x n)."""
        return self.target_mean - self.mean @ weight

    @cached_property
    def unweighted(self) -> "Regression":
        """The same with all outputs weighing alike."""
        found = replace(self, metric=None, root=None)
        vars(found).update({key: vars(self)[key] for key in ("spread", "freedom") if key in vars(self)})
        return found

    @cached_property
    def spread(self) -> Spread:
        """How rounding errors of one input's row are passed on to the others."""
        return Spread.of(self.covariance)

    @cached_property
    def freedom(self) -> Tensor:
        """Diagonal (m,) of the damped covariance's inverse: what an input varies by beyond all others, inverted."""
        return torch.cholesky_inverse(torch.linalg.cholesky(self.damped(SELECTION_DAMPING))).diagonal().clone()

    def components(self, rank: int, weighted: bool = True) -> Components:
        """The best product of rank k; parts of a larger one where that is known."""
        root, known = self.root if weighted else None, self._components
        if weighted not in known or known[weighted].left.shape[1] < rank:
            if self.covariance.ndim == 1:
                known.clear()  # of an embedding's, which are wide, only those in one metric
            n = self.weight.shape[1]  # of few directions all are found at once
            vectors = principal(self.weight, self.covariance, root, n if n <= DENSE_BELOW else rank)
            known[weighted] = Components(*projected(self.weight, root, vectors), vectors)
            if weighted:
                self._covered.clear()
        left, right, vectors = known[weighted]
        return Components(left[:, :rank], right[:rank], vectors[:, :rank])

    def covered(self, rank: int) -> Tensor:
        """The covariance times the left factor (m x k) of the components."""
        left, known = self.components(rank).left, self._covered
        if not known or known[0].shape[1] < rank:
            known[:] = [self.covariance @ left]
        return known[0][:, :rank]

    def low_rank(self, rank: int, weighted: bool = True) -> tuple[Tensor, Tensor]:
        """The rank-k factors (m x k), (k x n) of least error in both metrics, balanced."""
        left, right, _ = self.components(rank, weighted)
        return balanced(left, right)

    def damped(self, share: float) -> Tensor:
        """The covariance plus ``share`` of its mean variance on the diagonal: invertible where inputs are dead or few."""
        covariance = self.covariance.clone()
        covariance.diagonal().add_(share * level(self.covariance))
        return covariance
