"""Torch modules that compute with factors, in the place of ``torch.nn.Linear``.

They take (..., m) and give (..., n), can be fine-tuned, and export to ONNX as standard nodes.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import singledispatch
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slrprop.errors import SlrpropError
from slrprop.factors import (
    Dense,
    Factors,
    LowRank,
    LowRankPlusSparse,
    Narrowed,
    Quantized,
    Sparse,
    SparseLowRank,
    members,
    restored,
    span,
)


def _keep_factored(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Do nothing: torch's fused paths read ``weight``, unless a hook hangs on one of their modules."""


class FactoredLinear(nn.Module):
    """A linear layer held as factors.

    ``repacked``: in an ONNX file torch's exporter would make its numbers longer than they are stored, so it is exported as
    :meth:`unpacked` and then put back as it is stored.
    """

    repacked: ClassVar[bool] = False

    def __init__(self, factors: Factors, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = factors.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.register_forward_pre_hook(_keep_factored)

    def factors(self) -> Factors:
        """The factors as they are now."""
        raise NotImplementedError

    @classmethod
    def stored(cls, description: Mapping[str, Any], state: Mapping[str, Tensor]) -> Factors:
        """The factors that a saved state of this module holds, from their description; values may be placeholders."""
        return restored(description, state)

    def unpacked(self) -> nn.Linear:
        """An ``nn.Linear`` that computes the same."""
        return _dense_linear(Dense(self.factors().dense()), self.bias)

    @property
    def weight(self) -> Tensor:
        """The dense weight, out x in like ``nn.Linear.weight``, rebuilt at each call: for code that reads it."""
        return self.factors().dense().T

    def _with_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _parameter(block: Tensor) -> nn.Parameter:
    return nn.Parameter(block.detach().clone(memory_format=torch.contiguous_format))


class LowRankLinear(FactoredLinear):
    """``y = (x @ left) @ right + bias``."""

    def __init__(self, factors: LowRank, bias: Tensor | None) -> None:
        super().__init__(factors, bias)
        self.left, self.right = _parameter(factors.left), _parameter(factors.right)

    def factors(self) -> LowRank:
        return LowRank(self.left, self.right)

    def forward(self, x: Tensor) -> Tensor:
        return self._with_bias(x @ self.left @ self.right)


def _gathered(x: Tensor, index: Tensor) -> Tensor:
    """``x[..., index]``; in exported graphs by whole rows of the transpose, which ONNX Runtime copies far faster."""
    if torch.compiler.is_exporting():
        return x.movedim(-1, 0).index_select(0, index).movedim(0, -1)
    return x.index_select(-1, index)


class SparseLowRankLinear(FactoredLinear):
    """Nested dense blocks: one product per row set, one per column segment (the outputs of one level).

    Where the neurons of a set are neighbours (``slrprop.apply`` orders them so if it can), a set is a slice;
    elsewhere it is gathered. ``segments[i]`` holds all blocks' columns of the i-th segment, stacked.
    """

    row_levels: Tensor
    column_levels: Tensor
    unsort: Tensor | None

    def __init__(self, factors: SparseLowRank, bias: Tensor | None) -> None:
        super().__init__(factors, bias)
        for name, stored in factors.indices().items():
            self.register_buffer(f"packed_{name}", stored)
        self.register_buffer("row_levels", factors.row_levels.clone(), persistent=False)
        self.register_buffer("column_levels", factors.column_levels.clone(), persistent=False)
        self.left = nn.ParameterList(_parameter(block) for block in factors.left)
        self.row_slices: list[slice | None] = []
        for level in range(len(self.left)):
            index = members(self.row_levels, level)
            self.register_buffer(f"rows_{level}", index, persistent=False)
            self.row_slices.append(span(index))
        segments, unsort = factors.segments()
        self.segment_levels = [segment.level for segment in segments]
        for i, segment in enumerate(segments):
            self.register_buffer(f"columns_{i}", segment.columns, persistent=False)
        self.segments = nn.ParameterList(_parameter(segment.right) for segment in segments)
        self.register_buffer("unsort", unsort, persistent=False)

    def factors(self) -> SparseLowRank:
        right, start = [], 0
        for g, left in enumerate(self.left):
            block = left.new_zeros(left.shape[1], self.out_features)
            for i, (level, segment) in enumerate(zip(self.segment_levels, self.segments, strict=True)):
                if level > g:
                    block[:, self.get_buffer(f"columns_{i}")] = segment[start : start + left.shape[1]]
            right.append(block[:, members(self.column_levels, g)])
            start += left.shape[1]
        return SparseLowRank(tuple(self.left), tuple(right), self.row_levels, self.column_levels)

    @classmethod
    def stored(cls, description: Mapping[str, Any], state: Mapping[str, Tensor]) -> SparseLowRank:
        left = [state[f"left.{level}"] for level in range(sum(key.startswith("left.") for key in state))]
        packed = {name.removeprefix("packed_"): array for name, array in state.items()}
        rows, columns = SparseLowRank.levels_of(description, packed, len(left))
        right = tuple(block.new_zeros(block.shape[1], len(members(columns, level))) for level, block in enumerate(left))
        return SparseLowRank(tuple(left), right, rows, columns)

    def _rows(self, x: Tensor, level: int) -> Tensor:
        span = self.row_slices[level]
        if span is None:
            return _gathered(x, self.get_buffer(f"rows_{level}"))
        return x if span == slice(0, self.in_features) else x[..., span]

    def forward(self, x: Tensor) -> Tensor:
        hidden = [self._rows(x, level) @ left for level, left in enumerate(self.left)]
        parts = [
            torch.cat(hidden[:level], -1) @ segment if level else x.new_zeros((*x.shape[:-1], segment.shape[1]))
            for level, segment in zip(self.segment_levels, self.segments, strict=True)
        ]
        y = torch.cat(parts, -1)
        return self._with_bias(y if self.unsort is None else _gathered(y, self.unsort))


class NarrowedLinear(FactoredLinear):
    """One dense block that reads some of the inputs and makes some of the outputs; the others are the bias alone."""

    rows: Tensor
    columns: Tensor

    def __init__(self, factors: Narrowed, bias: Tensor | None) -> None:
        super().__init__(factors, bias)
        self.block = _parameter(factors.block)
        for name, array in factors.indices().items():
            self.register_buffer(name, array.clone())
        self._description = factors.description()
        index = factors.rows.nonzero()[:, 0]
        self.row_slice = span(index)
        self.register_buffer("row_index", index, persistent=False)
        place = torch.where(factors.columns, factors.columns.cumsum(0) - 1, len(self.block.T))
        self.register_buffer("place", None if factors.columns.all() else place, persistent=False)

    def factors(self) -> Narrowed:
        return Narrowed.restored(self._description, {"block": self.block, "rows": self.rows, "columns": self.columns})

    def forward(self, x: Tensor) -> Tensor:
        if self.row_slice is None:
            x = _gathered(x, self.get_buffer("row_index"))
        elif self.row_slice != slice(0, self.in_features):
            x = x[..., self.row_slice]
        y = x @ self.block
        if self.place is not None:
            y = _gathered(torch.cat([y, torch.zeros_like(y[..., :1])], -1), self.get_buffer("place"))
        return self._with_bias(y)


class PackedLinear(FactoredLinear):
    """Factors kept as they are stored, in few bits; they are unpacked when they are first needed.

    What is packed is not trained, and a change of the module's dtype does not touch it.
    """

    repacked = True

    def __init__(self, factors: Quantized, bias: Tensor | None) -> None:
        super().__init__(factors, None if factors.bias_codes is not None else bias)
        self._description = factors.description()
        for name, array in factors.arrays().items():
            self.register_buffer(f"packed_{name}", array.clone())
        self._names = tuple(factors.arrays())
        # in lists: no part of the module's state
        self._arrays, self._unpacked = [self.get_buffer(f"packed_{name}") for name in self._names], list[nn.Module]()

    def factors(self) -> Factors:
        return restored(self._description, dict(zip(self._names, self._arrays, strict=True)))

    @classmethod
    def stored(cls, description: Mapping[str, Any], state: Mapping[str, Tensor]) -> Factors:
        return restored(description, {name.removeprefix("packed_"): array for name, array in state.items()})

    def forward(self, x: Tensor) -> Tensor:
        if not self._unpacked or self._unpacked[0].like != (x.dtype, x.device):
            with ThreadPoolExecutor(1) as elsewhere:  # where nothing is traced: exported programs hold it as constants
                self._unpacked[:] = [elsewhere.submit(self._plain, x.dtype, x.device).result()]
        return self._with_bias(self._unpacked[0](x))

    @torch.no_grad()
    def _plain(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        factors = self.factors()
        assert isinstance(factors, Quantized)
        module = linear_from(factors.plain(), factors.bias).to(device, dtype).requires_grad_(False)
        module.like = dtype, device  # type: ignore[assignment]
        return module

    def unpacked(self) -> nn.Linear:
        factors = self.factors()
        assert isinstance(factors, Quantized)
        bias = self.bias if factors.bias is None else factors.bias
        return _dense_linear(Dense(factors.dense().to(torch.float32)), bias)

    def _apply(self, *args: Any, **kwargs: Any) -> "PackedLinear":
        super()._apply(*args, **kwargs)
        self._refresh()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._refresh()

    def _refresh(self) -> None:
        self._unpacked.clear()
        self._arrays[:] = [self.get_buffer(f"packed_{name}") for name in self._names]


class SparseLinear(FactoredLinear):
    """``y = x @ W + bias`` with the values of a sparse W as parameters; their places stay as they are."""

    repacked = True
    gaps: Tensor
    places: Tensor

    def __init__(self, factors: Sparse | LowRankPlusSparse, bias: Tensor | None) -> None:
        super().__init__(factors, bias)
        sparse = factors if isinstance(factors, Sparse) else factors.sparse
        self.entries = _parameter(sparse.entries)
        self.gap_bits = sparse.gap_bits
        self.register_buffer("gaps", sparse.gaps.clone())
        self.register_buffer("places", sparse.places.clone(), persistent=False)

    def _sparse(self) -> Sparse:
        return Sparse(self.entries, self.gaps, self.gap_bits, (self.in_features, self.out_features), self.places)

    def factors(self) -> Sparse | LowRankPlusSparse:
        return self._sparse()

    def forward(self, x: Tensor) -> Tensor:
        return self._with_bias(x @ self._sparse().dense())


class LowRankPlusSparseLinear(SparseLinear):
    """``y = (x @ left) @ right + x @ S + bias``."""

    def __init__(self, factors: LowRankPlusSparse, bias: Tensor | None) -> None:
        super().__init__(factors, bias)
        self.left, self.right = _parameter(factors.low_rank.left), _parameter(factors.low_rank.right)

    def factors(self) -> LowRankPlusSparse:
        return LowRankPlusSparse(LowRank(self.left, self.right), self._sparse())

    def forward(self, x: Tensor) -> Tensor:
        return self._with_bias(x @ self.left @ self.right + x @ self._sparse().dense())


@singledispatch
def linear_from(factors: Factors, bias: Tensor | None) -> nn.Module:
    """The module that computes with these factors; ``bias`` is (n,) or None. A new form registers its own."""
    raise SlrpropError(f"no torch layer computes with {type(factors).__name__} factors")


@linear_from.register(Dense)
def _dense_linear(factors: Dense, bias: Tensor | None) -> nn.Linear:
    m, n = factors.shape
    linear = nn.utils.skip_init(nn.Linear, m, n, bias=bias is not None)
    linear.weight = _parameter(factors.weight.T)
    if bias is not None:
        linear.bias = _parameter(bias)
    return linear


def note_shape(module: nn.Module, shape: tuple[int, ...]) -> None:
    """Note that a layer took the place of one of another shape (m, n), before neurons around it were removed."""
    module.original_shape = shape[0], shape[1]  # type: ignore[assignment]


def original_shape(module: nn.Module) -> tuple[int, int] | None:
    """The shape (m, n) of the layer before neurons around it were removed; None where none were."""
    return getattr(module, "original_shape", None)


LAYERS: dict[str, type[FactoredLinear]] = {}


def computes_with(form: type[Factors], layer: type[FactoredLinear]) -> None:
    """Make a module class the one that computes with a form."""
    LAYERS[form.kind] = layer
    linear_from.register(form, layer)


computes_with(LowRank, LowRankLinear)
computes_with(SparseLowRank, SparseLowRankLinear)
computes_with(Narrowed, NarrowedLinear)
computes_with(Quantized, PackedLinear)
computes_with(Sparse, SparseLinear)
computes_with(LowRankPlusSparse, LowRankPlusSparseLinear)
