"""Compiled loops for exact changes behind ReLU layers (extra ``numba``); :mod:`slrprop.relevance.alike` calls them.

A *reference* is a mask r of active units. With it, the layers behind an injection are one matrix; a unit at z that moves by d
adds ``relu(z + d) - relu(z) - r d`` to that, which is zero unless its sign is not the reference's, or flips. Which units these
are is found by bounds and then by looking, for every tile of a sample's candidates; what they add is a product of small matrices.
"""

import numpy as np
from numba import get_num_threads, njit, prange

from slrprop.relevance.alike import SLACK, TILE

FAST = {"contract", "nsz", "reassoc"}
LINE = 64  # bytes of a cache line: what lies across two is read from both


@njit(cache=True)
def _rows_of_tiles(count, dtype):  # type: ignore[no-untyped-def]
    """An empty array (count x TILE) that begins with a cache line."""
    whole = np.empty(count * TILE + LINE, dtype)
    first = -whole.ctypes.data % LINE // whole.itemsize
    return whole[first : first + count * TILE].reshape(count, TILE)


@njit(fastmath=FAST, cache=True)
def _add(total, weight, rows, columns, moved):  # type: ignore[no-untyped-def]
    """``total[k] += sum_i weight[rows[i], columns[k]] * moved[i]``, eight rows at once: a BLAS takes longer for products so small."""
    whole = len(rows) // 8 * 8
    for first in range(0, whole, 8):
        r, m = rows[first : first + 8], moved[first : first + 8]
        for k in range(len(columns)):
            c, one = columns[k], total[k]
            w0, w1, w2, w3 = weight[r[0], c], weight[r[1], c], weight[r[2], c], weight[r[3], c]
            w4, w5, w6, w7 = weight[r[4], c], weight[r[5], c], weight[r[6], c], weight[r[7], c]
            for j in range(TILE):
                one[j] += (w0 * m[0, j] + w1 * m[1, j] + w2 * m[2, j] + w3 * m[3, j]) + (
                    w4 * m[4, j] + w5 * m[5, j] + w6 * m[6, j] + w7 * m[7, j]
                )
    for i in range(whole, len(rows)):
        for k in range(len(columns)):
            w, one = weight[rows[i], columns[k]], total[k]
            for j in range(TILE):
                one[j] += w * moved[i, j]


@njit(parallel=True, cache=True)
def gathered(source, rows, columns, out):  # type: ignore[no-untyped-def]
    """Sets ``out`` (k x u x TILE) to ``source[rows[u], columns[:]]`` in blocks of TILE columns; zeros fill the last one."""
    threads = get_num_threads()
    for thread in prange(threads):
        for u in range(thread, len(rows), threads):
            row = source[rows[u]]
            for block in range(len(out)):
                one, first = out[block, u], block * TILE
                some = min(TILE, len(columns) - first)
                for j in range(some):
                    one[j] = row[columns[first + j]]
                one[some:] = 0


@njit(fastmath=FAST, cache=True)
def _places(here, rows, places):  # type: ignore[no-untyped-def]
    """Where candidates ``here``, which ascend, are in blocks (k x rows x TILE), row 0; whether side by side."""
    for j in range(TILE):
        places[j] = here[j] // TILE * rows * TILE + here[j] % TILE
    return here[0] % TILE == 0 and here[TILE - 1] - here[0] == TILE - 1


@njit(fastmath=FAST, cache=True)
def _picked(row, blocks, u, places, together):  # type: ignore[no-untyped-def]
    """A row's numbers at these places: part of the blocks, or put together in ``row``."""
    first = u * TILE + places[0]
    if together:
        return blocks[first : first + TILE]
    for j in range(TILE):
        row[j] = blocks[u * TILE + places[j]]
    return row


@njit(parallel=True, fastmath=FAST, cache=True)
def one_layer(z, reference, ends, likely, near, peaks, weight, linear, samples, candidates, moves, out):  # type: ignore[no-untyped-def]
    """What follows one ReLU layer changes by, for injections of ``moves[t, j]`` times what is ``near`` for candidate ``candidates[t, j]`` into it.

    Args:
        z: pre-activations of the u units that may be needed (b x u).
        reference: whether each is active there (u,).
        likely: the units that any candidate may need, sample by sample; ``ends``: how many up to each sample's last (b,).
        near: what a candidate moves them by, in blocks (k x u x TILE); ``peaks``: the most of it (u,).
        weight: outgoing (u x c).
        linear: the change by the reference for a move of 1, in blocks (k x c x TILE).
        samples: of each tile (t,); ``candidates``, ``moves``: t x TILE.
        out: the changes (t x c x TILE); each thread takes every so many tiles.
    """
    every, c, zero, threads = len(peaks), weight.shape[1], z.dtype.type(0), get_num_threads()
    columns, near_blocks, linear_blocks = np.arange(c), near.reshape(-1), linear.reshape(-1)
    for thread in prange(threads):
        places = np.empty(TILE, np.int64)
        moved, row, chosen = _rows_of_tiles(every, z.dtype), _rows_of_tiles(1, z.dtype)[0], np.empty(every, np.int64)
        for tile in range(thread, len(samples), threads):
            p, here, scale, total = samples[tile], candidates[tile], moves[tile], out[tile]
            together = _places(here, c, places)
            for k in range(c):
                one, by = total[k], _picked(row, linear_blocks, k, places, together)
                for j in range(TILE):
                    one[j] = scale[j] * by[j]
            _places(here, every, places)
            reach, count = np.abs(scale).max(), 0
            for place in range(ends[p - 1] if p else 0, ends[p]):
                u = likely[place]
                at, one = z[p, u], moved[count]
                if (-at if reference[u] else at) + reach * peaks[u] < 0:
                    continue
                base, kept, most = max(at, zero), z.dtype.type(reference[u]), zero
                by = _picked(row, near_blocks, u, places, together)
                for j in range(TILE):
                    d = scale[j] * by[j]
                    now = at + d
                    one[j] = (now if now > zero else zero) - base - kept * d
                    most += abs(one[j])
                chosen[count] = u
                count += most > 0
            _add(total, weight, chosen[:count], columns, moved)


