"""Positions of a few marked places among many, in as few bytes as a runtime decodes without a loop.

The gap before each marked place is written in ``bits`` bits. A code of all ones says that so many places are skipped and
none is marked yet, so any gap can be written. With one bit this is a bitmap (inverted), with 8 or 16 the usual relative
index (Han, Mao, Dally, ICLR 2016, section 2, with escapes that take no value); the best width in between comes near to the
entropy of the positions. Codes stand most significant bit first in uint8 bytes, filled up with ones.
"""

import numpy as np
import torch
from torch import Tensor

from slrprop.errors import SlrpropError

WIDTHS = range(1, 17)


def encoded(positions: Tensor) -> tuple[Tensor, int]:
    """Ascending positions (count,) from 0 as packed uint8 codes, and the bits of a code: those that take fewest bytes."""
    places = positions.cpu().numpy().astype(np.int64)
    gaps = np.diff(places, prepend=-1) - 1
    sizes = {bits: bits * int((gaps // ((1 << bits) - 1) + 1).sum()) for bits in WIDTHS}
    bits = min(sizes, key=lambda width: (-(-sizes[width] // 8), width))
    skip = (1 << bits) - 1
    skips = gaps // skip
    codes = np.full(sizes[bits] // bits, skip, np.int64)
    codes[np.cumsum(skips + 1) - 1] = gaps % skip
    spread = (codes[:, None] >> np.arange(bits - 1, -1, -1)) & 1
    filled = np.append(spread.astype(np.uint8), np.ones(-spread.size % 8, np.uint8))
    return torch.from_numpy(np.packbits(filled)), bits


def decoded(stored: Tensor, bits: int, places: int) -> Tensor:
    """The ascending positions (count,) int64 below ``places`` that :func:`encoded` packed.

    Raises:
        SlrpropError: the bytes hold no such positions.
    """
    if bits not in WIDTHS or stored.dtype != torch.uint8 or stored.ndim != 1:
        raise SlrpropError(f"positions are a row of uint8 bytes with codes of 1 to 16 bits, got {stored.dtype} {tuple(stored.shape)} of {bits!r} bits")  # fmt: skip
    powers = 1 << torch.arange(15, -1, -1, device=stored.device)
    spread = (torch.div(stored.long()[:, None], powers[8:], rounding_mode="floor") % 2).reshape(-1)
    spread = spread[: len(spread) // bits * bits].reshape(-1, bits)
    codes = (spread * powers[16 - bits :]).sum(1)  # what fills up the last byte may read as more, all ones
    marks = codes < (1 << bits) - 1
    positions = (codes + marks).cumsum(0)[marks] - 1
    if len(positions) and int(positions[-1]) >= places:
        raise SlrpropError(f"position {int(positions[-1])} is marked among {places} places; the data is damaged")
    return positions
