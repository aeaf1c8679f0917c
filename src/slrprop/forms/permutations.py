"""Permutations: packed into as few bits as their entries need, and generated from a seed.

``places`` is an n x m integer array throughout: row j is the permutation of column j of an m x n weight, entry i the
place in the shared sequence.
"""

import numpy as np

from slrprop.checks import require_seed
from slrprop.errors import SlrpropError

GOLDEN, MIX_1, MIX_2 = (np.uint64(value) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def entry_bits(m: int) -> int:
    """Bits that one of m places takes: ceil(log2 m)."""
    return (m - 1).bit_length()


def packed_bytes(m: int, n: int) -> int:
    """Bytes of n packed permutations of m places."""
    return (m * n * entry_bits(m) + 7) // 8


def pack(places: np.ndarray) -> np.ndarray:
    """The places as one stream of bits, highest bit of an entry first, as uint8 (``packed_bytes(m, n)``,)."""
    bits = entry_bits(places.shape[1])
    shifts = np.arange(bits)[::-1].astype(np.uint32)
    flat, parts = places.reshape(-1).astype(np.uint32), []
    step = 1 << 20  # entries at a time: a multiple of 8, so that every part ends at a byte
    for start in range(0, flat.size, step):
        spread = (flat[start : start + step, None] >> shifts) & np.uint32(1)
        parts.append(np.packbits(spread.astype(np.uint8)))
    return np.concatenate(parts) if parts else np.zeros(0, np.uint8)


def windows(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the 8 entries of a group of ``bits`` bytes stand: their bytes, and how far right of the last byte's end.

    Entry e is ``(sum of its bytes, base 256) >> shift[e]``, its lowest ``bits`` bits. Bytes beyond the group are
    the group's last one instead: the shift removes what they hold.

    Returns:
        Byte numbers (8 x w) with w the bytes that an entry can touch, and shifts (8,).
    """
    width = (bits + 14) // 8
    first = np.arange(8) * bits
    return np.minimum(first[:, None] // 8 + np.arange(width), bits - 1), 8 * width - bits - first % 8


def unpack(packed: np.ndarray, m: int, n: int) -> np.ndarray:
    """The places (n x m, int32) that :func:`pack` wrote.

    Raises:
        SlrpropError: too few or many bytes, or a place beyond the sequence.
    """
    bits = entry_bits(m)
    if packed.dtype != np.uint8 or packed.shape != (packed_bytes(m, n),):
        raise SlrpropError(
            f"{n} packed permutations of {m} places are {packed_bytes(m, n)} bytes, got {packed.dtype} {packed.shape}"
        )
    if not bits:
        return np.zeros((n, m), np.int32)
    groups = np.concatenate([packed, np.zeros(-len(packed) % bits, np.uint8)]).reshape(-1, bits)
    where, shifts = windows(bits)
    value = np.zeros((len(groups), 8), np.int64)
    for column in where.T:
        value = (value << 8) + groups[:, column]
    places = ((value >> shifts) & ((1 << bits) - 1)).astype(np.int32).reshape(-1)[: m * n].reshape(n, m)
    if places.size and int(places.max()) >= m:
        raise SlrpropError(f"a packed permutation points to place {int(places.max())} of {m}; the file is damaged")
    return places


def words(seed: int, start: int, count: int) -> np.ndarray:
    """Words ``start`` to ``start + count - 1`` of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), as uint64."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(start + 1, start + count + 1, dtype=np.uint64) * GOLDEN
        z = (z ^ (z >> np.uint64(30))) * MIX_1
        z = (z ^ (z >> np.uint64(27))) * MIX_2
        return z ^ (z >> np.uint64(31))


def seeded(seed: int, m: int, n: int) -> np.ndarray:
    """Random permutations, n of m places (n x m, int32), the same on every machine and in every release.

    Permutation j sorts words j m to (j + 1) m - 1 of the SplitMix64 stream of ``seed``, read as signed numbers, ascending.
    SplitMix64 is integer arithmetic modulo 2^64, so nothing depends on a library's version (NumPy keeps its bit
    streams, but may change what ``Generator.permutation`` makes of them, NEP 19). Its words are a one-to-one function of
    their number, so no two are equal and every sorting routine gives the same order.
    """
    require_seed(seed)
    places = np.empty((n, m), np.int32)
    for j in range(n):
        places[j] = np.argsort(words(int(seed), j * m, m).view(np.int64))
    return places
