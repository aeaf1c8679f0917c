"""Ranks in whole vector blocks: what a processor multiplies at once is filled."""

import math
from collections.abc import Sequence
from typing import Any

from slrprop.operators import Operator

BLOCK = 16  # numbers of 32 bits in an AVX-512 register


def in_blocks(
    ladder: Sequence[dict[str, Any]], operator: Operator, shape: tuple[int, int], block: int
) -> list[dict[str, Any]]:
    """A method's ladder for an m x n weight with its ranks, or the channels it keeps, cut down to multiples of ``block``.

    As it is where the layer has less than two blocks of channels on a side.
    """
    least, found = min(shape[0] // operator.unit, shape[1]), list[dict[str, Any]]()
    for step in ladder:
        for key, unit in (("rank", block), ("keep", block / least)):
            if key in step and least >= 2 * block > 2:
                step = step | {key: max(1, math.floor(step[key] / unit + 1e-9)) * unit}
        found += [] if step in found else [step]
    return found
