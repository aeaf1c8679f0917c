"""A convolution's weight as a product of two sides: the mathematics that spatial and Tucker forms share.

Rows of the weight go by channel and place ``(c, i, j)``, k places i and l places j. A first side F (C k x r) makes r channels of each
stretch of k places, a second side K (r l x n) the outputs: ``W[(c, i, j), o] = sum_r F[(c, i), r] K[(r, j), o]``. With a kernel of k x l
places that is the spatial form; with k = 1 and all places in l F are a Tucker form's input channels. What lies between the sides is linear in
the patches, so that their covariance says all that maps between the two convolutions would.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from slrprop.fit.quantize import compensated, form_of, rounded
from slrprop.fit.regression import Regression, Spread, level
from slrprop.forms import Quantized, Spatial, Tucker
from slrprop.linalg import conjugate_gradients, reduced_rank

RIDGE = 1e-6  # of what is solved, times its mean diagonal
STEPS = 12  # of conjugate gradients for a first side
GAIN = 1e-3  # of the error that is left: what a step brings at least, or it is the last


@dataclass(frozen=True, eq=False)
class Sides:
    """The problem ``min tr (T - spread(F) K)^T S (T - spread(F) K) G`` of a layer: S (m x m), T (m x n), G (n x n, or None)."""

    square: Tensor
    target: Tensor
    metric: Tensor | None
    root: Tensor | None
    high: int
    wide: int

    @classmethod
    def of(cls, task: Regression, high: int, wide: int) -> "Sides":
        return cls(task.covariance, task.weight, task.metric, task.root, high, wide)

    def start(self, rank: int) -> Tensor:
        """The first side (C k x r) of least error were the stretches side by side alike, and no covariance between them."""
        weighed = self.target if self.root is None else self.target @ self.root
        rows = weighed.unflatten(0, (-1, self.wide)).flatten(1)
        return torch.linalg.qr(reduced_rank(rows, self.stretch, None, rank)[0])[0]

    @property
    def stretch(self) -> Tensor:
        """The covariance (C k x C k) of one stretch, the mean over the l of them."""
        size = len(self.square) // self.wide
        return self.square.reshape(size, self.wide, size, self.wide).diagonal(dim1=1, dim2=3).mean(-1)

    @cached_property
    def crossed(self) -> Tensor:
        """``S T`` (m x n)."""
        return self.square @ self.target

    def covered(self, first: Tensor) -> Tensor:
        """``S spread(F)`` (m x r l)."""
        return (first.T @ self.square.reshape(len(first), -1)).reshape(-1, len(self.square)).T

    def folded(self, first: Tensor, rows: Tensor) -> Tensor:
        """``spread(F)^T`` times something (m x c)."""
        return torch.einsum("sr,sjc->rjc", first, rows.unflatten(0, (-1, self.wide))).flatten(0, 1)

    def between(self, first: Tensor) -> Tensor:
        """The covariance (r l x r l) of what the first side gives."""
        inner = self.folded(first, self.covered(first))
        inner.diagonal().add_(RIDGE * level(inner))
        return inner

    def second(self, first: Tensor, inner: Tensor | None = None) -> Tensor:
        """The second side by least squares."""
        inner = self.between(first) if inner is None else inner
        return torch.linalg.solve(inner, self.folded(first, self.crossed))

    def first(self, start: Tensor, second: Tensor) -> Tensor:
        """The first side by conjugate gradients from the one that the second was fitted to, as long as they gain."""
        weighed = second if self.metric is None else second @ self.metric
        across, rank = weighed @ second.T, start.shape[1]
        target = self.target if self.metric is None else self.target @ self.metric
        error = float((self.crossed * target).sum() - (weighed * self.folded(start, self.crossed)).sum())

        def taken(rows: Tensor) -> Tensor:
            """``sum_j S[(., j), :] X[:, (., j)]`` (C k x r) of X (m x r l)."""
            parts = rows.unflatten(1, (rank, self.wide)).permute(2, 0, 1)
            return self.square.reshape(len(start), -1) @ parts.reshape(-1, rank)

        def spread(first: Tensor, rows: Tensor) -> Tensor:
            """``spread(F)`` times something (r l x c)."""
            return torch.einsum("sr,rjc->sjc", first, rows.unflatten(0, (rank, self.wide))).flatten(0, 1)

        def little(_: Tensor, gain: float) -> bool:
            nonlocal error
            error -= gain
            return gain < GAIN * error

        rest = taken(self.target @ weighed.T - spread(start, across))
        return conjugate_gradients(lambda first: taken(spread(first, across)), rest, start, STEPS, enough=little)


@compensated.register(Spatial)
@compensated.register(Tucker)
def _(form: Spatial | Tucker, bits: int, task: Regression) -> Quantized:
    """A form (float64) in few bits: what comes later is fitted to what is rounded already, errors compensated on the data."""
    high, wide = form.kernel if isinstance(form, Spatial) else (1, task.operator.unit)
    sides = Sides.of(task, high, wide)
    codes, scale = rounded(form.first, 0, bits, Spread.of(sides.stretch))
    found, first = {"first": (codes, scale)}, codes * scale
    inner = sides.between(first)
    target = sides.second(first, inner)
    if isinstance(form, Spatial):
        found["second"] = rounded(target, 0, bits, Spread.of(inner))
    else:
        core, _ = reduced_rank(target, inner, sides.root, form.core.shape[1])
        codes, scale = rounded(core, 0, bits, Spread.of(inner))
        core = codes * scale
        last_inner = core.T @ inner @ core
        last_inner.diagonal().add_(RIDGE * level(last_inner))
        last = torch.linalg.solve(last_inner, core.T @ inner @ target)
        found |= {"core": (codes, scale), "last": rounded(last, 1, bits, Spread.of(last_inner))}
    return form_of(form, bits, found)
