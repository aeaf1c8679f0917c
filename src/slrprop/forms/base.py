"""What a dense weight can become. Every form knows its stored numbers, bytes, multiplications and dense value.

All matrices are in the articles' orientation: a weight is ``m x n`` = inputs (rows) x outputs (columns),
``y = x @ W + b``, the transpose of ``torch.nn.Linear.weight``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from slrprop.errors import SlrpropError
from slrprop.linalg import SVD


class Form:
    """A weight in a stored form. What is here holds for a product of matrices, the first of m rows and the last of n columns."""

    kind: ClassVar[str]  # the name that stored files give it
    beside: ClassVar[tuple[str, ...]] = ()  # its tensors that are no matrices
    faster: ClassVar[bool] = True  # False: the file is smaller, the computation is not
    selects: ClassVar[bool] = False  # whether ``permuted`` also takes lists that leave neurons out

    def __init_subclass__(cls) -> None:
        if "kind" in vars(cls):
            KINDS[cls.kind] = cls

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n): inputs, outputs."""
        chain = list(self.matrices().values())
        return chain[0].shape[0], chain[-1].shape[1]

    def matrices(self) -> dict[str, Tensor]:
        """The stored number arrays, by name."""
        return {
            name: value for name, value in vars(self).items() if isinstance(value, Tensor) and name not in self.beside
        }

    def with_matrices(self, matrices: Mapping[str, Tensor]) -> Self:
        """The same form with other numbers of the same shapes; what was worked out of its indices stays."""
        own = self.matrices()
        for name, matrix in own.items():
            require_matrix(f"the {name}", matrices[name], matrix.shape)
        return self.like(**{name: matrices[name] for name in own})

    def like(self, **parts: Any) -> Self:
        """The same form with other parts, unchecked."""
        made = object.__new__(type(self))
        vars(made).update(vars(self) | parts)
        return made

    @classmethod
    def restored(cls, description: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> Self:
        """The form that :meth:`description` and :meth:`arrays` tell of.

        Raises:
            KeyError, SlrpropError: they do not belong together.
        """
        return cls(**{field.name: arrays[field.name] for field in fields(cls)})  # type: ignore[arg-type]

    def description(self) -> dict[str, Any]:
        """What :meth:`restored` needs besides the arrays, as JSON-like values."""
        return {"kind": self.kind}

    def arrays(self) -> dict[str, Tensor]:
        """Everything stored, by name."""
        return self.matrices() | self.indices()

    def scale_axes(self) -> dict[str, int]:
        """For each matrix the axis along which numbers share one scale when they are quantised."""
        return {name: int(name.startswith(("right", "last"))) for name in self.matrices()}

    def dense(self) -> Tensor:
        """The ``m x n`` matrix these factors stand for."""
        return reduce(torch.matmul, self.matrices().values())

    def permuted(self, rows: Tensor | None = None, columns: Tensor | None = None) -> Self:
        """The factors of ``W[rows][:, columns]``, without loss.

        Args:
            rows, columns: neurons in a new order (None: the old one); where the form ``selects``, not necessarily all.
        """
        made = self.matrices()
        first, last = next(iter(made)), [*made][-1]
        made[first] = made[first] if rows is None else self.picked(made[first], rows)
        made[last] = made[last] if columns is None else made[last][:, columns]
        return replace(self, **made)  # type: ignore[type-var]

    def picked(self, first: Tensor, rows: Tensor) -> Tensor:
        """The first matrix with these rows of the weight."""
        return first[rows]

    def read(self) -> Tensor:
        """Which inputs there are weights for: bool (m,)."""
        return torch.ones(self.shape[0], dtype=torch.bool)

    def indices(self) -> dict[str, Tensor]:
        """The stored arrays that say which neurons a block serves, by name."""
        return {}

    @property
    def numbers(self) -> int:
        """Stored numbers; singular values are folded into the left factor, so they count nothing."""
        return sum(matrix.numel() for matrix in self.matrices().values())

    @property
    def multiplications(self) -> int:
        """Multiplications for one sample."""
        return self.numbers if self.faster else math.prod(self.shape)  # numbers of a block are used once

    @property
    def bytes(self) -> int:
        """Bytes of everything stored, indices included."""
        return sum(array.nbytes for array in self.arrays().values())


KINDS: dict[str, type[Form]] = {}


def restored(description: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> Form:
    """The form that a description and arrays tell of.

    Raises:
        SlrpropError: they tell of none.
    """
    try:
        return KINDS[description["kind"]].restored(description, arrays)
    except (KeyError, TypeError, IndexError, ValueError, AttributeError, RuntimeError) as error:
        raise SlrpropError(f"the stored arrays make no layer: {type(error).__name__} {error}") from error


def require_matrix(what: str, value: Tensor, shape: tuple[int | None, ...]) -> None:
    """Refuse what is no matrix of this shape (None: any side), or no vector."""
    if value.shape == shape:
        return
    fits = value.ndim == len(shape) and all(want in (None, got) for got, want in zip(value.shape, shape, strict=True))
    if not fits:
        wanted = " x ".join("any" if side is None else str(side) for side in shape)
        raise SlrpropError(f"{what} must have shape {wanted}, got {tuple(value.shape)}")


@dataclass(frozen=True, eq=False)
class Dense(Form):
    """The weight itself (m x n)."""

    weight: Tensor
    kind: ClassVar[str] = "dense"
    selects: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_matrix("a dense weight", self.weight, (None, None))


@dataclass(frozen=True, eq=False)
class Table(Dense):
    """The weight of an embedding (m x n): numbers of a row share a scale when they are quantised."""

    kind: ClassVar[str] = "table"

    def scale_axes(self) -> dict[str, int]:
        return {"weight": 1}


@dataclass(frozen=True, eq=False)
class LowRank(Form):
    """``W = left @ right`` with ``left`` (m x k) and ``right`` (k x n)."""

    left: Tensor
    right: Tensor
    kind: ClassVar[str] = "low_rank"
    selects: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_matrix("the left factor", self.left, (None, None))
        require_matrix("the right factor", self.right, (self.left.shape[1], None))

    @classmethod
    def from_svd(cls, svd: SVD) -> "LowRank":
        """Truncated SVD with the singular values folded into the left factor."""
        return cls(svd.left, svd.vt)