@njit(fastmath=FAST, cache=True)
def _flips(share, z, right, lengths, listed, flip):  # type: ignore[no-untyped-def]
    """Units of a ReLU layer that flip when its pre-activations z move by ``right @ share``, for some candidate.

    Returns how many, and the longest of the candidates' shares. ``listed``: these units; ``flip``: by what each candidate goes beyond
    zero there (units x TILE).
    """
    zero, size = z.dtype.type(0), np.zeros(TILE, z.dtype)
    for q in range(len(share)):
        for j in range(TILE):
            size[j] += share[q, j] * share[q, j]
    reach, count = np.sqrt(size.max()) * z.dtype.type(SLACK), 0
    for u in range(len(z)):
        at = z[u]
        if reach * lengths[u] < abs(at):
            continue
        one, most, away = flip[count], zero, z.dtype.type(-1 if at > 0 else 1)
        one[:] = at
        for q in range(len(share)):
            for j in range(TILE):
                one[j] += right[u, q] * share[q, j]
        for j in range(TILE):
            one[j] = max(away * one[j], zero)
            most += one[j]
        listed[count] = u
        count += most > 0
    return count, reach


@njit(parallel=True, fastmath=FAST, cache=True)
def low_rank(  # type: ignore[no-untyped-def]
    z, right, lengths, behind, between, z_next, reference, basis, reaches, spans, weight, linear, samples, shares, out
):
    """What follows two ReLU layers changes by, for injections ``right @ shares[t, :, j]`` into the first; one layer, where the second has no units.

    Args:
        z: pre-activations of the first layer (b x n).
        right: n x r; ``lengths``: their norms (n,).
        behind: what an output of the first layer adds by the reference of the second (n x c).
        between: weights from the first to the second layer (n x m).
        z_next: pre-activations of the second layer (b x m).
        reference: whether its units are active there (m,).
        basis: what the second layer moves by for each component while no unit of the first flips (b x r x m).
        reaches: norms of that over the components (b x m).
        spans: norms of the 1, 2, 4, ... largest numbers in each column of ``between`` (levels x m).
        weight: outgoing of the second layer (m x c).
        linear: the change for each component while no unit flips and the second layer is the reference (b x r x c).
        samples: of each tile (t,); ``shares``: t x r x TILE.
        out: the changes (t x c x TILE); each thread takes every so many tiles.
    """
    n, m, r, c, threads = z.shape[1], z_next.shape[1], shares.shape[1], weight.shape[1], get_num_threads()
    zero, slack, columns, components = z.dtype.type(0), z.dtype.type(SLACK), np.arange(c), np.arange(r)
    for thread in prange(threads):
        flip, shift = _rows_of_tiles(n, z.dtype), _rows_of_tiles(m, z.dtype)
        chosen, later = np.empty(n, np.int64), np.empty(m, np.int64)
        size, flipped = np.zeros(TILE, z.dtype), np.zeros(TILE, np.int64)
        for tile in range(thread, len(samples), threads):
            p, total, share = samples[tile], out[tile], shares[tile]
            count, reach = _flips(share, z[p], right, lengths, chosen, flip)
            total[:] = 0
            _add(total, linear[p], components, columns, share)
            _add(total, behind, chosen[:count], columns, flip)
            if not m:
                continue
            size[:], flipped[:] = 0, 0
            for i in range(count):
                for j in range(TILE):
                    size[j] += flip[i, j] * flip[i, j]
                    flipped[j] += flip[i, j] > 0
            # units of the second layer that may leave the reference
            length, level = np.sqrt(size.max()) * slack, 0
            while (1 << level) < flipped.max():
                level += 1
            span, needed = spans[min(level, len(spans) - 1)], 0
            for v in range(m):
                later[needed] = v
                outside = -z_next[p, v] if reference[v] else z_next[p, v]
                needed += outside + reach * reaches[p, v] + length * span[v] >= 0
            units, moved = later[:needed], shift[:needed]
            moved[:] = 0
            _add(moved, basis[p], components, units, share)
            _add(moved, between, chosen[:count], units, flip)
            for i in range(needed):
                v = units[i]
                at, base, kept = z_next[p, v], max(z_next[p, v], zero), z.dtype.type(reference[v])
                for j in range(TILE):
                    moved[i, j] = max(at + moved[i, j], zero) - base - kept * moved[i, j]
            _add(total, weight, units, columns, moved)
