"""How operations multiply a weight."""

from slrprop.operators.base import Operator
from slrprop.operators.convolution import Convolution
from slrprop.operators.lookup import Lookup
from slrprop.operators.matmul import MatMul, times

__all__ = ["Convolution", "Lookup", "MatMul", "Operator", "times"]
