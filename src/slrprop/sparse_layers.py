"""Torch modules whose weight is sparse, or low rank plus sparse: stored small, multiplied out to compute."""

import torch
from torch import Tensor, nn

from slrprop.factors import LowRank, LowRankPlusSparse, Sparse
from slrprop.layers import FactoredLinear, computes_with
from slrprop.positions import codes_in


class SparseLinear(FactoredLinear):
    """``y = x @ W + bias`` with the values of a sparse W as parameters; their places stay as they are."""

    gaps: Tensor
    places: Tensor

    def __init__(self, factors: Sparse, bias: Tensor | None) -> None:
        super().__init__(factors, bias)
        self.values = nn.Parameter(factors.values.detach().clone())
        self._keep(factors)

    def _keep(self, sparse: Sparse) -> None:
        self.gap_bits = sparse.gap_bits
        self.register_buffer("gaps", sparse.gaps.clone())
        self.register_buffer("places", sparse.places.clone(), persistent=False)

    def _sparse(self) -> Sparse:
        return Sparse(self.values, self.gaps, self.gap_bits, (self.in_features, self.out_features))

    def factors(self) -> Sparse | LowRankPlusSparse:
        return self._sparse()

    def _multiplied_out(self) -> Tensor:
        """The sparse weight (m x n); in exported graphs from the packed places, so that the file has nothing longer."""
        count = self.in_features * self.out_features
        if not torch.compiler.is_exporting():
            flat = self.values.new_zeros(count).index_put((self.places,), self.values)
            return flat.reshape(self.in_features, self.out_features)
        codes = codes_in(self.gaps, self.gap_bits)
        marks = codes < (1 << self.gap_bits) - 1
        ends = (codes + marks).cumsum(0)  # one behind a marked place
        padded = torch.cat([self.values.new_zeros(1), self.values])
        chosen = padded.index_select(0, marks.long().cumsum(0) * marks)
        flat = self.values.new_zeros(count + 1).scatter(0, ends * marks, chosen)  # 0 takes what is not marked
        return flat[1:].reshape(self.in_features, self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self._with_bias(x @ self._multiplied_out())


class LowRankPlusSparseLinear(SparseLinear):
    """``y = (x @ left) @ right + x @ S + bias``."""

    def __init__(self, factors: LowRankPlusSparse, bias: Tensor | None) -> None:
        FactoredLinear.__init__(self, factors, bias)
        self.left = nn.Parameter(factors.low_rank.left.detach().clone().contiguous())
        self.right = nn.Parameter(factors.low_rank.right.detach().clone().contiguous())
        self.values = nn.Parameter(factors.sparse.values.detach().clone())
        self._keep(factors.sparse)

    def factors(self) -> LowRankPlusSparse:
        return LowRankPlusSparse(LowRank(self.left, self.right), self._sparse())

    def forward(self, x: Tensor) -> Tensor:
        return self._with_bias(x @ self.left @ self.right + x @ self._multiplied_out())


computes_with(Sparse, SparseLinear)
computes_with(LowRankPlusSparse, LowRankPlusSparseLinear)
