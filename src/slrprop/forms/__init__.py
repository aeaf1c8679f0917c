"""What a dense weight can become."""

from slrprop.forms.base import Dense, Form, LowRank, Table, restored
from slrprop.forms.blocks import Index, SparseLowRank
from slrprop.forms.expression import express
from slrprop.forms.fit import Bias, Fit
from slrprop.forms.narrowed import Narrowed
from slrprop.forms.quantized import Quantized
from slrprop.forms.shared import Shared
from slrprop.forms.sparse import LowRankPlusSparse, Sparse
from slrprop.forms.spatial import Spatial, Tucker

__all__ = [
    "Bias", "Dense", "Fit", "Form", "Index", "LowRank", "LowRankPlusSparse", "Narrowed", "Quantized", "Shared",
    "Sparse", "SparseLowRank", "Spatial", "Table", "Tucker", "express", "restored",
]  # fmt: skip
