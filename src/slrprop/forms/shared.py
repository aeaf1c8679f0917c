"""A weight whose columns are permutations of one sequence."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from slrprop.errors import SlrpropError
from slrprop.forms.base import Form
from slrprop.forms.permutations import pack, packed_bytes, require_seed, seeded, unpack


@dataclass(frozen=True, eq=False)
class Shared(Form):
    """``W[i, j] = scale[j] * sequence[places[j, i]] + offset[j]``, every row of ``places`` a permutation of 0 .. m - 1.

    Without an offset (None) none is stored or added.

    The permutations are either ``packed``, ceil(log2 m) bits an entry (uint8, :func:`slrprop.forms.permutations.pack`), or
    generated from a ``seed`` (:func:`slrprop.forms.permutations.seeded`), of which 8 bytes are stored. The form
    makes files smaller, not faster: the weight is put together before it is multiplied.

    ``sequence`` is (m,), ``scale`` and ``offset`` are (n,). Source of the idea: Nagaraju, Chandrachoodan, IET Computers &
    Digital Techniques, 2023 (its construction is not available to us: scale, offset, packing and generator are ours).
    """

    sequence: Tensor
    scale: Tensor
    offset: Tensor | None
    packed: Tensor | None = None
    seed: int | None = None
    beside: ClassVar[tuple[str, ...]] = ("packed", "places")
    kind: ClassVar[str] = "shared"
    faster: ClassVar[bool] = False

    def __post_init__(self) -> None:
        sides = [part.shape for part in (self.scale, self.offset) if part is not None]
        if any(part.ndim != 1 for part in self.matrices().values()) or len(set(sides)) > 1:
            shapes = ", ".join(str(tuple(part.shape)) for part in self.matrices().values())
            raise SlrpropError(f"a shared weight takes a sequence (m,), a scale and an offset (n,), got {shapes}")
        if (self.packed is None) == (self.seed is None):
            raise SlrpropError("a shared weight takes either packed permutations or a seed")
        if self.seed is not None:
            require_seed(self.seed)
        elif self.packed is not None and (
            self.packed.dtype != torch.uint8 or self.packed.shape != (packed_bytes(*self.shape),)
        ):
            raise SlrpropError(
                f"{self.shape[1]} packed permutations of {self.shape[0]} places are {packed_bytes(*self.shape)} bytes, got {self.packed.dtype} {tuple(self.packed.shape)}"
            )

    @classmethod
    def of(cls, sequence: Tensor, scale: Tensor, offset: Tensor | None, places: Tensor) -> "Shared":
        """The form with these permutations (n x m, whole numbers)."""
        return cls(sequence, scale, offset, torch.from_numpy(pack(places.cpu().numpy())).to(sequence.device))

    @cached_property
    def places(self) -> Tensor:
        """The permutations (n x m, int32).

        Raises:
            SlrpropError: a place is beyond the sequence.
        """
        m, n = self.shape
        if self.seed is not None:
            found: np.ndarray = seeded(self.seed, m, n)
        else:
            assert self.packed is not None
            found = unpack(self.packed.cpu().numpy(), m, n)
        return torch.from_numpy(found)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.sequence), len(self.scale)

    def indices(self) -> dict[str, Tensor]:
        return {"packed": self.packed} if self.packed is not None else {"seed": torch.tensor([self.seed])}

    def with_matrices(self, matrices: Mapping[str, Tensor]) -> "Shared":
        _ = self.places  # unpacked once for all
        return super().with_matrices(matrices)

    @classmethod
    def restored(cls, description: Mapping[str, Any], arrays: Mapping[str, Tensor]) -> "Shared":
        numbers = arrays["sequence"], arrays["scale"], arrays.get("offset")
        if "seed" in arrays:
            return cls(*numbers, seed=int(arrays["seed"].item()))
        return cls(*numbers, arrays["packed"])

    def dense(self) -> Tensor:
        weight = self.scale[:, None] * self.sequence[self.places.to(self.sequence.device).long()]
        return (weight if self.offset is None else weight + self.offset[:, None]).T

    def permuted(self, rows: Tensor | None = None, columns: Tensor | None = None) -> "Shared":
        """Without loss of a number, but a seed's permutations are packed then: their new order has no seed."""
        if rows is None and columns is None:
            return self
        places, scale, offset = self.places, self.scale, self.offset
        if columns is not None:
            places, scale, offset = places[columns], scale[columns], None if offset is None else offset[columns]
        return Shared.of(self.sequence, scale, offset, places if rows is None else places[:, rows])
