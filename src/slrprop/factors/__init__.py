"""What a dense weight can become."""

from slrprop.factors.base import Dense, Factors, LowRank, restored
from slrprop.factors.blocks import Segment, SparseLowRank, members, span
from slrprop.factors.quantized import Quantized

__all__ = ["Dense", "Factors", "LowRank", "Quantized", "Segment", "SparseLowRank", "members", "restored", "span"]
