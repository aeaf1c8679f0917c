"""A weight that can be replaced, whatever holds it."""

from dataclasses import dataclass

from slrprop.operators import Operator


@dataclass(frozen=True)
class Layer:
    """One weight of a network, as a matrix m x n.

    ``positions`` are the products for one sample (1, tokens, height times width; 1 where that is not known), ``calls`` how often the
    layer is run, 0 where the data does not reach it. ``tied`` says what else uses the weight, ``held`` why nothing can take its place.
    """

    name: str
    operator: Operator
    shape: tuple[int, int]
    positions: int = 1
    tied: tuple[str, ...] = ()
    calls: int = 1
    held: str = ""
