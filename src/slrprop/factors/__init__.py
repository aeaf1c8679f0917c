"""What a dense weight can become."""

from slrprop.factors.base import Dense, Factors, LowRank, Table, restored
from slrprop.factors.blocks import Index, SparseLowRank
from slrprop.factors.expression import express
from slrprop.factors.fit import Bias, Fit
from slrprop.factors.narrowed import Narrowed
from slrprop.factors.quantized import Quantized
from slrprop.factors.shared import Shared
from slrprop.factors.sparse import LowRankPlusSparse, Sparse
from slrprop.factors.spatial import Spatial, Tucker

__all__ = [
    "Bias",
    "Dense",
    "Factors",
    "Fit",
    "Index",
    "LowRank",
    "LowRankPlusSparse",
    "Narrowed",
    "Quantized",
    "Shared",
    "Sparse",
    "SparseLowRank",
    "Spatial",
    "Table",
    "Tucker",
    "express",
    "restored",
]
