"""Dense layers: every position of the last axis is multiplied by the weight."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from slrprop.forms import Dense, Form, Quantized, express
from slrprop.forms.spatial import Sequence
from slrprop.operators.base import Operator
from slrprop.operators.lookup import Lookup


@dataclass(frozen=True)
class MatMul(Operator):
    """``y = x @ W``; torch stores W's transpose (n x m)."""

    kind: ClassVar[str] = "dense layer"
    kernel: ClassVar[tuple[int, ...]] = ()  # type: ignore[misc]

    def matrix(self, stored: Tensor) -> Tensor:
        return stored.T

    def stored(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def inputs(self, x: Tensor, first: int = 0) -> Tensor:
        return x.reshape(-1, x.shape[-1])

    def compute(self, form: Form, bias: Tensor | None, x: Tensor) -> Tensor:
        if isinstance(form, Dense) and bias is not None:  # rounded as torch's own layer is
            return functional.linear(x, form.weight.T, bias.to(x))
        return super().compute(form, bias, x)

    def enter(self, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight


def times(rows: Tensor, form: Form) -> Tensor:
    """Rows (p x m), whatever operation they were taken from, times the matrix that a form stands for."""
    if not rows.is_floating_point():  # the numbers of rows
        return express(form, Lookup(), rows)
    sequence = isinstance(form.codes if isinstance(form, Quantized) else form, Sequence)
    return rows @ form.dense() if sequence else express(form, MatMul(), rows)
